"""Arms of a pruning study: cut from a trained arm, trained on, pruned bit by bit; sweeps over criteria."""

import contextlib
import dataclasses
import itertools

import matplotlib.pyplot as plt
import pandas as pd
import torch

from vitlab.compress.budget import BudgetImpossible
from vitlab.compress.pruning import peers
from vitlab.compress.pruning.budget import select
from vitlab.compress.pruning.criteria import calibration, score
from vitlab.compress.pruning.gates import L1, GatedConfig, GatedViT
from vitlab.compress.pruning.structured import shape_of, slim
from vitlab.metrics.measure import accuracy, compare
from vitlab.metrics.predict import logits
from vitlab.metrics.statistics import paired_difference
from vitlab.study import plots
from vitlab.study.label_plots import name_beside
from vitlab.study.study import Arm
from vitlab.train.loop import History, cross_entropy
from vitlab.utils.device import device_of, example
from vitlab.utils.files import digest

KINDS = ("qk", "v", "mlp")


def gated(study, spec, data, seed, *, l1, kinds=KINDS):
    """The Arm of a `zoo.Spec` trained with gates under an L1 penalty; its model is a `GatedViT`."""
    spec = dataclasses.replace(spec, config=GatedConfig(base=spec.config, kinds=kinds))
    return study.arm(spec, data, seed, objective=L1(l1), name=f"{spec.name} gated")


def scored(arm, data, criterion, *, images=256, kinds=KINDS):
    """`score` of an arm's model on so many training images, which the arm's seed draws."""
    batches = calibration(data, images, seed=arm.seed, size=shape_of(arm.model).image_size)
    return score(arm.model, criterion, kinds=kinds, data=batches, seed=arm.seed)


def cut(arm, masks, name, title):
    """The Arm of the smaller model that `masks` leave of an arm's, not trained further ({}: gates folded in)."""
    small = slim(arm.model, masks).eval()
    chosen = {k: m.int().tolist() for k, m in masks.items()}
    spec = dataclasses.replace(arm.spec, name=name, title=title, config=small.config)
    return Arm(name, arm.seed, digest([arm.key, chosen]), small, History(dtype=arm.history.dtype), spec, arm.before)


def tuned(study, arm, data, recipe, name, title, *, objective=cross_entropy, changes=()):
    """The Arm that starts from an arm's weights and trains on.

    recipe: {field: value} of what is set otherwise than in the arm's own; changes: what differs from the published.
    """
    recipe = dataclasses.replace(arm.spec.recipe, **recipe)
    spec = dataclasses.replace(arm.spec, name=name, title=title, recipe=recipe, changes=(*arm.spec.changes, *changes))
    return study.arm(spec, data, arm.seed, start=arm, objective=objective, name=name)


def step_by_step(study, arm, data, recipe, name, title, *, criterion, macs, rounds, images, multiple=8, kinds=KINDS):
    """Prune a little, train on, again, down to `macs`: (Arm, Arms of the rounds). Epochs are divided.

    The history and the epochs of the Arm are those of all rounds, so that its time is what it took.
    """
    start, steps, epochs, before = shape_of(arm.model).macs(), [], recipe["epochs"], arm.epochs
    if not 1 <= rounds <= epochs:
        raise ValueError(f"rounds={rounds}: from 1 to the {epochs} epochs that are divided among them")
    for i in range(rounds):
        target = int(start * (macs / start) ** ((i + 1) / rounds))
        scores = scored(arm, data, criterion, images=images, kinds=kinds)
        masks = select(shape_of(arm.model), scores, macs=target, multiple=multiple)
        part = epochs * (i + 1) // rounds - epochs * i // rounds
        label = name if i + 1 == rounds else f"{name} round {i + 1}"
        arm = tuned(study, cut(arm, masks, name, title), data, recipe | {"epochs": part}, label, title)
        steps.append(arm)
    history = History([row for step in steps for row in step.history.rows], dtype=arm.history.dtype)
    spec = dataclasses.replace(arm.spec, recipe=dataclasses.replace(arm.spec.recipe, epochs=epochs))
    return dataclasses.replace(arm, history=history, spec=spec, before=before), steps


def same(first, second, data, *, images=256, tolerance=1e-4):
    """Largest difference of two models' logits over the first validation images, relative to their size.

    ValueError where it exceeds the tolerance: a cut that is not exact must stop a notebook.
    """
    one, other = (logits(m, data.val.take(images), mean=data.mean, std=data.std)[0] for m in (first, second))
    error = ((one - other).abs().max() / one.abs().max().clamp_min(1e-6)).item()
    if not error <= tolerance:
        raise ValueError(f"the two models differ by {error:.1e} of their largest logit; allowed: {tolerance:.0e}")
    return error


def validated(model, data, dtype=None):
    """Accuracy (%) on the validation images, on which choices are made."""
    return accuracy(model, data.val, mean=data.mean, std=data.std, num_classes=data.num_classes, dtype=dtype).top1


