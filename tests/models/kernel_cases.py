"""The Triton kernels in Triton's interpreter, against float64. Run by test_kernels.py in a process of its own,
since the interpreter is chosen by an environment variable when triton is first imported."""

import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitlab.models.kernels import launch
from vitlab.models.kernels.linear import EPS, PHIS, macs

assert os.environ.get("TRITON_INTERPRET") == "1", "run this file through tests/test_kernels.py"

OP = torch.ops.vitlab.linear_attention.default
BACKWARD = torch.ops.vitlab.linear_attention_backward.default
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}


def quadratic(qkv, extra, phi):
    """Linear attention written as attention: an n x M matrix of weights, normalised. Nothing shared with the code."""
    maps = {
        "relu": lambda x: torch.cat([x.clamp(min=0), -x.clamp(max=0)], -1),
        "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
        "softmax": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    }
    q = qkv[:, :, :-2]
    k = torch.cat([qkv[:, :, -2], extra[:, :, 0]], 1)
    v = torch.cat([qkv[:, :, -1], extra[:, :, 1]], 1)
    weights = torch.einsum("bnrhd,bmhd->bnrhm", maps[phi](q), maps[phi](k)) / k.shape[1]
    return torch.einsum("bnrhm,bmhd->bnrhd", weights, v) / (weights.sum(-1, keepdim=True) + EPS)


def expected(grad, qkv, extra, phi):
    inputs = [x.double().detach().requires_grad_() for x in (qkv, extra)]
    out = quadratic(*inputs, phi)
    return out.detach(), *torch.autograd.grad(out, inputs, grad.double(), materialize_grads=True)


def fused(grad, qkv, extra, phi, keep=False, parts=1):
    out, state, norm = launch.forward(qkv, extra, phi, EPS, keep, parts)
    return out, *launch.backward(grad, qkv, extra, state, norm, phi, EPS, parts)


def compare(found, wanted, dtype):
    for name, a, b in zip(("out", "dqkv", "dextra"), found, wanted):
        assert a.shape == b.shape and a.dtype == dtype, name
        if b.numel():
            error = ((a.double() - b).abs().max() / b.abs().max()).item()
            assert error < TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


def draw(b, n, m, branches, h, d, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (b, n, branches, h, d), (b, n, branches + 2, h, d), (b, m, 2, h, d)
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


@pytest.mark.parametrize("d", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_head_widths_and_dtypes(d, dtype):
    grad, qkv, extra = draw(1, 65 if d < 64 else 33, 0, 1, 2, d, dtype)
    compare(fused(grad, qkv, extra, "relu"), expected(grad, qkv, extra, "relu"), dtype)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 130])
def test_any_number_of_tokens(n):
    inputs = draw(1, n, 0, 1, 1, 16)
    compare(fused(*inputs, "relu"), expected(*inputs, "relu"), torch.float32)


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("keep", [False, True], ids=["rebuilt", "kept"])
def test_maps_branches_and_extra_keys(phi, keep):
    inputs = draw(2, 21, 5, 3, 2, 16)
    compare(fused(*inputs, phi, keep=keep), expected(*inputs, phi), torch.float32)


@pytest.mark.parametrize("keep", [False, True], ids=["rebuilt", "kept"])
def test_rows_split_over_programs(keep):
    inputs = draw(1, 200, 70, 2, 1, 16)
    compare(fused(*inputs, "relu", keep, parts=3), expected(*inputs, "relu"), torch.float32)


@pytest.mark.parametrize(("b", "n"), [(0, 4), (2, 0)])
def test_nothing_to_do(b, n):
    grad, qkv, extra = draw(b, n, 3, 1, 1, 16)
    out, dqkv, dextra = fused(grad, qkv, extra, "relu")
    assert out.shape == grad.shape and dqkv.shape == qkv.shape and not dextra.any()


def test_strides():
    """A padded buffer, a transposed layout, a gradient of stride 0: the memory layout changes nothing."""
    grad, qkv, extra = draw(2, 9, 3, 1, 2, 16)
    buffer = torch.zeros(2, 12, 4, 2, 32)
    buffer[:, 1:10, :3, :, 8:24] = qkv
    heads_first = extra.transpose(1, 3).contiguous().transpose(1, 3)
    ones = torch.ones(()).expand(grad.shape)
    found = fused(ones, buffer[:, 1:10, :3, :, 8:24], heads_first, "relu")
    compare(found, expected(ones, qkv, extra, "relu"), torch.float32)
    last = qkv.transpose(3, 4).contiguous().transpose(3, 4)  # head_dim is not the innermost: copied
    assert torch.equal(fused(ones, last, extra, "relu")[0], found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_queries_that_no_key_answers(dtype):
    """All weights zero: the output is zero, and no gradient is NaN (dk is grad . v / eps: float16 ends at 65504)."""
    grad, qkv, extra = draw(1, 4, 0, 1, 1, 16, dtype)
    qkv[:, :, 0], qkv[:, :, 1] = qkv[:, :, 0].abs(), -qkv[:, :, 1].abs()
    out, dqkv, _ = fused(grad, qkv, extra, "relu")
    assert not out.any() and not dqkv.isnan().any()


def test_float16_does_not_overflow():
    grad, qkv, extra = (100 * x for x in draw(1, 300, 0, 1, 1, 16, torch.float16))
    compare(fused(grad, qkv, extra, "relu"), expected(grad, qkv, extra, "relu"), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", [False, True], ids=["rebuilt", "kept"])
def test_operators_keep_their_promises(dtype, keep):
    grad, qkv, extra = draw(2, 7, 3, 2, 2, 16, dtype)
    torch.library.opcheck(OP, (qkv.requires_grad_(), extra.requires_grad_(), "relu", EPS, keep))
    state = [x.detach() for x in OP(qkv, extra, "relu", EPS, keep)[1:]]
    torch.library.opcheck(BACKWARD, (grad, qkv.detach(), extra.detach(), *state, "relu", EPS))


@pytest.mark.parametrize("phi", PHIS)
def test_operator_gradients_and_operations(phi):
    grad, qkv, extra = draw(2, 7, 3, 2, 2, 16)
    wanted = expected(grad, qkv, extra, phi)
    inputs = [x.requires_grad_() for x in (qkv, extra)]
    with FlopCounterMode(display=False) as counter:
        out = OP(*inputs, phi, EPS, True)[0]
    compare((out, *torch.autograd.grad(out, inputs, grad)), wanted, torch.float32)
    assert counter.get_total_flops() == 2 * macs(qkv.shape, extra.shape, phi)


def test_compiles_without_graph_breaks():
    _, *inputs = (x.requires_grad_() for x in draw(2, 7, 3, 2, 2, 16))
    run = lambda q, e: OP(q, e, "relu", EPS, True)[0].square().sum()  # noqa: E731
    loss = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(run(*inputs), inputs)):
        torch.testing.assert_close(a, b)
