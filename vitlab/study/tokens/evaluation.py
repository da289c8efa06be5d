"""Fewer tokens, measured: sweeps, agreement of scores, speed beside its limit (rivals: see `token_contest`).

Everything here looks at a finished model on validation images; rows come back as DataFrames. Beside accuracy
stands `kl`, the divergence of the predictions from the plain model's (nats): a few hundred images cannot tell
accuracies half a point apart, but they can tell these.
"""

import dataclasses
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from vitlab.compress.tokens import reduction as tokens
from vitlab.compress.tokens.controller import AdaptiveViT, fit_controller
from vitlab.compress.tokens.scores import SCORES
from vitlab.compress.tokens.search import fit_budget
from vitlab.data.augment import normalize
from vitlab.metrics import measure
from vitlab.metrics.predict import input_size, kl_divergence
from vitlab.models import vit
from vitlab.study import zoo
from vitlab.study.study import Arm
from vitlab.train.loop import History
from vitlab.utils.device import device_of, running


def shipped(path, device="cpu", name="ours"):
    """The Arm of a trained model that lies in the project folder at `path`; how it was trained is not known."""
    model = vit.load(Path(__file__).parents[3] / path).to(device).eval()
    spec = dataclasses.replace(zoo.get(name), config=model.config, changes=(f"the trained model {path}",))
    return Arm(name, 0, "shipped", model, History(), spec)


def reduced(arm, name, **options):
    """The Arm `name` that runs the model of `arm` on fewer tokens (options of `reduce_tokens`); without any, the plain one."""
    model = tokens.reduce_tokens(arm.model, **options)
    model = (model if options else model.plain).eval()
    return dataclasses.replace(arm, name=name, model=model)


class Evaluator:
    """A finished model with `n` images (None: all) of one split of `data`, ready to judge its reductions.

    accuracy (%), macs and logits are those of the plain model. dtype: autocast.
    """

    def __init__(self, model, data, n=None, *, split="val", dtype=None, batch=256):
        self.plain, self.dtype, self.batch = tokens.reduce_tokens(model).plain, dtype, batch
        part = getattr(data, split)
        part = part if n is None else part.take(n)
        size, device = input_size(self.plain, data.image_size), device_of(self.plain)
        self.raw, self.labels, self.classes = part.images, part.labels.to(device), data.classes
        self.images = normalize(part.images.to(device), data.mean, data.std, size=size)
        self.logits = self.run(self.plain)
        self.accuracy = self.score(self.logits)
        self.macs = tokens.reduce_tokens(self.plain, r_max=0.0).macs()

    def run(self, model):
        """Logits, float32 N K."""
        with running([model], self.images.device, self.dtype):
            return torch.cat([model(part).float() for part in self.images.split(self.batch)])

    def score(self, logits):
        return 100 * (logits.argmax(1) == self.labels).double().mean().item()

    def look(self, model, macs=None):
        """{"accuracy", "lost" (points), "kl", "macs", "share" of the plain model's MACs} of a reduced model."""
        found = self.run(model)
        macs = model.macs() if macs is None else macs
        accuracy, kl = self.score(found), kl_divergence(found, self.logits).item()
        return {"accuracy": accuracy, "lost": self.accuracy - accuracy, "kl": kl, "macs": macs,
                "share": macs / self.macs}  # fmt: skip

    def times(self, models, batch, seconds):
        """{name: milliseconds a pass} of `models` on `batch` images, interleaved."""
        images = measure.example(self.plain, self.images.shape[1:], batch)
        timed = measure.compare(models, images, dtype=self.dtype, seconds=seconds, warmup=2, min_runs=3)
        return {name: t.median_s * 1e3 for name, t in timed.items()}


