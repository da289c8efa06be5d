"""Run the notebooks: preset, order, resume, budget, executed copies, summary."""

import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat

from vitlab.run import notebooks as nb
from vitlab.run.execution import environment, execute

DONE, SKIPPED, PAUSED, FAILED, WAITING = "done", "up to date", "paused", "failed", "not started"
PAUSED_CODE, FAILED_CODE = 75, 1
CIFAR = ("cifar10.npz", "cifar-10-batches-py", "cifar-10-python.tar.gz")
PROBE = "import torch;print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


@dataclass(frozen=True)
class Job:
    """One notebook with the parameters it is to run with."""

    notebook: nb.Notebook
    preset: str
    parameters: dict


@dataclass(frozen=True)
class Outcome:
    """What became of a job: status, wall time in seconds (None where it did not run), what to know."""

    stem: str
    status: str
    wall_s: float | None = None
    note: str = ""


@functools.cache
def cuda_device():
    """The name of the CUDA device, or "". A process of its own asks, so that this one holds no GPU memory."""
    answer = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    return answer.stdout.strip()


def choose_preset(project):
    """(preset, why): `gpu` where CUDA is found and CIFAR can be had, else `tiny`."""
    if not (device := cuda_device()):
        return "tiny", "no CUDA device"
    if "gpu" not in nb.presets(project.source):
        return "tiny", f"{device} is here, but there is no presets/gpu.yaml"
    from vitlab.data.sources import home

    folder = Path(os.environ.get("VITLAB_DATA") or home())
    where = "VITLAB_DATA" if os.environ.get("VITLAB_DATA") else "~/.cache/vitlab"
    if any((folder / name).exists() for name in CIFAR):
        return "gpu", f"{device}, CIFAR under {where}"
    with contextlib.suppress(OSError), socket.create_connection(("www.cs.toronto.edu", 443), timeout=5):
        return "gpu", f"{device}, CIFAR can be downloaded"
    return "tiny", f"{device} is here, but CIFAR is neither under {where} nor can it be downloaded"


def select(found, only=None):
    """The notebooks that `only` names (numbers such as "01", or whole names), in running order."""
    if not only:
        return found
    unknown = [o for o in only if not any(o in (n.stem, n.stem[:2]) for n in found)]
    if unknown:
        raise ValueError(f"no notebook {unknown}; there are: {', '.join(n.stem for n in found) or 'none'}")
    return [n for n in found if n.stem in only or n.stem[:2] in only]


def plan(project, preset, only=None, seeds=None, overrides=None):
    """The jobs to run; every parameter is checked here, before anything starts (ValueError)."""
    found = nb.find(project.source)
    if not found:
        return []
    values = nb.preset_parameters(project.source, preset, found)
    chosen = select(found, only)
    if seeds is not None and chosen and not any("seeds" in n.parameters for n in chosen):
        raise ValueError(f"none of {[n.stem for n in chosen]} has the parameter 'seeds'")
    jobs = []
    for notebook in chosen:
        extra = dict(overrides or {})
        if seeds is not None and "seeds" in notebook.parameters:
            extra["seeds"] = list(seeds)
        nb.check_parameters(notebook, extra)
        jobs.append(Job(notebook, preset, {**values[notebook.stem], **extra}))
    return jobs


def executed_path(project, job, failed=False):
    """Where the executed copy of a job's notebook lies."""
    return project.executed(job.preset) / f"{job.notebook.stem}{'.failed' if failed else ''}.ipynb"


def standing(project, job):
    """"up to date", "stale", "failed" or "never run": whether a run of `job` would tell anything new."""
    if executed_path(project, job, failed=True).exists():
        return FAILED
    marks = nb.stamp(executed_path(project, job))
    if not marks:
        return "never run"
    rows = len(project.rows(job.preset, job.notebook.stem))
    current = marks.get("inputs") == inputs(project, job) and marks.get("status") == DONE
    return SKIPPED if current and rows >= marks.get("rows", 1) else "stale"


def inputs(project, job):
    everyone = nb.find(project.source)
    return nb.inputs_digest(project, job.preset, job.notebook, job.parameters, everyone)


def run(project, jobs, resume=True, budget=None, timeout=None):
    """Run `jobs` one after the other; [Outcome]. A failed one does not stop those after it.

    budget: seconds for all of them. Training stops between epochs as they end (its notebook is "paused"),
    nothing starts after them, and a cell that goes on regardless is interrupted.
    timeout: seconds for each notebook. resume=False runs what is up to date too, and retrains its arms.
    """
    limit = None if budget is None else time.time() + budget
    # the room before the limit is for what follows an epoch: evaluation, checkpoint, the executed copy
    deadline = None if budget is None else limit - min(30, budget / 10)
    outcomes = []
    for position, job in enumerate(jobs):
        stem = job.notebook.stem
        if resume and standing(project, job) == SKIPPED:
            outcomes.append(Outcome(stem, SKIPPED, note="--fresh runs it again"))
            continue
        if any(o.status == PAUSED for o in outcomes) or (limit is not None and time.time() >= deadline):
            outcomes.append(Outcome(stem, WAITING, note="budget spent"))
            continue
        print(f"\n=== {stem} ({job.preset}), {position + 1} of {len(jobs)}", flush=True)
        outcomes.append(run_one(project, job, not resume, deadline, limit, timeout))
        last = outcomes[-1]
        print(f"=== {stem}: {last.status}, {duration(last.wall_s)} {last.note}", flush=True)
    for preset in {job.preset for job in jobs}:
        if any(project.executed(preset).glob("*.ipynb")):
            nb.render_index(project.executed(preset))
    return outcomes


