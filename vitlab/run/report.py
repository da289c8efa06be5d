"""What the rows say, as Markdown: README's computed parts, RESULTS.md, CLAIMS.md; from results/ and executed/ alone.

Evidence whose stamp is not that of the present code is marked where it is shown.
"""

import re
from pathlib import Path

from vitlab.metrics.measure import COLUMNS, show
from vitlab.run import notebooks as nb
from vitlab.run import runner, stamps
from vitlab.run.prose import titled, words
from vitlab.study import claims, verdicts, zoo
from vitlab.study.noise import TIMES, change, image_noise, times
from vitlab.study.study import read_rows
from vitlab.utils.files import read_record, write_text

FILES = ("README.md", "RESULTS.md", "CLAIMS.md")
SHOWN = ("accuracy_top1", "params", "macs", "latency_ms", "images_per_s", "mj_per_image")
MOST, WORDS = 6, 900  # findings that README shows, and its words in all
SURE, INTERVAL = re.compile(r"±|\bn = \d|95 %:"), re.compile(r"±|95 %:")  # a sentence that says how sure it is
PRESETS = ("gpu", "cpu")  # the best evidence first; of other presets nothing is committed

# project -> its headline with the published figures, the notebook, the arm that stands for it, the arms it is held
# against, which had the same training: the baseline, then what has the same but for the method itself
HEADLINES = {
    "S0": ("{S0/sparse/accuracy} with sparse attention, {S0/dense/accuracy} dense", "02", "S0/sparse", "S0/dense-6"),
    "S1": ("{S1/favit/memory-saved} of the memory saved, and better than a plain ViT", "03", "S1/B1", "plain ViT"),
    "S2": ("{S2/pruned-40-kd/accuracy} pruned by 40 % and distilled, {S2/baseline/accuracy} before", "04",
           "S2/pruned-40-kd", "S2/baseline-tuned"),
    "S3": ("{S3/pruned-alpha-1.2/speed-up} for {S3/pruned-alpha-1.2/accuracy-drop}", "05",
           "S3/pruned-alpha-1.2", "S3/baseline"),
    "S4": ("{S4/ripple/training-speed-up} training speed, {S4/ripple/cifar100-accuracy} instead of "
           "{S4/baseline/cifar100-accuracy}", "06", "S4/ripple", "S4/baseline", "softmax with ripple's convolutions"),
}  # fmt: skip


def render(root):
    """{file name: text} of the three files."""
    evidence = Evidence(root)
    readme = (evidence.root / "README.md").read_text(encoding="utf-8")
    readme = fill(readme, {"hero": hero(evidence), "projects": projects(evidence), "status": status(evidence)})
    room = WORDS - words(fill(readme, {"findings": ""}))
    return dict(zip(FILES, (fill(readme, {"findings": findings(evidence, room)}), results(evidence),
                            claims_page(evidence))))  # fmt: skip


def stale(root):
    """{file name: what it should say} of the files that say anything else than the rows do."""
    there = {path.name: path.read_text(encoding="utf-8") for path in Path(root).glob("*.md")}
    return {name: text for name, text in render(root).items() if there.get(name) != text}


def refresh(root):
    """Write what is stale; the names of the files that changed."""
    changed = stale(root)
    for name, text in changed.items():
        write_text(Path(root) / name, text)
    return list(changed)


def fill(text, parts):
    """`text` with each part put between its markers; ValueError where a pair of markers is missing."""
    for name, body in parts.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda m, body=body: m[1] + body + m[2], text, flags=re.S)
        if count != 1:
            raise ValueError(f"there are {count} pairs of <!-- {name} --> ... <!-- /{name} -->, not one")
    return text


