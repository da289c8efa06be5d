"""The scoreboard: every measured arm beside the model it was made from, and where the projects said they would be."""

import math
import re
import textwrap

import matplotlib.pyplot as plt
import pandas as pd

from vitlab.metrics.measure import COLUMNS
from vitlab.study import claims, plots, zoo
from vitlab.study.label_plots import name_near
from vitlab.study.noise import NOISE, image_noise, interval, paired_image_noise, times, typical

SHOWN = ("accuracy_top1", "params", "macs", "size_mb", "latency_ms", "images_per_s", "peak_mb", "mj_per_image")
IDENTITY = ("notebook", "arm", "data", "family", "n", "base", "batch", "made by")
LABELS = {"change": "change in accuracy (points)", "latency_x": "times as fast, one image at a time",
          "images_per_s_x": "times as fast, {} images at a time"}  # fmt: skip
MARGINS = ("margin", "accuracy_margin")
METHODS = {"S0": "sparse attention", "S1": "factorised attention", "S2": "channel pruning", "S3": "token pruning",
           "S4": "linear attention"}  # fmt: skip
CORNERS = {(1, 1.01, "right", "bottom"): "faster, more accurate",
           (0.01, 0.01, "left", "bottom"): "slower, less accurate"}  # fmt: skip
# family -> what the name of such an arm has in it (the first that fits); what others are compared with is a "baseline"
FAMILIES = {
    "several at once": r"/.* \+ ", "another recipe": "^step: | recipe$", "smaller model": "tiny$|scratch|narrower",
    "no attention": "no attention",
    "softmax attention": "^softmax|(^|/)dense|plain ViT", "distilled": "kd|locality", "CNN": "(?i)cnn",
    "sparse attention": "sparse|top-?k|^both", "heads removed": "^heads",
    "factorised attention": "S1/|team", "linear attention": "ripple|hydra|linear", "tokens merged, ToMe": "ToMe",
    "tokens merged, ours": "Ward|[Cc]alibrated|norm-preserving|size-priced|fewer tokens",
    "all tokens kept": "pruned-off|pooled-last", "tokens dropped by a grid": "grid at",
    "tokens dropped": "drop|EViT|attention at|random at|S3/",
    "channels pruned": "pruned|S2/torch-pruning|^ours/", "other": "",
}  # fmt: skip
# what one picture of all projects tells apart: family -> group
GROUPS = {family: group for group, families in {
    "softmax, other shape": ("softmax attention", "smaller model"),
    "another attention": ("sparse attention", "factorised attention", "linear attention", "no attention"),
    "channels or heads pruned": ("heads removed", "channels pruned", "distilled"),
}.items() for family in families}  # fmt: skip


def base_of(model, present):
    """The name, among those `present`, of the arm that `model` is a cheaper form of: its control where it has one."""
    name, _, data = model.partition(" on ")
    project = re.match(r"S\d/|ours", name)
    if project:  # what was trained on is held against the baseline that was trained on
        tuned = name.startswith("ours/") or (re.search("tuned|-kd|scratch|torch-pruning", name) and "tiny" not in name)
        wanted = [f"{project[0]}baseline-tuned", "ours/uncut"] * bool(tuned) + [f"{project[0]}baseline"]
        # a sparse model of half the depth is held against a dense one of that depth
        wanted += ["S0/dense-6"] * (name == "S0/sparse") + [f"{project[0]}dense", project[0], "plain ViT"]
    else:
        wanted = [f"softmax, {name.partition(', ')[2]}", *["S4/baseline"] * name.startswith("softmax"), "dense"]
        wanted += ["plain ViT", "ours"]
    return next((w for w in (f"{w} on {data}" if data else w for w in wanted) if w in present), None)


