"""Choosing a schedule: per-layer counts by calibration, (r_max, alpha) by a multi-objective search."""

import contextlib
import dataclasses
import itertools
import time
from pathlib import Path

import torch

from vitlab.compress.budget import BudgetImpossible, bisect, demand
from vitlab.compress.pruning.criteria import calibration
from vitlab.compress.tokens.reduction import TokenConfig, reduce_tokens
from vitlab.data.datasets import Dataset
from vitlab.metrics.predict import input_size, kl_divergence, outputs
from vitlab.train.progress import clock
from vitlab.utils.device import device_of

EVERY = 5.0  # seconds between two lines of progress
ALPHAS = (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.5)  # schedules that a calibration starts from


def calibrate(model, images, *, macs=None, latency=None, meter=None, config=None, step=4, passes=200, batch=256,
              log=print, **options):  # fmt: skip
    """Tokens after each block that keep to a budget and change the predictions least: a TokenConfig.

    The budget is `macs` (of one image), or `latency` (ms) by `meter`, a `TokenLatency` of this machine. If all tokens
    fit into it they stay. Else the best of some schedules at that cost is the start: rising ones (`ALPHAS`), and all
    at once in one of the early blocks (`at_once`), which pays where choosing takes longer than what it saves. Then
    counts are exchanged: a block gives `step` tokens to another, what is left of the budget is filled up, and a change
    that lowers the KL divergence from the plain model's predictions stays; when none does, the step is halved, down
    to 1.
    images: normalised, B C H W, of train, never validation or test; or a Dataset, of which 256 are drawn. passes: over
    the images, at most. log: gets a line every few seconds; None: silent. options: as in `reduce_tokens`.

    BudgetImpossible, a ValueError, if the budget cannot be reached; ValueError for images that are not finite floats.
    """
    if (macs is None) == (latency is None) or (latency is None) != (meter is None):
        raise ValueError("give macs=..., or latency=... with meter=TokenLatency(model, images, ...)")
    config = dataclasses.replace(config or TokenConfig(), **options)
    name, budget = ("macs", macs) if latency is None else ("latency", latency)
    demand(name, budget)
    search = _Exchange(model, images, budget, meter, config, batch, passes, log)
    if search.try_counts([search.parts.prefix + search.parts.patches] * search.parts.depth):
        return dataclasses.replace(config, counts=search.counts)
    rising = _fits(model, budget, config, meter, [{"alpha": alpha} for alpha in ALPHAS])
    for start in (*rising, *at_once(model, budget, config, meter=meter)):
        search.try_counts(search.reduced.reduce_by(start).tokens)
    if search.counts is None:
        raise BudgetImpossible(f"{name}={budget}: no schedule of {config.action!r} costs this little or less")
    while step >= 1 and search.passes < passes:
        step = step if search.improve(step) else step // 2
    return dataclasses.replace(config, counts=search.counts)


def _images(model, images):
    """Normalised images that a calibration can use, B C H W, from such images or a Dataset."""
    if isinstance(images, Dataset):
        parts = calibration(images, size=input_size(model, images.image_size))
        images = torch.cat([x for x, _ in parts]).to(device_of(model))
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: give them normalised (data.augment.normalize), or the Dataset")
    if broken := int((~images.flatten(1).isfinite()).any(1).sum()):
        raise ValueError(f"{broken} of {len(images)} images hold values that are not finite")
    return images


def _cost(reduced, meter, **changes):
    """What a TokenViT costs once it is changed: multiply-accumulates, or what `meter(counts)` gives."""
    reduced.reduce_by(**changes)
    return meter(reduced.tokens) if meter else reduced.macs()


