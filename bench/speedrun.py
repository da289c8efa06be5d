"""CIFAR-10 to 94 % with a ViT on one GPU: seconds of training, n seeds. bench/speedrun_cpu.py: to 90 % on a CPU.

    python bench/speedrun.py [--seeds 0,1,2] [-p epochs=40] [--record]

Several of these, a seed and a core each, may run side by side: a record takes in the other seeds of its recipe.

All 50,000 training images, none held out, and the test images read once, at the end of each run, without test-time
augmentation. The seconds are those of the epochs, without what is loaded and compiled before (an uncounted run of a few
steps fills the compiler's cache); on a CPU those that its cores worked for the training, all threads added up, so that
neighbours do not count. The GPU's setting is the CPU's, which was chosen on validation images, made wider and
given larger batches and more epochs; it is a first guess, to be tuned on validation images (--val 5000) where a GPU is.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import yaml
from record import HERE, record

import vitlab
from vitlab.metrics.measure import accuracy
from vitlab.study import zoo
from vitlab.utils import files, rng, threads
from vitlab.utils.device import device_name, hold_memory

PRESET = Path(__file__).parents[1] / "presets" / "cpu.yaml"
WIDER = {"dim": 256, "depth": 6, "mlp_dim": 512, "batch": 512, "lr": 0.016, "rest_lr": 0.016, "epochs": 40, "warmup": 2,
         "smoothing": 0.1}  # fmt: skip


def train(spec, data, seed, device):
    """One run: (the model, its History)."""
    rng.seed_all(seed)
    model = zoo.fitted(spec, data).config.build().to(device)
    recipe = {**vars(spec.recipe), "seed": seed}
    return model, vitlab.fit(model, data, vitlab.Recipe(**recipe), validate=False)


def keep(name, rows, device, **facts):
    """Record these seeds beside those that runs of the same recipe recorded before on such a device."""
    path, facts = HERE / "results" / f"{name}.json", {**facts, "threads": torch.get_num_threads()}
    same = facts | {"device": device_name(device)}
    with files.locked(path.with_suffix(".lock")):
        before = files.read_json(path) if path.exists() else {}
        alike = all(before.get(key) == value for key, value in same.items())
        seeds = {row["seed"]: row for row in [*(before["rows"] if alike else []), *rows]}
        record(name, [seeds[seed] for seed in sorted(seeds)], device=device, **facts)


def main(goal, more, device, name):
    """The command line: train for each seed, and say how often and in which time the goal (%) was reached."""
    parser = argparse.ArgumentParser(description=f"CIFAR-10 to {goal} % on {device}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--val", type=int, default=0, help="images held out, and read in place of the test images")
    parser.add_argument("--images", type=int, help="of the training set, to try it out")
    parser.add_argument("-p", dest="changes", action="append", default=[], metavar="epochs=40")
    parser.add_argument("--record", action="store_true", help="keep the table in bench/results and bench/README.md")
    options = parser.parse_args()
    changes = yaml.safe_load(PRESET.read_text(encoding="utf-8"))["01_baseline"]["changes"]["ours"] | more
    changes |= {k: yaml.safe_load(v) for k, v in (pair.split("=", 1) for pair in options.changes)}
    spec = zoo.scaled("ours", changes)
    print(threads.choose())
    hold_memory()
    data = vitlab.load_data("cifar10", val=options.val, device=device)
    if options.images:
        data = data.with_train(options.images)
    if spec.recipe.compiles(device):
        short = zoo.scaled("ours", changes | {"epochs": 1, "warmup": 0})
        train(short, data.with_train(4 * spec.recipe.batch), 0, device)
    rows = []
    clock = "core seconds" if device.type == "cpu" else "seconds"
    for seed in map(int, options.seeds.split(",")):
        started = time.process_time()
        model, history = train(spec, data, seed, device)
        spent = time.process_time() - started if device.type == "cpu" else history.seconds
        split = data.val if options.val else data.test
        score = accuracy(model, split, mean=data.mean, std=data.std, num_classes=data.num_classes)
        reached = "yes" if score.top1 >= goal else "no"
        rows.append({"seed": seed, "epochs": len(history), "precision": history.dtype, clock: spent,
                     "accuracy (%)": score.top1, f"{goal} % reached": reached})  # fmt: skip
        print(rows[-1], flush=True)
        if options.record:
            keep(name, rows, device, goal=goal, changes=changes, train_images=len(data.train.labels),
                 read="validation" if options.val else "test")  # fmt: skip
    means = [statistics.mean(row[column] for row in rows) for column in ("accuracy (%)", clock)]
    print(f"mean of {len(rows)}: {means[0]:.2f} % after {means[1]:,.1f} {clock} on {device_name(device)}")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("bench/speedrun.py needs a GPU; bench/speedrun_cpu.py does not")
    main(94, WIDER, torch.device("cuda"), "speedrun")
