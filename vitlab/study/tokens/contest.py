"""Rivals of token reduction at equal operations and at equal time, and what reduction buys on this machine.

They are judged by a `token_study.Evaluator`: a finished model with validation images.
"""

import contextlib
import dataclasses
from statistics import fmean, pstdev

import numpy as np
import pandas as pd

from vitlab.compress.budget import BudgetImpossible
from vitlab.compress.tokens import reduction as tokens
from vitlab.compress.tokens.latency import TokenLatency
from vitlab.compress.tokens.scores import SCORES
from vitlab.compress.tokens.search import fit_budget, calibrate
from vitlab.metrics import measure

CONTROLS = ("random", "grid")
TOME, WARD, CALIBRATED = "merge pairs (ToMe)", "Ward, lengths kept", "Ward, calibrated counts"
LATE = "merge pairs, drop in the last blocks"
CLOCKED, LEAN = "Ward, calibrated to the clock", "all tokens, last block lean"
OTHER = "at another cost"  # the group of rivals that do not meet the others at equal MACs
ACTIONS = {
    "fuse the dropped into one (EViT)": {"action": "fuse"},
    "merge into the nearest kept": {"action": "nearest"},
    "merge pairs, important ones dear": {"action": "edge"},
    TOME: {"action": "merge"},
    "ToMe, alike in the input": {"action": "merge", "metric": "input"},
    "Ward, plain means": {"action": "ward", "lengths": False},
    WARD: {"action": "ward"},
}


def rivals(probe, share, *, alpha=0.5, scores=tuple(SCORES), seeds=(0, 1, 2), late=-2, calibration=None, passes=100):
    """{name: (group, [TokenConfig, ...])} that all cost `share` of the plain model's MACs, or just below.

    Every score drops; every action goes by the score "cls"; "random" comes once a seed of `seeds`. All follow the
    schedule `alpha` but one: calibration: normalised images (not of the test split) for the calibrated counts,
    found with so many passes over them; None leaves that rival out. In all of them the last block computes only what
    the head reads.
    """
    target, found = share * probe.macs, {}
    for score in scores:
        draws = seeds if score == "random" else (0,)
        group = "control" if score in CONTROLS else "drop by score"
        config = fit_budget(probe.plain, target, alpha=alpha, score=score, pooled_last=True)
        found[f"drop, {score}"] = (group, [dataclasses.replace(config, seed=seed) for seed in draws])
    for name, options in (ACTIONS | {LATE: {"action": "merge", "late": late}}).items():
        found[name] = ("merge", [fit_budget(probe.plain, target, alpha=alpha, pooled_last=True, **options)])
    if calibration is not None:
        found[CALIBRATED] = ("merge", [calibrated(probe, calibration, passes, macs=target)])
    return found


