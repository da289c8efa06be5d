"""The whole test command: lint, the package's tests, every notebook under nbval on the tiny preset."""

import os
import subprocess
import sys
import tempfile
import time

from vitlab.run import notebooks as nb
from vitlab.run.execution import papermill_run

CELL_TIMEOUT_S = 300
NOTHING_COLLECTED = 5  # pytest's exit code where it found no test at all


def selftest(project):
    """Run every stage, also after one has failed; 0 where all passed, else 1."""
    stages = {"ruff": _ruff, "pytest": _pytest, "notebooks": _notebooks}
    codes = {}
    for name, stage in stages.items():
        print(f"\n=== {name}", flush=True)
        begun = time.time()
        codes[name] = stage(project)
        verdict = "ok" if codes[name] == 0 else "FAILED"
        print(f"=== {name}: {verdict}, {time.time() - begun:.0f} s", flush=True)
    return int(any(codes.values()))


def prepare(project, folder, preset="tiny"):
    """Copies of all notebooks in `folder` with the preset's parameters put in, ready for nbval; their paths.

    nbval runs notebooks as they are, so papermill writes the parameters into them beforehand.
    """
    found = nb.find(project.source)
    values = nb.preset_parameters(project.source, preset, found) if found else {}
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.ipynb"):
        old.unlink()
    for notebook in found:
        papermill_run(notebook.path, folder / notebook.path.name, values[notebook.stem], prepare_only=True)
    return [folder / n.path.name for n in found]


def _ruff(project):
    return _python(project, "-m", "ruff", "check", ".")


def _pytest(project):
    # no test at all is a failure here: the package has some
    return _python(project, "-m", "pytest")


def _notebooks(project):
    paths = prepare(project, project.root / ".state" / "nbval")
    if not paths:
        print("no notebooks yet")
        return 0
    arguments = ("--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={CELL_TIMEOUT_S}")
    # results go to a folder of their own, so that the working tree stays as it is
    with tempfile.TemporaryDirectory(prefix="vitlab-") as scratch:
        code = _python(project, "-m", "pytest", *arguments, *map(str, paths), root=scratch)
    if code == NOTHING_COLLECTED:
        print("the notebooks have no code cells")
    return code


def _python(project, *arguments, root=None):
    environment = dict(os.environ)
    if root is not None:
        environment["VITLAB_ROOT"] = root
    return subprocess.run([sys.executable, *arguments], cwd=project.source, env=environment).returncode
