"""Fewer tokens, measured: sweeps, speed beside its limit, images that choose (methods: see `comparison`).

Everything here looks at a finished model; rows come back as DataFrames. Changes of accuracy are in points, negative is
worse. Beside accuracy stands `kl`, the divergence of the predictions from the plain model's (nats): a few hundred
images cannot tell accuracies half a point apart, but they can tell these.
"""

import dataclasses

import pandas as pd
import torch

from vitlab.compress.tokens.controller import AdaptiveViT, fit_controller
from vitlab.compress.tokens.reduction import TokenConfig, reduce_tokens
from vitlab.compress.tokens.search import fit_budget
from vitlab.data.augment import normalize
from vitlab.metrics.measure import compare
from vitlab.metrics.predict import input_size, kl_divergence, outputs
from vitlab.metrics.statistics import paired_difference, paired_seeds, t_interval, unpacked
from vitlab.utils.device import device_of, example


def reduced(arm, name, config=None, *, changes=(), **options):
    """The Arm `name` that runs the model of `arm` as `reduce_tokens` says; without any options, the plain one.

    changes: what of this is not as published.
    """
    model, spec = reduce_tokens(arm.model, config, **options), arm.spec
    return dataclasses.replace(arm, name=name, model=(model if config or options else model.plain).eval(),
                               spec=dataclasses.replace(spec, changes=(*spec.changes, *changes)))  # fmt: skip


def evaluators(arms, data, n=None, **options):
    """An `Evaluator` of each arm, in the precision that its recipe asks for."""
    return [Evaluator(arm.model, data, n, dtype=arm.spec.recipe.torch_dtype(device_of(arm.model)), **options)
            for arm in arms]  # fmt: skip


def enlarged(model, side):
    """A copy of `model`, with its weights, for images of `side` pixels; ValueError if it has learned positions."""
    config = dataclasses.replace(model.config, image_size=side)
    if config.pos != "none":
        raise ValueError(f"pos={config.pos!r}: learned positions are those of a grid of side {model.config.grid}")
    larger = config.build()
    larger.load_state_dict(model.state_dict())
    return larger.eval().to(device_of(model))


class Evaluator:
    """A finished model with the first `n` images (None: all) of one split of `data`, ready to judge its reductions.

    accuracy (%), macs, logits (N K) and correct (N) are those of the plain model.
    dtype: autocast.
    """

    def __init__(self, model, data, n=None, *, split="val", dtype=None, batch=256):
        self.plain, self.dtype, self.batch, self.split = reduce_tokens(model).plain, dtype, batch, split
        part = getattr(data, split)
        part = part if n is None else part.take(n)
        size, device = input_size(self.plain, data.image_size), device_of(self.plain)
        self.raw, self.labels, self.classes = part.images, part.labels.to(device), data.classes
        self.images = normalize(part.images.to(device), data.mean, data.std, size=size)
        self.logits, self._judged = self.run(self.plain), {}
        self.correct = self.right(self.logits)
        self.accuracy = 100 * self.correct.double().mean().item()
        self.macs = reduce_tokens(self.plain, r_max=0.0).macs()

    def run(self, model):
        """Logits, float32 N K."""
        return outputs(model, self.images, self.batch, self.images.device, self.dtype)

    def right(self, logits):
        """Whether each image is classified correctly, bool N."""
        return logits.argmax(1) == self.labels

    def judged(self, config):
        """`right` of the plain model with its tokens reduced by a TokenConfig; each is run once."""
        if config not in self._judged:
            self._judged[config] = self.right(self.run(reduce_tokens(self.plain, config)))
        return self._judged[config]

    def remember(self, config, row):
        """Let `judged` take what a row of the same model on the same images already tells; ValueError if of others."""
        self._judged[config] = torch.from_numpy(unpacked(row["right"], len(self.labels))).to(self.labels.device)

    def divergences(self, model):
        """KL divergence of the model's predictions from the plain model's for each image (nats), N."""
        own, goal = (logits.double().log_softmax(1) for logits in (self.run(model), self.logits))
        return (goal.exp() * (goal - own)).sum(1)

    def evaluate(self, model, macs=None, logits=None):
        """{"accuracy", "change" (points against the plain model), "kl", "macs", "share" of the plain model's MACs}."""
        logits, macs = self.run(model) if logits is None else logits, model.macs() if macs is None else macs
        accuracy = 100 * self.right(logits).double().mean().item()
        kl = max(0.0, kl_divergence(logits, self.logits).item())  # rounding may leave a zero below zero
        return {"accuracy": accuracy, "change": accuracy - self.accuracy, "kl": kl, "macs": macs,
                "share": macs / self.macs}  # fmt: skip

    def times(self, models, batch, seconds):
        """{name: milliseconds a pass} of `models` on `batch` images, interleaved."""
        images = example(self.plain, self.images.shape[1:], batch)
        timed = compare(models, images, dtype=self.dtype, seconds=seconds, warmup=2, min_runs=3)
        return {name: t.median_s * 1e3 for name, t in timed.items()}


def judged(rows):
    """Which images were judged rightly, a bool tensor for each row of a DataFrame of rows."""
    return [torch.from_numpy(unpacked(right, n)) for right, n in zip(rows.right, rows.n)]


