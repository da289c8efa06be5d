"""Training end to end, images a second: vitlab's loop against timm's VisionTransformer with torchvision and AdamW.

    python bench/train.py [--dims 64,128,192] [--seconds 4] [--rounds 3] [--record]

Both train the same shape (32x32 images, patches of 4, depth 6) on CIFAR-10's images with the same random crops and
flips, in batches of 128, by AdamW with label smoothing. The peer is what one would write with these libraries: v2
transforms on uint8 tensors in a DataLoader, torch's AdamW, fused; with several shares of the cores for loader and
model, of which the fastest counts. Every setting has a process of its own, set up before the clock runs; they are
measured in turns, and the ratios are of medians. "auto" is what `vitlab train` does, in the precision that it times to
be the faster one, against the faster of the peer's precisions; "compiled" is the same under torch.compile, which is
ready before the clock runs; "float32" is like with like.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from record import record

from vitlab import cli
from vitlab.utils import threads

BATCH, DEPTH = 128, 6
OURS = {"vitlab, auto": {}, "vitlab, compiled": {"compile": "on"}, "vitlab, float32": {"dtype": "float32"}}
# how the peer shares the cores out: (threads of the model, None: torch's default; workers of the loader; precision)
PEERS = {
    "peer, 2 workers": (None, 2, "float32"),
    "peer, 1 worker": (None, 1, "float32"),
    "peer, 1 thread, 1 worker": (1, 1, "float32"),
    "peer, 2 workers, bfloat16": (None, 2, "bfloat16"),
}


def ours(data, dim, recipe):
    """A function that trains for so many seconds and gives images a second: an epoch of as many steps as that takes."""
    import vitlab
    from vitlab.utils.device import hold_memory

    threads.choose()
    hold_memory()
    model = vitlab.ViT(vitlab.ViTConfig(dim=dim, depth=DEPTH, heads=dim // 32, patch_size=4, num_classes=10))

    def run(steps):
        part = data.with_train(steps * BATCH)
        recipe_ = vitlab.Recipe(epochs=1, batch=BATCH, smoothing=0.1, augment="crop(4)+flip", **recipe)
        return vitlab.fit(model, part, recipe_, validate=False, log=None).rows[0]["images_per_s"]

    first = run(2) and run(4)
    return lambda seconds: run(max(3, round(seconds * first / BATCH)))


def peer(data, dim, count, workers, dtype):
    """The same for timm and torchvision."""
    import torch
    from data import torchvision_loader
    from timm.models.vision_transformer import VisionTransformer

    if count:
        torch.set_num_threads(count)
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=dim, depth=DEPTH, num_heads=dim // 32,
                              num_classes=10).train()  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

    def step(loader):
        images, labels = next(loader)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            out = loss(model(images), labels)
        optimizer.zero_grad()
        out.backward()
        optimizer.step()
        return out.detach()

    def run(seconds):
        loader = torchvision_loader(data, BATCH, None, pil=False, workers=workers)
        for _ in range(2 + 2 * workers):  # the workers start, and what they have fetched ahead is used up
            step(loader)
        losses, start = [], time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            losses.append(step(loader))
        return len(losses) * BATCH / passed

    return run


def worker(name, dim):
    """Give the images a second for each line of standard input, a number of seconds."""
    from vitlab.data.datasets import load

    data = load("cifar10")
    run = ours(data, dim, OURS[name]) if name in OURS else peer(data, dim, *PEERS[name])
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(float(line))), flush=True)


def compare(dim, seconds, rounds):
    """{setting: [images a second, a round each]}."""
    command = [sys.executable, __file__, "--dims", str(dim), "--worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # threads that wait sleep, as vitlab's command line has them do, in all alike
    waiting, runs = threads.PASSIVE | cli.SHORT_SPIN, {}
    try:
        for name in (*OURS, *PEERS):  # one after another, since threads and precision are chosen by short timings
            runs[name] = subprocess.Popen([*command, name], env=waiting | os.environ, **pipes)
            if runs[name].stdout.readline().strip() != "ready":
                raise RuntimeError(f"{name} did not start")
        found = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                run.stdin.write(f"{seconds}\n")
                run.stdin.flush()
                found[name].append(json.loads(run.stdout.readline()))
    finally:
        for run in runs.values():
            run.kill()
            run.wait()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", default="64,128,192")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="keep the table in bench/results and bench/README.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    dims = [int(dim) for dim in options.dims.split(",")]
    if options.worker:
        return worker(options.worker, dims[0])
    rows, every = [], {}
    for dim in dims:
        every[dim] = compare(dim, options.seconds, options.rounds)
        rates = {name: statistics.median(found) for name, found in every[dim].items()}
        best = max((name for name in PEERS), key=rates.get)
        alike = max((name for name, setting in PEERS.items() if setting[2] == "float32"), key=rates.get)
        rows.append({
            "dim": dim, "vitlab (images/s)": rates["vitlab, auto"], "best peer": best.removeprefix("peer, "),
            "its images/s": rates[best], "ratio": rates["vitlab, auto"] / rates[best],
            "ratio, compiled": rates["vitlab, compiled"] / rates[best],
            "float32: vitlab": rates["vitlab, float32"], "float32: peer": rates[alike],
            "float32: ratio": rates["vitlab, float32"] / rates[alike],
        })  # fmt: skip
        print(json.dumps(rates), rows[-1], sep="\n", flush=True)
    if options.record:
        record("train", rows, rounds=every, seconds=options.seconds, batch=BATCH)


if __name__ == "__main__":
    main()
