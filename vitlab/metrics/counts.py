"""What a model is and does, counted: parameters, bytes on disk, multiply-accumulates."""

import contextlib
import copy
import io
import math
import re
import warnings

import safetensors.torch
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from vitlab.utils.device import eager, example, running


def parameters(model):
    """Number of parameters, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())


def size_bytes(model):
    """Bytes of the model's safetensors file, in float32; a tensor under two names is stored once."""
    stored = {}
    for name, tensor in eager(model).state_dict().items():
        if isinstance(tensor, torch.Tensor):
            same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
            dtype = torch.float32 if tensor.is_floating_point() else None
            stored.setdefault(same, (name, tensor.to("cpu", dtype).contiguous().clone()))
    return len(safetensors.torch.save(dict(stored.values())))


class _Unknown(TorchDispatchMode):
    """Collects custom operations that no flop formula covers, since a counter takes them for free."""

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = getattr(func, "_overloadpacket", func)
        own = getattr(func, "namespace", "") not in ("aten", "prim", "prims", "profiler", "higher_order", "")
        if own and packet not in flop_registry:
            self.names.add(str(packet))
        return func(*args, **(kwargs or {}))


def _missing_formulas():
    """Flop formulas (they get shapes) of the matrix products that torch's own registry lacks."""
    def product(a, b, *_, out_shape=None, **__):
        return 2 * math.prod(a) * (b[-1] if len(b) > 1 else 1)

    def added(_, a, b, *__, out_shape=None, **___):
        return product(a, b)

    aten = torch.ops.aten
    return {aten.mv: product, aten.dot: product, aten.vdot: product, aten._int_mm: product,
            aten.addmv: added, aten._addmm_activation: added, aten.addbmm: added}


def macs_by_module(model, shape):
    """{module name: MACs} of one image of `shape` (C H W), "" for the whole model; see `macs`."""
    model = eager(model)
    images = example(model, shape)
    counter = FlopCounterMode(display=False, custom_mapping=_missing_formulas())
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention's is one opaque operation
    try:
        with running([model], images.device), torch.inference_mode(False), torch.no_grad(), \
                torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), \
                counter, _Unknown() as unknown:
            model(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    if unknown.names:
        warnings.warn(f"counted as no work: {sorted(unknown.names)} have no flop formula", stacklevel=2)
    root, found = type(model).__name__, {"": counter.get_total_flops() // 2}
    for name, counts in counter.get_flop_counts().items():
        if name not in ("Global", root):
            found[name.removeprefix(root + ".")] = sum(counts.values()) // 2
    return found


def macs(model, shape):
    """Multiply-accumulates of one image of `shape` (C H W): every matrix product and convolution that runs.

    Counted on the operations themselves with attention taken apart (the MATH backend), so that it is the same
    work however attention is written; element-wise work is not counted. Custom operations need a formula
    (torch.utils.flop_counter.register_flop_formula), without which they are named in a warning.
    """
    return macs_by_module(model, shape)[""]


def macs_by_part(model, shape):
    """MACs of one image through a ViT (ours or timm's) by kind of work: {"stem", "qkv", "attention products",
    "projection", "MLP", "head"}, summed over the blocks. What belongs to none of them is "other".
    """
    found = macs_by_module(model, shape)

    def total(pattern):
        return sum(v for name, v in found.items() if re.fullmatch(pattern, name))

    parts = {
        "stem": total("patch_embed"),
        "qkv": total(r"blocks\.\d+\.attn\.qkv"),
        "attention products": total(r"blocks\.\d+\.attn") - total(r"blocks\.\d+\.attn\.(qkv|proj)"),
        "projection": total(r"blocks\.\d+\.attn\.proj"),
        "MLP": total(r"blocks\.\d+\.mlp"),
        "head": total("head(_dist)?"),
    }
    return parts | {"other": found[""] - sum(parts.values())}


def ptflops_macs(model, shape):
    """(MACs as ptflops' default backend has them, ""), or (None, why not). They miss part of attention."""
    from ptflops import get_model_complexity_info

    said = io.StringIO()
    try:
        model = copy.deepcopy(eager(model)).eval()  # it leaves its own attributes behind
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), torch.no_grad():
            found, _ = get_model_complexity_info(
                model, tuple(shape), as_strings=False, print_per_layer_stat=False, verbose=False,
                backend="pytorch", input_constructor=lambda _: example(model, shape),
            )
    except Exception as problem:  # a counter's trouble with somebody's model must not cost the whole row
        return None, f"ptflops: {type(problem).__name__}: {problem}"
    if found is None:
        return None, "ptflops: " + " ".join(said.getvalue().split("Traceback")[0].split())
    return int(found), ""
