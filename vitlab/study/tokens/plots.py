"""Figures of token reduction: counts, sweeps, kept patches and merged ones, rivals, speed beside its limit."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.ticker import NullFormatter

from vitlab.study.plots import WIDTH, colours


def lines(curves, *, x, y, level=None, level_name="plain", errors=None):
    """{label: (x values, y values)} as lines; `level` draws a horizontal line with its name."""
    figure, ax = plt.subplots(figsize=(WIDTH, 3.4))
    for name, (colour, marker) in colours(curves).items():
        ax.errorbar(*curves[name], yerr=(errors or {}).get(name), color=colour, marker=marker, markersize=5, label=name)
    if level is not None:
        ax.axhline(level, color="0.3", linestyle="--", linewidth=1, label=level_name)
    ax.set(xlabel=x, ylabel=y)
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def heatmaps(rows, columns, *, index="alpha", across="r_max", title=""):
    """One heatmap a column of `rows` ({column: (label, digits, scale)}), index down and `across` along."""
    figure, axes = plt.subplots(1, len(columns), figsize=(WIDTH * 1.35, 1.4 + 0.3 * rows[index].nunique()),
                                squeeze=False)  # fmt: skip
    for ax, (column, (label, digits, scale)) in zip(axes[0], columns.items()):
        table = rows.pivot_table(index=index, columns=across, values=column) * scale
        sns.heatmap(table, annot=table.shape[1] <= 10, fmt=f".{digits}f", cmap="cividis", ax=ax, linewidths=0.5,
                    annot_kws={"fontsize": 7}, cbar=False)  # fmt: skip
        ax.set_title(label, fontsize=9)
        ax.tick_params(axis="y", rotation=0)
    figure.suptitle(title, fontsize=10)
    return figure


def kept(images, steps, grid, names=None, blocks=None):
    """uint8 images N C H W, and under each what is kept after each block: `steps`, a list of N k positions.

    Patches that are gone are white; blocks: which of the steps are drawn (default: all).
    """
    blocks = range(len(steps)) if blocks is None else blocks
    rows = [("image", images)]
    for block in blocks:
        there = present(steps[block], grid[0] * grid[1])
        rows.append((f"block {block + 1}\n{steps[block].shape[1]} left", faded(images, there, grid)))
    return _sheet(rows, names)


def merged(images, owners, grid, names=None, blocks=None):
    """As `kept`, for merged tokens: `owners`, a list of N n; each token's patches are filled with their mean colour."""
    blocks = range(len(owners)) if blocks is None else blocks
    rows = [("image", images)]
    for block in blocks:
        left = int(owners[block].max()) + 1
        rows.append((f"block {block + 1}\n{left} left", mosaic(images, owners[block].cpu(), grid)))
    return _sheet(rows, names)


def _pixels(images, grid):
    """The patch number of each pixel, H W."""
    height, width = images.shape[-2:]
    row = torch.arange(height) * grid[0] // height
    column = torch.arange(width) * grid[1] // width
    return row[:, None] * grid[1] + column


def present(kept, patches):
    """Positions N k (-1: a fused token, which has none) -> N patches, True where the patch is kept."""
    there = torch.zeros(len(kept), patches + 1, dtype=torch.bool)
    # -1 lands in a last column that is cut off
    return there.scatter_(1, kept.cpu() % (patches + 1), True)[:, :-1]


def faded(images, there, grid):
    """uint8 N C H W with the patches that are not `there` (N n) nearly white."""
    mask = there[:, _pixels(images, grid)][:, None]  # N 1 H W
    images = images.cpu()
    return torch.where(mask, images, (images.float() * 0.12 + 255 * 0.88).to(torch.uint8))


def mosaic(images, owner, grid):
    """uint8 N C H W, each pixel in the mean colour of the token (N n) that its patch belongs to."""
    pixel, images = _pixels(images, grid), images.cpu().float()
    token = owner[:, pixel].flatten(1)[:, None].expand(-1, images.shape[1], -1)  # N C HW
    flat, count = images.flatten(2), int(owner.max()) + 1
    sums = torch.zeros(len(images), images.shape[1], count).scatter_add_(2, token, flat)
    sizes = torch.zeros_like(sums).scatter_add_(2, token, torch.ones_like(flat))
    return (sums / sizes.clamp_min(1)).gather(2, token).view_as(images).to(torch.uint8)