def chooser(arm, data, *, criterion, kinds=KINDS, images=256, **options):
    """masks(share of the MACs) of one way to choose what goes: by a criterion of ours, or of torch-pruning.

    options: of `select`; torch-pruning takes `multiple` alone. BudgetImpossible for a share that it cannot reach.
    """
    full = shape_of(arm.model).macs()
    if criterion in peers.IMPORTANCES:
        folded = slim(arm.model)  # gates are multiplied in
        return lambda share: peers.torch_pruning(folded, share * full, importance=criterion, **options)
    scores = scored(arm, data, criterion, images=images, kinds=kinds)
    return lambda share: select(shape_of(arm.model), scores, macs=share * full, **options)


def choosers(arm, data, ways, **options):
    """{name: `chooser`} of ways: criteria, or {name: {"criterion", "kinds", and options of `select`}}."""
    ways = ways if isinstance(ways, dict) else {name: {"criterion": name} for name in ways}
    return {name: chooser(arm, data, **options | way) for name, way in ways.items()}


def sweep(arm, data, ways, shares, *, batch=64, seconds=0.5, **options):
    """Every way of choosing what goes (see `choosers`), at every share of the MACs, without training on: a DataFrame.

    Columns: way, share, macs, accuracy (%, validation images), change (points against the unpruned model; low and high:
    its 95 % interval, on the same images), latency_ms (of a batch, all models in turns), images.
    The first row is unpruned; a share that a way cannot reach has no row.
    """
    models = {("unpruned", 1.0): slim(arm.model).eval()}
    for (name, masks), share in itertools.product(choosers(arm, data, ways, **options).items(), shares):
        with contextlib.suppress(BudgetImpossible):  # such as MLPs alone, far down
            models[name, share] = slim(arm.model, masks(share)).eval()
    return _judged(arm, data, models, batch, seconds)


def at_latency(arm, data, ways, reference, *, batch=64, seconds=0.5, steps=6, **options):
    """Every way of choosing what goes at the latency of the model `reference`, without training on: rows as of `sweep`.

    Of each way the largest share of the MACs, to 1 / 2^steps, with which `batch` images take no longer than the
    reference: by bisection, the two timed in turns at each step. In the end all are timed anew, in turns as well, which
    undoes what luck chose; the first rows are the unpruned model and the reference.
    """
    dtype, pictures = _timing(arm, batch)
    models = {("unpruned", 1.0): slim(arm.model).eval(),
              ("reference", reference.config.macs() / shape_of(arm.model).macs()): reference}  # fmt: skip
    for name, masks in choosers(arm, data, ways, **options).items():
        low, high, fits = 0.0, 1.0, {}
        for _ in range(steps):
            share, slow = (low + high) / 2, False
            with contextlib.suppress(BudgetImpossible):  # too small for this way
                model = slim(arm.model, masks(share)).eval()
                times = compare({"": model, "reference": reference}, pictures, dtype=dtype, seconds=seconds, min_runs=5)
                slow = times[""].median_s > times["reference"].median_s
                fits = fits if slow else {(name, share): model}
            low, high = (low, share) if slow else (share, high)
        models |= fits
    return _judged(arm, data, models, batch, seconds)


def _timing(arm, batch):
    shape = shape_of(arm.model)
    size = (shape.in_chans, shape.image_size, shape.image_size)
    return arm.spec.recipe.torch_dtype(device_of(arm.model)), example(arm.model, size, batch)


def _judged(arm, data, models, batch, seconds):
    """Rows of {(way, share): model}, the first of which is the unpruned one."""
    dtype, pictures = _timing(arm, batch)
    times, rows, whole = compare(models, pictures, dtype=dtype, seconds=seconds, warmup=2, min_runs=5), [], None
    for (way, share), model in models.items():
        found, labels = logits(model, data.val, mean=data.mean, std=data.std, dtype=dtype)
        right = found.argmax(1) == labels
        whole = right if whole is None else whole
        apart = paired_difference(right, whole)
        rows.append({"way": way, "share": share, "macs": model.config.macs(), "images": batch,
                     "accuracy": 100 * right.double().mean().item(), "change": apart.points, "low": apart.low,
                     "high": apart.high, "latency_ms": times[way, share].median_s * 1e3})  # fmt: skip
    return pd.DataFrame(rows)


