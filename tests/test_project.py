"""The project's files agree with each other: dependencies, lock, environments, floors, notebooks, presets."""

import ast
import graphlib
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vitlab import notebooks as nb

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTED = sorted(p for preset in ("gpu", "cpu") for p in (ROOT / "executed" / preset).glob("*.ipynb"))
MODULES = sorted(p for p in (ROOT / "vitlab").rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MACHINE_PATH = re.compile(r"(/home/|/root/|/Users/|/tmp/|[A-Z]:\\\\Users)")

# A module imports only from floors below its own; within a floor, helpers may be imported without a cycle.
FLOORS = {
    0: "files rng assets imageops pictures sources data geometry randaugment augment",
    1: "models kernels published",
    2: "complexity recipe resume train precision inference predict counts meters power measure provenance compress",
    3: "claims plots zoo study linear_study linear_plots pruned costs "
       "token_study token_contest token_plots token_panel",
    4: "readme discussion notebooks execution selftest runner commands cli",
}


def floor(module):
    first = module.split(".")[1]
    return next((n for n, names in FLOORS.items() if first in names.split()), None)


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
    assert floor(module) is not None, f"{module} has no floor: give it one in FLOORS"
    for other in set(imported(path)) - {"vitlab"}:
        assert floor(other) is not None, f"{module} imports {other}, which has no floor"
        assert floor(other) <= floor(module), f"{module} may not import {other} from a floor above"


def test_imports_make_no_circle():
    known = {module_name(p): p for p in MODULES[1:]}
    graph = {name: set(imported(path)) & set(known) for name, path in known.items()}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


def test_scripts():
    for name in ("run_all.sh", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK), f"{name} is not executable"
        if shutil.which("bash"):
            subprocess.run(["bash", "-n", ROOT / name], check=True)
    lines = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and line[0] != "#"]
    assert [line for line in lines if not line.startswith(("set", "cd", "trap"))] == ["./run_all.sh --test"]


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


@pytest.mark.skipif(not EXECUTED, reason="no executed notebook is committed yet")
@pytest.mark.parametrize("path", EXECUTED or [None], ids=lambda p: p and p.stem)
def test_executed_notebook_is_of_the_present_source(path):
    source = ROOT / "notebooks" / path.name.replace(".failed", "")
    executed = nbformat.read(path, as_version=4)
    again = f"run: ./run_all.sh --preset {path.parent.name} --only {path.stem[:2]}"
    assert executed.metadata["vitlab"]["source_sha256"] == nb.inspect(source).source_sha256, again
    assert nb.source_cells(executed) == nb.source_cells(nbformat.read(source, as_version=4)), again
    assert executed.metadata["vitlab"]["status"] == "done"
    assert not MACHINE_PATH.search(re.sub(r'"image/\w+": "[^"]*"', "", path.read_text(encoding="utf-8")))