def calibrated(probe, images, passes=100, **budget):
    """The TokenConfig of Ward merging with counts calibrated on `images` to a budget (see `calibrate`)."""
    step = max(1, tokens.reduce_tokens(probe.plain).adapter.patches // 16)
    return calibrate(probe.plain, images, action="ward", pooled_last=True, step=step, passes=passes, **budget)


def contest(probe, shares, *, batch=32, seconds=0.1, calibration=None, passes=100, **options):
    """Rows of all `rivals` at each share of the MACs: accuracy, lost, kl, macs, latency_ms, spread over seeds.

    Two more stand beside them at another cost: all tokens with a lean last block, and, with calibration images, Ward
    with the counts that they choose for the time that ToMe takes on this machine.
    """
    rows = []
    meter = None if calibration is None else clock(probe, batch, seconds=seconds / 10)
    for share in shares:
        field = rivals(probe, share, calibration=calibration, passes=passes, **options)
        field[LEAN] = (OTHER, [tokens.TokenConfig(r_max=0.0, pooled_last=True)])
        models = {name: [tokens.reduce_tokens(probe.plain, c) for c in configs] for name, (_, configs) in field.items()}
        if meter:
            tome = probe.times({TOME: models[TOME][0]}, batch, seconds)[TOME]
            best = calibrated(probe, calibration, passes, latency=tome, meter=meter)
            field[CLOCKED], models[CLOCKED] = (OTHER, [best]), [tokens.reduce_tokens(probe.plain, best)]
        times = probe.times({"plain": probe.plain} | {n: m[0] for n, m in models.items()}, batch, seconds)
        for name, (group, _) in field.items():
            looks = [probe.look(model) for model in models[name]]
            mean = {key: fmean(look[key] for look in looks) for key in looks[0]}
            rows.append({"rival": name, "group": group, "at": share} | mean | {
                "spread": pstdev([look["accuracy"] for look in looks]), "latency_ms": times[name],
                "speed_up": times["plain"] / times[name], "tokens": models[name][0].tokens,
            })  # fmt: skip
    return pd.DataFrame(rows)


def clock(probe, batch, **options):
    """The TokenLatency of Ward merging on `batch` images (with a lean last block) on this machine."""
    images = measure.example(probe.plain, probe.images.shape[1:], batch)
    return TokenLatency(probe.plain, images, dtype=probe.dtype, action="ward", pooled_last=True, **options)


def payoff(probe, images, batches, goals=(0.8, 0.65, 0.5), *, passes=100, seconds=0.1):
    """What Ward merging, calibrated to the clock on `images`, buys at each batch size: rows.

    batch, goal (share of the plain model's time asked for), tokens (of each block; None where no choice is that
    fast), speed_up (measured, in turns with the plain model), and the columns of `Evaluator.look`.
    """
    rows = []
    for batch in batches:
        meter = clock(probe, batch, seconds=seconds / 10)
        plain = probe.times({"plain": probe.plain}, batch, seconds)["plain"]
        for goal in goals:
            nothing = dict.fromkeys(("speed_up", "accuracy", "lost", "kl", "macs", "share"), float("nan"))
            row = {"batch": batch, "goal": goal, "tokens": None} | nothing
            with contextlib.suppress(BudgetImpossible):  # nothing is that fast here
                config = calibrated(probe, images, passes, latency=goal * plain, meter=meter)
                model = tokens.reduce_tokens(probe.plain, config)
                times = probe.times({"plain": probe.plain, "reduced": model}, batch, seconds)
                row |= {"tokens": model.tokens, "speed_up": times["plain"] / times["reduced"]} | probe.look(model)
            rows.append(row)
    return pd.DataFrame(rows)


def pooled(frames):
    """The mean over frames of `contest`, one a seed; `spread` is the deviation over them where there are several."""
    rows = pd.concat(frames)
    groups = rows.groupby(["at", "rival", "group"], sort=False)
    mean = groups.mean(numeric_only=True)
    if len(frames) > 1:
        mean["spread"] = groups.accuracy.std()
    return mean.reset_index()


def same_latency(rows, against=TOME, columns=("kl", "lost")):
    """Rivals at the latency that `against` has at each share of the MACs: rows rival, at (that share), time,
    and `columns`.

    time is the share of the plain model's latency, timed in turns with it: absolute ones from different moments
    do not compare. A rival's columns lie on the straight line between its own shares. One that is faster than that at
    every share is read at its slowest; one that is never as fast has no row.
    """
    rows, found = rows.assign(time=1 / rows.speed_up), []
    for at, time in rows.loc[rows.rival == against, ["at", "time"]].itertuples(index=False):
        for name, part in rows.groupby("rival", sort=False):
            part = part.sort_values("time")
            if part.time.iloc[0] <= time:
                there = {c: np.interp(time, part.time, part[c]) for c in columns}
                found.append({"rival": name, "at": at, "time": time} | there)
    return pd.DataFrame(found, columns=["rival", "at", "time", *columns])
