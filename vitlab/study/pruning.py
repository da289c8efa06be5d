"""Arms of a pruning study: cut from a trained arm, trained on, pruned bit by bit; sweeps over criteria."""

import contextlib
import dataclasses

import matplotlib.pyplot as plt
import pandas as pd
import torch

from vitlab.compress.budget import BudgetImpossible
from vitlab.compress.pruning.budget import select
from vitlab.compress.pruning.criteria import calibration, score
from vitlab.compress.pruning.gates import L1, GatedConfig, GatedViT
from vitlab.compress.pruning.structured import shape_of, slim
from vitlab.metrics.measure import accuracy, compare
from vitlab.metrics.predict import logits
from vitlab.study import plots
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


def sweep(arm, data, ways, shares, *, images=256, multiple=8, batch=64, seconds=0.5):
    """Every way of choosing what goes, at every share of the MACs, without training on: a DataFrame.

    ways: criteria, or {name: {"criterion", "kinds", and options of `select`}}. Columns: way, share, macs,
    accuracy (%, validation images), latency_ms (of a batch; all models are timed against each other in turn,
    the unpruned one with them), images. The first row is unpruned; a share that a way cannot reach has no row.
    """
    shape, dtype = shape_of(arm.model), arm.spec.recipe.torch_dtype(device_of(arm.model))
    ways = ways if isinstance(ways, dict) else {name: {"criterion": name} for name in ways}
    models = {("unpruned", 1.0): slim(arm.model).eval()}
    for name, options in ways.items():
        options = {"kinds": KINDS, "multiple": multiple} | options
        scores = scored(arm, data, options.pop("criterion"), images=images, kinds=options.pop("kinds"))
        for share in shares:
            with contextlib.suppress(BudgetImpossible):  # such as MLPs alone, far down
                masks = select(shape, scores, macs=share * shape.macs(), **options)
                models[name, share] = slim(arm.model, masks).eval()
    pictures = example(arm.model, (shape.in_chans, shape.image_size, shape.image_size), batch)
    times = compare(models, pictures, dtype=dtype, seconds=seconds, warmup=2, min_runs=5)
    return pd.DataFrame([
        {"way": name[0], "share": name[1], "macs": model.config.macs(), "images": batch,
         "accuracy": validated(model, data, dtype), "latency_ms": times[name].median_s * 1e3}
        for name, model in models.items()
    ])  # fmt: skip


def ranking(rows, title=""):
    """What a `sweep` cost in accuracy, against MACs and against latency: one line a way, from the unpruned model on.

    Points up to one are drawn to scale, larger losses by their logarithm, so that a way that fails hides no other.
    """
    figure, axes = plt.subplots(1, 2, figsize=(plots.WIDTH, 3.2), sharey=True)
    whole, cuts = rows[rows.way == "unpruned"], rows[rows.way != "unpruned"]
    before = whole.iloc[0]
    for ax, column, unit in zip(axes, ("macs", "latency_ms"), (1e-6, 1.0)):
        for name, (colour, marker) in plots.colours(cuts.way).items():
            line = rows[rows.way.isin([name, "unpruned"])].sort_values("macs")
            ax.plot(line[column] * unit, line.accuracy - before.accuracy, color=colour, marker=marker, markersize=5,
                    label=name)  # fmt: skip
        ax.plot(before[column] * unit, 0, "k*", markersize=10, label="unpruned", linestyle="none")
        ax.set_yscale("symlog", linthresh=1, subs=(2, 5))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
    axes[0].set(xlabel="MACs (M)", ylabel="change in validation\naccuracy (points)", title=title)
    axes[1].set(xlabel=f"latency of {int(before.images)} images (ms)")
    figure.legend(*axes[1].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
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
