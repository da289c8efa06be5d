"""Every figure of the study, in one theme that colour-blind readers can tell apart."""

import math
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from vitlab.metrics.measure import COLUMNS
from vitlab.study.label_plots import literal, name_beside
from vitlab.study.noise import NOISE, image_noise, interval, over_seeds
from vitlab.utils.files import atomic

WIDTH = 7.5  # inches: the column of a notebook
MARKERS = "osD^vPX*<>"


def theme():
    """The one look: seaborn's colour-blind palette on white, quiet grid, readable sizes."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.9)
    plt.rcParams.update({
        "figure.dpi": 100, "savefig.dpi": 160, "savefig.bbox": "tight", "axes.spines.top": False,
        "axes.spines.right": False, "grid.alpha": 0.4, "legend.frameon": False, "image.interpolation": "nearest",
        "figure.constrained_layout.use": True, "pdf.fonttype": 42,
    })  # fmt: skip


def save(figure, path):
    """Write `figure` to path.png and path.pdf, each whole or not at all; the figure comes back.

    VITLAB_PDF=0 leaves the PDF out.
    """
    path = Path(path)
    for kind in ("png",) if os.environ.get("VITLAB_PDF") == "0" else ("png", "pdf"):
        # no date in the PDF: the same figure is the same file
        extra = {"metadata": {"CreationDate": None}} if kind == "pdf" else {}
        with atomic(path.with_name(f"{path.name}.{kind}")) as part:
            figure.savefig(part, format=kind, **extra)
    return figure


def axis(name):
    """The label of a measured column, with its unit."""
    column = COLUMNS[name]
    return f"{column.label} ({column.unit})" if column.unit else column.label


def colours(names):
    """{name: (colour, marker)}, the same for the same order of names."""
    names = list(dict.fromkeys(names))
    palette = sns.color_palette("colorblind")
    # past ten names the markers are shifted, so that no two names look the same
    shape = [MARKERS[(i + i // len(palette)) % len(MARKERS)] for i in range(len(names))]
    return {n: (palette[i % len(palette)], shape[i]) for i, n in enumerate(names)}


def pictures(images, rows, titles=(), *, columns=10, size=0.75):
    """A sheet of images C H W (uint8, or floats up to 1), each `size` inches wide.

    rows: names at the left of each row of them; titles: above the first.
    """
    figure, axes = plt.subplots(len(rows), columns, figsize=(columns * size, 1.12 * len(rows) * size), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, image in zip(axes.flat, images):
        ax.imshow(image.permute(1, 2, 0).cpu())
    for ax, name in zip(axes[:, 0], rows):
        ax.text(-0.12, 0.5, name, transform=ax.transAxes, ha="right", va="center", fontsize=8)
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=7, pad=2)
    return figure


def faded(images, there):
    """uint8 N C H W with the cells of a grid that are not `there` (N rows columns, bool) nearly white."""
    mask, images = F.interpolate(there[:, None].float(), images.shape[-2:]).bool(), images.cpu()
    return torch.where(mask, images, (images.float() * 0.12 + 255 * 0.88).to(torch.uint8))


def patches(image, patch):
    """One uint8 image C H W beside the patches a ViT cuts it into, in the order it reads them."""
    cut = image.cpu().unfold(1, patch, patch).unfold(2, patch, patch)  # C rows columns patch patch
    gap = max(1, patch // 4)
    sheet = F.pad(cut, (0, gap, 0, gap), value=255).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :-gap, :-gap]
    titles = (f"{image.shape[1]} x {image.shape[2]} pixels", f"{cut[0, ..., 0, 0].numel()} tokens of {patch} x {patch}")
    return pictures((image, sheet), [""], titles, columns=2, size=WIDTH * 0.35)


def curves(arms, columns=("loss", "val_accuracy")):
    """Training curves: one panel a column, one line an arm, named at its end, the seeds' range shaded."""
    labels = {"loss": "training loss", "val_accuracy": "validation accuracy (%)", "accuracy": "train accuracy (%)",
              "val_loss": "validation loss"}  # fmt: skip
    figure, axes = plt.subplots(1, len(columns), figsize=(WIDTH, 3), squeeze=False)
    look, ends = colours(arm.name for arm in arms), {}
    for ax, column in zip(axes[0], columns):
        for name, (colour, marker) in look.items():
            histories = [arm.history for arm in arms if arm.name == name]
            # of an arm that came with the project only the last epoch is known
            whole = max(histories, key=len)
            runs = [h[column] for h in histories if len(h) == len(whole)]
            runs = np.array([[math.nan if v is None else v for v in run] for run in runs], float)
            epochs = whole["epoch"]
            ax.plot(epochs, runs.mean(0), color=colour, marker=marker, markersize=4, label=name,
                    markevery=max(1, len(epochs) // 8))  # fmt: skip
            ends[name] = epochs[-1], runs.mean(0)[-1], colour
            if len(runs) > 1:
                ax.fill_between(epochs, runs.min(0), runs.max(0), color=colour, alpha=0.2, linewidth=0)
        ax.set(xlabel="epoch", ylabel=labels.get(column, column))
        ax.xaxis.get_major_locator().set_params(integer=True)
    name_beside(axes[0][-1], ends)
    return figure


def tradeoff(rows, costs=("macs", "latency_ms")):
    """Accuracy with its 95 % interval against each cost (log axis), one point an arm, named beside the last panel.

    Accuracies on different data do not compare: each data set gets a row of panels of its own.
    """
    sets = list(dict.fromkeys(rows.dataset))
    height = max(2.5, 0.16 * rows.groupby("dataset").arm.nunique().max())
    figure, axes = plt.subplots(len(sets), len(costs), figsize=(WIDTH, 0.6 + height * len(sets)), sharey="row",
                                sharex="col", squeeze=False)  # fmt: skip
    look = colours(rows.arm)
    ends = {}
    for panels, data in zip(axes, sets):
        here = rows[rows.dataset == data]
        for ax, cost in zip(panels, costs):
            for name, group in here.groupby("arm", sort=False):
                colour, marker = look[name]
                x, y = (group[cost] * COLUMNS[cost].scale).median(), group.accuracy_top1.tolist()
                mean, _, margin = interval(y, NOISE["accuracy"], image_noise(here))
                ax.errorbar(x, mean, yerr=margin, fmt=marker, color=colour, markersize=7, elinewidth=1)
                ends.setdefault(panels[-1], {})[name] = x, mean, colour
            ax.set(xscale="log")
            plain_log(ax.xaxis)
        panels[0].set_ylabel(axis("accuracy_top1") + (f", {data}" if len(sets) > 1 else ""))
    for ax, cost in zip(axes[-1], costs):
        ax.set_xlabel(axis(cost))
    for ax, named in ends.items():
        name_beside(ax, named)
    return figure


def plain_log(axis_):
    """Plain numbers on a logarithmic axis, three of them at least."""
    low, high = axis_.get_view_interval()
    per_decade = {1000: (1,), 80: (1, 3), 8: (1, 2, 5), 0: (1, 1.5, 2, 3, 5, 7)}
    steps = next(steps for span, steps in per_decade.items() if high > span * low)
    nice = [step * 10.0**power for power in range(-12, 13) for step in steps]
    few = sum(low <= tick <= high for tick in nice) < 3  # where LogLocator gives one, or fills the axis
    axis_.set_major_locator(MaxNLocator(5) if few else LogLocator(subs=steps))
    axis_.set_major_formatter("{x:g}")
    axis_.set_minor_formatter(NullFormatter())


def bars(frame, *, unit):
    """Grouped horizontal bars: one group a row, one bar a column of `frame`; missing values are left out."""
    height = 0.22 * frame.shape[0] * (frame.shape[1] + 0.8)
    figure, ax = plt.subplots(figsize=(WIDTH, 0.6 + height))
    palette = sns.color_palette("colorblind", frame.shape[1])
    frame.plot.barh(ax=ax, width=0.8, color=palette, edgecolor="white", legend=False, xlabel=unit, ylabel="")
    for drawn, column in zip(ax.containers, frame):
        ax.bar_label(drawn, ["" if v != v else f" {v:,.{3 if abs(v) < 10 else 4}g}" for v in frame[column]], fontsize=7)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.12)
    if frame.shape[1] > 1:  # below the axis label, whatever the height
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.6 / height), ncols=frame.shape[1])
    return figure


