"""The parts of README.md that are computed: result tables and what ran on which hardware.

They stand between `<!-- results -->` and `<!-- /results -->` (and `status`), and are made from the rows in
results/ and the stamps of the notebooks in executed/ alone.
"""

import re
from pathlib import Path

from vitlab.metrics.measure import COLUMNS
from vitlab.run import costs, notebooks
from vitlab.run.discussion import discuss
from vitlab.study import claims, verdicts
from vitlab.study.noise import over_seeds
from vitlab.study.study import read_rows
from vitlab.study.verdicts import JUDGED, Verdict
from vitlab.utils.files import read_json, write_text

SHOWN = ("accuracy_top1", "params", "macs", "latency_ms", "images_per_s", "mj_per_image")
PRESETS = ("gpu", "cpu")  # the best evidence first; of other presets nothing is committed


def render(root):
    """{"discussion": ..., "results": ..., "status": ...}: the computed parts, as Markdown."""
    root = Path(root)
    return {"discussion": discuss(root, _presets(root)), "results": _results(root), "status": _status(root)}


def _presets(root):
    """{notebook: the best preset that has rows of it}."""
    found = {}
    for notebook in notebooks.find(root):
        with_rows = [p for p in PRESETS if len(read_rows(root, p, notebook.stem))]
        if with_rows:
            found[notebook.stem] = with_rows[0]
    return found


def fill(text, parts):
    """`text` with each part put between its markers; ValueError where a pair of markers is missing."""
    for name, body in parts.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda m, body=body: m[1] + body + m[2], text, flags=re.S)
        if count != 1:
            raise ValueError(f"README.md has {count} pairs of <!-- {name} --> ... <!-- /{name} -->, not one")
    return text


def stale(root):
    """Whether README.md says anything else than the rows do."""
    text = (Path(root) / "README.md").read_text(encoding="utf-8")
    return fill(text, render(root)) != text


def refresh(root):
    """Write the computed parts into README.md; whether that changed it."""
    path = Path(root) / "README.md"
    before = path.read_text(encoding="utf-8")
    after = fill(before, render(root))
    if after != before:
        write_text(path, after)
    return after != before


def markdown(headings, lines):
    """A Markdown table."""
    body = [headings, ["---"] * len(headings), *lines]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in body)


def _results(root):
    parts, presets = [], _presets(root)
    for notebook in notebooks.find(root):
        if preset := presets.get(notebook.stem):
            rows = read_rows(root, preset, notebook.stem)
            # what is no arm read on test images (a sweep, a timing) belongs to its notebook
            arms = rows[rows.accuracy_top1.notna()]
            parts.append(_table(arms, notebook, preset) + _claims(root, notebook, preset))
    return "\n".join(parts) or "No rows yet: `./run_all.sh` makes them.\n"


def _table(rows, notebook, preset):
    columns = [c for c in SHOWN if c in rows and rows[c].notna().any()]
    headings = ["arm", "data", "epochs", *(_heading(c) for c in columns), "training", "seeds"]
    lines = []
    for (arm, data), group in rows.groupby(["arm", "dataset"], sort=False):
        cells = [over_seeds(group[c], c) for c in columns]
        minutes = f"{group.train_s.mean() / 60:.1f} min" if "train_s" in group else ""
        lines.append([arm, data, f"{group.epochs.iloc[0]:g}", *cells, minutes, len(group)])
    where = " / ".join(dict.fromkeys(rows.device))
    title = f"**{notebook.title}**"
    return f"{title}\n\nPreset `{preset}`, on {where}.\n\n{markdown(headings, lines)}\n"


def _heading(column):
    form = COLUMNS[column]
    return f"{form.label} ({form.unit})" if form.unit else form.label


def _claims(root, notebook, preset):
    path = root / "results" / preset / notebook.stem / "claims.json"
    if not path.exists():
        return ""
    found = [Verdict.from_row(row) for row in read_json(path)["verdicts"]]
    judged = [v for v in found if v.status in JUDGED]
    known = claims.load()
    frame = verdicts.table([c for c in known if c.id in {v.claim for v in judged}], judged)
    lines = [[i, row.claimed, row.measured, row.verdict] for i, row in frame.iterrows()]
    table = markdown(["claim", "claimed", "measured", "verdict"], lines)
    fold = f"<details><summary>The claims that were judged</summary>\n\n{table}\n</details>\n"
    return f"{verdicts.summary(found)}\n\n{fold}"


def _status(root):
    lines, found = [], notebooks.find(root)
    wanted = {p: notebooks.preset_parameters(root, p, found) for p in PRESETS} if found else {}
    for notebook in found:
        cells = [notebook.stem]
        for preset in PRESETS:
            marks = notebooks.stamp(root / "executed" / preset / f"{notebook.stem}.ipynb")
            given = notebook.parameters | wanted[preset][notebook.stem]
            cells.append(f"{marks['finished'][:10]}, {marks['device']}" if marks else _missing(notebook, preset, given))
        lines.append(cells)
    return markdown(["notebook", *(f"preset `{p}`" for p in PRESETS)], lines)


def _missing(notebook, preset, given):
    count, minutes = costs.minutes(notebook.stem.split("_")[0], given)
    if preset != "gpu" or not count:
        return "has not run yet"
    return f"has not run yet: {count} training runs, at least {minutes:,.0f} GPU minutes"
