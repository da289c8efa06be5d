"""Notebook files: their parameters, presets, stamps, executed copies without machine paths, HTML."""

import ast
import contextlib
import hashlib
import html
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml

from vitlab.utils.files import digest, write_text

PARAMETERS = "parameters"
INJECTED = "injected-parameters"
WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Project:
    """Where things lie: `source` holds notebooks/ and presets/, `root` gets what they write."""

    source: Path
    root: Path

    def executed(self, preset):
        return self.root / "executed" / preset

    def rows(self, preset, stem):
        """The result files (one JSON a measured arm) that notebook `stem` has written, sorted."""
        return sorted((self.root / "results" / preset / stem).glob("*.json"))


@dataclass(frozen=True)
class Notebook:
    """What has to be known of a notebook before it runs.

    `parameters` maps each name in its cell tagged `parameters` to the default. `reads` names the
    notebooks whose rows it reads (metadata `{"vitlab": {"reads": ["*"]}}`; "*" is every other): it runs
    after them, and their rows are among its inputs.
    """

    path: Path
    title: str
    parameters: dict
    reads: tuple[str, ...]
    source_sha256: str

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
    paths = sorted((Path(source) / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    return sorted((inspect(path) for path in paths), key=lambda n: (bool(n.reads), n.stem))


def inspect(path):
    """The Notebook in the file `path`; ValueError where its parameters cannot be read off the source."""
    node = nbformat.read(path, as_version=4)
    heading = next((text for kind, text in source_cells(node) if kind == "markdown" and text.strip()), "")
    title = heading.strip().splitlines()[0].lstrip("# ").strip() if heading else Path(path).stem
    reads = tuple(node.metadata.get("vitlab", {}).get("reads", ()))
    return Notebook(Path(path), title, defaults(node, Path(path).name), reads, source_sha256(node))


def defaults(node, name="notebook"):
    """{parameter: default} of the one cell tagged `parameters`, which holds plain literal assignments."""
    cells = [c for c in node.cells if PARAMETERS in c.metadata.get("tags", ())]
    if len(cells) != 1:
        raise ValueError(f"{name}: {len(cells)} cells are tagged `{PARAMETERS}`; there must be exactly one")
    found = {}
    for statement in ast.parse(cells[0].source).body:
        targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
        try:
            found |= {t.id: ast.literal_eval(statement.value) for t in targets}
        except (AttributeError, ValueError, TypeError) as error:
            raise ValueError(
                f"{name}: `{ast.unparse(statement)}` in the parameters cell is not `name = literal`"
            ) from error
    return found


def source_sha256(node):
    """SHA-256 of a notebook's own cells; outputs, ids and cells that papermill put in do not count."""
    return hashlib.sha256(repr(source_cells(node)).encode()).hexdigest()


def source_cells(node):
    """[(type, source)] of the cells somebody wrote."""
    added = {INJECTED, "papermill-error-cell-tag"}
    return [(c.cell_type, c.source) for c in node.cells if not added & set(c.metadata.get("tags", ()))]


def presets(source):
    """The names of the project's presets."""
    return sorted(p.stem for p in (Path(source) / "presets").glob("*.yaml"))


def preset_parameters(source, preset, notebooks):
    """{stem: parameters} for every one of `notebooks`, from presets/<preset>.yaml.

    The file has one section a notebook and may have `common`, whose entries go to each notebook that
    has such a parameter. ValueError for a section, name or type that fits no notebook.
    """
    if preset not in presets(source):
        raise ValueError(f"no preset {preset!r}; there are: {', '.join(presets(source)) or 'none'}")
    file = f"presets/{preset}.yaml"
    sections = yaml.safe_load((Path(source) / file).read_text(encoding="utf-8")) or {}
    common = sections.pop("common", None) or {}
    stems = [n.stem for n in notebooks]
    if strange := sorted(set(sections) - set(stems)):
        raise ValueError(f"{file}: no notebook for {strange}; there are: {', '.join(stems) or 'none'}")
    if missing := sorted(set(stems) - set(sections)):
        raise ValueError(f"{file} has no section for {missing}; `name: {{}}` takes the notebook's defaults")
    nobody = sorted(k for k in common if not any(k in n.parameters for n in notebooks))
    if nobody and notebooks:
        raise ValueError(f"{file}: no notebook has the parameters {nobody} of `common`")
    found = {}
    for notebook in notebooks:
        shared = {k: v for k, v in common.items() if k in notebook.parameters}
        found[notebook.stem] = {**shared, **(sections[notebook.stem] or {}), "preset": preset}
        check_parameters(notebook, found[notebook.stem], f"{file}: ")
    return found


def check_parameters(notebook, values, where=""):
    """ValueError where `values` has a name that the notebook has not, or a value of another type."""
    for name, value in values.items():
        if name not in notebook.parameters:
            known = ", ".join(sorted(notebook.parameters))
            raise ValueError(f"{where}{notebook.stem} has no parameter {name!r}; it has: {known}")
        default = notebook.parameters[name]
        if not _fits(value, default):
            raise ValueError(
                f"{where}{notebook.stem}: {name} = {value!r} is of type {type(value).__name__}, "
                f"its default {default!r} is of type {type(default).__name__}"
            )


def _fits(value, default):
    if value is None or default is None:
        return True
    if isinstance(default, float) and type(value) is int:
        return True
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple))
    return type(value) is type(default)


