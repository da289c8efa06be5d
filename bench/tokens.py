"""How much of what token reduction saves in operations is saved in time: DeiT-S and the study's baseline.

    OMP_WAIT_POLICY=passive python bench/tokens.py [--models deit,ours] [--batches 1,16,64] [--share 0.7]
                                                   [--engines eager,compiled,onnxruntime] [--record]

Random weights: what is timed does not hang on them. "share of the limit" is (time of the plain model / time of the
reduced one) / (its MACs / their MACs): 1 where time falls as the operations do. ToMe merges a constant number of tokens
a block, by keys; ours a rising number, by the study's merge, with only the class token (or the mean) in the last block;
the third does the same in one block, the middle one of those early enough. "uniform grid" compares no tokens at all: it
drops a fixed pattern in that block, and so shows how much of the limit the machine gives to any method.
Eager, compiled and in onnxruntime, in turns, medians. bench/slim.py does the same for pruned models.
"""

import argparse
import tempfile
from pathlib import Path

import timm
import torch
import yaml
from deit import ENGINES, prepared
from record import record
from speedrun import PRESET

import vitlab
from vitlab.compress.tokens.search import at_once, fit_budget
from vitlab.metrics import meters
from vitlab.models.timm import from_timm
from vitlab.study import zoo
from vitlab.utils import threads

MODELS = {
    "deit": lambda: from_timm(timm.create_model("deit_small_patch16_224")),
    "ours": lambda: baseline().config.build(),
}


def baseline():
    """The study's own model as the cpu preset has it: a Spec."""
    changes = yaml.safe_load(PRESET.read_text(encoding="utf-8"))["01_baseline"]["changes"]["ours"]
    return zoo.scaled("ours", changes)


def reduced(plain, share):
    """{what was done: model} at `share` of the MACs of `plain`."""
    budget = share * plain.config.macs()
    merge, grid = {"action": "size-priced"}, {"action": "drop", "score": "grid"}
    merge, grid = (options | {"pooled_last": True} for options in (merge, grid))
    once = at_once(plain, budget, **merge)
    once = once[len(once) // 2]
    configs = {
        "ToMe": fit_budget(plain, budget, action="merge", schedule="constant"),
        "ours": fit_budget(plain, budget, alpha=1.0, **merge), "ours, in one block": once,
        "uniform grid, in one block": fit_budget(plain, budget, schedule="once", protect=once.protect, **grid),
    }  # fmt: skip
    return {what: vitlab.reduce_tokens(plain, config) for what, config in configs.items()}


def compare(name, cheaper, batches, seconds, engines):
    """Rows of one model: its own time, and of each cheaper one the speed-up and the share of the limit reached."""
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # one function, many models
    plain = MODELS[name]().eval()
    models = {"plain": plain} | cheaper(plain)
    macs = {what: model.config.macs() for what, model in models.items()}
    shape, rows = (3, plain.config.image_size, plain.config.image_size), []
    with tempfile.TemporaryDirectory() as folder:
        for engine in engines:
            runs = {what: prepared(model, engine, Path(folder) / f"{i}.onnx", shape)
                    for i, (what, model) in enumerate(models.items())}  # fmt: skip
            for batch in batches:
                timed = meters.compare(runs, torch.randn(batch, *shape), warmup=2, seconds=seconds, min_runs=3)
                times = {what: timing.median_s for what, timing in timed.items()}
                for what in list(models)[1:]:
                    faster, limit = times["plain"] / times[what], macs["plain"] / macs[what]
                    rows.append({"model": name, "made cheaper": what, "batch": batch, "engine": engine,
                                 "plain (ms)": 1e3 * times["plain"], "speed-up": faster, "limit by MACs": limit,
                                 "share of the limit": faster / limit})  # fmt: skip
                    print(rows[-1], flush=True)
    return rows


def main(name, cheaper, about):
    """The command line of this benchmark and of bench/slim.py."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--models", default="deit,ours")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--share", type=float, default=0.7, help="of the MACs that are left")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each model's timing")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--record", action="store_true", help="keep the table in bench/results and bench/README.md")
    options = parser.parse_args()
    print(threads.choose())
    rows = []
    for model in options.models.split(","):
        batches = [int(batch) for batch in options.batches.split(",")]
        rows += compare(model, lambda plain: cheaper(plain, options.share), batches, options.seconds,
                        options.engines.split(","))  # fmt: skip
    if options.record:
        record(name, rows, share=options.share, seconds=options.seconds)


if __name__ == "__main__":
    main("tokens", reduced, __doc__)
