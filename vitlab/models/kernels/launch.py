"""How the kernels of `vitlab.models.kernels.linear_triton` are launched: sizes, splits, buffers."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vitlab.models.kernels import linear_triton as kernels

WAVES = 2  # programs wanted for each multiprocessor before the rows are split
MIN_ROWS = 256  # rows a split must have to be worth its launch


@dataclass(frozen=True)
class Tile:
    """Rows a step, warps a program, depth of the software pipeline."""

    block: int
    warps: int
    stages: int


def tile(head_dim, dtype, backward):
    """The tile for one head width (16, 32, 64, 128) and dtype; chosen for few spills on sm_90 (`bench/kernels.py`)."""
    wide = dtype == torch.float32  # float32 operands need twice the shared memory
    if backward:
        if wide:
            return Tile(32 if head_dim <= 64 else 16, 8, 1)
        return {16: Tile(64, 4, 2), 32: Tile(64, 4, 2), 64: Tile(64, 8, 2), 128: Tile(16, 8, 1)}[head_dim]
    if wide:
        return Tile(64 if head_dim <= 64 else 32, 8, 1)
    return {16: Tile(64, 4, 3), 32: Tile(64, 4, 3), 64: Tile(64, 4, 2), 128: Tile(32, 8, 2)}[head_dim]


def splits(pairs, rows, multiprocessors):
    """Programs that share one (image, head): 1 unless `pairs` = images x heads leave the device idle."""
    wanted = -(-WAVES * multiprocessors // max(pairs, 1))
    return max(1, min(wanted, rows // MIN_ROWS))


def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def interpreted():
    """True where the kernels run in Triton's interpreter (on CPU tensors)."""
    return not isinstance(kernels.forward_kernel, triton.runtime.jit.JITFunction)


def _constants(qkv, phi):
    # the interpreter's bfloat16 products are wrong
    half = {torch.float16: tl.float16, torch.bfloat16: tl.float32 if interpreted() else tl.bfloat16}
    precise = torch.get_float32_matmul_precision() == "highest"
    return {"R": qkv.shape[2] - 2, "D": qkv.shape[4], "PHI": phi,
            "DOT": half.get(qkv.dtype, tl.float32), "PREC": "ieee" if precise else "tf32"}  # fmt: skip


def _chunks(n, m, parts, block):
    """Rows a split takes of the n tokens and the m extra keys, whole blocks of them."""
    return tuple(-(-max(1, -(-rows // parts)) // block) * block for rows in (n, m))


def _dense(x):
    """x with a contiguous last dimension; a gradient may be an expanded scalar."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _states(qkv, phi, parts=1):
    b, _, _, h, d = qkv.shape
    features = 2 * d if phi == "relu" else d
    state = torch.empty((parts, b * h, features, d), dtype=torch.float32, device=qkv.device)
    return state, torch.empty(state.shape[:-1], dtype=torch.float32, device=qkv.device)


def _run(kernel, grid, tile, *args, **constants):
    options = {} if interpreted() else {"num_warps": tile.warps, "num_stages": tile.stages}
    kernel[grid](*args, BLOCK=tile.block, **constants, **options)


def _state(qkv, extra, phi, parts, tile):
    """The whole state, by way of `parts` partial ones: [images * heads, features, D] and [.., features]."""
    b, n, _, h, _ = qkv.shape
    m = extra.shape[1]
    state, norm = _states(qkv, phi, parts)
    chunks = _chunks(n, m, parts, tile.block)
    _run(kernels.state_kernel, (b * h, parts), tile, qkv, extra, state, norm, h, n, m, *chunks, 1 / (n + m),
         *qkv.stride()[:4], *extra.stride()[:4], **_constants(qkv, phi))  # fmt: skip
    return state.sum(0), norm.sum(0)


def forward(qkv, extra, phi, eps, keep, parts=None):
    """(out B n R heads D, state, norm); the last two are empty unless `keep`."""
    qkv, extra = _dense(qkv), _dense(extra)
    b, n, slots, h, d = qkv.shape
    m, size = extra.shape[1], tile(d, qkv.dtype, backward=False)
    parts = parts or splits(b * h, n, multiprocessors(qkv.device))
    out = torch.empty(b, n, slots - 2, h, d, dtype=qkv.dtype, device=qkv.device)
    read = parts > 1
    state, norm = _state(qkv, extra, phi, parts, size) if read else (x[0] for x in _states(qkv, phi))
    if out.numel():
        _run(kernels.forward_kernel, (b * h, parts), size, qkv, extra, out, state, norm, h, n, m,
             _chunks(n, m, parts, size.block)[0], 1 / (n + m), eps, *qkv.stride()[:4], *extra.stride()[:4],
             **_constants(qkv, phi), READ=read, KEEP=keep)  # fmt: skip
    return out, *((state, norm) if keep else (state.new_empty(0), norm.new_empty(0)))


def backward(grad, qkv, extra, state, norm, phi, eps, parts=None):
    """(dqkv, dextra), contiguous; an empty `state` is rebuilt from the keys and values."""
    grad, qkv, extra = _dense(grad), _dense(qkv), _dense(extra)
    b, n, _, h, d = qkv.shape
    m, size = extra.shape[1], tile(d, qkv.dtype, backward=True)
    parts = parts or splits(b * h, n, multiprocessors(qkv.device))
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dextra = torch.empty(extra.shape, dtype=extra.dtype, device=extra.device)
    if not dqkv.numel():
        return dqkv, dextra.zero_()
    if parts > 1 and not state.numel():
        state, norm = _state(qkv, extra, phi, parts, size)
    chunks = _chunks(n, m, parts, size.block)
    strides = (*grad.stride()[:4], *qkv.stride()[:4], *extra.stride()[:4])
    constants = _constants(qkv, phi) | {"READ": state.numel() > 0}
    rest = (h, n, m, *chunks, 1 / (n + m), eps, *strides)
    tensors = (grad, qkv, extra, dqkv, dextra, state, norm)

    def run(dstate, dnorm, step):
        _run(kernels.backward_kernel, (b * h, parts), size, *tensors, dstate, dnorm, *rest, **constants, STEP=step)

    if parts == 1:
        unused = qkv.new_empty(1, dtype=torch.float32)
        run(unused, unused, "both")
        return dqkv, dextra
    dstate, dnorm = _states(qkv, phi, parts)
    run(dstate, dnorm, "query")
    run(dstate.sum(0), dnorm.sum(0), "key")
    return dqkv, dextra
