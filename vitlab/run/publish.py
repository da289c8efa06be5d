"""Executed notebooks fit to be published: no machine paths, whole files."""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat

from vitlab.run.notebooks import ADDED, INJECTED
from vitlab.utils.files import write_text

WIDGET = "application/vnd.jupyter.widget-view+json"


def machine_paths(project):
    """[(path, replacement)] for what must not leave this machine, the longest paths first."""
    pairs = [(Path(sys.prefix), "<env>"), (Path(tempfile.gettempdir()), "<tmp>"), (Path.home(), "~")]
    pairs += [(Path(sys.base_prefix), "<python>")]
    if data := os.environ.get("VITLAB_DATA"):
        pairs.append((Path(data), "$VITLAB_DATA"))
    # last, and so kept where two are the same folder
    pairs += [(project.source, "."), (project.root, ".")]
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
                for k, v in value.items()}  # fmt: skip
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


def clean(node, project):
    """A copy of the executed notebook fit to be published: no machine paths, widgets or run metadata."""
    paths, cells = machine_paths(project), []
    for number, cell in enumerate(node.cells):
        cell = nbformat.from_dict(cell)
        tags = list(cell.metadata.get("tags", ()))
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if INJECTED in tags:
            cell.source = clean_text(cell.source, paths)
        if ADDED & set(tags):
            cell.id = f"added-{number}"
        if cell.cell_type == "code":
            shown = [o for o in _joined(cell.outputs) if WIDGET not in o.get("data", {})]
            cell.outputs = [nbformat.from_dict(_clean_value(o, paths)) for o in shown]
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    language = {"name": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": language})


def save(node, path, said):
    """Write the notebook, with what it says of its run (`marks` reads that), whole or not at all."""
    node.metadata["vitlab"] = said
    write_text(path, nbformat.writes(node, version=4) + "\n")