def ranking(rows, title=""):
    """What a `sweep` cost in accuracy, against MACs and against latency: one line a way, from the unpruned model on.

    Bars: 95 %, on the same images. Points up to one are drawn to scale, larger losses by their logarithm, so that a way
    that fails hides no other.
    """
    figure, axes = plt.subplots(1, 2, figsize=(plots.WIDTH, 3.2), sharey=True)
    before, cuts, ends = rows[rows.way == "unpruned"].iloc[0], rows[rows.way != "unpruned"], {}
    for ax, column, unit in zip(axes, ("macs", "latency_ms"), (1e-6, 1.0)):
        for name, (colour, marker) in plots.colours(cuts.way).items():
            line = rows[rows.way.isin([name, "unpruned"])].sort_values("macs")
            ax.errorbar(line[column] * unit, line.change, (line.change - line.low, line.high - line.change),
                        color=colour, marker=marker, markersize=5, elinewidth=1)  # fmt: skip
            ends[name] = line[column].iloc[0] * unit, line.change.iloc[0], colour
        ax.plot(before[column] * unit, 0, "k*", markersize=10)
        ends["unpruned"] = before[column] * unit, 0, "k"
        ax.set_yscale("symlog", linthresh=1, subs=(2, 5))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
    axes[0].set(xlabel="MACs (M)", ylabel="change in validation\naccuracy (points)", title=title)
    axes[1].set(xlabel=f"latency of {int(before.images)} images (ms)")
    name_beside(axes[1], ends)
    return figure


def kept_share(config, masks):
    """What is left under `masks`, in %: a DataFrame, a row a block; columns: query/key, value, MLP and, of
    the value channels, each head."""
    lines = {}
    for i, block in enumerate(config.shapes):
        part = {kind: masks.get(f"blocks.{i}.{kind}", torch.ones(1)).float() for kind in KINDS}
        line = {"q, k": part["qk"].mean(), "v": part["v"].mean(), "MLP": part["mlp"].mean()}
        of_heads = masks.get(f"blocks.{i}.v", torch.ones(block.v)).float().split([v for _, v in block.each_head])
        line |= {f"head {j + 1}": head.mean() for j, head in enumerate(of_heads)}
        lines[f"block {i + 1}"] = {k: 100 * v.item() for k, v in line.items()}
    return pd.DataFrame.from_dict(lines, orient="index")


def relative(rows, columns, base):
    """Change of `columns` in % of the arm `base` of the same seed; a DataFrame with arm and seed, gaps kept."""
    below = rows[rows.arm == base].set_index("seed").loc[rows.seed, columns].astype(float).to_numpy()
    return pd.concat([rows[["arm", "seed"]], 100 * (rows[columns].astype(float) / below - 1)], axis=1)


def credit(epochs, teacher):
    """Whether what distillation was credited with was the epochs that came along, in words.

    epochs, teacher: what each brought, lines (low, high, p) of `comparisons.compared`. Only what is clearly above zero,
    and above all that the other may have brought, is called most of it.
    """
    for more, less, words in ((epochs, teacher, "was"), (teacher, epochs, "was not")):
        if more.p <= 0.05 and more.low > max(0.0, less.high):
            return f"Most of what was credited to distillation {words} the epochs."
    return "How much of what was credited to distillation was the epochs cannot be told from these runs."


def published_export(arm, masks):
    """The slim model as the published export makes it: gates forgotten, channels dealt out evenly to the heads.

    The kept channels of a block keep their order and are split into equal heads wherever they came from; what
    does not divide is left out at the end. For showing what that costs; `cut` is what to use.
    """
    core = arm.model.core if isinstance(arm.model, GatedViT) else arm.model
    exact, blocks = slim(core, masks), []
    state = exact.state_dict()
    for i, block in enumerate(exact.config.shapes):
        heads, at = len(block.each_head) and len(core.config.shapes[i].each_head), f"blocks.{i}.attn."
        qk, v = (block.qk // heads, block.v // heads) if heads else (0, 0)
        for name in (at + "qkv.weight", at + "qkv.bias"):
            if heads and name in state:
                parts = state[name].split((block.qk, block.qk, block.v))
                state[name] = torch.cat([p[: heads * n] for p, n in zip(parts, (qk, qk, v))])
        state[at + "proj.weight"] = state[at + "proj.weight"][:, : heads * v]
        blocks.append(dataclasses.replace(block, heads=((heads, qk, v),) if heads else ()))
    model = dataclasses.replace(exact.config, blocks=tuple(blocks)).build()
    model.load_state_dict(state)
    return model.to(device_of(arm.model)).eval()


def exports(gated, cuts, masks, data):
    """Rows (arm, seed, val_accuracy) of each cut, exact and exported as published, and {name: that pair of arms}.

    gated: the Arms that were cut, one a seed; cuts: {name: Arms of the same seeds}; masks: {(name, seed): its masks}.
    """
    rows, pairs = [], {name: (f"{name} as published", name) for name in cuts}
    for name, arm, small in ((name, *both) for name, smalls in cuts.items() for both in zip(gated, smalls)):
        wrong = published_export(arm, masks[name, arm.seed])
        rows += [{"arm": label, "seed": arm.seed, "val_accuracy": validated(model, data)}
                 for label, model in zip(pairs[name], (wrong, small.model))]  # fmt: skip
    return pd.DataFrame(rows), pairs
