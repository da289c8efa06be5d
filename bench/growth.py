"""How the cost of training grows: time and memory of a step against images, tokens and width.

    OMP_WAIT_POLICY=passive python bench/growth.py [--seconds 1] [--record]

A ViT of depth 4 with softmax attention; a step is forward and backward, on the CPU or, where there is one, a GPU. One
size grows, the others stay (batch 16, 64 tokens, width 128). The exponent is the slope of log cost on log size over the
upper half of the sizes, where what does not grow weighs least. Memory is a step's peak above what was held before.
Seeds and epochs cost what they count: more of them are more of the same.
"""

import argparse

import torch
from record import HERE, record

import vitlab
from vitlab.metrics import meters
from vitlab.study import complexity
from vitlab.utils import threads

START = {"batch": 16, "tokens": 64, "width": 128}
SIZES = {"batch": (8, 16, 32, 64, 128), "tokens": (16, 64, 256, 576, 1024), "width": (64, 128, 256, 384, 512)}


def measure(what, sizes, seconds, device):
    """Rows of one size that grows: ms and MB of a step."""
    rows = []
    for size in sizes:
        batch, tokens, width = (START | {what: size}).values()
        side = 4 * round(tokens**0.5)
        model = vitlab.ViT(vitlab.ViTConfig(image_size=side, dim=width, depth=4, heads=width // 32, pool="mean"))
        step = meters.training_step(model.to(device).train(), torch.randn(batch, 3, side, side, device=device))
        seen = meters.latency(step, device=device, warmup=2, seconds=seconds, min_runs=3)
        memory = meters.peak_memory(step, None, device=device)
        rows.append({"what": what, "size": size, "ms": 1e3 * seen.median_s, "mb": memory.activations / 1e6})
        print(rows[-1], flush=True)
    return rows


def exponent(rows, column):
    return complexity.slope([(row["size"], row[column]) for row in rows])


def draw(found, path):
    """The figure: time and memory against each size, both axes logarithmic."""
    import matplotlib
    import matplotlib.pyplot as plt

    from vitlab.study import plots

    matplotlib.use("Agg")
    plots.theme()
    figure, axes = plt.subplots(2, len(found), figsize=(9, 5), sharex="col", sharey="row", squeeze=False)
    for column, (what, rows) in enumerate(found.items()):
        for axis, cost, label in zip(axes[:, column], ("ms", "mb"), ("time of a step (ms)", "peak memory (MB)")):
            axis.loglog([r["size"] for r in rows], [r[cost] for r in rows], "o-")
            axis.set_title(f"exponent {exponent(rows, cost):.2f}", fontsize="medium")
            if column == 0:
                axis.set_ylabel(label)
        sizes = [row["size"] for row in rows]
        axes[1, column].set_xticks(sizes, sizes)
        axes[1, column].set_xticks([], minor=True)
        axes[1, column].set_xlabel({"batch": "images in a batch"}.get(what, what))
    plots.save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each timing")
    parser.add_argument("--largest", type=int, default=10**6, help="leave larger sizes out")
    parser.add_argument("--record", action="store_true", help="keep it in bench/results and bench/README.md")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(threads.choose())
    found = {what: measure(what, [s for s in sizes if s <= options.largest], options.seconds, device)
             for what, sizes in SIZES.items()}  # fmt: skip
    rows = [{"grows": what, "from": each[0]["size"], "to": each[-1]["size"],
             "time (ms)": f"{each[0]['ms']:.1f} to {each[-1]['ms']:.1f}", "exponent of time": exponent(each, "ms"),
             "memory (MB)": f"{each[0]['mb']:.1f} to {each[-1]['mb']:.1f}", "exponent of memory": exponent(each, "mb")}
            for what, each in found.items()]  # fmt: skip
    print(*rows, sep="\n")
    if options.record:
        draw(found, HERE / "results" / "growth")  # README shows it
        record("growth", rows, "![growth](results/growth.png)", points=found, device=device)


if __name__ == "__main__":
    main()
