"""Time and memory of linear attention against softmax attention, from 64 to 16384 tokens.

    python bench/attention.py --out FOLDER [--max-n 16384] [--seconds 240] [--dtype bfloat16]

Every arm does the same work: packed projections B n 3 heads d in, B n heads d out, forward alone and forward
with backward. The number of images shrinks as n grows, so that images x n stays constant. Arms: plain
PyTorch ("eager"), the same under torch.compile, the fused kernels ("ours", CUDA only), and scaled-dot-product
attention with each backend forced in turn. Arms take turns within a round; medians and quartiles are over
rounds. "bandwidth" is the bytes that must move (each tensor once) over the time, as a share of a measured
copy. The crossover is the n from which linear attention stays faster than the best softmax backend.
Writes attention.json and a figure (PNG, PDF).
"""

import argparse
import contextlib
import math
import platform
import statistics
import time
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitlab.models.kernels.linear import EPS, PHIS, choose, linear_attention
from vitlab.study import complexity
from vitlab.utils import files

SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
LINEAR = ("eager", "compile", "ours")
PASSES = ("forward", "training")


def softmax(qkv, backend):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    with sdpa_kernel(SDPA[backend]):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def arms(device, dtype, head_dim, phi):
    """{name: function of the packed projections}."""
    eager = partial(linear_attention, phi=phi, kernels="off")
    found = {"eager": eager, "compile": torch.compile(eager, fullgraph=True, dynamic=False)}
    if device.type == "cuda" and choose(device, head_dim, "auto", dtype)[0]:
        found["ours"] = partial(linear_attention, phi=phi)
    names = SDPA if device.type == "cuda" else ("flash", "math")
    return found | {f"sdpa {name}": partial(softmax, backend=name) for name in names}


def step(function, qkv, grad):
    """One call to time: the forward alone where `grad` is None."""

    def forward():
        with torch.no_grad():
            function(qkv)

    def training():
        torch.autograd.grad(function(qkv).reshape(grad.shape), qkv, grad)

    return forward if grad is None else training