def package_digest(folder=None):
    """A digest of every source file of the package: what an executed notebook depends on besides itself."""
    here = Path(folder or Path(__file__).parents[1])
    files = sorted(p for p in here.rglob("*") if p.suffix in {".py", ".toml"})
    return digest({str(p.relative_to(here)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files})


def inputs_digest(job_project, preset, notebook, parameters, notebooks):
    """What decides whether a finished run still stands: source, parameters, package, rows that are read."""
    others = [n.stem for n in notebooks if n.stem != notebook.stem]
    read = [stem for stem in others if "*" in notebook.reads or stem in notebook.reads]
    rows = [p for stem in read for p in job_project.rows(preset, stem)]
    hashes = {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in rows}
    return digest([notebook.source_sha256, parameters, package_digest(), hashes], length=64)


def stamp(path):
    """The stamp in the executed notebook `path`, or {} where there is none."""
    with contextlib.suppress(FileNotFoundError, ValueError, nbformat.reader.NotJSONError):
        return dict(nbformat.read(path, as_version=4).metadata.get("vitlab", {}))
    return {}


def machine_paths(job_project):
    """[(path, replacement)] for what must not leave this machine, the longest paths first."""
    pairs = [(Path(sys.prefix), "<env>"), (Path(tempfile.gettempdir()), "<tmp>"), (Path.home(), "~")]
    pairs += [(Path(sys.base_prefix), "<python>")]
    if data := os.environ.get("VITLAB_DATA"):
        pairs.append((Path(data), "$VITLAB_DATA"))
    # last, and so kept where two are the same folder
    pairs += [(job_project.source, "."), (job_project.root, ".")]
    every = {str(p): name for path, name in pairs for p in (path.absolute(), path.resolve())}
    return sorted(((p, n) for p, n in every.items() if p != "/"), key=lambda pair: -len(pair[0]))


def clean_text(text, paths):
    """`text` without machine paths, kernel temporary file names and overwritten progress lines."""
    for path, name in paths:
        # a path may follow a colour code (ESC[32m/home/...), but not the end of another path
        start = r"(?:(?<![\w.~-])|(?<=\dm))" + re.escape(path)
        inside = "" if name == "." else f"{name}/"
        text = re.sub(start + "/", lambda _, to=inside: to, text)
        text = re.sub(start + r"(?![\w-]|\.\w)", lambda _, to=name: to, text)
    text = re.sub(r"(<tmp>/|/tmp/)?ipykernel_\d+/\d+\.py", "<cell>", text)
    return re.sub(r"[^\r\n]*\r(?=[^\r\n])", "", text)


def _clean_value(value, paths):
    if isinstance(value, str):
        return clean_text(value, paths)
    if isinstance(value, dict):
        # base64 of a picture holds no path, and is long
        return {k: v if k.startswith("image/") and "svg" not in k else _clean_value(v, paths)
                for k, v in value.items()}
    return [_clean_value(v, paths) for v in value] if isinstance(value, list) else value


def _joined(outputs):
    """Outputs with the pieces of one stream, which arrive print by print, put together."""
    joined = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output.output_type == "stream" and output.name == last.get("name"):
            last["text"] += output.text
        else:
            joined.append(dict(output))
    return joined


def clean(node, job_project):
    """A copy of the executed notebook fit to be published: no machine paths, widgets or run metadata."""
    paths, cells = machine_paths(job_project), []
    for number, cell in enumerate(node.cells):
        cell = nbformat.from_dict(cell)
        tags = list(cell.metadata.get("tags", ()))
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if INJECTED in tags:
            cell.source = clean_text(cell.source, paths)
        if set(tags) & {INJECTED, "papermill-error-cell-tag"}:
            cell.id = f"added-{number}"
        if cell.cell_type == "code":
            shown = [o for o in _joined(cell.outputs) if WIDGET not in o.get("data", {})]
            cell.outputs = [nbformat.from_dict(_clean_value(o, paths)) for o in shown]
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    result = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    result.metadata.language_info = {"name": "python"}
    return result


def save(node, path, marks):
    """Write the notebook with its stamp `marks` to `path`, whole or not at all."""
    node.metadata["vitlab"] = marks
    write_text(path, nbformat.writes(node, version=4) + "\n")


def render(path):
    """Write site/<name>.html beside the executed notebook `path`, pictures inside; its path.

    Only equations need a network when the page is read (MathJax); nothing does when it is made.
    """
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    page = "{% extends 'lab/index.html.j2' %}{% block html_head_js_requirejs %}{% endblock %}"
    exporter = HTMLExporter(
        template_name="lab", embed_images=True, template_file="page.html.j2",
        extra_loaders=[DictLoader({"page.html.j2": page})],
    )
    body, _ = exporter.from_filename(str(path))
    write_text(path.parent / "site" / f"{path.stem}.html", body)
    return path.parent / "site" / f"{path.stem}.html"


def render_index(folder):
    """Write site/index.html: the executed notebooks in `folder` with title, status and wall time."""
    lines = []
    for path in sorted(folder.glob("*.ipynb")):
        found, marks = inspect(path), stamp(path)
        name = html.escape(f"{path.stem}: {found.title}")
        page = folder / "site" / f"{path.stem}.html"
        link = f'<a href="{page.name}">{name}</a>' if page.exists() else name
        lines.append(f"<tr><td>{link}</td><td>{marks.get('status')}</td><td>{marks.get('wall_s')} s</td>"
                     f"<td>{html.escape(str(marks.get('device')))}</td><td>{marks.get('commit')}</td></tr>")
    head = "".join(f"<th>{h}</th>" for h in ("notebook", "status", "wall time", "device", "commit"))
    title = f"vitlab, preset {folder.name}"
    style = "body{font-family:sans-serif;margin:2em}td,th{text-align:left;padding:.3em 1em}"
    write_text(folder / "site" / "index.html",
               f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
               f"<style>{style}</style><h1>{title}</h1>"
               f"<table><tr>{head}</tr>{''.join(lines)}</table></html>\n")
