"""DeiT-S (random weights) made cheaper in several ways, timed in turns: ratios to the plain model.

    python bench/deit.py [--model deit_small_patch16_224] [--batches 1,16] [--seconds 2] [--engines eager,onnxruntime]
                         [--tome CLONE] [--keep FOLDER] [--prepare] [--compile-within 240] [--record]

Runs: plain; ToMe's schedule (a constant number of tokens merged in each block, by keys) and ours (a rising number, by
the study's merge, with only the class token in the last block) at the same MACs; pruned to about these MACs by us (one
width for the heads of a block, and unequal widths) and by torch-pruning. Each in torch, eager and compiled, and in
onnxruntime, with the same threads. --tome: a clone of facebookresearch/ToMe, whose own code then runs beside ours, on
the same weights, its outputs compared. What is timed does not hang on the weights, so none are loaded; what each way
costs in accuracy is for the notebooks to say. Printed: milliseconds, and how many times as fast as the plain model in
the same engine.

Compiling takes minutes, and is the same on a busy machine: --keep FOLDER keeps what was compiled and exported, and
--prepare stops when that is done, so that the timings can wait for a quiet hour and then take few minutes.
"""

import argparse
import copy
import itertools
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import record, show

import vitlab
from vitlab.compress.pruning.peers import torch_pruning
from vitlab.compress.pruning.structured import slim
from vitlab.compress.tokens.search import fit_budget
from vitlab.metrics import meters
from vitlab.metrics.counts import macs
from vitlab.models.timm import from_timm
from vitlab.run import export
from vitlab.run.report import markdown
from vitlab.utils.device import running

ENGINES, UPSTREAM = ("eager", "compiled", "onnxruntime"), "ToMe, its own code"


def models(name, share, tome):
    """{what was done: model} at `share` of the MACs; what cannot be done here is said and left out."""
    import timm

    torch.manual_seed(0)
    source = timm.create_model(name).eval()
    plain = from_timm(source)
    budget, side = share * plain.config.macs(), plain.config.image_size
    ours = fit_budget(plain, budget, action="size-priced", alpha=1.0, pooled_last=True)
    merged = vitlab.reduce_tokens(plain, fit_budget(plain, budget, action="merge", schedule="constant"))
    images = [(torch.randn(4, 3, side, side), torch.arange(4))]
    found = {"plain": plain, "ours": vitlab.reduce_tokens(plain, ours),
             "pruned, uniform heads": vitlab.prune(plain, images, macs=budget), "ToMe": merged}  # fmt: skip
    try:
        found["torch-pruning"] = slim(plain, torch_pruning(plain, int(budget)))
    except (ImportError, ValueError) as problem:
        print(f"torch-pruning: not measured ({problem})")
    found["pruned, unequal heads"] = vitlab.prune(plain, images, macs=budget, uniform=False)
    if tome:
        found[UPSTREAM] = upstream(source, merged, tome, images[0][0])
    return found


class Called(torch.nn.Module):
    """A model whose forward takes images and nothing else, as exporters want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images)


def upstream(source, merged, clone, images):
    """ToMe as its authors wrote it, around a copy of timm's `source`, merging as many tokens a block as `merged`."""
    sys.path.insert(0, str(clone))
    from tome.patch import timm as patch

    model = copy.deepcopy(source)
    patch(model)
    counts = [merged.plain.config.tokens, *merged.tokens]
    model.r = [before - after for before, after in itertools.pairwise(counts)]
    model = Called(model)
    with running([model, merged], "cpu"):
        worst = (model(images) - merged(images)).abs().max().item()
    print(f"{UPSTREAM}: logits differ from ours by {worst:.1e}, tokens after each block {merged.tokens}", flush=True)
    return model