def once(call, device, repeat=1):
    """Seconds a call: events around `repeat` calls on CUDA, the clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        return (time.perf_counter() - start) / repeat
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeat):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / repeat


def captured(call, device):
    """The call as a CUDA graph, so that launch overhead, which a model hides the same way, is not measured."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak(call, device):
    """Bytes that one call takes on top of what is there before; None on the CPU, which does not count them."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(device):
    """Bytes a second of a copy (read + written), the best of 20."""
    source = torch.empty((1 << 30 if device.type == "cuda" else 1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    best = min(once(lambda: target.copy_(source), device) for _ in range(20))
    return 2 * source.nbytes / best


def moved(qkv, training):
    """Bytes with each tensor once: q, k, v, o forward; backward q, k, v, do and the three gradients."""
    tensor = qkv.nbytes / 3
    return tensor * (4 + 7 * training)


def size(n, args, device):
    images = max(1, (args.tokens or (2**18 if device.type == "cuda" else 2**12)) // n)
    generator = torch.Generator().manual_seed(n)
    qkv = torch.randn(images, n, 3, args.heads, args.head_dim, generator=generator)
    return qkv.to(device, args.dtype).requires_grad_()


def measure(n, functions, device, args, bandwidth, skip, until):
    """Rows for one n; an arm whose last size took too long for the limit is in `skip`."""
    qkv = size(n, args, device)
    grad = torch.randn_like(qkv[:, :, 0])
    rows, calls = [], {}
    for name, function in functions.items():
        for kind in PASSES:
            if (name, kind) in skip or time.monotonic() > until:
                continue
            call = step(function, qkv, grad if kind == "training" else None)
            try:
                for _ in range(2):
                    call()
                memory = peak(call, device)
                with contextlib.suppress(RuntimeError):
                    call = captured(call, device)
                # short calls are repeated within one reading, so that the clock's own grain does not count
                repeat = max(1, math.ceil(args.reading / max(once(call, device), 1e-7)))
            except (RuntimeError, torch.OutOfMemoryError) as error:
                print(f"{name} {kind} n={n}: left out ({str(error).splitlines()[0][:90]})", flush=True)
                skip[name, kind] = True
                continue
            calls[name, kind] = call, repeat, memory
    times = {key: [] for key in calls}
    for _ in range(args.rounds):
        for key, (call, repeat, _) in calls.items():
            if times[key] and time.monotonic() > until:
                continue
            times[key].append(once(call, device, repeat))
    for (name, kind), seconds in times.items():
        low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else 3 * seconds
        share = moved(qkv, kind == "training") / median / bandwidth
        rows.append({"arm": name, "pass": kind, "n": n, "images": len(qkv), "seconds": median, "low": low, "high": high,
                     "rounds": len(seconds), "peak_bytes": calls[name, kind][2], "bandwidth": share})  # fmt: skip
        if median * 4 * (args.rounds + 3) > until - time.monotonic():
            skip[name, kind] = True
    return rows


def best(rows, kind, n, names):
    found = [r for r in rows if r["pass"] == kind and r["n"] == n and names(r["arm"])]
    return min(found, key=lambda r: r["seconds"], default=None)


def crossover(rows, kind, names):
    """The n from which the arms in `names` stay faster than every SDPA backend; None where they never do."""
    ratios = []
    for n in sorted({r["n"] for r in rows}):
        pair = best(rows, kind, n, lambda a: a in names), best(rows, kind, n, lambda a: a.startswith("sdpa"))
        if all(pair):
            ratios.append((n, pair[0]["seconds"] / pair[1]["seconds"]))
    return complexity.crossing(ratios)


def exponent(rows, arm, kind):
    """Slope of log time a head and image against log n over the upper half of the sizes, or None."""
    return complexity.slope((r["n"], r["seconds"] / r["images"]) for r in rows if (r["arm"], r["pass"]) == (arm, kind))


def summary(rows):
    names = dict.fromkeys(r["arm"] for r in rows)
    found = {"crossover": {}, "exponents": {}}
    for kind in PASSES:
        found["crossover"][kind] = {a: crossover(rows, kind, (a,)) for a in names if a in LINEAR}
        found["exponents"][kind] = {a: exponent(rows, a, kind) for a in names}
    return found


def show(rows, kind):
    names = list(dict.fromkeys(r["arm"] for r in rows))
    print(f"\n{kind}: milliseconds, (share of copy bandwidth)\n{'n':>6}" + "".join(f"{a:>19}" for a in names))
    for n in sorted({r["n"] for r in rows}):
        cells = [best(rows, kind, n, lambda a, name=name: a == name) for name in names]
        text = (f"{c['seconds'] * 1e3:11.3f} ({c['bandwidth']:4.0%})" if c else "-" for c in cells)
        print(f"{n:6}" + "".join(f"{t:>19}" for t in text))


def figure(rows, found, title, out):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    memory = any(r["peak_bytes"] is not None for r in rows)
    panels = [*((kind, "seconds") for kind in PASSES), *([("training", "peak_bytes")] if memory else [])]
    fig, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), layout="constrained")
    for axis, (kind, value) in zip(axes, panels):
        for arm in dict.fromkeys(r["arm"] for r in rows):
            mine = [r for r in rows if r["arm"] == arm and r["pass"] == kind]
            scale = [(1e3 if value == "seconds" else 2**-20) / r["images"] for r in mine]
            x, y = [r["n"] for r in mine], [r[value] * s for r, s in zip(mine, scale)]
            line = axis.plot(x, y, "o-" if arm in LINEAR else "s--", label=arm, markersize=4)[0]
            if value == "seconds":
                band = [[r[edge] * s for r, s in zip(mine, scale)] for edge in ("low", "high")]
                axis.fill_between(x, *band, alpha=0.2, color=line.get_color())
        for n in {n for n in found["crossover"][kind].values() if n and value == "seconds"}:
            axis.axvline(n, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel="tokens n", title=kind,
                 ylabel="ms an image" if value == "seconds" else "peak MiB an image")  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    fig.suptitle(title, fontsize=10)
    for suffix in ("png", "pdf"):
        with files.atomic(out / f"attention.{suffix}") as part:
            fig.savefig(part, dpi=150, format=suffix)
    plt.close(fig)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for attention.json and the figure")
    parser.add_argument("--min-n", type=int, default=64)
    parser.add_argument("--max-n", type=int, default=16384)
    parser.add_argument("--seconds", type=float, default=240, help="sizes that would not fit are left out")
    parser.add_argument("--rounds", type=int, default=7, help="readings an arm")
    parser.add_argument("--reading", type=float, default=0.02, help="least seconds a reading lasts")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tokens", type=int, help="images x n (default 262144 on CUDA, 4096 on the CPU)")
    parser.add_argument("--phi", default="relu", choices=PHIS)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser.parse_args()


def main():
    args = arguments()
    until = time.monotonic() + args.seconds
    device = torch.device(args.device)
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    torch.set_num_threads(args.threads)
    # one graph a size: each n is compiled for itself
    torch._dynamo.config.cache_size_limit = 64
    warnings.filterwarnings("ignore", message=".*backend.*|.*attention.*|.*kernel.*", module="torch|__main__")
    functions = arms(device, args.dtype, args.head_dim, args.phi)
    print(f"linear attention: {choose(device, args.head_dim, 'auto', args.dtype)[1]}", flush=True)
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {args.threads} thread"
    title = f"{name}, {str(args.dtype)[6:]}, {args.heads} heads of {args.head_dim}, copy {bandwidth / 1e9:.1f} GB/s"
    rows, skip, n = [], {}, args.min_n
    while n <= args.max_n and time.monotonic() < until:
        rows += measure(n, functions, device, args, bandwidth, skip, until)
        n *= 2
    for kind in PASSES:
        show(rows, kind)
    found = summary(rows)
    print(f"\n{title}\ncrossover {found['crossover']}\nexponents {found['exponents']}")
    setting = {k: str(v) for k, v in vars(args).items() if k != "out"} | {"eps": EPS, "torch": torch.__version__}
    files.write_json(args.out / "attention.json", {"device": name, "copy_bytes_per_second": bandwidth,
                     "settings": setting, **found, "rows": rows})  # fmt: skip
    figure(rows, found, title, args.out)


if __name__ == "__main__":
    main()
