"""Choosing a schedule: per-layer counts by calibration, (r_max, alpha) by a multi-objective search."""

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F

from vitlab.compress.tokens import TokenConfig, keep
from vitlab.inference import device_of, running


@torch.no_grad()
def damage(model, reference, images, batch=256):
    """Mean Kullback-Leibler divergence (nats) of `model`'s predictions from the logits `reference` (B K).

    It needs no labels and, unlike accuracy, tells small changes apart.
    """
    found = torch.cat([model(part) for part in images.split(batch)]).float().log_softmax(1)
    return F.kl_div(found, reference.log_softmax(1), reduction="batchmean", log_target=True).item()


def calibrate(model, images, *, macs, config=None, step=4, batch=256, log=None, **options):
    """Tokens after each block that cost at most `macs` and change the predictions least: a TokenConfig.

    Greedy from the full model: of all blocks, the one is next to lose `step` tokens (there and, where fewer are
    left, in the blocks after) whose change costs the least damage per multiply-accumulate saved; damage is
    measured on `images` (normalised, B C H W; from train or validation, never test). The cost is about
    depth * tokens * depth / step passes over `images`. config and options: as in `keep`, without counts.

    ValueError if `macs` cannot be reached.
    """
    config = dataclasses.replace(config or TokenConfig(), **options)
    reduced = keep(model, dataclasses.replace(config, r_max=0.0, counts=None))
    n = reduced.anatomy.prefix + reduced.anatomy.patches
    least = reduced.anatomy.prefix + config.minimum
    with running([reduced], device_of(reduced)):
        reference = torch.cat([reduced.plain(part) for part in images.split(batch)]).float()
        counts, cost, harm = (n,) * reduced.anatomy.depth, reduced.macs(), 0.0
        while cost > macs:
            trials = []
            for candidate in _candidates(counts, step, least, config.protect):
                saved = cost - reduced.reduce_by(counts=candidate).macs()
                if saved > 0:
                    trials.append(((damage(reduced, reference, images, batch) - harm) / saved, candidate))
            if not trials:
                raise ValueError(f"macs={macs}: these blocks cannot cost less than {cost} multiply-accumulates")
            counts = min(trials)[1]
            cost = reduced.reduce_by(counts=counts).macs()
            harm = damage(reduced, reference, images, batch)
            if log:
                log(f"{cost / 1e6:.2f} MMac  damage {harm:.4f}  tokens {list(counts)}")
    return dataclasses.replace(config, counts=counts)


def _candidates(counts, step, least, protect):
    """Every way to take `step` tokens more away in one block; the blocks after it keep no more than it."""
    depth, found = len(counts), []
    shielded = {p % depth for p in protect}
    for layer, count in enumerate(counts):
        if layer in shielded or count <= least:
            continue
        lower = max(least, count - step)
        changed = (*counts[:layer], *(min(c, lower) for c in counts[layer:]))
        if changed not in found:
            found.append(changed)
    return found


def at_macs(model, macs, config=None, **options):
    """The r_max in [0, 1) that brings `model` to at most `macs`: a TokenConfig; for arms at equal cost."""
    config = dataclasses.replace(config or TokenConfig(), **options)
    reduced, low, high = keep(model, config), 0.0, 0.999
    if reduced.reduce_by(r_max=high, counts=None).macs() > macs:
        raise ValueError(f"macs={macs}: alpha={config.alpha} reaches no less than {reduced.macs()}")
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if reduced.reduce_by(r_max=middle).macs() <= macs else (middle, high)
    return dataclasses.replace(config, r_max=high, counts=None)


def search(evaluate, *, storage, name, trials, r_max=(0.1, 0.9), alpha=(0.5, 3.0), choices=None, seed=0, log=None):
    """Optuna's search over (r_max, alpha) and `choices` for high accuracy and low latency: the study.

    evaluate(config) -> (accuracy, latency) on validation. storage: path of an SQLite file (several workers or
    machines that share it work on one study) or any address Optuna takes; an existing study of that `name`
    goes on until `trials` are complete in all. choices: {field of TokenConfig: values}, such as {"action":
    ("drop", "merge")}. `best` gives the trade-off it found.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    address = str(storage)
    if "://" not in address:
        Path(address).parent.mkdir(parents=True, exist_ok=True)
        address = f"sqlite:///{Path(address).resolve()}"
    study = optuna.create_study(storage=address, study_name=name, load_if_exists=True,
                                directions=["maximize", "minimize"])  # fmt: skip
    # a worker that comes later must not propose what the first did
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), constant_liar=True)

    def objective(trial):
        config = {"r_max": trial.suggest_float("r_max", *r_max), "alpha": trial.suggest_float("alpha", *alpha)}
        config |= {key: trial.suggest_categorical(key, values) for key, values in (choices or {}).items()}
        return evaluate(TokenConfig(**config))

    done = (optuna.trial.TrialState.COMPLETE,)
    stop = optuna.study.MaxTrialsCallback(trials, states=done)
    if len(study.get_trials(deepcopy=False, states=done)) < trials:
        study.optimize(objective, callbacks=[stop] + ([lambda s, t: log(t.params, t.values)] if log else []))
    return study


def best(study):
    """The study's Pareto front, most accurate first: [{"config": TokenConfig, "accuracy", "latency"}]."""
    rows = [{"config": TokenConfig(**t.params), "accuracy": t.values[0], "latency": t.values[1]}
            for t in study.best_trials]  # fmt: skip
    return sorted(rows, key=lambda row: -row["accuracy"])


__all__ = ["at_macs", "best", "calibrate", "damage", "search"]
