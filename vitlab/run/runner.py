"""Run the notebooks: preset, order, resume, budget, side by side, executed copies, summary."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import nbformat

from vitlab.run import notebooks as nb
from vitlab.run import publish, stamps
from vitlab.run.execution import environment, execute, send

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

    def stamp(self, project):
        return nb.stamp(project, self.preset, self.notebook, self.parameters)


@dataclass(frozen=True)
class Outcome:
    """What became of a job: status, wall time in seconds (None where it did not run), what to know."""

    stem: str
    status: str
    wall_s: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Terms:
    """On which terms jobs run: `fresh` trains arms again; training ends by `deadline`, everything by `limit` (unix
    times), a notebook after `timeout` seconds; `width` of them run side by side. `kernels` lists those at work, and
    once `stopped` is set what they leave is not kept."""

    fresh: bool = False
    deadline: float | None = None
    limit: float | None = None
    timeout: float | None = None
    width: int = 1
    kernels: list = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)


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

    folder = home()
    where = "VITLAB_DATA" if os.environ.get("VITLAB_DATA") else "~/.cache/vitlab"
    if any((folder / name).exists() for name in CIFAR):
        return "gpu", f"{device}, CIFAR under {where}"
    with contextlib.suppress(OSError), socket.create_connection(("www.cs.toronto.edu", 443), timeout=5):
        return "gpu", f"{device}, CIFAR can be downloaded"
    return "tiny", f"{device} is here, but CIFAR is neither under {where} nor can it be downloaded"


# ---------------------------------------------------------------------------------------------- plan

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
    chosen, overrides = select(found, only), dict(overrides or {})
    if seeds is not None and chosen and not any("seeds" in n.parameters for n in chosen):
        raise ValueError(f"none of {[n.stem for n in chosen]} has the parameter 'seeds'")
    jobs = []
    for notebook in chosen:
        extra = dict(overrides)
        if seeds is not None and "seeds" in notebook.parameters:
            extra["seeds"] = list(seeds)
        nb.check_parameters(notebook, extra)
        jobs.append(Job(notebook, preset, {**values[notebook.stem], **extra}))
    if overrides.get("dataset") not in (None, "", "tiny"):
        from vitlab.data import sources

        sources.plan(overrides["dataset"], sources.home())
    return jobs


def executed_path(project, job, failed=False):
    """Where the executed copy of a job's notebook lies."""
    return project.executed(job.preset) / f"{job.notebook.stem}{'.failed' if failed else ''}.ipynb"


def standing(project, job):
    """How far the evidence for `job` stands: "up to date", "failed", "never run", or what it is instead."""
    if executed_path(project, job, failed=True).exists():
        return FAILED
    if not (marks := nb.marks(executed_path(project, job))):
        return "never run"
    if stale := stamps.difference(marks.get("stamp"), job.stamp(project)):
        return stale
    complete = len(project.rows(job.preset, job.notebook.stem)) >= marks.get("rows", 1)
    return SKIPPED if complete else "rows are missing"


# ----------------------------------------------------------------------------------------------- run

def run(project, jobs, resume=True, budget=None, timeout=None, width=1):
    """Run `jobs`; [Outcome] in their order. A failed one does not stop the others.

    budget: seconds for all of them. Training stops between epochs as they end (its notebook is "paused"),
    nothing starts after them, and a cell that goes on regardless is interrupted.
    timeout: seconds for each notebook. resume=False runs what is up to date too, and retrains its arms.
    width: so many kernels side by side. The seeds of a notebook are then trained each in a kernel of its own, before
    the notebook runs as a whole, which finds them trained and measures them undisturbed.
    """
    limit = None if budget is None else time.time() + budget
    # the room before the limit is for what follows an epoch: evaluation, checkpoint, the executed copy
    deadline = None if budget is None else limit - min(30, budget / 10)
    terms, paused = Terms(not resume, deadline, limit, timeout, width), threading.Event()

    def one(position, terms=terms):
        job, stem = jobs[position], jobs[position].notebook.stem
        state = standing(project, job)
        if resume and state == SKIPPED:
            return Outcome(stem, SKIPPED, note="--fresh runs it again")
        if paused.is_set() or (limit is not None and time.time() >= deadline):
            return Outcome(stem, WAITING, note="budget spent")
        print(f"\n=== {stem} ({job.preset}), {position + 1} of {len(jobs)}: {state}", flush=True)
        outcome = run_one(project, job, terms)
        if outcome.status == PAUSED:
            paused.set()
        print(f"=== {stem}: {outcome.status}, {duration(outcome.wall_s)} {outcome.note}", flush=True)
        return outcome

    if width == 1:
        return [one(position) for position in range(len(jobs))]
    parts = {p: _by_seed(job) for p, job in enumerate(jobs) if not (resume and standing(project, job) == SKIPPED)}
    last = {p for p, job in enumerate(jobs) if job.notebook.reads or parts.get(p)}
    with ThreadPoolExecutor(width) as pool:
        seeds = [pool.submit(run_one, project, part, terms, True) for found in parts.values() for part in found]
        others = {p: pool.submit(one, p) for p in range(len(jobs)) if p not in last}
        try:
            wait([*seeds, *others.values()])
        except KeyboardInterrupt:
            terms.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            while wait([*seeds, *others.values()], timeout=0.5).not_done:
                send(terms.kernels, signal.SIGKILL)
            raise
    # measured undisturbed, from arms that have been trained
    alone = dataclasses.replace(terms, width=1, fresh=False)
    found = {p: one(p, alone if parts.get(p) else terms) for p in sorted(last)}
    return [found[p] if p in last else others[p].result() for p in range(len(jobs))]


