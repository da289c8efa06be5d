"""Figures of token reduction: sweeps, kept and merged patches, methods at equal cost and against time, intervals."""

import textwrap

import matplotlib.pyplot as plt
import seaborn as sns
import torch
import torch.nn.functional as F

from vitlab.compress.tokens.merge import MERGES
from vitlab.study.label_plots import name_beside
from vitlab.study.plots import WIDTH, colours, faded
from vitlab.study.tokens.comparison import DROPS


def heatmaps(sweeps, columns, *, title=""):
    """Heatmaps of sweeps {method: rows}, alpha down and r_max along, one line a method, on one scale a column.

    columns: {column of the rows: (label, digits, factor)}.
    """
    size = (WIDTH * 1.3, 1.0 + len(sweeps) * (0.7 + 0.3 * next(iter(sweeps.values())).alpha.nunique()))
    figure, axes = plt.subplots(len(sweeps), len(columns), figsize=size, squeeze=False)
    for i, (column, (label, digits, factor)) in enumerate(columns.items()):
        found = {name: rows.pivot(index="alpha", columns="r_max", values=column) * factor
                 for name, rows in sweeps.items()}  # fmt: skip
        low, high = min(f.min().min() for f in found.values()), max(f.max().max() for f in found.values())
        for ax, (name, table) in zip(axes[:, i], found.items()):
            sns.heatmap(table, vmin=low, vmax=high, annot=table.shape[1] <= 10, fmt=f".{digits}f", cmap="cividis",
                        ax=ax, linewidths=0.5, annot_kws={"fontsize": 7}, cbar=False)  # fmt: skip
            ax.set_title(f"{name}: {label}", fontsize=8)
            ax.tick_params(axis="y", rotation=0)
    figure.suptitle(title, fontsize=10)
    return figure


def changes(rows, *, title=""):
    """Change of accuracy of a `sweep` against alpha, one line a method, named at its end, with 95 % intervals."""
    figure, ax = plt.subplots(figsize=(WIDTH * 0.75, 3))
    ends = {}
    for name, (colour, marker) in colours(rows.method).items():
        part = rows[rows.method == name].sort_values("alpha")
        ax.errorbar(part.alpha, part.change, (part.change - part.low, part.high - part.change), color=colour,
                    marker=marker, markersize=5, elinewidth=1)  # fmt: skip
        ends[name] = part.alpha.iloc[-1], part.change.iloc[-1], colour
    ax.axhline(0, color="0.3", linestyle="--", linewidth=1)
    ax.set(xlabel="alpha", ylabel="change of validation\naccuracy (points)", title=title)
    name_beside(ax, ends | {"plain": (ax.get_xlim()[1], 0, "0.3")})
    return figure


def views(images, model, seen):
    """[(label, uint8 N C H W)] of the images and what is left of them after each block of a TokenViT.

    seen: its intermediates. Where it merges, the patches of a token are filled with their mean colour; else patches
    that are gone are pale.
    """
    found, grid = [("image", images.cpu())], model.adapter.grid
    for block, (kept, owner) in enumerate(zip(seen["kept"], seen["owners"]), 1):
        if model.token_config.action in MERGES:
            view = mosaic(images, owner.cpu().unflatten(1, (grid, grid)))
        else:
            view = faded(images, present(kept, owner.shape[1]).unflatten(1, (grid, grid)))
        found.append((f"block {block}\n{model.tokens[block - 1]} left", view))
    return found


def present(kept, patches):
    """Positions N k (-1: a fused token, which has none) -> N patches, True where the patch is kept."""
    there = torch.zeros(len(kept), patches + 1, dtype=torch.bool)
    # -1 lands in a last column that is cut off
    return there.scatter_(1, kept.cpu() % (patches + 1), True)[:, :-1]


def mosaic(images, owner):
    """uint8 N C H W, each pixel in the mean colour of the token (N rows columns) that its patch belongs to."""
    images = images.cpu().float()
    token = F.interpolate(owner[:, None].float(), images.shape[-2:]).long().expand_as(images).flatten(2)  # N C HW
    flat, count = images.flatten(2), int(owner.max()) + 1
    sums = torch.zeros(len(images), images.shape[1], count).scatter_add_(2, token, flat)
    sizes = torch.zeros_like(sums).scatter_add_(2, token, torch.ones_like(flat))
    return (sums / sizes.clamp_min(1)).gather(2, token).view_as(images).to(torch.uint8)


def divergence(rows, *, title=""):
    """KL of methods at equal cost on a log axis, closest to the plain model on top, one marker a share of the MACs."""
    table = rows.pivot(index="method", columns="at", values="kl")
    table = table.loc[table.mean(axis=1).sort_values().index]
    figure, ax = plt.subplots(figsize=(WIDTH, 0.9 + 0.22 * len(table)))
    for share, (colour, marker) in colours(sorted(table, reverse=True)).items():
        ax.plot(table[share], table.index, marker, color=colour, label=f"{100 * share:.0f} % of the MACs")
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="divergence from the plain model's predictions (nats)", title=title)
    ax.legend(fontsize=8)
    return figure


def frontier(rows, names, *, title=""):
    """Change of accuracy against MACs and against time (both in % of plain), a named line through a method's shares.

    The axis ends a little below the merging methods: what is far worse runs out of it.
    """
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH * 1.2, 3.4), sharey=True)
    ends = {"plain": (100, 0, "k")}
    for ax, (column, label) in zip(axes, {"share": "MACs", "time": "latency of the batch"}.items()):
        for name, (colour, marker) in colours(names).items():
            part = rows[rows.method == name].sort_values(column)
            ax.plot(100 * part[column], part.change, color=colour, marker=marker, markersize=5)
            if len(part):
                ends[name] = 100 * part[column].iloc[-1], part.change.iloc[-1], colour
        ax.plot(100, 0, "k*", markersize=11)
        ax.set(xlabel=f"{label} (% of plain)")
    low, high = rows[rows.method.isin(set(names) - set(DROPS.values()))].change.min(), rows.change.max()
    axes[0].set(ylabel="change of validation accuracy (points)", ylim=(1.15 * low - 0.2, max(high, 0) + 0.3))
    name_beside(axes[1], ends)
    figure.suptitle(title, fontsize=10)
    return figure


def intervals(frames, *, label):
    """Changes with their intervals (columns change, low, high), one line a method, one panel an entry of `frames`."""
    size = (WIDTH * 1.2, 1.5 + 0.26 * max(map(len, frames.values())))
    figure, axes = plt.subplots(1, len(frames), figsize=size, squeeze=False, sharey=True)
    for ax, (name, found) in zip(axes[0], frames.items()):
        ax.errorbar(found.change, found.index, xerr=(found.change - found.low, found.high - found.change), fmt="o")
        ax.axvline(0, color="0.3", linestyle="--", linewidth=1)
        ax.set_title(textwrap.fill(name, 30), fontsize=8)
    axes[0][0].invert_yaxis()
    figure.supxlabel(label, fontsize=9)
    return figure