def board(rows):
    """The mean of each arm's seeds (a DataFrame; of times their median): SHOWN, and against its `base` in the same
    notebook and data: change (points) with margin (95 %), latency_x and images_per_s_x (speed-ups, of the medians), and
    "<column> %" (change of each of SHOWN).
    accuracy_margin is that of the accuracy itself; what is its own base has a change of 0 by definition, and no margin.

    An arm that was trained for more epochs than its base is not held against it: only its own columns are filled.
    rows: of one preset (else ValueError), as `read_rows` gives them; a column `why` says of which code a row is.
    """
    if not len(rows):
        return pd.DataFrame(columns=[*IDENTITY, *SHOWN, *(f"{c} %" for c in SHOWN), *LABELS, *MARGINS])
    if rows.preset.nunique() > 1:
        raise ValueError(f"rows of the presets {sorted(rows.preset.unique())} do not compare; choose one")
    lines = []
    rows = rows.reindex(columns=[*dict.fromkeys([*rows, *SHOWN, "why", "epochs"])]).fillna({"why": ""})
    rows = rows[rows.accuracy_top1.notna()].assign(model=rows.arm.str.replace(zoo.STAND_IN, "", regex=True))
    for (notebook, data), part in rows.groupby(["notebook", "dataset"]):
        images = image_noise(part)
        arms = {model: seeds.groupby("seed").last() for model, seeds in part.groupby("model", sort=False)}
        for model, mine in arms.items():
            base, values = base_of(model, arms), mine[list(SHOWN)].astype(float)
            family = next(family for family, words in FAMILIES.items() if re.search(words, model))
            family = "baseline" if base in (model, None) else family
            known = (notebook, mine.arm.iloc[0], data, family, len(mine), base, mine.batch.iloc[0], mine.why.max())
            own = interval(values.accuracy_top1.tolist(), NOISE["accuracy"], images)[2]
            lines.append(dict(zip(IDENTITY, known)) | typical(values) | dict(zip(MARGINS, (math.nan, own))))
            if base and not mine.epochs.max() > arms[base].epochs.max():
                other = arms[base][list(SHOWN)].astype(float)
                apart = (values.accuracy_top1 - other.accuracy_top1).dropna().tolist() or [math.nan]
                shared = paired_image_noise(part, mine.arm.iloc[-1], arms[base].arm.iloc[-1])
                change, _, margin = interval(apart, math.sqrt(2) * NOISE["accuracy"], math.sqrt(2) * shared)
                share = {c: (values[c] / other[c]).mean() for c in SHOWN} | times(values, other)
                lines[-1] |= {f"{c} %": 100 * (share[c] - 1) for c in SHOWN} | {
                    "change": change, "margin": math.nan if base == model else margin,
                    "latency_x": 1 / share["latency_ms"], "images_per_s_x": share["images_per_s"]}  # fmt: skip
    return pd.DataFrame(lines)


def stacked(frame):
    """Each model of several methods ("ours/kd + fewer tokens") of a `board` beside what its methods give one by one.

    added: the sum of the changes in accuracy of the two (points); multiplied: the product of their speed-ups with a
    batch. A DataFrame; a model one of whose methods has no row of its own is left out.
    """
    lines, alone = [], frame.set_index("arm")[["change", "images_per_s_x"]].dropna()
    for row in frame[frame.family == "several at once"].to_dict("records"):
        first, _, second = row["arm"].rpartition(" + ")
        root = first.partition("/")[0]
        other = next((n for n in (f"{root} + {second}", f"{root}/baseline + {second}") if n in alone.index), None)
        if other and first in alone.index:
            parts = alone.loc[[first, other]]
            lines.append({c: row[c] for c in ("arm", "base", "n", "change", "margin", "images_per_s_x")}
                         | {"added": parts.change.sum(), "multiplied": parts.images_per_s_x.prod()})  # fmt: skip
    return pd.DataFrame(lines)


def labelled(frame):
    """`frame` with the columns of SHOWN in their units, rounded, under the names that a reader knows."""
    shown = {c: COLUMNS[c] for c in SHOWN if c in frame}
    frame = frame.assign(**{c: (frame[c].astype(float) * of.scale).round(of.digits) for c, of in shown.items()})
    return frame.rename(columns={c: plots.axis(c) for c in shown})


def front(frame, cost, quality="accuracy_top1", lower=True):
    """The rows of `frame` that none other beats in both, cost (`lower` or higher is better) and quality."""
    frame = frame.dropna(subset=[cost, quality]).sort_values([cost, quality], ascending=[lower, False])
    return frame[frame[quality] > frame[quality].cummax().shift(fill_value=-math.inf)]