def _by_seed(job):
    """The job once for each of its seeds; [] where it has one only."""
    seeds = job.parameters.get("seeds") or []
    return [dataclasses.replace(job, parameters={**job.parameters, "seeds": [s]}) for s in seeds if len(seeds) > 1]


def run_one(project, job, terms, part=False):
    """Run one notebook and keep its executed copy; the Outcome. Only Ctrl-C (KeyboardInterrupt) gets out.

    part: this is one seed of a notebook: what counts are the arms it trains, and no copy is kept.
    """
    stem = job.notebook.stem
    label = f"{stem}-s{job.parameters['seeds'][0]}" if part else stem
    scratch = project.root / ".state" / "run" / job.preset / f"{label}.ipynb"
    scratch.parent.mkdir(parents=True, exist_ok=True)
    scratch.unlink(missing_ok=True)
    begun, stamp = time.time(), job.stamp(project)
    ends = [m for m in (terms.limit, terms.timeout and begun + terms.timeout) if m is not None]
    env = environment(project.root, stamp, deadline=terms.deadline, fresh=terms.fresh, jobs=terms.width)
    error, overran = execute(job.notebook.path, scratch, job.parameters, project.root, min(ends, default=None), env=env,
                             prefix=f"{label} | " if terms.width > 1 else "", kernels=terms.kernels)  # fmt: skip
    wall = round(time.time() - begun, 1)
    spent = overran and terms.limit is not None and time.time() >= terms.limit
    if terms.stopped.is_set() or (error and (error[0] == "BudgetSpent" or spent)):
        return Outcome(stem, PAUSED, wall, "budget spent")
    if overran:
        error = ("TimeoutError", f"stopped after {duration(terms.timeout)} (--notebook-timeout)", "")
    if scratch.exists() and not part:
        _publish(project, job, scratch, {"status": FAILED if error else DONE, "stamp": stamp, "wall_s": wall})
    if error:
        text = error[2] or f"{error[0]}: {error[1]}"
        plain = text if sys.stderr.isatty() else re.sub(r"\x1b\[[\d;]*m", "", text)
        print(plain, file=sys.stderr, flush=True)
        first_line = (error[1].strip().splitlines() or [""])[0][:120]
        return Outcome(stem, FAILED, wall, f"{error[0]}: {first_line}")
    return Outcome(stem, DONE, wall)


def _publish(project, job, scratch, said):
    """Keep the executed copy, with what ran, from which code, on what, and how that went (`said`)."""
    from vitlab.utils.provenance import provenance

    origin = provenance("cpu")  # asking for "cuda" would make a context on the GPU in this process
    said |= {name: origin[name] for name in ("commit", "dirty", "versions", "finished")} | {
        "device": cuda_device() or origin["device"], "source_sha256": job.notebook.source_sha256,
        "preset": job.preset, "parameters": json.loads(json.dumps(job.parameters)),
        "rows": len(project.rows(job.preset, job.notebook.stem)),
    }  # fmt: skip
    failed = said["status"] == FAILED
    node = publish.clean(nbformat.read(scratch, as_version=4), project)
    publish.save(node, executed_path(project, job, failed), said)
    if not failed:
        executed_path(project, job, failed=True).unlink(missing_ok=True)
    scratch.unlink()


# ------------------------------------------------------------------------------------------- summary

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


def summary(project, jobs, outcomes):
    """The table at the end: notebook, status, wall time, where its outputs are."""
    lines = [("notebook", "status", "time", "outputs")]
    for job, outcome in zip(jobs, outcomes, strict=True):
        lines.append((outcome.stem, outcome.status, duration(outcome.wall_s), _outputs(project, job, outcome)))
    return columns(lines)


def columns(lines):
    """Lines of cells as text, all but the last column padded."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(line, widths)), line[-1]]) for line in lines)


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
