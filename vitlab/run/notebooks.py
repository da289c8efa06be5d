"""Notebook files: where they are, their parameters and presets, what an executed one says of itself."""

import ast
import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml

from vitlab.run.execution import papermill_run

PARAMETERS, INJECTED = "parameters", "injected-parameters"
ADDED = {INJECTED, "papermill-error-cell-tag"}  # tags of the cells that papermill puts in


@dataclass(frozen=True)
class Project:
    """Where things lie: `source` holds notebooks/ and presets/, `root` gets what they write.

    few: in a rehearsal, how many images of each split the notebooks see; else 0.
    """

    source: Path
    root: Path
    few: int = 0

    def executed(self, preset):
        return self.root / "executed" / preset


@dataclass(frozen=True)
class Notebook:
    """What has to be known of a notebook before it runs.

    `parameters` maps each name in its cell tagged `parameters` to the default, `code` holds the sources of its code
    cells. `reads` says that the rows of all others are among its inputs (metadata `{"vitlab": {"reads": ["*"]}}`): it
    runs after them.
    """

    path: Path
    title: str
    parameters: dict
    code: tuple[str, ...]
    reads: bool

    @property
    def stem(self):
        return self.path.stem


def project(source=None):
    """The Project at `source` (default: this checkout), writing to VITLAB_ROOT or else to `source`."""
    source = Path(source or Path(__file__).parents[2]).resolve()
    if not (source / "presets").is_dir():
        raise FileNotFoundError(f"no presets/ in {source}; name the project's folder with --project")
    return Project(source, Path(os.environ.get("VITLAB_ROOT") or source).resolve())


def find(source):
    """Every notebook of the project in running order: by name, those that read others' rows last."""
    paths = (Path(source) / "notebooks").glob("[0-9][0-9]_*.ipynb")
    return sorted(map(inspect, paths), key=lambda n: (n.reads, n.stem))


def inspect(path):
    """The Notebook in the file `path`; ValueError where its parameters cannot be read off the source."""
    node = nbformat.read(path, as_version=4)
    cells = source_cells(node)
    heading = next((text.strip() for kind, text in cells if kind == "markdown"), path.stem)
    code = tuple(text for kind, text in cells if kind == "code")
    reads = bool(node.metadata.get("vitlab", {}).get("reads"))
    return Notebook(path, heading.splitlines()[0].lstrip("# "), _defaults(node, path.name), code, reads)


def _defaults(node, name):
    """{parameter: default} of the one cell tagged `parameters`, which holds plain literal assignments."""
    cells = [c for c in node.cells if PARAMETERS in c.metadata.get("tags", ())]
    if len(cells) != 1:
        raise ValueError(f"{name}: {len(cells)} cells are tagged `{PARAMETERS}`; there must be exactly one")
    found = {}
    for statement in ast.parse(cells[0].source).body:
        try:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found |= {t.id: ast.literal_eval(statement.value) for t in targets}
        except (AttributeError, ValueError) as error:
            text = ast.unparse(statement)
            raise ValueError(f"{name}: `{text}` in the parameters cell is not `name = literal`") from error
    return found


def source_cells(node):
    """[(type, source)] of the cells somebody wrote."""
    return [(c.cell_type, c.source) for c in node.cells if not ADDED & set(c.metadata.get("tags", ()))]


# ------------------------------------------------------------------------------------------- presets

class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as it is everywhere else (YAML 1.1 wants 1.0e-3)."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
                              list("-+0123456789"))  # fmt: skip


def read_yaml(text, where):
    """The value of a YAML text; ValueError in one line that begins with `where`."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of a date that there is not
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise ValueError(f"{where}: {text.strip()[:60]!r} is no YAML ({problem})") from error


def presets(source):
    """The names of the project's presets."""
    return sorted(p.stem for p in (Path(source) / "presets").glob("*.yaml"))


def preset_parameters(source, preset, notebooks):
    """{stem: parameters} for every one of `notebooks`, from presets/<preset>.yaml, which has a section for each.

    ValueError for a section, name or type that fits no notebook.
    """
    if preset not in presets(source):
        raise ValueError(f"no preset {preset!r}; there are: {', '.join(presets(source)) or 'none'}")
    file, stems = f"presets/{preset}.yaml", {n.stem for n in notebooks}
    sections = read_yaml((Path(source) / file).read_text(encoding="utf-8"), file) or {}
    if not isinstance(sections, dict) or not all(isinstance(s, dict | None) for s in sections.values()):
        raise ValueError(f"{file}: sections with `name: value` lines are needed, one a notebook")
    if odd := sorted(set(sections) ^ stems, key=str):
        raise ValueError(f"{file}: a section for each notebook is needed ({', '.join(sorted(stems))}), and no other: "
                         f"{', '.join(map(str, odd))}")  # fmt: skip
    found = {n.stem: {**(sections[n.stem] or {}), "preset": preset} for n in notebooks}
    for notebook in notebooks:
        check_parameters(notebook, found[notebook.stem], f"{file}: ")
    return found


def check_parameters(notebook, values, where=""):
    """ValueError where `values` has a name that the notebook has not, or a value of another type."""
    for name, value in values.items():
        if name not in notebook.parameters:
            known = ", ".join(sorted(notebook.parameters))
            raise ValueError(f"{where}{notebook.stem} has no parameter {name!r}; it has: {known}")
        default, types = notebook.parameters[name], {type(value), type(notebook.parameters[name])}
        alike = len(types) == 1 or type(None) in types or types == {list, tuple}
        if not alike and (type(value), type(default)) != (int, float):
            raise ValueError(f"{where}{notebook.stem}: {name} = {value!r} is of type {type(value).__name__}, its "
                             f"default {default!r} is of type {type(default).__name__}")  # fmt: skip


def prepare(source, folder, preset="tiny"):
    """Write copies of all notebooks into `folder`, with the preset's parameters put in: nbval runs them as they are."""
    found = find(source)
    values = preset_parameters(source, preset, found)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for notebook in found:
        papermill_run(notebook.path, Path(folder, notebook.path.name), values[notebook.stem], prepare_only=True)


# ------------------------------------------------------------------------------------ executed copies

def marks(path):
    """What the executed notebook `path` says of its run, or {} where there is none, or no whole one."""
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        return dict(nbformat.read(path, as_version=4).metadata["vitlab"])
    return {}
