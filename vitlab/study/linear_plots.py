"""The figures of the study of linear attention: cost against tokens, receptive fields."""

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.colors import LogNorm

from vitlab.study.plots import WIDTH, colours

DARKEST = 1e-4  # of the largest value in a receptive field
PANELS = (
    ("forward", "ms", "forward (ms an image)"),
    ("training", "ms", "forward + backward (ms an image)"),
    ("training", "peak_mb", "memory in training (MB an image)"),
    ("forward", "macs", "MACs an image"),
)


def scaling(rows, crossings=None):
    """Time, memory and operations of a layer against tokens n, log-log; `rows` as `complexity.sweep` gives them.

    crossings: {pass: {arm: n or None}}; each is marked by a dotted line in the arm's colour in that pass's panel
    of time. Bands are quartiles.
    """
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 5.6), sharex=True)
    look = colours(r["arm"] for r in rows)
    for ax, (kind, column, label) in zip(axes.flat, PANELS):
        for arm, (colour, marker) in look.items():
            mine = [r for r in rows if r["arm"] == arm and r["pass"] == kind]
            n = [r["n"] for r in mine]
            ax.plot(n, [r[column] for r in mine], marker=marker, color=colour, markersize=5, label=arm)
            if column == "ms":
                ax.fill_between(n, [r["ms_q25"] for r in mine], [r["ms_q75"] for r in mine], color=colour, alpha=0.2,
                                linewidth=0)  # fmt: skip
                if at := (crossings or {}).get(kind, {}).get(arm):
                    ax.axvline(at, color=colour, linestyle=":", linewidth=1.2)
        ax.set(yscale="log", ylabel=label)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for ax in axes[1]:
        ax.set_xlabel("tokens n")
    axes[0][0].legend(fontsize=8)
    return figure


def fields(found, *, patch):
    """Receptive fields {name: H W, sum 1} on one logarithmic colour scale, with the patch grid's middle framed."""
    top = max(100 * field.max().item() for field in found.values())
    figure, axes = plt.subplots(1, len(found), figsize=(min(WIDTH, 2.4 * len(found)), 2.6), squeeze=False)
    for ax, (name, field) in zip(axes[0], found.items()):
        shares = (100 * field).clamp_min(top * DARKEST).cpu().numpy()
        drawn = ax.imshow(shares, cmap="magma", norm=LogNorm(top * DARKEST, top))
        at = field.shape[-1] // patch // 2 * patch - 0.5
        ax.add_patch(plt.Rectangle((at, at), patch, patch, fill=False, color="white", linewidth=1))
        ax.set_title(name, fontsize=9)
        ax.set_axis_off()
    bar = figure.colorbar(drawn, ax=axes[0].tolist(), shrink=0.75)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("% of the influence, a pixel", fontsize=8)
    return figure


def ablation(change):
    """Differences from the softmax baseline, a row a variant: the first column (points) on its own colours."""
    size, wide = (WIDTH, 1.1 + 0.32 * len(change)), (1.3, change.shape[1] - 1)
    figure, axes = plt.subplots(1, 2, figsize=size, width_ratios=wide)
    for ax, part, digits, unit in ((axes[0], change.iloc[:, :1], 2, "points"), (axes[1], change.iloc[:, 1:], 0, "%")):
        sns.heatmap(part, annot=True, fmt=f"+.{digits}f", cmap="vlag", center=0, ax=ax, linewidths=0.5,
                    annot_kws={"fontsize": 8}, cbar_kws={"label": unit})  # fmt: skip
        ax.tick_params(axis="y", rotation=0)
        ax.tick_params(axis="x", rotation=0)
    axes[1].set_yticks([])
    return figure