def sweep(probes, methods, alphas, r_maxes=(0.6,), *, batch=0, seconds=0.1):
    """Every (alpha, r_max) for every method {name: options of `reduce_tokens`}, the mean over `probes` (one a seed).

    With `batch`, also latency_ms of that many images, all settings of a method interleaved, on the first probe.
    """
    rows = []
    for name, options in methods.items():
        grid = {(a, r): [tokens.reduce_tokens(p.plain, r_max=r, alpha=a, **options) for p in probes]
                for a in alphas for r in r_maxes}  # fmt: skip
        times = probes[0].times({k: v[0] for k, v in grid.items()}, batch, seconds) if batch else {}
        for (alpha, r_max), models in grid.items():
            looks = pd.DataFrame([p.look(m) for p, m in zip(probes, models)])
            row = {"method": name, "alpha": alpha, "r_max": r_max, "tokens": models[0].tokens} | looks.mean().to_dict()
            rows.append(row | {"std": looks.accuracy.std() if len(looks) > 1 else None,
                               "latency_ms": times.get((alpha, r_max))})  # fmt: skip
    return pd.DataFrame(rows)


def choose(rows, allowed=0.5):
    """The row of a sweep with the fewest MACs that loses at most `allowed` points; else the one that loses least."""
    good = rows[rows.lost <= allowed + 1e-9]
    return good.loc[good.macs.idxmin()] if len(good) else rows.loc[rows.lost.idxmin()]


def agreement(probe, scores=tuple(SCORES), *, block=0, part=0.5):
    """Share of kept patches (%) that two scores have in common, when each keeps `part` of them in `block`.

    Up to that block nothing is removed, so all of them judge the same tokens. Two blind choices agree in
    100 * part per cent. DataFrame scores x scores, the mean over the probe's images.
    """
    plain = tokens.reduce_tokens(probe.plain, r_max=0.0)
    parts = plain.adapter
    left = parts.prefix + max(1, round(parts.patches * part))
    counts = (parts.prefix + parts.patches,) * block + (left,) * (parts.depth - block)
    chosen = {}
    for score in scores:
        model = tokens.reduce_tokens(probe.plain, counts=counts, score=score)
        with model.recording(), running([model], probe.images.device, probe.dtype):
            kept = [model(x) is not None and model.kept[block] for x in probe.images.split(probe.batch)]
        chosen[score] = F.one_hot(torch.cat(kept), parts.patches).sum(1).double()  # B P, 1 where kept
    kept = left - parts.prefix
    shared = [[100 * (a * b).sum(1).mean().item() / kept for b in chosen.values()] for a in chosen.values()]
    return pd.DataFrame(shared, index=list(scores), columns=list(scores))


def speed(probe, configs, batches, *, seconds=0.3, mode=""):
    """Measured speed-up of each TokenConfig in {name: config} over the plain model, beside the MAC limit.

    Plain and reduced are interleaved in pairs. mode: of torch.compile ("reduce-overhead" captures a CUDA
    graph); "" runs eagerly. Rows: rival, batch, limit (MACs plain / reduced), measured, plain_ms, reduced_ms.
    """
    rows = []
    for name, config in configs.items():
        reduced = tokens.reduce_tokens(probe.plain, config)
        pair = {"plain": probe.plain, "reduced": reduced}
        if mode:  # dynamo keeps few versions of one function, whichever model they are of
            torch.compiler.reset()
            pair = {k: torch.compile(m, mode=mode, dynamic=False) for k, m in pair.items()}
        for batch in batches:
            times = probe.times(pair, batch, seconds)
            rows.append({"rival": name, "batch": batch, "limit": probe.macs / reduced.macs(),
                         "measured": times["plain"] / times["reduced"], "plain_ms": times["plain"],
                         "reduced_ms": times["reduced"]})  # fmt: skip
    return pd.DataFrame(rows)


