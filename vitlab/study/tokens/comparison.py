"""Methods of token reduction at equal operations and at equal time, and what reduction buys on this machine.

They are judged by an `evaluation.Evaluator`: a finished model with images. What a method chooses (its metric, its
exponent, its counts) it chooses on images of the train split, which another Evaluator has.
"""

import contextlib
import dataclasses
import functools
from statistics import fmean

import pandas as pd
import torch

from vitlab.compress.budget import BudgetImpossible
from vitlab.compress.tokens import search
from vitlab.compress.tokens.latency import TokenLatency
from vitlab.compress.tokens.reduction import ReducedConfig, TokenConfig, reduce_tokens
from vitlab.compress.tokens.scores import SCORES
from vitlab.metrics.statistics import holm
from vitlab.study.tokens.evaluation import difference, speed
from vitlab.utils.device import example

CONTROLS = ("random", "grid")
ATTENTION, RANDOM, GRID = "drop by attention", "drop at random", "drop by a uniform grid"
EVIT = "fuse the dropped (EViT)"
CONSTANT, TOME, TOME_CALIBRATED, INPUT = "ToMe, constant r", "ToMe", "ToMe, calibrated", "ToMe by the input"
PRICED, LENGTHS = "size-priced merge, plain means", "size-priced merge"
ONCE = f"{LENGTHS}, in one block"
PRICED_CALIBRATED, CLOCKED = f"{LENGTHS}, calibrated", f"{LENGTHS}, calibrated to the clock"
POOLED = "all tokens, pooled-last block"
DROPS = {"cls": ATTENTION, "random": RANDOM, "grid": GRID}
CANDIDATES = tuple({"metric": m, "power": p} for m in ("key", "input") for p in (0.0, 0.25, 0.5, 1.0))
SIZE_PRICED = {"action": "size-priced"}
ALONE = TokenConfig(r_max=0.0, pooled_last=True)


def chosen(calibration, share, *, alpha=0.5, candidates=CANDIDATES):
    """(options of the size-priced merge, table): metric and exponent with the least KL at `share` of the MACs.

    calibration: an Evaluator; ValueError if its images are not of "train", so that what is measured elsewhere later
    did not choose its own method. Ties go to the first candidate.
    """
    plain, budget = of_train(calibration).plain, share * calibration.macs
    fitted = [search.fit_budget(plain, budget, alpha=alpha, pooled_last=True, **SIZE_PRICED | c) for c in candidates]
    table = pd.DataFrame([c | {"kl": calibration.evaluate(reduce_tokens(plain, config))["kl"]}
                          for c, config in zip(candidates, fitted)])  # fmt: skip
    return SIZE_PRICED | candidates[table.kl.idxmin()], table


def share_left(evaluator, cut, *, alpha=0.5):
    """The share of the plain model's MACs that is left where `cut` is gone of all that the schedule can take at most.

    So models are asked for as much as each other, whatever they compute before their first block: a stem of
    convolutions keeps its MACs, and with few more than it needs a model would be left with a token or two a block.
    """
    if not 0 < cut < 1:
        raise ValueError(f"cut={cut}: a share of what can go lies between 0 and 1, both excluded")
    emptied = reduce_tokens(evaluator.plain, r_max=0.999, alpha=alpha, pooled_last=True, **SIZE_PRICED)
    return 1 - cut * (1 - emptied.config.macs() / evaluator.macs)


def of_train(evaluator):
    """The Evaluator itself; ValueError unless its images are of the train split."""
    if evaluator.split != "train":
        raise ValueError(f"split={evaluator.split!r}: what a method chooses for itself is chosen on train")
    return evaluator


def distinct(evaluator):
    """The SCORES that differ for this model: where no class token reads, attention given means attention received."""
    read = reduce_tokens(evaluator.plain).adapter.read
    return tuple(score for score in SCORES if read or not score.startswith("received"))


def methods(evaluator, share, *, alpha=0.5, scores=tuple(SCORES), seeds=(0, 1, 2), merge=SIZE_PRICED, calibration=None,
            passes=100):  # fmt: skip
    """{name: [TokenConfig, ...]} that all cost `share` of the plain model's MACs, or just below.

    Every score drops; "random" comes once a seed of `seeds`. All follow the schedule `alpha` but ToMe's own, a constant
    number a block, the calibrated ones, and the one that merges in one block: that of the first half which keeps the
    predictions closest. merge: options of the size-priced merge. calibration: an Evaluator on train images for
    calibrated counts, found with so many passes over them, and for that block; None leaves those out. In all of them
    the last block computes only what the head reads. A method that cannot become so cheap is left out.
    """
    budget, found = share * evaluator.macs, {}
    fit = functools.partial(search.fit_budget, evaluator.plain, budget, pooled_last=True)
    for score in scores:
        config = fit(alpha=alpha, score=score)
        draws = [dataclasses.replace(config, seed=seed) for seed in seeds] if score == "random" else [config]
        found[DROPS.get(score, f"drop by {score}")] = draws
    merges = {
        EVIT: {"action": "fuse"}, CONSTANT: {"action": "merge", "schedule": "constant"}, TOME: {"action": "merge"},
        INPUT: {"action": "merge", "metric": "input"}, PRICED: merge | {"lengths": False}, LENGTHS: merge,
    }  # fmt: skip
    for name, options in merges.items():
        with contextlib.suppress(BudgetImpossible):
            found[name] = [fit(alpha=alpha, **options)]
    if calibration is not None:
        for name, options in {TOME_CALIBRATED: merges[TOME], PRICED_CALIBRATED: merge}.items():
            found[name] = [calibrated(evaluator, calibration, passes, macs=budget, **options)]
        once = search.at_once(evaluator.plain, budget, pooled_last=True, **merge)
        found |= {ONCE: [_closest(evaluator.plain, once, calibration)]} if once else {}
    return found