def run_one(project, job, fresh=False, deadline=None, limit=None, timeout=None):
    """Run one notebook and keep its executed copy; the Outcome. Only Ctrl-C (KeyboardInterrupt) gets out."""
    scratch = project.root / ".state" / "run" / job.preset / f"{job.notebook.stem}.ipynb"
    scratch.parent.mkdir(parents=True, exist_ok=True)
    scratch.unlink(missing_ok=True)
    begun, before = time.time(), inputs(project, job)
    ends = [m for m in (limit, timeout and begun + timeout) if m is not None]
    with environment(project.root, deadline, fresh):
        error, overran = execute(
            job.notebook.path, scratch, job.parameters, project.root, min(ends, default=None)
        )
    wall = round(time.time() - begun, 1)
    spent = overran and limit is not None and time.time() >= limit
    if error and (error[0] == "BudgetSpent" or spent):
        return Outcome(job.notebook.stem, PAUSED, wall, "budget spent")
    if overran:
        error = ("TimeoutError", f"stopped after {duration(timeout)} (--notebook-timeout)", "")
    marks = {"status": FAILED if error else DONE, "inputs": before, "wall_s": wall}
    marks |= _marks(project, job)
    if scratch.exists():
        _publish(project, job, scratch, marks)
    if error:
        _complain(error[2] or f"{error[0]}: {error[1]}")
        return Outcome(job.notebook.stem, FAILED, wall, f"{error[0]}: {_first_line(error[1])}")
    return Outcome(job.notebook.stem, DONE, wall)


def _complain(text):
    plain = text if sys.stderr.isatty() else re.sub(r"\x1b\[[\d;]*m", "", text)
    print(plain, file=sys.stderr, flush=True)


def _publish(project, job, scratch, marks):
    node = nb.clean(nbformat.read(scratch, as_version=4), project)
    failed = marks["status"] == FAILED
    nb.save(node, executed_path(project, job, failed), marks)
    if not failed:
        executed_path(project, job, failed=True).unlink(missing_ok=True)
        nb.render(executed_path(project, job))
    scratch.unlink()


def _marks(project, job):
    """The rest of an executed notebook's stamp: what ran, with which parameters, from which code, on what."""
    from vitlab.utils.provenance import provenance

    marks = provenance("cpu")  # asking for "cuda" would make a context on the GPU in this process
    marks.pop("cuda", None)
    return marks | {
        "device": cuda_device() or marks["device"],
        "source_sha256": job.notebook.source_sha256,
        "preset": job.preset,
        "parameters": json.loads(json.dumps(job.parameters)),
        "rows": len(project.rows(job.preset, job.notebook.stem)),
    }


def exit_code(outcomes):
    """0 all well, 1 some failed, 75 paused or not started for want of time."""
    statuses = {o.status for o in outcomes}
    if FAILED in statuses:
        return FAILED_CODE
    return PAUSED_CODE if statuses & {PAUSED, WAITING} else 0


def duration(seconds):
    """Seconds as a person writes them: 4.2 s, 3 min 05 s, 1 h 12 min."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _first_line(text):
    return (str(text).strip().splitlines() or [""])[0][:120]


def summary(project, jobs, outcomes):
    """The table at the end: notebook, status, wall time, where its outputs are."""
    lines = [("notebook", "status", "time", "outputs")]
    for job, outcome in zip(jobs, outcomes, strict=True):
        where = _outputs(project, job, outcome)
        lines.append((outcome.stem, outcome.status, duration(outcome.wall_s), where))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(line, widths)), line[3]]) for line in lines)


def _outputs(project, job, outcome):
    stem = job.notebook.stem
    copy = executed_path(project, job, outcome.status == FAILED)
    found = [str(copy.relative_to(project.root))] if copy.exists() else []
    figures = project.root / "figures" / job.preset / stem
    if count := len(list(figures.glob("*.png"))):
        found.append(f"{figures.relative_to(project.root)}/ ({count} figures)")
    if count := len(project.rows(job.preset, stem)):
        found.append(f"results/{job.preset}/{stem}/ ({count} rows)")
    return ", ".join(found) + (f" [{outcome.note}]" if outcome.note else "")
