"""What one busy neighbour costs: a small ViT's training on the CPU, alone and beside a second process like it.

    python bench/neighbour.py [--seconds 4] [--rounds 3] [--record]

Each setting runs in processes of its own, since OpenMP reads how to wait when it is loaded: as torch comes; with
vitlab's settings (vitlab/cli.py: waiting threads spin briefly, then sleep; vitlab/utils/threads.py: their number is
timed); the same without spinning; with one thread. The neighbour trains the same model under the same setting. Printed
are medians over the rounds, the settings in turns. On two cores an ideal neighbour costs a training that uses both of
them a factor of 2; the goal of vitlab's settings is at most 2.5.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

from vitlab import cli
from vitlab.utils import threads

GOAL = 2.5  # times as slow beside a neighbour, at most, by vitlab's settings
FREE = (*threads.PASSIVE, *cli.SHORT_SPIN, "OMP_NUM_THREADS", "MKL_NUM_THREADS")  # a setting starts without them
SETTINGS = {
    "as torch comes": {},
    "vitlab": {"BENCH_SET_UP": "1"},
    "vitlab, asleep at once": {"BENCH_SET_UP": "1", "GOMP_SPINCOUNT": "0"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def worker(seconds, batch=64):
    """Train until told to stop (an end of stdin) or for `seconds`; prints {"images_per_s", "threads"}."""
    said = ""
    if os.environ.get("BENCH_SET_UP"):
        cli.set_waiting()
        said = threads.choose()
    import time

    import torch

    from vitlab.models.vit import ViT, ViTConfig

    torch.manual_seed(0)
    model = ViT(ViTConfig(dim=128, depth=4, heads=4, image_size=32, patch_size=4, num_classes=10)).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, labels = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    for _ in range(2):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        step()
        count += batch
    print(json.dumps({"images_per_s": count / passed, "threads": torch.get_num_threads(), "said": said}), flush=True)


def start(setting, seconds):
    """A worker under a setting, ready to train once it gets a line."""
    environment = {k: v for k, v in os.environ.items() if k not in FREE} | SETTINGS[setting]
    command = [sys.executable, __file__, "--worker", "--seconds", str(seconds)]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if process.stdout.readline().strip() != "ready":
        raise RuntimeError(f"the worker under {setting!r} did not start")
    return process


def begin(process):
    process.stdin.write("\n")
    process.stdin.flush()


def finish(process):
    """What the worker measured."""
    found = json.loads(process.stdout.readline())
    process.communicate()
    return found


def measure(setting, seconds):
    """(alone, beside a neighbour): what one worker measured."""
    one = start(setting, seconds)
    begin(one)
    alone = finish(one)
    # the neighbour starts first, so that the number of threads is chosen beside it, and ends last
    other = start(setting, 3600)
    begin(other)
    try:
        one = start(setting, seconds)
        begin(one)
        beside = finish(one)
    finally:
        other.kill()
        other.communicate()
    return alone, beside


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="keep it in bench/results and bench/README.md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.seconds)
    from record import record  # notes the load now; a worker loads torch only once it has said how to wait

    found = {setting: [] for setting in SETTINGS}
    load = f", load before {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    cores = f"{threads.physical_cores()} cores, {os.cpu_count()} logical CPUs{load}"
    print(f"{cores}; images/s, median of {options.rounds}")
    for _ in range(options.rounds):
        for setting, runs in found.items():
            runs.append(measure(setting, options.seconds))
    rows = [row(setting, runs) for setting, runs in found.items()]
    print(*rows, sep="\n")
    cost = next(row["costs (times)"] for row in rows if row["setting"] == "vitlab")
    verdict = f"Goal for vitlab's settings: at most {GOAL} times; {'met' if cost <= GOAL else 'missed'}."
    print(verdict)
    if options.record:
        record("neighbour", rows, verdict, runs=found, goal=GOAL)


def row(setting, runs):
    """The medians of one setting's runs: images a second alone and beside a neighbour, and what that costs."""
    alone, beside = (statistics.median(run[k]["images_per_s"] for run in runs) for k in (0, 1))
    counts = "/".join(map(str, sorted({each["threads"] for run in runs for each in run})))
    return {"setting": setting, "threads": counts, "alone (images/s)": alone, "beside (images/s)": beside,
            "costs (times)": alone / beside}  # fmt: skip


if __name__ == "__main__":
    main()