def runners(found, folder, engines, shape, batches, within):
    """{(model, engine): function of images}, each run once at each batch; what fails is said and left out.

    within: seconds after which no further model is compiled. Compiling comes last, for it takes longest.
    """
    torch._dynamo.config.recompile_limit = 64  # one function, many models
    runs, compiling = {}, 0.0
    for engine in sorted(engines, key=lambda name: name == "compiled"):
        for what, model in found.items():
            if engine == "compiled" and compiling > within:
                print(f"{what}, compiled: not measured (--compile-within {within:g} is over)", flush=True)
                continue
            begun, file = time.perf_counter(), f"{what.replace(', ', '-').replace(' ', '-')}.onnx"
            try:
                run = prepared(model, engine, Path(folder) / file, shape)
                for batch in batches:
                    with running([run], "cpu"):
                        run(torch.randn(batch, *shape))
            except Exception as problem:  # whatever an exporter or a compiler may raise
                print(f"{what}, {engine}: not measured ({str(problem).strip().splitlines()[0][:150]})", flush=True)
                continue
            runs[what, engine], spent = run, time.perf_counter() - begun
            compiling += spent if engine == "compiled" else 0.0
            print(f"{what}, {engine}: ready in {spent:.0f} s", file=sys.stderr, flush=True)
    return runs


def prepared(model, engine, path, shape):
    """A function of images B C H W that runs the model in that engine; path: of its ONNX file, kept."""
    if engine == "eager":
        return model
    if engine == "compiled":
        return torch.compile(model, dynamic=False)
    if not path.exists():
        part = path.with_suffix(".part")
        export.to_onnx(model, part, torch.randn(2, *shape))
        part.replace(path)
    return export.onnx_session(path)


def table(timed, found, shape, engines):
    """A row a model: ms, and how many times as fast as plain, in each engine at each batch; None: not measured."""
    rows = []
    for what, model in found.items():
        row = {"": what, "MMac": f"{macs(model, shape) / 1e6:,.0f}"}
        for (batch, times), engine in itertools.product(timed.items(), engines):
            ms, plain = times.get((what, engine)), times.get(("plain", engine))
            row[f"batch {batch}, {engine}"] = f"{ms:.1f} ({plain / ms:.2f}x)" if ms and plain else None
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--share", type=float, default=0.6, help="of the MACs that are left")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each timing")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--tome", type=Path, help="a clone of facebookresearch/ToMe")
    parser.add_argument("--keep", type=Path, help="folder for what is compiled and exported")
    parser.add_argument("--compile-within", type=float, default=math.inf, metavar="SECONDS",
                        help="compile no further model after so long")
    parser.add_argument("--prepare", action="store_true", help="compile and export only")
    parser.add_argument("--record", action="store_true", help="keep the table in bench/results and bench/README.md")
    options = parser.parse_args()
    batches, engines = [int(b) for b in options.batches.split(",")], options.engines.split(",")
    if unknown := set(engines) - set(ENGINES):
        parser.error(f"--engines {', '.join(unknown)}: choose of {', '.join(ENGINES)}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(options.keep or folder) / f"{options.model}-{options.share}"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        found = models(options.model, options.share, options.tome)
        shape = 3, found["plain"].config.image_size, found["plain"].config.image_size
        runs, timed = runners(found, folder, engines, shape, batches, options.compile_within), {}
        if options.prepare:
            return
        for batch in batches:
            images = torch.randn((batch, *shape), generator=torch.Generator().manual_seed(0))
            spent = meters.compare(runs, images, warmup=1, seconds=options.seconds, min_runs=5)
            timed[batch] = {key: 1e3 * timing.median_s for key, timing in spent.items()}
    rows = table(timed, found, shape, engines)
    print(markdown(list(rows[0]), [map(show, row.values()) for row in rows]))
    if options.record:
        below = f"`{options.model}` at {options.share:.0%} of the MACs; milliseconds (times as fast as plain)."
        every = [{"model": what, "engine": engine, "batch": batch, "ms": ms}
                 for batch, times in timed.items() for (what, engine), ms in times.items()]  # fmt: skip
        record("deit", rows, below, times=every, model=options.model, share=options.share)


if __name__ == "__main__":
    main()
