"""Non-causal linear attention (Katharopoulos et al. 2020, eq. 4-5): plain PyTorch, and a fused operator.

For a feature map phi >= 0 and M keys (M = n + m: the tokens and the extra keys)

    out_i = phi(q_i) S / (phi(q_i) z + eps),    S = mean_j phi(k_j)^T v_j,    z = mean_j phi(k_j)

so the cost grows with n, not n^2, and the denominator is positive by construction. Means, not sums:
`eps` then has the same meaning at any n, and float16 does not overflow.

Tensors are packed as the qkv projection writes them: `qkv` B n R+2 heads d holds R query branches, then
the keys, then the values; `extra` B m 2 heads d holds more keys and values (m may be 0). The output is
B n R heads d.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

PHIS = ("relu", "elu", "softmax")
KERNELS = ("auto", "on", "off")
HAS_TRITON = importlib.util.find_spec("triton") is not None
FUSED = "fused Triton kernels"
EPS = 1e-6
HEAD_DIMS = (16, 32, 64, 128)  # what the Triton kernels take
SAVE_STATE_ABOVE = 256  # tokens; beyond, re-reading keys and values in the backward costs more than the state


def features(x, phi):
    """phi(x) over the last dimension: "relu" = [relu(x), relu(-x)], "elu" = elu(x) + 1, "softmax"."""
    if phi == "relu":
        return torch.cat([x.relu(), (-x).relu()], dim=-1)
    if phi == "elu":
        return F.elu(x) + 1
    if phi == "softmax":
        return x.softmax(dim=-1)
    raise ValueError(f"phi={phi!r}: choose one of {', '.join(PHIS)}")


def keys_values(qkv, extra=None):
    """All keys and values, each B M heads d: the tokens' own, then the extra ones."""
    k, v = qkv[:, :, -2], qkv[:, :, -1]
    if extra is None or not extra.shape[1]:
        return k, v
    return torch.cat([k, extra[:, :, 0]], dim=1), torch.cat([v, extra[:, :, 1]], dim=1)


def _split(qkv, extra, phi, eps):
    """What both directions need: q, k, v, phi(q) B h R*n F, phi(k), S, z and the denominators."""
    k, v = (x.transpose(1, 2) for x in keys_values(qkv, extra))  # B h M d
    q = qkv[:, :, :-2].permute(0, 3, 2, 1, 4).flatten(2, 3)  # B h R*n d
    fq, fk = features(q, phi), features(k, phi)
    state = (fk / k.shape[2]).mT @ v  # B h F d
    norm = fk.mean(dim=2).unsqueeze(-1)  # B h F 1
    return q, k, v, fq, fk, state, norm, (fq @ norm).to(_wide(qkv)) + eps


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def plain(qkv, extra=None, phi="relu", eps=EPS):
    """Linear attention in plain PyTorch, any device and dtype, differentiable; the kernels' reference."""
    _, _, _, fq, _, state, _, den = _split(qkv, extra, phi, eps)
    n, slots = qkv.shape[1:3]
    out = ((fq @ state).to(den.dtype) / den).to(qkv.dtype)
    return out.unflatten(2, (slots - 2, n)).permute(0, 3, 2, 1, 4)


def _features_grad(x, grad, phi):
    if phi == "relu":
        positive, negative = grad.chunk(2, dim=-1)
        return positive * (x > 0) - negative * (x < 0)
    if phi == "elu":
        return grad * x.clamp(max=0).exp()
    p = x.softmax(dim=-1)
    return p * (grad - (p * grad).sum(dim=-1, keepdim=True))