class _Exchange:
    """Counts within a budget, the best found so far (`counts`, `kl`), and what was tried."""

    def __init__(self, model, images, budget, meter, config, batch, most, log):
        self.budget, self.meter, self.batch, self.most, self.log = budget, meter, batch, most, log
        self.began = self.said = time.monotonic()
        self.reduced, self.images = reduce_tokens(model, config, r_max=0.0, counts=None), _images(model, images)
        self.parts, self.counts, self.kl, self.passes, self.tried = self.reduced.adapter, None, None, 0, set()
        self.shielded = {p % self.parts.depth for p in config.protect}
        self.reference = self.predict(self.reduced.plain)

    def predict(self, model):
        return outputs(model, self.images, self.batch, self.images.device)

    def cost(self, counts):
        return _cost(self.reduced, self.meter, counts=counts)

    def try_counts(self, counts):
        """Whether these counts are the best so far; those that cost too much, or were tried before, are not."""
        counts = tuple(counts)
        if counts in self.tried or self.cost(counts) > self.budget:
            return False
        self.tried.add(counts)
        self.passes += 1
        kl = kl_divergence(self.predict(self.reduced), self.reference).item()
        better = self.kl is None or kl < self.kl
        if better:
            self.counts, self.kl = counts, kl
        if self.log and time.monotonic() - self.said >= EVERY:
            self.said = time.monotonic()
            left = (self.said - self.began) / self.passes * max(0, self.most - self.passes)
            self.log(f"calibrating: pass {self.passes} of at most {self.most}  KL {self.kl:.4f}  tokens "
                     f"{' '.join(map(str, self.counts))}  left at most {clock(left)}")  # fmt: skip
        return better

    def improve(self, step):
        """One round of exchanges from the best counts; whether any of them stayed."""
        start = self.kl
        for giver, taker in itertools.permutations(range(self.parts.depth), 2):
            if self.passes >= self.most:
                break
            changed = list(self.counts)
            changed[giver] -= step
            changed[taker] += step
            self.try_counts(self.filled(self.allowed(changed), taker))
        return self.kl < start

    def allowed(self, counts):
        """Counts made to fall from block to block, protected ones the same as before them."""
        low, left = self.parts.prefix + 1, self.parts.prefix + self.parts.patches
        found = []
        for layer, count in enumerate(counts):
            left = left if layer in self.shielded else max(low, min(left, count))
            found.append(left)
        return found

    def filled(self, counts, layer):
        """As many tokens for `layer` as the budget allows, else fewer."""
        while self.cost(counts) > self.budget and counts[layer] > self.parts.prefix + 1:
            counts = self.allowed([c - (i == layer) for i, c in enumerate(counts)])
        while True:
            more = self.allowed([c + (i == layer) for i, c in enumerate(counts)])
            if more == counts or self.cost(more) > self.budget:
                return counts
            counts = more


def fit_budget(model, budget, config=None, *, meter=None, **options):
    """The r_max in [0, 1) that brings `model` to at most `budget`: a TokenConfig; for methods at equal cost.

    The budget is in multiply-accumulates of one image, or in what `meter(counts)` gives. BudgetImpossible, a
    ValueError, where no r_max costs so little.
    """
    config = dataclasses.replace(config or TokenConfig(), **options)
    reduced = reduce_tokens(model, config, r_max=0.0, counts=None)
    demand("budget", budget)

    def cost(r_max):
        return _cost(reduced, meter, r_max=r_max)

    low, least = 0.0, float("inf")
    for high in (0.6, 0.9, 0.999):  # by the clock, the steepest reduction need not be the cheapest
        least = min(least, cost(high))
        if least <= budget:
            return dataclasses.replace(config, r_max=bisect(cost, budget, low, high, 30), counts=None)
        low = high
    raise BudgetImpossible(f"{budget:,.6g} {'ms' if meter else 'multiply-accumulates'}: schedule={config.schedule!r}, "
                           f"alpha={config.alpha} reaches no less than {least:,.6g}")  # fmt: skip


def _fits(model, budget, config, meter, choices):
    """`fit_budget` with each of `choices` (options) that reaches the budget: one so late cannot become so cheap."""
    for options in choices:
        with contextlib.suppress(BudgetImpossible):
            yield fit_budget(model, budget, config, meter=meter, **options)


def at_once(model, budget, config=None, *, meter=None, **options):
    """As `fit_budget`, with all that go going in one block: a TokenConfig for each of the first half's blocks.

    A list, the earliest block first; without those that are too late for the budget.
    """
    config = dataclasses.replace(config or TokenConfig(), **options)
    half = range((len(model.blocks) + 1) // 2)
    ways = [{"schedule": "once", "protect": (*config.protect, *range(block))} for block in half]
    return list(_fits(model, budget, config, meter, ways))


def search(evaluate, *, storage, name, trials, r_max=(0.1, 0.9), alpha=(0.5, 3.0), seed=0):
    """Optuna's search over (r_max, alpha), ranges, for high accuracy and low latency: the study (see `best`).

    evaluate(TokenConfig) -> (accuracy, latency) on validation. storage: path of an SQLite file, which several workers
    may share; an existing study of that `name` goes on until `trials` are complete in all.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    Path(storage).parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(storage=f"sqlite:///{Path(storage).resolve()}", study_name=name, load_if_exists=True,
                                directions=["maximize", "minimize"])  # fmt: skip
    # a worker that comes later must not propose what the first did
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), constant_liar=True)

    def objective(trial):
        return evaluate(TokenConfig(r_max=trial.suggest_float("r_max", *r_max),
                                    alpha=trial.suggest_float("alpha", *alpha)))  # fmt: skip

    done = (optuna.trial.TrialState.COMPLETE,)
    if len(study.get_trials(deepcopy=False, states=done)) < trials:
        study.optimize(objective, callbacks=[optuna.study.MaxTrialsCallback(trials, states=done)])
    return study


def best(study):
    """The study's Pareto front, most accurate first: [{"config": TokenConfig, "accuracy", "latency"}]."""
    rows = [{"config": TokenConfig(**t.params), "accuracy": t.values[0], "latency": t.values[1]}
            for t in study.best_trials]  # fmt: skip
    return sorted(rows, key=lambda row: -row["accuracy"])
