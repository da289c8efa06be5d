"""The kernels on any machine: interpreted against float64, and compiled for a Hopper GPU without having one."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitlab.models.kernels.linear import PHIS, choose, linear_attention, macs, plain

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def draw(dtype=torch.float32, n=7, m=3, branches=2, d=16):
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, n, branches + 2, 2, d, generator=g, dtype=dtype, requires_grad=True)
    return qkv, torch.randn(2, m, 2, 2, d, generator=g, dtype=dtype, requires_grad=True)


@needs_triton
def test_kernels_in_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", str(HERE / "kernel_cases.py"), "-p", "no:cacheprovider", "--tb=short"]
    run = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in run.stdout and version("triton").startswith("3.6."):
        pytest.skip("the interpreter of triton 3.6 does not run on numpy >= 2.4")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout


# (kernel, head_dim, flags): the most registers and spill instructions that are accepted in bfloat16
COMPILED = [
    ("state", 64, {}, 250, 0),
    ("forward", 64, {"READ": False, "KEEP": True}, 250, 0),
    ("backward", 64, {"READ": False, "STEP": "both"}, 250, 0),
    ("forward", 128, {"READ": False, "KEEP": False}, 250, 0),
    ("backward", 128, {"READ": False, "STEP": "both"}, 255, 100),
]


@needs_triton
def test_kernels_compile_for_hopper(tmp_path):
    """In a process that never runs the interpreter; prints what `python bench/kernels.py` prints."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[2]); from kernels import compile_one, cuobjdump\n"
        "if cuobjdump() is None: sys.exit(77)\n"
        "for name, d, flags, *_ in json.loads(sys.argv[1]): print(json.dumps(compile_one(name, d, **flags)))"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code, json.dumps(COMPILED), str(Path(__file__).parents[2] / "bench")]
    run = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True)
    if run.returncode == 77:
        pytest.skip("triton carries no cuobjdump here, so registers cannot be read")
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == len(COMPILED)
    for row, (_, d, _, registers, spills) in zip(rows, COMPILED):
        print(row)
        assert 0 < row["registers"] <= registers and row["spills"] <= spills, row
        assert row["tensor_cores"] != "none" and row["head_dim"] == d
        assert row["shared"] <= 227 * 1024, "more shared memory than a Hopper multiprocessor has"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_follows_the_region(dtype):
    qkv, extra = draw()
    with torch.autocast("cpu", dtype):
        out = linear_attention(qkv, extra)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert qkv.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), plain(qkv, extra), atol=3e-2, rtol=3e-2)


def test_the_choice_and_its_reason():
    assert choose("cpu", 64) == (False, "plain PyTorch (the device is cpu)")
    assert choose("cuda", 64, "off")[0] is False
    assert choose("cuda", 48)[1].startswith("plain PyTorch (")


@pytest.mark.parametrize("phi", PHIS)
def test_flop_formula_is_what_the_plain_code_multiplies(phi):
    qkv, extra = draw()
    with FlopCounterMode(display=False) as counter:
        linear_attention(qkv, extra, phi=phi)
    assert counter.get_total_flops() == 2 * macs(qkv.shape, extra.shape, phi)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [16, 32, 64, 128])
@pytest.mark.parametrize(("b", "n", "m", "branches"), [(64, 65, 21, 1), (2, 1000, 0, 4), (1, 4096, 0, 1), (3, 1, 0, 1)])
def test_on_the_device(dtype, d, b, n, m, branches):
    """One program a head, split rows, kept and rebuilt states, whatever the launcher picks."""
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(b, n, branches + 2, 3, d, generator=g).to("cuda", dtype).requires_grad_()
    extra = torch.randn(b, m, 2, 3, d, generator=g).to("cuda", dtype).requires_grad_()
    grad = torch.randn(b, n, branches, 3, d, generator=g).to("cuda", dtype)
    out = linear_attention(qkv, extra)
    found = out, *torch.autograd.grad(out, (qkv, extra), grad)
    wide = [x.detach().double().requires_grad_() for x in (qkv, extra)]
    reference = plain(*wide)
    wanted = reference, *torch.autograd.grad(reference, wide, grad.double(), materialize_grads=True)
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
    for a, w in zip(found, wanted):
        if w.numel():
            assert ((a - w).abs().max() / w.abs().max()).item() < tolerance