def plain_grads(grad, qkv, extra, phi, eps):
    """(dqkv, dextra) in closed form: the formulas that the backward kernel follows, in at least float32."""
    wide = _wide(qkv)
    n, slots = qkv.shape[1:3]
    q, k, v, fq, fk, state, norm, den = _split(qkv.to(wide), extra.to(wide), phi, eps)
    g = grad.to(wide).permute(0, 3, 2, 1, 4).flatten(2, 3) / den  # B h R*n d
    dfq = g @ state.mT
    along = (fq * dfq).sum(dim=-1, keepdim=True) / den  # grad . out / den
    dfq = dfq - along * norm.mT
    dstate, dnorm = fq.mT @ g / k.shape[2], -(fq * along).sum(dim=2, keepdim=True) / k.shape[2]
    dq = _features_grad(q, dfq, phi).unflatten(2, (slots - 2, n)).permute(0, 3, 2, 1, 4)  # B n R h d
    dk = _features_grad(k, v @ dstate.mT + dnorm, phi)
    dkv = torch.stack([dk, fk @ dstate], dim=2).permute(0, 3, 2, 1, 4)  # B M 2 h d
    dqkv = torch.cat([dq, dkv[:, :n]], dim=2)
    return dqkv.to(qkv.dtype).contiguous(), dkv[:, n:].to(extra.dtype).contiguous()


def choose(device, head_dim, kernels="auto", dtype=torch.float32):
    """(use the kernels?, the reason in words).

    "on" without the means raises ValueError; on the CPU "on" takes the operator with its reference inside.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r}: choose one of {', '.join(KERNELS)}")
    if kernels == "off":
        return False, "plain PyTorch (kernels are switched off)"
    device = torch.device(device)
    missing = [
        (device.type != "cuda", f"the device is {device.type}"),
        (not HAS_TRITON, "triton is not installed"),
        (head_dim not in HEAD_DIMS, f"head_dim={head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"),
        (dtype == torch.float64, "float64"),
    ]
    reasons = [text for is_missing, text in missing if is_missing]
    if kernels == "on":
        if device.type == "cuda" and reasons:
            raise ValueError(f"kernels='on', but {', '.join(reasons)}")
        return True, f"the operator, computed by PyTorch ({', '.join(reasons)})" if reasons else FUSED
    if reasons:
        return False, f"plain PyTorch ({', '.join(reasons)})"
    return True, FUSED


@torch.library.custom_op("vitlab::linear_attention", mutates_args=())
def _forward(qkv: Tensor, extra: Tensor, phi: str, eps: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, state, norm): the last two are what the backward may reuse, empty where it need not."""
    none = qkv.new_empty(0, dtype=torch.float32)
    return plain(qkv, extra, phi, eps).contiguous(), none, none.clone()


@torch.library.custom_op("vitlab::linear_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, qkv: Tensor, extra: Tensor, state: Tensor, norm: Tensor, phi: str, eps: float
) -> tuple[Tensor, Tensor]:
    """(dqkv, dextra), by the closed formula that the kernel follows too."""
    return plain_grads(grad, qkv, extra, phi, eps)


def _state_shapes(qkv, phi, keep):
    b, _, _, h, d = qkv.shape
    if not keep or qkv.device.type != "cuda":
        return (0,), (0,)
    width = 2 * d if phi == "relu" else d
    return (b * h, width, d), (b * h, width)


@_forward.register_fake
def _(qkv, extra, phi, eps, keep):
    b, n, slots, h, d = qkv.shape
    state, norm = (qkv.new_empty(s, dtype=torch.float32) for s in _state_shapes(qkv, phi, keep))
    return qkv.new_empty(b, n, slots - 2, h, d), state, norm


@_backward.register_fake
def _(grad, qkv, extra, state, norm, phi, eps):
    return qkv.new_empty(qkv.shape), extra.new_empty(extra.shape)


def _setup_context(ctx, inputs, output):
    qkv, extra, phi, eps, _ = inputs
    _, state, norm = output
    ctx.mark_non_differentiable(state, norm)
    ctx.save_for_backward(qkv, extra, state, norm)
    ctx.phi, ctx.eps = phi, eps


def _autograd(ctx, grad, *_):
    grads = torch.ops.vitlab.linear_attention_backward(grad, *ctx.saved_tensors, ctx.phi, ctx.eps)
    return *grads, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)

if HAS_TRITON:

    @_forward.register_kernel("cuda")
    def _(qkv, extra, phi, eps, keep):
        from vitlab.models.kernels import launch

        return launch.forward(qkv, extra, phi, eps, keep)

    @_backward.register_kernel("cuda")
    def _(grad, qkv, extra, state, norm, phi, eps):
        from vitlab.models.kernels import launch

        return launch.backward(grad, qkv, extra, state, norm, phi, eps)