def claimed():
    """Where the projects said they would be: model, change (points), and latency_x or images_per_s_x."""
    known, lines = {c.id: c.value for c in claims.load()}, []
    for claim in claims.select(kind="accuracy", source="published"):
        if claim.metric in ("accuracy", "cifar100-accuracy") and claim.model not in ("baseline", "dense"):
            mine, base = f"{claim.project}/{claim.model}", f"{claim.project}/baseline"
            fast = known.get(f"{mine}/speed-up", known.get(f"{mine}/training-speed-up", math.nan))
            at_one = known.get(f"{base}/latency", math.nan) / known.get(f"{mine}/latency", math.nan)
            lines.append((mine, claim.value - known.get(f"{base}/{claim.metric}", math.nan), at_one, fast))
    return pd.DataFrame(lines, columns=["model", *LABELS]).dropna(thresh=3)


def chart(frame, panels, *, said=None):
    """Panels side by side, each a pair of columns (x, y): one marker a family, 95 % where several seeds are, the front.

    The interval is that of what is drawn: of the change, or of the accuracy. said: points of `claimed`, as hollow
    stars. They and what is at the front are named, as far as there is room.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(plots.WIDTH * 1.3, 4.2), squeeze=False)
    look = {"baseline": ("k", "o"), "softmax attention": ("0.45", "s"), "softmax, other shape": ("0.45", "s")}
    order = dict.fromkeys([*FAMILIES, *GROUPS.values()])  # what others are held against is black and grey
    look |= plots.colours([family for family in order if family not in look and family in set(frame.family)])
    to_name = []
    for ax, (x, y) in zip(axes[0], panels):
        scale, margin = COLUMNS[x].scale if x in COLUMNS else 1.0, MARGINS[y != "change"]
        for family, part in frame.dropna(subset=[x, y]).groupby("family", sort=False):
            colour, marker = look[family]
            ax.errorbar(part[x] * scale, part[y], part[margin].where(part.n > 1), fmt=marker, color=colour,
                        label=family, markersize=6, alpha=0.85)  # fmt: skip
        if said is not None:
            part = said.dropna(subset=[x])
            ax.plot(part[x], part[y], "*", markersize=13, markerfacecolor="none", color="k", label="claimed")
        if y == "change":
            ax.axhline(0, color="0.5", linewidth=0.8)
            ax.axvline(1, color="0.5", linewidth=0.8)
            stars = [] if said is None else said.sort_values(x)[[x, y, "model"]].dropna()[::-1].to_numpy()
            to_name.append([(*at, _claimant(model)) for *at, model in stars])
            ax.set_yscale("symlog", linthresh=1, subs=(2, 5))
            ax.yaxis.set_major_formatter(lambda y, _: f"{y:+g}" if y else "0")
            for (across, up, side, end), words in CORNERS.items():
                ax.text(across, up, words, ha=side, va=end, transform=ax.transAxes, fontsize=8, color="0.4")
        else:
            best = front(frame, x, y, lower=x != "images_per_s")
            ax.plot(best[x] * scale, best[y], color="0.6", linewidth=1, zorder=0)
            to_name.append(list(zip(best[x] * scale, best[y], best.arm.map(_wrapped)))[::-1])
        ax.margins(0.08)
        ax.set(xscale="log", ylabel=LABELS.get(y) or plots.axis(y),
               xlabel=LABELS[x].format(f"{frame.batch.max():g}") if x in LABELS else plots.axis(x))  # fmt: skip
        plots.plain_log(ax.xaxis)
    handles = {label: h for ax in axes[0] for h, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside lower center", ncols=4)
    for ax, names in zip(axes[0], to_name):
        marked = (line for line in ax.get_lines() if line.get_marker() not in ("None", None, ""))
        name_near(ax, names, [at for line in marked for at in line.get_xydata()])
    return figure


def _wrapped(arm):
    return textwrap.fill(re.sub(zoo.STAND_IN, "", arm), 24)


def _claimant(model):
    project, _, arm = model.partition("/")
    return f"{METHODS[project]},\n{claims.select(project=project, model=arm)[0].name}"


def sortable(frame):
    """A table for a notebook whose columns sort at a click on their heading."""
    from IPython.display import HTML

    click = ("const t=this.closest('table').tBodies[0],i=this.cellIndex,v=r=>r.cells[i].innerText,"
             "d=this.d=-(this.d||-1);[...t.rows].sort((a,b)=>d*(v(a)-v(b)||v(a).localeCompare(v(b))))"
             ".forEach(r=>t.append(r))")  # fmt: skip
    table = frame.to_html(index=False, na_rep="", border=0)
    return HTML(table.replace("<th>", f'<th style="cursor:pointer" onclick="{click}">'))