def _closest(plain, configs, calibration):
    """The TokenConfig with which the predictions on the train images stay closest (KL) to the plain model's."""
    return min(configs, key=lambda config: of_train(calibration).evaluate(reduce_tokens(plain, config))["kl"])


def fields(evaluators, calibrations, share, **options):
    """{name: [a TokenConfig a seed]}: the `methods` that every seed's model has, and the pooled-last block alone."""
    found = [methods(e, share, calibration=c, seeds=(0,), **options) for e, c in zip(evaluators, calibrations)]
    common = [name for name in found[0] if all(name in f for f in found)]
    return {POOLED: [ALONE] * len(found)} | {name: [f[name][0] for f in found] for name in common}


def calibrated(evaluator, calibration, passes=100, **options):
    """The TokenConfig with counts calibrated on train images to a budget (see `search.calibrate`)."""
    step = max(1, reduce_tokens(evaluator.plain).adapter.patches // 16)
    images = of_train(calibration).images
    return search.calibrate(evaluator.plain, images, pooled_last=True, step=step, passes=passes, **options)


def comparison(evaluator, shares, *, batch=32, seconds=0.1, calibration=None, passes=100, merge=SIZE_PRICED, **options):
    """Rows of all `methods` at each share of the MACs: accuracy, change, kl, macs, latency_ms, spread over draws.

    Two more stand beside them at another cost: all tokens with a pooled-last block, and, with calibration images, the
    size-priced merge with the counts that they choose for the time that ToMe takes on this machine.
    """
    rows = []
    meter = None if calibration is None else clock(evaluator, batch, seconds=seconds / 10, **merge)
    for share in shares:
        field = methods(evaluator, share, calibration=calibration, passes=passes, merge=merge, **options)
        field[POOLED] = [ALONE]
        if meter:
            tome = evaluator.times({TOME: reduce_tokens(evaluator.plain, field[TOME][0])}, batch, seconds)[TOME]
            field[CLOCKED] = [calibrated(evaluator, calibration, passes, latency=tome, meter=meter, **merge)]
        models = {name: [reduce_tokens(evaluator.plain, c) for c in configs] for name, configs in field.items()}
        times = evaluator.times({"plain": evaluator.plain} | {n: m[0] for n, m in models.items()}, batch, seconds)
        for name, draws in models.items():
            found = pd.DataFrame([evaluator.evaluate(model) for model in draws])
            rows.append({"method": name, "at": share} | found.mean().to_dict() | {
                "spread": found.accuracy.std(ddof=0), "latency_ms": times[name],
                "time": times[name] / times["plain"], "tokens": draws[0].tokens,
            })  # fmt: skip
    return pd.DataFrame(rows)


def clock(evaluator, batch, *, seconds, **options):
    """The TokenLatency of a method on `batch` images (with a pooled-last block) on this machine."""
    images = example(evaluator.plain, evaluator.images.shape[1:], batch)
    return TokenLatency(evaluator.plain, images, dtype=evaluator.dtype, pooled_last=True, seconds=seconds, **options)


def paired(evaluators, configs, against="plain"):
    """How methods differ in accuracy on the same images: a row a method, of one or several seeds.

    evaluators: one a seed; configs: {name: a TokenConfig a seed}; against: "plain" or a name, what is compared with, or
    {name: another name}.
    Columns: accuracy, change (points, negative is worse), low and high (its 95 % interval, of the images and, for
    several, the seeds), p (adjusted for the number of methods, Holm), macs, text (change and interval, "unclear" where
    p is above 5 %).
    """
    right = {name: [e.judged(c) for e, c in zip(evaluators, each)] for name, each in configs.items()}
    right["plain"], rows = [e.correct for e in evaluators], {}
    others = against if isinstance(against, dict) else {name: against for name in configs if name != against}
    for name, other in others.items():
        found = difference(right[name], right[other])
        macs = fmean(ReducedConfig(base=e.plain.config, tokens=c).macs() for e, c in zip(evaluators, configs[name]))
        rows[name] = {"accuracy": 100 * torch.stack(right[name]).double().mean().item(), "change": found.points,
                      "low": found.low, "high": found.high, "p": found.p, "macs": macs, "text": str(found)}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    table = table.assign(p=holm(table.p.tolist()))
    return table.assign(text=table.text + table.p.gt(0.05).map({True: " (unclear)", False: ""}))


def payoff(evaluator, calibration, batches, goals=(0.8, 0.65, 0.5), *, passes=100, seconds=0.1, merge=SIZE_PRICED):
    """What the size-priced merge, calibrated to the clock on train images, buys at each batch size: rows.

    batch, goal (share of the plain model's time asked for), tokens (of each block), speed_up (measured, in turns with
    the plain model), and the columns of `Evaluator.evaluate`; empty but for the goal where no choice is that fast.
    """
    rows = []
    for batch in batches:
        meter = clock(evaluator, batch, seconds=seconds / 10, **merge)
        plain = evaluator.times({"plain": evaluator.plain}, batch, seconds)["plain"]
        for goal in goals:
            rows.append({"batch": batch, "goal": goal})
            with contextlib.suppress(BudgetImpossible):  # nothing is that fast here
                config = calibrated(evaluator, calibration, passes, latency=goal * plain, meter=meter, **merge)
                timed = speed(evaluator, {"": config}, [batch], seconds=seconds)
                rows[-1] |= {"tokens": config.counts, "speed_up": timed.measured.item()}
                rows[-1] |= evaluator.evaluate(reduce_tokens(evaluator.plain, config))
    columns = ["batch", "goal", "tokens", "speed_up", "accuracy", "change", "kl", "macs", "share"]
    return pd.DataFrame(rows, columns=columns)
