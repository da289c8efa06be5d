"""The study on a cluster: a Slurm job array with a task for every seed of every notebook.

The tasks train, side by side, into the folder that all nodes share; an arm that two of them want is trained once, the
other waits for it. When all have ended, a last job runs the notebooks as they are, one after another: they find their
arms trained, measure them undisturbed, and write their rows. Slurm does all the rest.
"""

import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

from vitlab.run import notebooks, runner
from vitlab.utils import files, threads

# A task that stopped for its --budget (exit code 75) is queued again; the last job with it runs what is not yet done.
SCRIPT = """\
#!/bin/sh
{python} -P -m vitlab.run.slurm {plan} $SLURM_ARRAY_TASK_ID
code=$?
if [ $code = {paused} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
"""


def submit(project, jobs, options, budget=math.inf, timeout=math.inf):
    """Hand the jobs to Slurm with these options of sbatch (text); a sentence that says what is queued.

    budget, timeout: seconds for a task, and for a notebook within it. ValueError with sbatch's words where it refuses.
    """
    due = [job for job in jobs if runner.standing(project, job) != runner.SKIPPED]
    if not due:
        return "everything is up to date"
    tasks = [(label, job) for job in due for label, job in runner.by_seed(job)]
    work = {
        "source": project.source, "root": project.root, "preset": due[0].preset,
        "budget": None if math.isinf(budget) else budget, "timeout": None if math.isinf(timeout) else timeout,
        "tasks": [[label, job.notebook.stem, job.parameters] for label, job in tasks],
        "whole": [[None, job.notebook.stem, job.parameters] for job in due],
    }  # fmt: skip
    folder = project.root / ".state" / "slurm"
    plan = folder / f"{files.digest(work)}.json"  # what is queued keeps its own
    script = plan.with_suffix(".sh")
    files.write_json(plan, work)
    files.write_text(script, SCRIPT.format(python=shlex.quote(sys.executable), plan=shlex.quote(str(plan)),
                                           paused=runner.PAUSED_CODE))  # fmt: skip
    given = [f"--chdir={project.source}", f"--output={folder}/%x-%A-%a.log", "--open-mode=append", "--requeue",
             *shlex.split(options)]
    after, said = [], []
    if tasks:
        number = _sbatch("--job-name=vitlab-train", f"--array=0-{len(tasks) - 1}", *given, script)
        after, said = [f"--dependency=afterany:{number}"], [f"job array {number} trains in {len(tasks)} tasks"]
    number = _sbatch("--job-name=vitlab-run", *after, *given, script)
    return f"{', '.join([*said, f'job {number} then runs {len(due)} notebooks'])}; squeue shows them, logs: {folder}"


def _sbatch(*arguments):
    """Queue a job; its number."""
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(["sbatch", "--parsable", *map(str, arguments)], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": paths})  # fmt: skip
    except FileNotFoundError as missing:
        raise ValueError("--slurm: there is no sbatch here; this is no machine of a Slurm cluster") from missing
    if done.returncode:
        raise ValueError(f"--slurm: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def main(plan, index=None):
    """What Slurm starts: task `index` of the plan, or without one all its notebooks as a whole; the exit code."""
    plan = files.read_json(plan)
    project = notebooks.Project(Path(plan["source"]), Path(plan["root"]))
    limits = [plan["budget"] or math.inf, plan["timeout"] or math.inf]
    chosen = plan["whole"] if index is None else [plan["tasks"][int(index)]]
    jobs = [runner.plan(project, plan["preset"], [stem], overrides=given)[0] for _, stem, given in chosen]
    print(threads.choose(), flush=True)
    if index is None:
        outcomes = runner.run(project, jobs, True, *limits)
        print(runner.summary(project, jobs, outcomes), flush=True)
    else:
        terms = runner.Terms.from_now(False, *limits, width=len(plan["tasks"]))
        outcomes = [runner.run_one(project, jobs[0], terms, chosen[0][0])]
        print(outcomes[0], flush=True)
    return runner.exit_code(outcomes)


if __name__ == "__main__":
    threads.wait_passively()
    sys.exit(main(*sys.argv[1:]))