def difference(right_a, right_b):
    """Accuracy of a minus that of b, as a `statistics.Difference` on the same images, of one seed or of several.

    right_a, right_b: which images were judged rightly, a bool tensor a seed.
    """
    return paired_difference(*right_a, *right_b) if len(right_a) == 1 else paired_seeds(right_a, right_b)


def sweep(evaluators, methods, alphas, r_maxes=(0.6,), *, batch=0, seconds=0.1):
    """Every (alpha, r_max) for every method {name: options of `reduce_tokens`}, the mean over evaluators (one a seed).

    low, high: the 95 % interval of the change. With `batch`, also latency_ms of that many images, all settings of a
    method interleaved, on the first of them.
    """
    rows = []
    for name, options in methods.items():
        grid = [TokenConfig(r_max=r, alpha=a, **options) for a in alphas for r in r_maxes]
        models = {c: [reduce_tokens(e.plain, c) for e in evaluators] for c in grid}
        times = evaluators[0].times({c: m[0] for c, m in models.items()}, batch, seconds) if batch else {}
        for config, each in models.items():
            logits = [e.run(m) for e, m in zip(evaluators, each)]
            found = pd.DataFrame([e.evaluate(m, logits=own) for e, m, own in zip(evaluators, each, logits)])
            apart = difference([e.right(own) for e, own in zip(evaluators, logits)], [e.correct for e in evaluators])
            about = {"method": name, "alpha": config.alpha, "r_max": config.r_max, "tokens": each[0].tokens}
            rows.append(about | found.mean().to_dict() | {"low": apart.low, "high": apart.high,
                                                          "latency_ms": times.get(config), "config": config})
    return pd.DataFrame(rows)


def choose(rows, allowed=0.5):
    """The row of a sweep with the fewest MACs that is at most `allowed` points worse; else the one least worse.

    Its entry `allowed` tells which of the two it is.
    """
    good = rows[rows.change >= -allowed - 1e-9]
    at = good.macs.idxmin() if len(good) else rows.change.idxmax()
    return rows.assign(allowed=bool(len(good))).loc[at]


def speed(evaluator, configs, batches, *, seconds=0.3, mode=""):
    """Measured speed-up of each TokenConfig in {name: config} over the plain model, beside the MAC limit.

    Plain and reduced are interleaved in pairs. mode: of torch.compile ("reduce-overhead" captures a CUDA
    graph); "" runs eagerly. Rows: method, batch, limit (MACs plain / reduced), measured, plain_ms, reduced_ms.
    """
    rows = []
    for name, config in configs.items():
        model = reduce_tokens(evaluator.plain, config)
        pair = {"plain": evaluator.plain, "reduced": model}
        if mode:  # dynamo keeps few versions of one function, whichever model they are of
            torch.compiler.reset()
            pair = {k: torch.compile(m, mode=mode, dynamic=False) for k, m in pair.items()}
        for batch in batches:
            times = evaluator.times(pair, batch, seconds)
            rows.append({"method": name, "batch": batch, "limit": evaluator.macs / model.macs(),
                         "measured": times["plain"] / times["reduced"], "plain_ms": times["plain"],
                         "reduced_ms": times["reduced"]})  # fmt: skip
    return pd.DataFrame(rows)


def adaptive(evaluator, fitting, strengths=(0.3, 0.6, 0.9), *, alpha=1.5, **options):
    """Images choose their own strength, against one strength for all at the same mean MACs: rows.

    "by entropy" cuts the attention's entropy into equal shares of the images of `fitting` (an Evaluator on other
    images); "by a controller" is learnt on them, for the mean number of tokens that such equal shares would leave.
    closer: by how much the choice lowers the KL of its control, on the same images; low and high: its 95 % interval.
    """
    model = reduce_tokens(evaluator.plain)
    base = {"action": "size-priced"} | options | {"alpha": alpha, "protect": (0,)}
    levels = [TokenConfig(r_max=r, **base) for r in strengths]
    costs = [reduce_tokens(evaluator.plain, level).macs() for level in levels]
    by_entropy, learnt = (AdaptiveViT(model, levels, [0.0] * (len(levels) - 1)).eval() for _ in range(2))
    with torch.no_grad():
        sharpness = torch.cat([by_entropy.gaze(x)[0] for x in fitting.images.split(fitting.batch)])
    by_entropy.thresholds = [sharpness.quantile(1 - i / len(levels)).item() for i in range(1, len(levels))]
    fit_controller(learnt, fitting.images, fitting.labels, sum(learnt.shares) / len(levels))
    rows = []
    for name, chooser in {"by entropy": by_entropy, "by a controller": learnt}.items():
        evaluator.run(chooser)
        used = chooser.used
        macs = sum(u * c for u, c in zip(used, costs)) / sum(used)
        fixed = reduce_tokens(evaluator.plain, fit_budget(evaluator.plain, max(macs, min(costs)), **base))
        closer = evaluator.divergences(fixed) - evaluator.divergences(chooser)
        middle, half = t_interval(closer.tolist())
        found = {"closer": middle, "low": middle - half, "high": middle + half}
        rows.append({"chosen": name, "used": used} | evaluator.evaluate(chooser, macs) | found)
        rows.append({"chosen": f"one for all, at the mean cost {name}", "used": None} | evaluator.evaluate(fixed))
    return pd.DataFrame(rows)