def _sheet(rows, names):
    count = len(rows[0][1])
    figure, axes = plt.subplots(len(rows), count, figsize=(WIDTH, WIDTH / count * len(rows) * 1.02), squeeze=False)
    for line, (label, pictures) in zip(axes, rows):
        for ax, picture in zip(line, pictures):
            ax.imshow(picture.permute(1, 2, 0).cpu())
            ax.set_axis_off()
        line[0].text(-0.08, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=7)
    for ax, name in zip(axes[0], names or []):
        ax.set_title(name, fontsize=8)
    return figure


def contest(rows, *, column="lost", label="points lost on validation", title=""):
    """Rivals at equal MACs, best on top, one panel a share of the MACs; the random control as a dashed line."""
    look = colours(["merge", "drop by score", "control"])
    rows = rows[rows.group.isin(look)]
    shares = sorted(rows["at"].unique(), reverse=True)
    order = rows.groupby("rival")[column].mean().sort_values().index
    size = (WIDTH * (0.8 + 0.2 * len(shares)), 0.9 + 0.24 * len(order))
    figure, axes = plt.subplots(1, len(shares), figsize=size, sharey=True, squeeze=False)
    for ax, share in zip(axes[0], shares):
        here = rows[rows["at"] == share].set_index("rival").loc[order]
        for group, (colour, marker) in look.items():
            part = here[here.group == group]
            error = part.spread if column == "lost" else None
            ax.errorbar(part[column], [order.get_loc(name) for name in part.index], xerr=error, fmt=marker,
                        color=colour, label=group, markersize=6)  # fmt: skip
        if "drop, random" in here.index:
            ax.axvline(here[column]["drop, random"], color="0.4", linestyle="--", linewidth=1)
        ax.set_title(f"{100 * share:.0f} % of the MACs")
        if column == "kl":  # from a hundredth of a nat to more than one
            ax.set_xscale("log")
            ax.xaxis.set_minor_formatter(NullFormatter())
    figure.supxlabel(label, fontsize=9)
    axes[0][0].set_yticks(range(len(order)), order)
    axes[0][0].invert_yaxis()
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def frontier(rows, names, plain, *, title=""):
    """Accuracy against MACs and against latency, a line through each rival's shares; `plain`: a row.

    The rivals in `names` are drawn in colour, all others of `rows` thin and grey. Latency is that of a batch in % of
    the plain model's, which was timed in turns with each.
    """
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH * 1.2, 3.6), sharey=True)
    columns = {"macs": ("million MACs", 1e-6), "time": ("latency of the batch (% of plain)", 100)}
    rows, plain = rows.assign(time=1 / rows.speed_up), plain | {"time": 1.0}
    others = [name for name in rows.rival.unique() if name not in names]
    looks = {name: ("0.75", None) for name in others} | colours(names)
    for ax, (column, (label, scale)) in zip(axes, columns.items()):
        for name, (colour, marker) in looks.items():
            part = rows[rows.rival == name].sort_values(column)
            text = None if name in others[1:] else "each of the others" if name in others else name
            ax.plot(part[column] * scale, part.accuracy, color=colour, marker=marker, markersize=5, label=text,
                    linewidth=0.8 if name in others else None)  # fmt: skip
        ax.plot(plain[column] * scale, plain["accuracy"], "k*", markersize=11, label="plain")
        ax.set(xlabel=label)
    axes[0].set_ylabel("validation accuracy (%)")
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize=10)
    return figure


def speed(rows, *, title=""):
    """Measured speed-up a batch size, one bar each, and each rival's MAC limit as a black tick."""
    names, batches = list(rows.rival.unique()), list(rows.batch.unique())
    figure, ax = plt.subplots(figsize=(WIDTH, 0.9 + 0.3 * len(names) * len(batches)))
    palette, height = sns.color_palette("colorblind", len(batches)), 0.8 / len(batches)
    for i, batch in enumerate(batches):
        part = rows[rows.batch == batch].set_index("rival").loc[names]
        at = np.arange(len(names)) + (i - (len(batches) - 1) / 2) * height
        drawn = ax.barh(at, part.measured, height * 0.9, color=palette[i], label=f"measured, batch {batch}")
        ax.bar_label(drawn, [f" {v:.2f}x" for v in part.measured], fontsize=7)
        ax.plot(part.limit, at, "k|", markersize=14, label="MAC limit" if i == 0 else None)
    ax.axvline(1, color="0.4", linewidth=1, linestyle="--")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set(xlabel="times as fast as the plain model", title=title)
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.1)
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
