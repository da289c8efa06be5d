"""`vitlab run`. What trains and measures is not imported here: that happens in the processes of the notebooks."""

import os
import signal
import sys

from vitlab.run import notebooks, runner, slurm
from vitlab.utils import threads

INTERRUPTED_CODE, BUDGET_CODE = 130, 75


def run(options):
    """Run what the options ask for."""
    project = notebooks.project(options.project)
    if options.list:
        print(listing(project))
        return 0
    preset, why = (options.preset, "as asked") if options.preset else runner.choose_preset()
    print(f"preset {preset}: {why}", flush=True)
    given = {name: notebooks.read_yaml(text, f"-p {name}") for name, text in options.parameter}
    jobs = runner.plan(project, preset, options.only, options.seeds, given)
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
