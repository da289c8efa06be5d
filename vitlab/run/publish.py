"""Executed notebooks fit to be published: no machine paths, whole files."""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

from vitlab.run.notebooks import ADDED, INJECTED

WIDGET = "application/vnd.jupyter.widget-view+json"


def machine_paths(project):
    """[(path, replacement)] for what must not leave this machine, the longest paths first."""
    pairs = [
        (sys.prefix, "<env>"), (tempfile.gettempdir(), "<tmp>"), (Path.home(), "~"), (sys.base_prefix, "<python>"),
        (os.environ.get("VITLAB_DATA") or "/", "$VITLAB_DATA"),
        (project.source, "."), (project.root, "."),  # last, and so kept where two are the same folder
    ]  # fmt: skip
    every = {str(p): name for path, name in pairs for p in (Path(path).absolute(), Path(path).resolve())}
    return sorted(((p, n) for p, n in every.items() if p != "/"), key=lambda pair: -len(pair[0]))


def clean_text(text, paths):
    """`text` without machine paths and the names of kernels' temporary files."""
    for path, name in paths:
        # a path may follow a colour code (ESC[32m/home/...), but not the end of another path
        start = r"(?:(?<![\w.~-])|(?<=\dm))" + re.escape(path)
        inside = "" if name == "." else f"{name}/"
        text = re.sub(start + "/", lambda _, to=inside: to, text)
        text = re.sub(start + r"(?![\w-]|\.\w)", lambda _, to=name: to, text)
    return re.sub(r"(<tmp>/|/tmp/)?ipykernel_\d+/\d+\.py", "<cell>", text)


def _clean_value(value, paths):
    if isinstance(value, str):
        return clean_text(value, paths)
    if isinstance(value, dict):
        # base64 of a picture holds no path, and is long
        return {k: v if k.startswith("image/") and "svg" not in k else _clean_value(v, paths)
                for k, v in value.items()}  # fmt: skip
    return [_clean_value(v, paths) for v in value] if isinstance(value, list) else value


def clean(node, project):
    """A copy of the executed notebook fit to be published: no machine paths, widgets or run metadata."""
    paths, join, cells = machine_paths(project), CoalesceStreamsPreprocessor(), []
    for number, cell in enumerate(node.cells):
        # the pieces of one stream, which arrive print by print, are put together; overwritten progress lines go
        cell, _ = join.preprocess_cell(nbformat.from_dict(cell), {}, number)
        tags = set(cell.metadata.get("tags", ()))
        cell.metadata = nbformat.from_dict({"tags": sorted(tags)} if tags else {})
        if INJECTED in tags:
            cell.source = clean_text(cell.source, paths)
        if ADDED & tags:
            cell.id = f"added-{number}"
        if cell.cell_type == "code":
            shown = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
            cell.outputs = nbformat.from_dict(_clean_value(shown, paths))
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
