"""Run the notebooks: preset, order, resume, budget, side by side, executed copies, summary."""

import dataclasses
import functools
import hashlib
import math
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import nbformat

from vitlab.data import sources
from vitlab.run import notebooks as nb
from vitlab.run import publish, stamps
from vitlab.run.execution import execute, kill
from vitlab.train.progress import clock
from vitlab.utils import files
from vitlab.utils.provenance import provenance

DONE, SKIPPED, PAUSED, FAILED, WAITING = "done", "up to date", "paused", "failed", "not started"
PAUSED_CODE, FAILED_CODE = 75, 1
PROBE = "import torch;print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


@dataclass(frozen=True)
class Job:
    """One notebook with the parameters it is to run with; preset: the name of the folders that its outputs go to."""

    notebook: nb.Notebook
    preset: str
    parameters: dict

    def stamp(self, project):
        """The stamp that a run would get: code, parameters, and the rows of others where the notebook reads them."""
        files = sorted(project.root.glob(f"results/{self.preset}/*/*.json")) if self.notebook.reads else ()
        rows = {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest()
                for p in files if p.parent.name != self.notebook.stem}  # fmt: skip
        return stamps.stamp(self.notebook.code, self.parameters, rows)

    def copy(self, project, failed=False):
        """Where the executed copy lies."""
        return project.executed(self.preset) / f"{self.notebook.stem}{'.failed' if failed else ''}.ipynb"

    def rows(self, project, stamp):
        """How many of its result files have this stamp; those of older code may lie beside them."""
        found = project.root.glob(f"results/{self.preset}/{self.notebook.stem}/*.json")
        return sum(f'"stamp": "{stamp}"' in path.read_text(encoding="utf-8", errors="replace") for path in found)


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its status, wall time in seconds, what to know."""

    stem: str
    status: str
    wall_s: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Terms:
    """On which terms jobs run: `fresh` trains arms again; training ends by `deadline`, everything by `limit` (unix
    times); `width` of them run side by side. `kernels` lists those at work, and once `stopped` is set what they leave
    is not kept."""

    fresh: bool
    deadline: float
    limit: float
    width: int
    kernels: list = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def from_now(cls, fresh, budget, width):
        """The terms for the next `budget` seconds."""
        limit = time.time() + budget
        # the room before the limit is for what follows an epoch: evaluation, checkpoint, the executed copy
        return cls(fresh, limit - min(30, budget / 10), limit, width)

    @property
    def spent(self):
        """Whether nothing more is to begin."""
        return self.stopped.is_set() or time.time() >= self.deadline


@functools.cache
def cuda_device():
    """The name of the CUDA device, or "". A process of its own asks, so that this one holds no GPU memory."""
    return subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True).stdout.strip()


def choose_preset():
    """(preset, why): `gpu` where CUDA is found, else `tiny`."""
    return ("gpu", device) if (device := cuda_device()) else ("tiny", "no CUDA device")


# ---------------------------------------------------------------------------------------------- plan

def plan(project, preset, only=(), seeds=None, overrides=None):
    """The jobs to run, in running order; every parameter is checked here, before anything starts (ValueError).

    only: notebooks, by number ("01") or whole name. overrides: parameters of all chosen notebooks. What runs on a data
    set of the user's has folders of its own (results/tiny-birds), so that rows of different data never lie together.
    """
    found, overrides, jobs = nb.find(project.source), overrides or {}, []
    values = nb.preset_parameters(project.source, preset, found)
    if unknown := set(only).difference(*((n.stem, n.stem[:2]) for n in found)):
        raise ValueError(f"no notebook {sorted(unknown)}; there are: {', '.join(n.stem for n in found)}")
    for notebook in (n for n in found if not only or n.stem in only or n.stem[:2] in only):
        # what only reads rows has no seeds
        extra = overrides | ({"seeds": seeds} if seeds and "seeds" in notebook.parameters else {})
        nb.check_parameters(notebook, extra)
        given, name, place = values[notebook.stem] | extra, overrides.get("dataset"), preset
        if name and not notebook.reads and name != (notebook.parameters | values[notebook.stem])["dataset"]:
            place = f"{preset}-{re.sub(r'[^A-Za-z0-9]+', '-', name.removeprefix('folder:')).strip('-')}"
        jobs.append(Job(notebook, place, given | {"preset": place} if place != preset else given))
    if overrides.get("dataset") not in (None, "", "tiny"):
        sources.plan(overrides["dataset"], sources.home())
    return jobs


def standing(project, job):
    """How far the evidence for `job` stands: "up to date", "failed", "never run", or what it is instead."""
    if job.copy(project, failed=True).exists():
        return FAILED
    if not (marks := nb.marks(job.copy(project))):
        return "never run"
    complete = job.rows(project, marks.get("stamp")) >= marks.get("rows", 1)
    return stamps.difference(marks.get("stamp"), job.stamp(project)) or (SKIPPED if complete else "rows are missing")


# ----------------------------------------------------------------------------------------------- run

def run(project, jobs, resume=True, budget=math.inf, width=1, alone=lambda: None):
    """Run `jobs`; [Outcome] in their order. A failed one does not stop the others.

    budget: seconds for all of them. Training stops between epochs as they end (its notebook is "paused"),
    nothing starts after them, and a cell that goes on regardless is interrupted.
    resume=False runs what is up to date too, and retrains its arms.
    width: so many kernels train side by side, one for each seed of each notebook. Then every notebook runs as a whole
    and alone, finds its arms trained and measures them undisturbed; `alone` is called before.
    """
    terms, outcomes = Terms.from_now(not resume, budget, width), []
    if width > 1:
        _side_by_side(project, parts(j for j in jobs if not resume or standing(project, j) != SKIPPED), terms)
        terms = dataclasses.replace(terms, width=1, fresh=False)
        alone()
    for position, job in enumerate(jobs, 1):
        stem, state = job.notebook.stem, standing(project, job)
        if resume and state == SKIPPED:
            outcome = Outcome(stem, SKIPPED, note="--fresh runs it again")
        elif terms.spent or any(o.status == PAUSED for o in outcomes):
            outcome = Outcome(stem, WAITING, note="budget spent")
        else:
            print(f"\n=== {stem} ({job.preset}), {position} of {len(jobs)}: {state}", flush=True)
            outcome = run_one(project, job, terms)
            print(f"=== {stem}: {outcome.status}, {clock(outcome.wall_s)} {outcome.note}", flush=True)
        outcomes.append(outcome)
    return outcomes


def run_part(project, jobs, index, budget):
    """Train one of the `parts` of `jobs`, of which others run on other machines; the Outcome, which is printed."""
    label, job = parts(jobs)[index]
    outcome = run_one(project, job, Terms.from_now(False, budget, len(parts(jobs))), label)
    print(outcome, flush=True)
    return outcome


def parts(jobs):
    """[(label, job)]: each job once for each of its seeds; none where it only reads rows."""
    found = []
    for job in jobs:
        stem, given = job.notebook.stem, job.parameters
        seeds = () if job.notebook.reads else (job.notebook.parameters | given).get("seeds", ())
        found += [(f"{stem}-s{seed}", dataclasses.replace(job, parameters=given | {"seeds": [seed]})) for seed in seeds]
    return found


def _side_by_side(project, parts, terms):
    """Train the arms of all `parts`; what fails there fails again, and is told, when its notebook runs as a whole."""
    with ThreadPoolExecutor(terms.width) as pool:
        training = [pool.submit(run_one, project, job, terms, label) for label, job in parts]
        try:
            wait(training)
        except KeyboardInterrupt:
            terms.stopped.set()
            training = [one for one in training if not one.cancel()]  # a cancelled one is never "done" for `wait`
            while wait(training, timeout=0.5).not_done:
                kill(terms.kernels)
            raise


def run_one(project, job, terms, part=""):
    """Run one notebook and keep its executed copy; the Outcome.

    part: the name of this one seed of a notebook: what counts are the arms it trains, and no copy is kept.
    While another `vitlab run` is at work on it in the same folder it is waited for, and what that one finished is not
    run again.
    """
    scratch = project.root / ".state" / "run" / job.preset / f"{part or job.notebook.stem}.ipynb"
    try:
        with files.locked(scratch.with_suffix(".lock"), functools.partial(print, flush=True),
                          lambda: terms.spent) as waited:  # fmt: skip
            if waited and not part and not terms.fresh and standing(project, job) == SKIPPED:
                return Outcome(job.notebook.stem, SKIPPED, note="another run did it")
            return _run_one(project, job, terms, part, scratch)
    except TimeoutError as error:
        return Outcome(job.notebook.stem, WAITING, note=f"budget spent: {error}")
    except OSError as error:  # of its lock, on a full disk, say: the others still run
        return Outcome(job.notebook.stem, FAILED, note=f"{type(error).__name__}: {error}")


def _run_one(project, job, terms, part, scratch):
    stem, begun, stamp = job.notebook.stem, time.time(), job.stamp(project)
    scratch.unlink(missing_ok=True)
    error = execute(job.notebook.path, scratch, job.parameters, project.root, end=terms.limit, kernels=terms.kernels,
                    env=environment(project, stamp, terms),
                    prefix=f"{part or stem} | " if terms.width > 1 else "")  # fmt: skip
    wall = round(time.time() - begun, 1)
    if terms.stopped.is_set() or (error and error[0] == "BudgetSpent") or time.time() >= terms.limit:
        return Outcome(stem, PAUSED, wall, "budget spent")
    if scratch.exists() and not part:
        try:
            _publish(project, job, scratch, {"status": FAILED if error else DONE, "stamp": stamp, "wall_s": wall})
        except (OSError, ValueError) as failure:  # a full disk; papermill may have left half a notebook on it
            error = error or (type(failure).__name__, f"its copy in executed/ cannot be written: {failure}", "")
    if not error:
        return Outcome(stem, DONE, wall)
    name, message, traceback = error
    text = traceback or f"{name}: {message}"
    print(text if sys.stderr.isatty() else re.sub(r"\x1b\[[\d;]*m", "", text), file=sys.stderr, flush=True)
    return Outcome(stem, FAILED, wall, f"{name}: {message.strip().partition(chr(10))[0][:120]}")


def environment(project, stamp, terms):
    """The environment of a kernel: this one's, with what the runner has to say in it.

    VITLAB_ROOT: where results go. VITLAB_STAMP: what rows are stamped with. VITLAB_DEADLINE: unix time by which
    training is to have stopped. VITLAB_FRESH: "1" where arms are to be trained again. VITLAB_JOBS: how many kernels
    run side by side, where it is more than one. VITLAB_REHEARSAL: images of each split, in a rehearsal.
    """
    data = os.environ.get("VITLAB_DATA")
    said = {
        "VITLAB_ROOT": str(project.root), "VITLAB_STAMP": stamp, "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "VITLAB_DEADLINE": repr(terms.deadline) if terms.deadline < math.inf else "",
        "VITLAB_FRESH": "1" if terms.fresh else "", "VITLAB_JOBS": str(terms.width) if terms.width > 1 else "",
        "VITLAB_REHEARSAL": str(project.few or ""),
        "VITLAB_DATA": data and os.path.abspath(data),  # the kernel's working folder is another one
    }  # fmt: skip
    others = {name: value for name, value in os.environ.items() if not name.startswith("VITLAB_")}
    return others | {name: value for name, value in said.items() if value}


def _publish(project, job, scratch, said):
    """Keep the executed copy, with what ran, from which code, on what, and how that went (`said`)."""
    origin = provenance("cpu")  # asking for "cuda" would make a context on the GPU in this process
    node = publish.clean(nbformat.read(scratch, as_version=4), project)
    node.metadata["vitlab"] = origin | said | {
        "device": cuda_device() or origin["device"], "preset": job.preset, "parameters": job.parameters,
        "rows": job.rows(project, said["stamp"])}  # fmt: skip
    files.write_text(job.copy(project, said["status"] == FAILED), nbformat.writes(node, version=4) + "\n")
    if said["status"] == DONE:
        job.copy(project, failed=True).unlink(missing_ok=True)
    scratch.unlink()


# ------------------------------------------------------------------------------------------- summary

def exit_code(outcomes):
    """0 all well, 1 some failed, 75 paused or not started for want of time."""
    statuses = {o.status for o in outcomes}
    return FAILED_CODE if FAILED in statuses else PAUSED_CODE if statuses & {PAUSED, WAITING} else 0


def summary(project, jobs, outcomes):
    """The table at the end: notebook, status, wall time, where its outputs are."""
    lines = [("notebook", "status", "time", "outputs")]
    for job, outcome in zip(jobs, outcomes):
        copy = job.copy(project, outcome.status == FAILED)
        found = [str(copy.relative_to(project.root))] if copy.exists() else []
        for folder, ending in (("figures", "png"), ("results", "json")):
            place = f"{folder}/{job.preset}/{outcome.stem}/"
            if files := list(project.root.glob(f"{place}*.{ending}")):
                found.append(f"{place} ({len(files)})")
        found += [f"[{outcome.note}]"] if outcome.note else []
        lines.append((outcome.stem, outcome.status, clock(outcome.wall_s), ", ".join(found)))
    return columns(lines)


def columns(lines):
    """Lines of cells as text, all but the last column padded."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(line, widths)), line[-1]]) for line in lines)
