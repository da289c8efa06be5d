"""What the kernels need on a Hopper GPU: registers, spills and shared memory, from an ahead-of-time compilation.

`python bench/kernels.py` prints a table (`--json`: a list); no GPU is needed.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch

ARCH = 90  # sm_90: H100, H200
CONSTANTS = {"R", "D", "BLOCK", "PHI", "DOT", "PREC", "READ", "KEEP", "STEP"}
FLOATS = ("scale", "eps")
STATES = ("state", "norm", "dstate", "dnorm")
TENSORS = ("qkv", "extra", "out", "grad", "dqkv", "dextra", *STATES)
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
VARIANTS = {  # kernel -> its flags, as the launcher sets them
    "state": [{}],
    "forward": [{"READ": False, "KEEP": False}, {"READ": False, "KEEP": True}, {"READ": True, "KEEP": False}],
    "backward": [
        {"READ": False, "STEP": "both"},
        {"READ": True, "STEP": "both"},
        {"READ": True, "STEP": "query"},
        {"READ": True, "STEP": "key"},
    ],
}


def _source(kernel, head_dim, dtype, tile, phi, branches, flags):
    import triton.language as tl
    from triton.compiler import ASTSource

    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    values = {"R": branches, "D": head_dim, "BLOCK": tile.block, "PHI": phi, "DOT": dot, "PREC": "tf32", **flags}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in CONSTANTS:
            signature[name] = "constexpr"
        elif name in TENSORS:
            signature[name] = "*fp32" if name in STATES else f"*{TYPES[dtype]}"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        # what the launcher finds at run time: pointers and strides are multiples of 16
        if name in TENSORS or re.search(r"_[bnsrh]$", name):
            attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {k: values[k] for k in kernel.arg_names if k in CONSTANTS}
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def compile_one(name, head_dim, dtype=torch.bfloat16, phi="relu", branches=1, **flags):
    """Compile one kernel for sm_90 -> {"registers", "stack" (bytes a thread), "spills", "shared" (bytes), ...}."""
    import triton
    from triton.backends.compiler import GPUTarget

    from vitlab.models.kernels import launch
    from vitlab.models.kernels import linear_triton as kernels

    tile = launch.tile(head_dim, dtype, backward=name == "backward")
    source = _source(getattr(kernels, f"{name}_kernel"), head_dim, dtype, tile, phi, branches, flags)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options)
    return {"kernel": name, "head_dim": head_dim, "dtype": TYPES[dtype], "phi": phi, **flags, "block": tile.block,
            "warps": tile.warps, "shared": compiled.metadata.shared, "tensor_cores": _products(compiled.asm["ptx"]),
            **_usage(compiled.asm["cubin"])}  # fmt: skip


def _products(ptx):
    found = [name for name in ("wgmma.mma_async", "mma.sync") if name in ptx]
    return found[0] if found else "none"


def cuobjdump():
    """The path of the cuobjdump that Triton carries, or None."""
    import triton

    found = sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("cuobjdump*"))
    return found[0] if found else None


def _usage(cubin):
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("triton carries no cuobjdump on this machine")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = lambda flag: subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage, code = run("-res-usage"), run("-sass")
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    # local memory is used for nothing but spills here
    return {"registers": registers, "stack": stack, "spills": len(re.findall(r"\b(?:STL|LDL)\b", code))}


def table(head_dims=(16, 32, 64, 128), dtypes=(torch.bfloat16,), phis=("relu",)):
    return [compile_one(name, d, dtype, phi, **flags)
            for dtype in dtypes for phi in phis for d in head_dims for name, variants in VARIANTS.items()
            for flags in variants]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--phi", nargs="+", default=["relu"], choices=["relu", "elu", "softmax"])
    args = parser.parse_args()
    rows = table(args.head_dims, [getattr(torch, name) for name in args.dtypes], args.phi)
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        flags = " ".join(f"{k.lower()}={row[k]}" for k in ("READ", "KEEP", "STEP") if k in row)
        print(f"{row['kernel']:9}{flags:24}d={row['head_dim']:<4}{row['dtype']} {row['phi']:8}{row['block']:4} rows "
              f"{row['warps']} warps {row['registers']:4} registers {row['spills']:4} spills {row['stack']:5} B stack "
              f"{row['shared']:7} B shared  {row['tensor_cores']}")  # fmt: skip


if __name__ == "__main__":
    main()