class Evidence:
    """What there is: for each notebook its jobs by preset, the best preset with rows of arms, those rows.

    presets: the best first. root: where rows lie, if not with the notebooks.

    Two columns are added to them: `model`, the published model that an arm stands for, and `why` it is stale ("": not).
    """

    def __init__(self, source, presets=PRESETS, root=None):
        self.root = Path(root or source)
        self.project = nb.Project(Path(source), self.root)
        self.notebooks = nb.find(source)
        self.present = [p for p in presets if p in nb.presets(source)]
        self.jobs = {(j.notebook.stem, p): j for p in self.present for j in runner.plan(self.project, p)}
        self.preset, self.rows, self.stamp = {}, {}, {}
        for stem in (n.stem for n in self.notebooks):
            for preset in self.present[::-1]:
                if "arm" in (rows := read_rows(self.root, preset, stem)):
                    self.preset[stem], self.rows[stem] = preset, rows[rows.arm.notna()]
        for stem, rows in self.rows.items():
            self.rows[stem] = rows.assign(
                model=rows.arm.str.replace(zoo.STAND_IN, "", regex=True),  # a scaled-down stand-in is called that
                why=[self.stale(stem, row) for row in rows.to_dict("records")],
            )

    def stale(self, stem, row):
        """"" for a row (a dictionary) of the present code, else what it is of."""
        old, preset = row.get("stamp"), self.preset.get(stem) or row["preset"]
        if (stem, preset) not in self.stamp:
            self.stamp[stem, preset] = self.jobs[stem, preset].stamp(self.project)
        return stamps.difference(old if isinstance(old, str) else None, self.stamp[stem, preset])

    def special(self, stem, name):
        """A file that notebook `stem` wrote beside its arms' rows, with its preset, or {}.

        Of a notebook without arms (one that only reads what others measured) that of the best preset that has it.
        """
        for preset in [self.preset[stem]] if stem in self.preset else self.present:
            path = self.root / "results" / preset / stem / f"{name}.json"
            if path.exists():
                return read_record(path) | {"preset": preset}
        return {}

    def find(self, number):
        return next((n.stem for n in self.notebooks if n.stem.startswith(number) and n.stem in self.preset), None)


def markdown(headings, lines):
    """A Markdown table."""
    body = [headings, ["---"] * len(headings), *lines]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in body)


def _frame(frame):
    return markdown([frame.index.name, *frame], [[name, *row] for name, row in zip(frame.index, frame.to_numpy())])


# -------------------------------------------------------------------------------------------- README

def hero(evidence):
    """The scoreboard's picture, of the best preset that has one, and of how many rows by which code it is."""
    found = [p for p in PRESETS if (evidence.root / f"figures/{p}/07_scoreboard/hero.png").exists()]
    if not found:
        return "The picture comes with notebook 07.\n"
    told = "Change in accuracy against measured speed-up; hollow stars: as claimed"
    rows = [drawn(rows) for stem, rows in evidence.rows.items() if evidence.preset[stem] == found[0]]
    old, count = sum((r.why != "").sum() for r in rows), sum(map(len, rows))
    note = f"\n{old} of the {count} rows behind it were made by older code.\n" if old else ""
    return f"![{told}](figures/{found[0]}/07_scoreboard/hero.png)\n{note}"


def drawn(rows):
    """Those of the rows that the scoreboard draws: of arms that were read on test images."""
    return rows[rows.accuracy_top1.notna()] if "accuracy_top1" in rows else rows.head(0)


def projects(evidence):
    """The table of the five projects: what each claims most, and what became of it here."""
    lines = []
    for project, (text, number, arm, control, *stricter) in HEADLINES.items():
        quoted = re.sub(r"\{(.+?)\}", lambda m: claims.get(m[1]).text, text)
        found, about = _found(evidence, number, arm, control)
        beside = ((other, _found(evidence, number, arm, other)[0]) for other in stricter)
        found = "; ".join([found, *(f"{said} against {other}" for other, said in beside if said != "nothing yet")])
        lines.append([claims.PROJECTS[project].split(":")[0], quoted, found, about])
    return markdown(["project", "its headline", "found here, against the same training without it", "evidence"], lines)


