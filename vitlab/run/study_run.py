"""`vitlab run`. What trains and measures is not imported here: that happens in the processes of the notebooks."""

import contextlib
import dataclasses
import os
import signal
import sys
import tempfile
from pathlib import Path

from vitlab.run import notebooks, runner, slurm
from vitlab.utils import threads

INTERRUPTED_CODE, BUDGET_CODE = 130, 75
FEW, SHORT = 128, 0.01  # of a rehearsal: images of each split, seconds of each timing


def run(options):
    """Run what the options ask for."""
    if options.rehearse and options.slurm is not None:
        raise ValueError("--rehearse goes without --slurm: it is for this machine")
    project = notebooks.project(options.project)
    with rehearsal(project) if options.rehearse and not options.list else contextlib.nullcontext(project) as place:
        return _run(place, options)


def _run(project, options):
    if options.list:
        print(listing(project))
        return 0
    preset, why = (options.preset, "as asked") if options.preset else runner.choose_preset()
    print(f"preset {preset}: {why}", flush=True)
    given = {name: notebooks.read_yaml(text, f"-p {name}") for name, text in options.parameter}
    jobs = runner.plan(project, preset, options.only, options.seeds, given)
    if project.few:
        print(f"a rehearsal: {project.few} images of each split, nothing is kept", flush=True)
        jobs = [job if "seconds" in given else hurried(job) for job in jobs]
    task = os.environ.get(slurm.TASK)
    if options.slurm is not None and task is None:
        if not options.resume or options.jobs > 1:
            raise ValueError("--slurm goes with neither --fresh nor --jobs: every seed of every notebook is a task")
        print(slurm.submit(project, jobs, options.slurm, [*options.words, f"--preset={preset}"]))
        return 0
    own = "OMP_NUM_THREADS" in os.environ
    print(threads.choose(options.jobs), flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if task:
            return runner.exit_code([runner.run_part(project, jobs, int(task), options.budget)])
        outcomes = runner.run(project, jobs, options.resume, options.budget, options.jobs,
                              alone=lambda: own or print(_all_threads(), flush=True))  # fmt: skip
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED_CODE
    print("\n" + runner.summary(project, jobs, outcomes), flush=True)
    if (code := runner.exit_code(outcomes)) == BUDGET_CODE:
        print("\nThe budget is spent; the same command, without --fresh, goes on from here.", flush=True)
    return code


@contextlib.contextmanager
def rehearsal(project):
    """The project as it is rehearsed: on few images, with a folder for what it writes that is gone after the block.

    Every cell runs with the preset's models, epochs and settings, so that what would stop a run of a night, such as a
    budget that a model cannot be brought down to, shows in minutes. The numbers mean nothing.
    """
    with tempfile.TemporaryDirectory(prefix="vitlab-rehearsal-") as folder:
        yield dataclasses.replace(project, root=Path(folder).resolve(), few=FEW)


def hurried(job):
    """The job with timings as short as they can be."""
    short = {"seconds": SHORT} if "seconds" in job.notebook.parameters else {}
    return dataclasses.replace(job, parameters=job.parameters | short)


def _all_threads():
    """Choose the number of threads anew, among all cores: what was chosen was a job's share of them."""
    os.environ.pop("OMP_NUM_THREADS", None)
    return threads.choose()


def listing(project):
    """The notebooks, and where each preset stands, as text."""
    presets = notebooks.presets(project.source)
    standing = {(job.notebook.stem, preset): runner.standing(project, job)
                for preset in presets for job in runner.plan(project, preset)}  # fmt: skip
    lines = [(n.stem, *(standing[n.stem, p] for p in presets), n.title) for n in notebooks.find(project.source)]
    return runner.columns([("notebook", *presets, "title"), *lines])
