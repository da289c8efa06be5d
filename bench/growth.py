"""How the cost of training grows: time and memory of a step against batch, tokens and width, of runs against images
and seeds.

    OMP_WAIT_POLICY=passive python bench/growth.py [--seconds 1] [--record]

A ViT of depth 4 with softmax attention; a step is forward and backward, on the CPU or, where there is one, a GPU. One
size grows, the others stay (batch 16, 64 tokens, width 128). The exponent is the slope of log cost on log size over the
upper half of the sizes, where what does not grow weighs least. Memory is the peak above what was held before. A run is
an epoch of `vitlab.fit` on so many of CIFAR-10's images, which are counted in its memory; seeds are such runs one after
another. More epochs cost what more seeds do.
"""

import argparse
import time

import torch
from record import HERE, record

import vitlab
from vitlab.metrics import meters
from vitlab.study import complexity
from vitlab.utils import threads

START = {"batch": 16, "tokens": 64, "width": 128}
SIZES = {"batch": (8, 16, 32, 64, 128), "tokens": (16, 64, 256, 576, 1024), "width": (64, 128, 256, 384, 512)}
RUNS = {"images": (500, 1000, 2000, 4000), "seeds": (1, 2, 4)}  # each seed with the fewest images
NAMES = {"batch": "images in a batch", "images": "images in an epoch", "seeds": "seeds, in turn"}


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


def measure_runs(what, sizes, device):
    """Rows of images or seeds that grow: ms and MB of all the runs of an epoch."""
    data, rows = vitlab.load_data("cifar10"), []

    def train(images, seeds):
        part = data.with_train(images)  # a copy
        for seed in range(seeds):
            model = vitlab.ViT(vitlab.ViTConfig(image_size=32, patch_size=4, dim=START["width"], depth=4, heads=4))
            recipe = vitlab.Recipe(epochs=1, batch=128, warmup=0, dtype="float32", compile="off", seed=seed)
            vitlab.fit(model.to(device), part, recipe, validate=False, log=None)

    train(RUNS["images"][0], 1)  # warms up
    for size in sizes:
        sized = (size, 1) if what == "images" else (RUNS["images"][0], size)
        start = time.perf_counter()
        train(*sized)
        ms = 1e3 * (time.perf_counter() - start)
        memory = meters.peak_memory(lambda sized=sized: train_with_gradients(train, sized), None, device=device)
        rows.append({"what": what, "size": size, "ms": ms, "mb": memory.activations / 1e6})
        print(rows[-1], flush=True)
    return rows


def train_with_gradients(train, sized):
    with torch.inference_mode(False), torch.enable_grad():  # the meter is for inference
        train(*sized)


def exponent(rows, column):
    return complexity.slope([(row["size"], row[column]) for row in rows])


def draw(found, path):
    """The figure: time and memory against each size, both axes logarithmic."""
    import matplotlib
    import matplotlib.pyplot as plt

    from vitlab.study import plots

    matplotlib.use("Agg")
    plots.theme()
    figure, axes = plt.subplots(2, len(found), figsize=(12, 5), sharex="col", sharey="row", squeeze=False)
    for column, (what, rows) in enumerate(found.items()):
        for axis, cost, label in zip(axes[:, column], ("ms", "mb"), ("time (ms)", "peak memory (MB)")):
            axis.loglog([r["size"] for r in rows], [r[cost] for r in rows], "o-")
            axis.set_title(f"exponent {exponent(rows, cost):.2f}", fontsize="medium")
            if column == 0:
                axis.set_ylabel(label)
        sizes = [row["size"] for row in rows]
        axes[1, column].set_xticks(sizes, sizes)
        axes[1, column].set_xticks([], minor=True)
        axes[1, column].set_xlabel(NAMES.get(what, what))
    plots.save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each timing")
    parser.add_argument("--largest", type=int, default=10**6, help="leave larger sizes out")
    parser.add_argument("--record", action="store_true", help="keep it in bench/results and bench/README.md")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(threads.choose())
    found = {}
    for what, sizes in (SIZES | RUNS).items():
        sizes = [size for size in sizes if size <= options.largest]
        if what in RUNS:
            found[what] = measure_runs(what, sizes, device)
        else:
            found[what] = measure(what, sizes, options.seconds, device)
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