def heatmap(frame, *, label, digits=1, title=""):
    """A DataFrame as a heatmap; values are written in when there is room (at most 15 columns)."""
    annotate = frame.shape[1] <= 15
    figure, ax = plt.subplots(figsize=(min(WIDTH, 2.5 + 0.6 * frame.shape[1]), 1.0 + 0.32 * frame.shape[0]))
    sns.heatmap(frame, annot=annotate, fmt=f".{digits}f", cmap="cividis", ax=ax, linewidths=0.5,
                annot_kws={"fontsize": 7}, cbar_kws={"label": label})  # fmt: skip
    ax.set_title(title)
    ax.tick_params(axis="y", rotation=0)
    if annotate:
        ax.set_xticks(ax.get_xticks(), [str(c).replace(" ", "\n") for c in frame.columns], rotation=0)
    return figure


def confusion(matrix, classes, *, title=""):
    """Confusion matrix, each row (the truth) in % of its images; with many classes the names are thinned."""
    counts = np.asarray(matrix, float)
    shares = 100 * counts / np.clip(counts.sum(1, keepdims=True), 1, None)
    side = min(WIDTH, 3 + 0.32 * len(classes))
    figure, ax = plt.subplots(figsize=(side, side * 0.85))
    few, names = len(classes) <= 20, [literal(name) for name in classes]
    sns.heatmap(shares, annot=few, fmt=".0f", cmap="cividis", ax=ax, square=True, vmin=0, vmax=100,
                xticklabels=names if few else False, yticklabels=names if few else False,
                annot_kws={"fontsize": 7}, cbar_kws={"label": "% of the class's images", "shrink": 0.8})  # fmt: skip
    ax.set(xlabel="predicted", ylabel="truth", title=literal(title))
    return figure