def adaptive(probe, fitting, strengths=(0.3, 0.6, 0.9), *, alpha=1.5, action="ward", look=1):
    """Images choose their own strength, against one strength for all at the same mean MACs: rows.

    "by entropy" cuts the attention's entropy into equal shares of the images of `fitting` (a Evaluator on other
    images); "by a controller" is learnt on them, for the mean number of tokens that such equal shares would leave.
    """
    model = tokens.reduce_tokens(probe.plain)
    base = {"alpha": alpha, "action": action, "protect": tuple(range(look))}
    levels = [tokens.TokenConfig(r_max=r, **base) for r in strengths]
    costs = [tokens.reduce_tokens(probe.plain, level).macs() for level in levels]
    blank = AdaptiveViT(model, levels, [0.0] * (len(levels) - 1), look=look).eval()
    with torch.no_grad():
        sharpness = torch.cat([blank.gaze(x)[0] for x in fitting.images.split(fitting.batch)])
    cuts = [sharpness.quantile(1 - i / len(levels)).item() for i in range(1, len(levels))]
    learnt = AdaptiveViT(model, levels, cuts, look=look).eval()
    counts = torch.tensor([sum(reducer.counts) for reducer in learnt.reducers], dtype=torch.float32)
    share = counts.mean().item() / (model.adapter.depth * (model.adapter.prefix + model.adapter.patches))
    fit_controller(learnt, fitting.images, fitting.labels, share=share)
    rows = []
    for name, arm in (("by entropy", AdaptiveViT(model, levels, cuts, look=look).eval()), ("by a controller", learnt)):
        probe.run(arm)
        used = arm.used
        macs = sum(u * c for u, c in zip(used, costs)) / sum(used)
        fixed = tokens.reduce_tokens(probe.plain, fit_budget(probe.plain, max(macs, min(costs)), **base))
        rows.append({"chosen": name, "used": used} | probe.look(arm, macs))
        rows.append({"chosen": f"one for all, as dear as {name}", "used": None} | probe.look(fixed))
    return pd.DataFrame(rows)


def trial(probe, *, batch, seconds, action="ward"):
    """What `search` wants: config -> (accuracy, latency in ms of `batch` images) on the probe's images."""

    def evaluate(config):
        model = tokens.reduce_tokens(probe.plain, config, action=action)
        return probe.look(model)["accuracy"], probe.times({"": model}, batch, seconds)[""]

    return evaluate


def answers(rows, pruned):
    """{claim of S3: values, one a seed} from the test rows and the arms that were trained with pruning.

    Speed-ups are quotients of throughput; the accuracy lost is against the baseline run plain. What training with
    pruning saves is not among them: two runs on one machine at different hours do not tell.
    """
    by = {name: part.sort_values("seed") for name, part in rows.groupby("arm")}
    found = {f"{name}/accuracy": part.accuracy_top1.tolist() for name, part in by.items()}
    found |= {f"{name}/evaluation-time": (10_000 / part.images_per_s).tolist() for name, part in by.items()}
    pairs = {"baseline-on": "baseline", "baseline-alpha-1.5": "baseline", "pruned-on": "pruned-off",
             "pruned-alpha-1.2": "baseline"}  # fmt: skip
    for on, off in pairs.items():
        fast, slow = by[f"S3/{on}"].images_per_s.to_numpy(), by[f"S3/{off}"].images_per_s.to_numpy()
        found[f"S3/{on}/speed-up"] = (fast / slow).tolist()
    found["S3/baseline-alpha-1.5/own-speed-up"] = found["S3/baseline-alpha-1.5/speed-up"]
    plain, last = by["S3/baseline"].accuracy_top1.to_numpy(), by["S3/pruned-alpha-1.2"].accuracy_top1.to_numpy()
    found["S3/pruned-alpha-1.2/accuracy-drop"] = (plain - last).tolist()
    found["S3/trained-pruned/accuracy"] = found["S3/pruned-on/accuracy"]
    found["S3/trained-pruned/training-time"] = [arm.history.seconds / 60 for arm in pruned]
    return found
