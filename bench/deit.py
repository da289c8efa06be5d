"""DeiT-S (random weights) made cheaper in several ways, timed in turns: ratios to the plain model.

    python bench/deit.py [--model deit_small_patch16_224] [--batches 1,16] [--seconds 2] [--no-compile] [--json FILE]

Runs: plain; ToMe's schedule (a constant number of tokens merged in each block, by keys) and ours (a rising number, by
the study's merge, with only the class token in the last block) at the same MACs; pruned to about these MACs by us (one
width for the heads of a block, and unequal widths) and by torch-pruning. Each in torch, eager and compiled, and in
onnxruntime, with the same threads. What is timed does not hang on the weights, so none are loaded; what each way costs
in accuracy is for the notebooks to say. Printed: milliseconds, and how many times as fast as the plain model.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

import vitlab
from vitlab.compress.pruning.peers import torch_pruning
from vitlab.compress.pruning.structured import slim
from vitlab.compress.tokens.search import fit_budget
from vitlab.models.timm import from_timm
from vitlab.run import export
from vitlab.run.runner import columns
from vitlab.utils.device import device_name, example


def models(name, share):
    """{what was done: model} at `share` of the MACs; what cannot be done here is said and left out."""
    import timm

    torch.manual_seed(0)
    plain = from_timm(timm.create_model(name)).eval()
    budget, side = share * plain.config.macs(), plain.config.image_size
    ours = fit_budget(plain, budget, action="ward", alpha=1.0, pooled_last=True)
    tome = fit_budget(plain, budget, action="merge", schedule="constant")
    cuts = {"pruned, uniform heads": {}, "pruned, unequal heads": {"uniform": False}}
    images = [(torch.randn(4, 3, side, side), torch.arange(4))]
    found = {"plain": plain, "ToMe": vitlab.reduce_tokens(plain, tome), "ours": vitlab.reduce_tokens(plain, ours)}
    found |= {what: vitlab.prune(plain, images, macs=budget, **options) for what, options in cuts.items()}
    try:
        found["torch-pruning"] = slim(plain, torch_pruning(plain, int(budget)))
    except (ImportError, ValueError) as problem:
        print(f"torch-pruning: not measured ({problem})")
    return found


def runners(found, folder, compiled):
    """{(model, engine): function of images}."""
    torch._dynamo.config.recompile_limit = 64  # one function, many models
    runs = {}
    for what, model in found.items():
        runs[what, "eager"] = model
        if compiled:
            runs[what, "compiled"] = torch.compile(model, dynamic=False)
        path = Path(folder) / f"{len(runs)}.onnx"
        side = model.config.image_size
        export.to_onnx(model, path, example(model, (model.config.in_chans, side, side), 2))
        runs[what, "onnxruntime"] = export.onnx_session(path)
        print(f"{what}: {model.config.macs() / 1e6:,.0f} MMac", file=sys.stderr, flush=True)
    return runs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--share", type=float, default=0.6, help="of the MACs that are left")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each timing")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found, batches = models(options.model, options.share), [int(b) for b in options.batches.split(",")]
    side = found["plain"].config.image_size
    with tempfile.TemporaryDirectory() as folder:
        runs = runners(found, folder, not options.no_compile)
        timed = export.timings(runs, (3, side, side), batches, options.seconds)
    engines = list(dict.fromkeys(engine for _, engine in runs))
    print(f"\n{options.model} on {device_name('cpu')}: ms, and times as fast as plain, in the same engine")
    lines = [("", "MMac", *(f"batch {b}, {engine}" for b in batches for engine in engines))]
    for what, model in found.items():
        cells = [f"{timed[b][what, e]:.1f}  {timed[b]['plain', e] / timed[b][what, e]:.2f}x"
                 if (what, e) in timed[b] else "not measured" for b in batches for e in engines]  # fmt: skip
        lines.append((what, f"{model.config.macs() / 1e6:,.0f}", *cells))
    print(columns(lines))
    if options.json:
        rows = [{"model": what, "engine": e, "batch": b, "ms": ms} for b in timed for (what, e), ms in timed[b].items()]
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
