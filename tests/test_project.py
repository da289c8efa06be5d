"""The project's files agree with each other: dependencies, lock, environments, floors, notebooks, presets."""

import ast
import graphlib
import os
import re
import shutil
import statistics
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vitlab.run import notebooks as nb
from vitlab.run import report, runner, stamps

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTED = sorted(p for preset in ("gpu", "cpu") for p in (ROOT / "executed" / preset).glob("*.ipynb"))
MODULES = sorted(p for p in (ROOT / "vitlab").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MACHINE_PATH = re.compile(r"(/home/|/root/|/Users/|/tmp/|[A-Z]:\\\\Users)")

# The folders are the floors, from the top down, as README and the package's docstring list them: a file imports only
# from its own folder or from one further down. What lies directly in vitlab/ (the command line) stands above all.
FOLDERS = re.findall(r"^    (\w+)/ ", (ROOT / "vitlab/__init__.py").read_text(), re.MULTILINE)


def floor(module):
    """Number of the floor from the top; a file directly in vitlab/ stands on floor 0."""
    parts = module.split(".")
    return 1 + FOLDERS.index(parts[1]) if len(parts) > 1 and parts[1] in FOLDERS else 0


def imported(path):
    """The vitlab modules that a file imports, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "vitlab")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import in line {node.lineno}"
            if node.module == "vitlab":
                yield from (f"vitlab.{a.name}" for a in node.names if not a.name.startswith("__"))
            elif node.module and node.module.startswith("vitlab."):
                yield node.module


def names(requirements):
    return {canonicalize_name(Requirement(r).name) for r in requirements}


def declared():
    return [*PYPROJECT["dependencies"], *PYPROJECT["optional-dependencies"]["dev"]]


def pins():
    """{name: ([Requirement, ...], is it ours)} of requirements.lock."""
    found, current = {}, None
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith(("#", " ")):
            requirement = Requirement(line)
            current = found.setdefault(canonicalize_name(requirement.name), [[], False])
            current[0].append(requirement)
        elif current and "vitlab (pyproject.toml)" in line:
            current[1] = True
    return found


def test_lock_has_what_pyproject_asks_for_and_nothing_asked_for_by_nobody():
    assert {name for name, (_, ours) in pins().items() if ours} == names(declared())


def test_every_pin_is_exact_and_satisfies_pyproject():
    locked = pins()
    for text in declared():
        wanted = Requirement(text)
        for pin in locked[canonicalize_name(wanted.name)][0]:
            (version,) = [s.version for s in pin.specifier if s.operator == "=="]
            assert wanted.specifier.contains(version, prereleases=True), f"{pin} does not satisfy {text}"
    assert all(str(r.specifier).startswith("==") for rs, _ in locked.values() for r in rs)


def test_lock_names_no_index_and_no_folder():
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"https?://|--index|--find-links|file:|(^|\s)/\w", text)


def test_conda_environment_takes_everything_from_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert python == f"python{PYPROJECT['requires-python']}"
    assert pip == "pip" and packages == {"pip": ["-r requirements.lock", "-e ."]}
    assert environment["name"] == PYPROJECT["name"]


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES[1:], ids=lambda p: str(p.relative_to(ROOT)))
def test_floors(path):
    module = module_name(path)
    for other in set(imported(path)) - {"vitlab"}:
        assert floor(other) >= floor(module), f"{module} may not import {other} from a floor above"


def test_every_folder_is_a_floor():
    folders = {p.parent.relative_to(ROOT / "vitlab").parts[0] for p in MODULES if p.parent != ROOT / "vitlab"}
    assert folders == set(FOLDERS)


def test_imports_make_no_circle():
    known = {module_name(p): p for p in MODULES[1:]}
    graph = {name: set(imported(path)) & set(known) for name, path in known.items()}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (350 if path in TESTS else 300)


def test_scripts():
    for name in ("run_all.sh", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK), f"{name} is not executable"
        if shutil.which("bash"):
            subprocess.run(["bash", "-n", ROOT / name], check=True)
    lines = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and line[0] != "#"]
    assert lines[-1] == "./run_all.sh --test"


def test_presets_and_notebooks_know_each_other():
    found = nb.find(ROOT)
    assert "tiny" in nb.presets(ROOT)
    if found:
        for preset in nb.presets(ROOT):
            assert set(nb.preset_parameters(ROOT, preset, found)) == {n.stem for n in found}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_source(path):
    node = nbformat.read(path, as_version=4)
    nbformat.validate(node)
    code = [c for c in node.cells if c.cell_type == "code"]
    assert not any(c.outputs or c.execution_count for c in code), "a notebook is committed without outputs"
    assert {"preset", "seeds"} <= set(nb.inspect(path).parameters) or nb.inspect(path).reads
    assert not MACHINE_PATH.search(path.read_text(encoding="utf-8"))
    assert "widgets" not in node.metadata and "papermill" not in node.metadata
    for cell in code:
        if not cell.source.startswith("%"):
            classes = [n.name for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.ClassDef)]
            assert not classes, f"a notebook defines no classes: {classes}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_reads_like_a_chapter(path):
    """At most 35 code cells, half of them of 7 lines or fewer, none over 25, and 5 to 10 words of prose a line."""
    cells = nbformat.read(path, as_version=4).cells
    lines = [len([line for line in c.source.splitlines() if line.strip()]) for c in cells if c.cell_type == "code"]
    words = sum(len(c.source.split()) for c in cells if c.cell_type == "markdown")
    assert len(lines) <= 35, f"{len(lines)} code cells"
    assert statistics.median(lines) <= 7, f"a median cell has {statistics.median(lines)} lines"
    assert max(lines) <= 25, f"the longest cell has {max(lines)} lines"
    assert 5 <= words / sum(lines) <= 10, f"{words / sum(lines):.1f} words of prose a line of code"


@pytest.mark.skipif(not EXECUTED, reason="no executed notebook is committed yet")
@pytest.mark.parametrize("path", EXECUTED or [None], ids=lambda p: p and p.stem)
def test_executed_notebook_is_of_the_present_code_or_marked(path):
    marks, (job,) = nb.marks(path), runner.plan(nb.project(ROOT), path.parent.name, [path.stem])
    assert marks["status"] == "done" and not path.stem.endswith(".failed")
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| [{path.stem}]"))
    cell = line.split(" | ")[1 + report.PRESETS.index(path.parent.name)]
    stale = stamps.difference(marks.get("stamp"), job.stamp(nb.project(ROOT)))
    assert stale in cell and ("made" in cell) == bool(stale), f"{cell}: run `vitlab report`"
    assert not MACHINE_PATH.search(re.sub(r'"image/\w+": "[^"]*"', "", path.read_text(encoding="utf-8")))


def test_generated_files_say_what_the_rows_say():
    assert list(report.stale(ROOT)) == [], "run `vitlab report`"
    assert len(re.findall(r"\S*\w\S*", (ROOT / "README.md").read_text())) <= 900