def per_class(scores, classes):
    """Accuracy of each class: one marker an arm; scores: {arm: per-class % (or the mean over seeds)}.

    With more than 30 classes the 15 worst and the 15 best of the first arm are shown.
    """
    first = np.array(next(iter(scores.values())), float)
    order = np.argsort(first)
    if len(order) > 30:
        order = np.concatenate([order[:15], order[-15:]])
    figure, ax = plt.subplots(figsize=(WIDTH, 0.8 + 0.24 * len(order)))
    for name, (colour, marker) in colours(scores).items():
        values = np.array(scores[name], float)[order]
        ax.plot(values, np.arange(len(order)), marker, color=colour, label=name, markersize=6, alpha=0.85)
    ax.set_yticks(np.arange(len(order)), [literal(classes[i]) for i in order])
    ax.set(xlabel="accuracy of the class (%)", xlim=(0, 101), ylim=(-0.6, len(order) - 0.4))
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def scaling(rows, crossings=None):
    """Time, memory and, where known, operations of ways to attend against tokens n, log-log.

    rows: of `complexity.sweep` or `metered`. crossings: {pass: {arm: n or None}}; each is marked by a dotted line in
    the arm's colour in that pass's panel of time. Bands are quartiles.
    """
    panels = [("forward", "ms", "forward (ms)"), ("training", "ms", "forward + backward (ms)"),
              ("forward", "peak_mb", "memory forward (MB)"), ("training", "peak_mb", "memory in training (MB)"),
              ("forward", "macs", "MACs")]  # fmt: skip
    del panels[2 if "macs" in rows[0] else 4]
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 5.6), sharex=True)
    for ax, (kind, column, label) in zip(axes.flat, panels):
        ends = {}
        for arm, (colour, marker) in colours(r["arm"] for r in rows).items():
            mine = pd.DataFrame([r for r in rows if r["arm"] == arm and r["pass"] == kind])
            ax.plot(mine.n, mine[column], marker=marker, color=colour, markersize=5)
            if len(mine):
                ends[arm] = mine.n.iloc[-1], mine[column].iloc[-1], colour
            if column == "ms":
                ax.fill_between(mine.n, mine.ms_q25, mine.ms_q75, color=colour, alpha=0.2, linewidth=0)
                if at := (crossings or {}).get(kind, {}).get(arm):
                    ax.axvline(at, color=colour, linestyle=":", linewidth=1.2)
        ax.set(yscale="log", ylabel=label)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        if ax in axes[:, 1]:
            name_beside(ax, ends)
    for ax in axes[1]:
        ax.set_xlabel("tokens n of one image")
    return figure


def fields(found, *, patch):
    """Receptive fields {name: H W, sum 1} on one logarithmic colour scale; framed: the token's own patch."""
    top = max(100 * field.max().item() for field in found.values())
    scale = LogNorm(top * 1e-4, top)
    figure, axes = plt.subplots(1, len(found), figsize=(min(WIDTH, 2.4 * len(found)), 2.6), squeeze=False)
    for ax, (name, field) in zip(axes[0], found.items()):
        drawn = ax.imshow((100 * field).clamp_min(scale.vmin).cpu().numpy(), cmap="magma", norm=scale)
        at = field.shape[-1] // patch // 2 * patch - 0.5
        ax.add_patch(plt.Rectangle((at, at), patch, patch, fill=False, color="white", linewidth=1))
        ax.set_title(name, fontsize=9)
        ax.set_axis_off()
    bar = figure.colorbar(drawn, ax=axes[0].tolist(), shrink=0.75)
    bar.set_label("% of the influence, a pixel", fontsize=8)
    return figure


def attention(images, maps, titles):
    """Images N C H W (uint8) over their attention maps {name: N g g in [0, 1]}, enlarged and laid on top.

    Black are weights of exactly 0, where several patches have it. A single 0 is but the least weight of a map that was
    scaled; there the image shows in dark violet.
    """
    grey = images.cpu().float().mean(1, keepdim=True)
    low, high = grey.amin((2, 3), keepdim=True), grey.amax((2, 3), keepdim=True)
    sheet = [*images]
    for found in maps.values():
        found = found.float().cpu()
        unread = (found == 0) & ((found == 0).sum((1, 2), keepdim=True) > 1)
        large, black = (F.interpolate(m[:, None].float(), images.shape[-2:])[:, 0] for m in (found, unread))
        laid = torch.from_numpy(plt.get_cmap("magma")(0.2 + 0.8 * large.numpy())[..., :3]).movedim(-1, 1)
        sheet += [*((0.6 * laid + 0.4 * (grey - low) / (high - low).clamp_min(1e-6)) * (1 - black)[:, None])]
    return pictures(sheet, ["image", *maps], titles, columns=len(images), size=WIDTH / len(images))


def table(rows, columns):
    """A DataFrame to read: one line an arm, mean ± standard deviation over seeds, "not measured" where so."""
    lines = {}
    for name, group in rows.groupby("arm", sort=False):
        measured = {axis(column): over_seeds(group.get(column, []), column) for column in columns}
        lines[name] = measured | {"seeds": len(group)}
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("arm")