def _found(evidence, number, arm, control):
    """(what was found with its 95 % interval, on which evidence) for an arm beside its control."""
    stem = evidence.find(number)
    if not stem or not {arm, control} <= set(evidence.rows[stem].model):
        return "nothing yet", f"notebook {number} has not run"
    rows = evidence.rows[stem]
    if {arm, control} <= set(rows.model[rows.why == ""]):  # what older code left behind is not mixed in
        rows = rows[rows.why == ""]
    first, second = (rows[rows.model == name].groupby("seed").last() for name in (arm, control))
    gain = (first.accuracy_top1 - second.accuracy_top1).dropna()
    if not len(gain):
        return "nothing yet", f"notebook {number} has no seed of both"
    speed = times(first, second)["images_per_s"]
    once = drawn(rows).assign(arm=rows.model).drop_duplicates(["arm", "seed"], keep="last")
    last = rows[rows.model == arm].iloc[-1]
    # a method that is built as described, at the published size, is not "as published" either
    whole = last.as_published or " instead of " not in last.get("changes", " instead of ")
    notes = [f"n = {len(gain)}", "published size" if whole else "scaled down", last.why]
    # where rows do not say which images were right, with the same noise of the test images as in the notebook
    settled = () if "right" in once else evidence.special(stem, "claims").get("verdicts", ())
    shared = next((v["shared"] for v in settled if v["claim"].startswith(f"{arm}/") and v.get("shared")
                   and claims.get(v["claim"]).kind == "accuracy"), None)  # fmt: skip
    return f"{change(once, arm, control, shared)}, {speed:.2f}x the throughput", ", ".join(filter(None, notes))


def findings(evidence, room):
    """Of each notebook a sentence that is short enough for a newcomer, with titles for names; RESULTS.md has all.

    The first with an interval, else the first that says how many seeds it had, else the first. Where there is no `room`
    for all (words), those that say how sure they are come first, the shortest of them before all, so that many find
    room.
    """
    short = [[line for line in conclusions(evidence, n.stem) if words(line) <= 60] for n in evidence.notebooks]
    lines = [min(several, key=lambda line: (not INTERVAL.search(line), not SURE.search(line)))
             for several in short if several]  # fmt: skip
    shown = []
    for line in sorted(lines, key=lambda line: (not SURE.search(line), words(line))):
        if (need := words(titled(line))) <= room and len(shown) < MOST:
            shown.append(line)
            room -= need
    shown = "".join(f"- {titled(line)}\n" for line in lines if line in shown)
    return shown or "None yet: the notebooks write them when they run.\n"


def conclusions(evidence, stem):
    """The sentences that a notebook concluded from its rows."""
    found = evidence.special(stem, "conclusions")
    mark = f" *({why})*" if found and (why := evidence.stale(stem, found)) else ""
    return [said["text"] + mark for said in found.get("conclusions", ())]


def status(evidence):
    """What ran where, and from which code."""
    lines = [[f"[{n.stem}](notebooks/{n.path.name})", *(standing(evidence, n, p) for p in PRESETS)]
             for n in evidence.notebooks]  # fmt: skip
    return markdown(["notebook", *(f"`{p}`" for p in PRESETS)], lines)


def standing(evidence, notebook, preset):
    """When and on which device a notebook's executed copy was made, and, where that is so, that it is out of date."""
    job = evidence.jobs.get((notebook.stem, preset))
    marks = nb.marks(evidence.root / "executed" / preset / notebook.path.name)
    state = runner.standing(evidence.project, job) if job else "never run"
    said = f"{marks['finished'][:10]}, {marks['device']}" if marks else state
    return said if state in (runner.SKIPPED, said) else f"{said}: {state}"


# --------------------------------------------------------------------------------- RESULTS, CLAIMS