def macs(qkv_shape, extra_shape, phi="relu"):
    """Multiply-accumulates of the forward: S over the keys, products with S and z over the queries."""
    b, n, slots, h, d = qkv_shape
    width = 2 * d if phi == "relu" else d
    return b * h * width * ((n + extra_shape[1]) * d + n * (slots - 2) * (d + 1))


@register_flop_formula(torch.ops.vitlab.linear_attention)
def _(qkv_shape, extra_shape, phi, *args, out_shape=None, **kwargs):
    return 2 * macs(qkv_shape, extra_shape, phi)


@register_flop_formula(torch.ops.vitlab.linear_attention_backward)
def _(grad_shape, qkv_shape, extra_shape, state_shape, norm_shape, phi, *args, out_shape=None, **kwargs):
    b, n, slots, h, d = qkv_shape
    width, keys, queries = 2 * d if phi == "relu" else d, n + extra_shape[1], n * (slots - 2)
    rebuild = 0 if state_shape[0] else keys * d
    return 2 * b * h * width * (rebuild + 2 * keys * d + queries * (2 * d + 1))


# torch.library.register_autocast fixes one dtype for good; these follow the dtype of the autocast region
_library = torch.library.Library("vitlab", "FRAGMENT")


def _register_autocast(op, device, key):
    def kernel(_, *args):
        dtype = torch.get_autocast_dtype(device)
        cast = [x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 and i < tensors else x
                for i, x in enumerate(args)]  # fmt: skip
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return op(*cast)

    # the saved state stays float32
    tensors = 2 if op is torch.ops.vitlab.linear_attention.default else 3
    _library.impl(op, kernel, key, with_keyset=True)


for _op in (torch.ops.vitlab.linear_attention.default, torch.ops.vitlab.linear_attention_backward.default):
    _register_autocast(_op, "cuda", "AutocastCUDA")
    _register_autocast(_op, "cpu", "AutocastCPU")


def linear_attention(qkv, extra=None, *, phi="relu", eps=EPS, kernels="auto"):
    """Linear attention over packed projections: B n R+2 heads d -> B n R heads d.

    `qkv` may be any strided view whose slots along dim 2 are R query branches, keys, values; `extra`
    B m 2 heads d adds keys and values that have no query. `phi` is "relu", "elu" or "softmax", `eps` > 0
    keeps the denominator positive. `kernels`: "auto" takes the Triton kernels on CUDA and plain PyTorch
    elsewhere, "off" always plain PyTorch, "on" always the operator. Raises ValueError for shapes and names
    that it does not know.
    """
    if qkv.ndim != 5 or qkv.shape[2] < 3:
        raise ValueError(f"qkv of shape {tuple(qkv.shape)}: B n R+2 heads d is needed, with R of at least 1")
    b, n, _, h, d = qkv.shape
    if phi not in PHIS:
        raise ValueError(f"phi={phi!r}: choose one of {', '.join(PHIS)}")
    if not eps > 0:
        raise ValueError(f"eps={eps}: a positive number is needed")
    if extra is not None and (extra.ndim != 5 or extra.shape[0] != b or extra.shape[2:] != (2, h, d)):
        raise ValueError(f"extra of shape {tuple(extra.shape)}: {(b, 'm', 2, h, d)} is needed")
    use, _ = choose(qkv.device, d, kernels, qkv.dtype)
    if torch.is_autocast_enabled(qkv.device.type):
        dtype = torch.get_autocast_dtype(qkv.device.type)
        qkv, extra = qkv.to(dtype), extra if extra is None else extra.to(dtype)
    if not use:
        return plain(qkv, extra, phi, eps)
    if extra is None:
        extra = qkv.new_empty(b, 0, 2, h, d)
    keep = torch.is_grad_enabled() and qkv.requires_grad and n + extra.shape[1] > SAVE_STATE_ABOVE
    return torch.ops.vitlab.linear_attention(qkv, extra, phi, eps, keep)[0]
