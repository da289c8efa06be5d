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
KERNELS = ("auto", "off")
HAS_TRITON = importlib.util.find_spec("triton") is not None
EPS = 1e-6
HEAD_DIMS = (16, 32, 64, 128)  # what the Triton kernels take
SAVE_STATE_ABOVE = 256  # tokens; beyond, re-reading keys and values in the backward costs more than the state


def features(x, phi):
    """phi(x) over the last dimension: "relu" = [relu(x), relu(-x)], "elu" = elu(x) + 1, "softmax"."""
    if phi == "relu":
        return torch.cat([x, -x], dim=-1).relu()  # in one go: its backward pass wants a gradient without gaps
    return F.elu(x) + 1 if phi == "elu" else x.softmax(dim=-1)


def queries_keys_values(qkv, extra=None):
    """Queries B n R heads d, and all keys and values, each B M heads d: the tokens' own, then the extra ones.

    Cut at once, so that their gradients are joined at once.
    """
    q, k, v = qkv.split([qkv.shape[2] - 2, 1, 1], dim=2)
    k, v = k.squeeze(2), v.squeeze(2)
    if extra is None or not extra.shape[1]:
        return q, k, v
    return q, torch.cat([k, extra[:, :, 0]], dim=1), torch.cat([v, extra[:, :, 1]], dim=1)


def plain(qkv, extra=None, phi="relu", eps=EPS):
    """Linear attention in plain PyTorch, any device and dtype, differentiable; the kernels' reference."""
    q, k, v = queries_keys_values(qkv, extra)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # B h M d
    q = q.permute(0, 3, 2, 1, 4).flatten(2, 3)  # B h R*n d
    fq, fk = features(q, phi), features(k, phi)
    # S and z side by side, B h F d+1, since a product with one column takes a CPU as long as one with all the others
    state = torch.cat([fk.mT @ (v / v.shape[2]), fk.mean(dim=2).unsqueeze(-1)], dim=-1)
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    above, below = (fq @ state).to(wide).split([v.shape[-1], 1], dim=-1)
    out = (above / (below + eps)).to(qkv.dtype)
    return out.unflatten(2, (qkv.shape[2] - 2, qkv.shape[1])).permute(0, 3, 2, 1, 4)


def choose(device, head_dim, kernels="auto", dtype=torch.float32):
    """(whether the Triton kernels compute the product, what does in words)."""
    device = torch.device(device)
    obstacles = {
        "kernels are switched off": kernels == "off",
        f"the device is {device.type}": device.type != "cuda",
        "triton is not installed": not HAS_TRITON,
        f"head_dim={head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}": head_dim not in HEAD_DIMS,
        "float64": dtype == torch.float64,
    }
    if reasons := [reason for reason, there in obstacles.items() if there]:
        return False, f"plain PyTorch ({', '.join(reasons)})"
    return True, "fused Triton kernels"


@torch.library.custom_op("vitlab::linear_attention", mutates_args=())
def _forward(qkv: Tensor, extra: Tensor, phi: str, eps: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, state, norm): the last two are what the backward may reuse, empty unless `keep`."""
    from vitlab.models.kernels import launch

    return launch.forward(qkv, extra, phi, eps, keep)


@torch.library.custom_op("vitlab::linear_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, qkv: Tensor, extra: Tensor, state: Tensor, norm: Tensor, phi: str, eps: float
) -> tuple[Tensor, Tensor]:
    """(dqkv, dextra)."""
    from vitlab.models.kernels import launch

    return launch.backward(grad, qkv, extra, state, norm, phi, eps)


@_forward.register_fake
def _(qkv, extra, phi, eps, keep):
    b, n, slots, h, d = qkv.shape
    width = 2 * d if phi == "relu" else d
    shapes = ((b * h, width, d), (b * h, width)) if keep else ((0,), (0,))
    state, norm = (qkv.new_empty(shape, dtype=torch.float32) for shape in shapes)
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


def linear_attention(qkv, extra=None, *, phi="relu", eps=EPS, kernels="auto"):
    """Linear attention over packed projections: B n R+2 heads d -> B n R heads d.

    `qkv` may be any strided view whose slots along dim 2 are R query branches, keys, values; `extra`
    B m 2 heads d adds keys and values that have no query. `phi`: one of `PHIS`; `eps` > 0 keeps the denominator
    positive. `kernels`: "auto" takes the Triton kernels where they can run (`choose`), "off" plain PyTorch.
    """
    use, _ = choose(qkv.device, qkv.shape[-1], kernels, qkv.dtype)
    if torch.is_autocast_enabled(qkv.device.type):
        dtype = torch.get_autocast_dtype(qkv.device.type)
        qkv, extra = qkv.to(dtype), extra if extra is None else extra.to(dtype)
    if not use:
        return plain(qkv, extra, phi, eps)
    b, n, _, h, d = qkv.shape
    if extra is None:
        extra = qkv.new_empty(b, 0, 2, h, d)
    keep = torch.is_grad_enabled() and qkv.requires_grad and n + extra.shape[1] > SAVE_STATE_ABOVE
    return torch.ops.vitlab.linear_attention(qkv, extra, phi, eps, keep)[0]