def results(evidence):
    """RESULTS.md: for each notebook its sentences and its arms."""
    parts = ["# Results\n\nWritten by `vitlab report` from the rows in results/; not to be edited. † marks a row made "
             "by older code or with other parameters than the present ones. ± is the standard deviation over seeds; "
             "of times their median stands there, with the lowest and the highest.\n"]
    for notebook in evidence.notebooks:
        if (stem := notebook.stem) in evidence.preset:
            rows, said = evidence.rows[stem], "".join(f"- {line}\n" for line in conclusions(evidence, stem))
            where = f"Preset `{evidence.preset[stem]}`, on {' / '.join(dict.fromkeys(rows.device))}."
            # what is no arm read on test images (a sweep, a timing) belongs to its notebook
            parts.append(f"## {notebook.title}\n\n{where}\n\n{said}\n{_table(drawn(rows))}")
        elif said := "".join(f"- {line}\n" for line in conclusions(evidence, stem)):
            parts.append(f"## {notebook.title}\n\n{said}")
    return "\n".join(parts)


def _table(rows):
    columns = [c for c in SHOWN if c in rows and rows[c].notna().any()]
    units = [f"{COLUMNS[c].label}{f' ({COLUMNS[c].unit})' if COLUMNS[c].unit else ''}" for c in columns]
    lines = []
    for (arm, data), group in rows.groupby(["arm", "dataset"], sort=False):
        cells = [_of_seeds(group[c], c) for c in columns]
        minutes = f"{group.train_s.mean() / 60:.1f} min" if "train_s" in group else ""
        name = f"{arm} †" if group.why.any() else arm
        lines.append([name, data, f"{group.epochs.iloc[0]:g}", *cells, minutes, len(group)])
    return markdown(["arm", "data", "epochs", *units, "training", "seeds"], lines)


def _of_seeds(values, column):
    values = values.dropna()
    if not len(values):
        return "not measured"
    time = column in TIMES
    center, *spread = (values.median(), values.min(), values.max()) if time else (values.mean(), values.std(ddof=1))
    center, *spread = (show(float(value), column) for value in (center, *spread))
    if values.nunique() == 1:
        return center
    return f"{center} ({' to '.join(spread)})" if time else f"{center} ± {spread[0]}"


def judged(evidence):
    """The verdicts on all claims by what the notebooks found, under the present rules."""
    files = [(evidence.special(stem, "claims"), stem) for stem in evidence.preset]
    return verdicts.settled((found, evidence.stale(stem, found), image_noise(drawn(evidence.rows[stem])))
                            for found, stem in files)  # fmt: skip


def claims_page(evidence):
    """CLAIMS.md: every claim with what was measured and its verdict."""
    settled = judged(evidence)
    frame = verdicts.counts(settled).rename_axis("project")
    frame.loc["all"] = frame.sum()
    totals = _frame(frame)
    parts = ["# Claims\n\nWritten by `vitlab report` from the verdicts in results/; not to be edited. Every figure the "
             f"five projects published, and what it came to here. {verdicts.summary(settled)} A figure and its change "
             "from a baseline count once, an order of figures not beside them; facts found by running a "
             f"project's own code (marked *fact*) do not count as its claims.\n\n{totals}"]  # fmt: skip
    for project, title in claims.PROJECTS.items():
        frame = verdicts.table(claims.select(project=project), settled)
        often = [note for note, n in frame.note.value_counts().items() if n > 2 and len(note) > 40]
        frame["note"] = [f"note {often.index(n) + 1}" if n in often else n for n in frame.note]
        frame.index = [i if claims.get(i).source == "published" else f"{i} *(fact)*" for i in frame.index]
        table = _frame(frame.rename_axis("claim"))
        notes = "".join(f"{i}. {note}\n" for i, note in enumerate(often, 1))
        parts.append(f"## {title}\n\n{table}" + (f"\nNotes:\n\n{notes}" if notes else ""))
    return "\n".join(parts)
