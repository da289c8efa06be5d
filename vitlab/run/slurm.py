"""The study on a cluster: a Slurm job array with a task for every seed of every notebook.

The tasks train, side by side, into the folder that all nodes share; an arm that two of them want is trained once, the
other waits for it. When all have ended, a last job runs the notebooks as they are, one after another: they find their
arms trained, measure them undisturbed, and write their rows. Slurm does all the rest.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from vitlab.run import runner
from vitlab.utils import files

TASK = "VITLAB_TASK"  # in its environment: which task of the array the command is, "" the last job
# The command is given again as it was, with the threads that the task was given (a cluster need not bind it to them).
# What stopped for its --budget (exit code 75) is queued again.
SCRIPT = """\
#!/bin/sh
export {task}="$SLURM_ARRAY_TASK_ID" PYTHONPATH={package}"${{PYTHONPATH:+:$PYTHONPATH}}"
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-1}}}}"
{command}
code=$?
if [ $code = {paused} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
"""


def submit(project, jobs, options, words):
    """Hand the jobs to Slurm with these options of sbatch (text); a sentence that says what is queued.

    words: the command that each task gives again. ValueError with sbatch's own words where it refuses.
    """
    due = {job.notebook.stem for job in jobs if runner.standing(project, job) != runner.SKIPPED}
    if not due:
        return "everything is up to date"
    tasks = [str(i) for i, (_, job) in enumerate(runner.parts(jobs)) if job.notebook.stem in due]
    folder = project.root / ".state" / "slurm"
    command = [sys.executable, "-P", "-m", "vitlab.cli", *words]
    script = folder / f"{files.digest(command)}.sh"
    package = shlex.quote(str(Path(__file__).parents[2]))
    files.write_text(script, SCRIPT.format(task=TASK, package=package, command=shlex.join(command),
                                           paused=runner.PAUSED_CODE))  # fmt: skip
    given = [f"--output={folder}/%x-%A-%a.log", "--open-mode=append", "--requeue", *shlex.split(options), str(script)]
    after, said = [], []
    if tasks:
        number = _sbatch("--job-name=vitlab-train", f"--array={','.join(tasks)}", *given)
        after, said = [f"--dependency=afterany:{number}"], [f"job array {number} trains in {len(tasks)} tasks"]
    number = _sbatch("--job-name=vitlab-run", *after, *given)
    return f"{', '.join([*said, f'job {number} then runs {len(due)} notebooks'])}; squeue shows them, logs: {folder}"


def _sbatch(*arguments):
    """Queue a job; its number."""
    try:
        done = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True)
    except FileNotFoundError as missing:
        raise ValueError("--slurm: there is no sbatch here; this is no machine of a Slurm cluster") from missing
    if done.returncode:
        raise ValueError(f"--slurm: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
