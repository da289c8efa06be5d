"""Stamps: from which code and which parameters an executed notebook and its rows come.

A stamp is "code-parameters". The first half covers the notebook's code cells and every module of this package that they
lead to and that can change a number, the second the parameters. Comments, docstrings and prose count in neither, so
that editing a sentence or a colour makes nothing stale.
"""

import ast
import functools
import hashlib
import io
import tokenize
from pathlib import Path

import vitlab
from vitlab.utils.files import digest

PACKAGE = Path(__file__).parents[1]

# What can only affect presentation, and is left out of every stamp with all that lies below: a module's whole name, or
# the last part of it, and why.
PRESENTATION = {
    "vitlab.cli": "parses options; what comes of them stands in the notebook's parameters",
    "vitlab.run": "runs notebooks and reports on their rows",
    "vitlab.utils.provenance": "writes beside a number where it comes from",
    "vitlab.study.claims": "judges what was measured; `vitlab report` judges the same values again",
    "vitlab.study.verdicts": "as above",
    "vitlab.study.noise": "as above",
    "vitlab.study.scoreboard": "draws and sorts what stands in rows",
    "plots": "draws what stands in rows",
    "panel": "controls for a reader; an executed notebook never moves them",
}


def stamp(code_cells, parameters, more=()):
    """The stamp of a notebook: its code cells' sources, its parameters, further plain data among its inputs."""
    code = "\n".join(code_cells)
    sources = {name: hashlib.sha256(bare(path.read_text(encoding="utf-8")).encode()).hexdigest()
               for name, path in modules(code).items()}  # fmt: skip
    return f"{digest([[bare(c) for c in code_cells], sources, more])}-{digest(parameters)}"


def difference(old, new):
    """"" for equal stamps, else what the evidence with the stamp `old` (or None) is of."""
    if old == new:
        return ""
    return "made with other parameters" if old and old.split("-")[0] == new.split("-")[0] else "made by older code"


def modules(code):
    """{name: path} of the package's modules that `code` leads to, without those in PRESENTATION."""
    found, waiting = {}, sorted(imports(code))
    while waiting:
        name, *waiting = waiting
        path = _file(name)
        if path and name not in found and not _presents(name):
            found[name] = path
            waiting += [name.rpartition(".")[0], *imports(path.read_text(encoding="utf-8"))]
    return dict(sorted(found.items()))


@functools.cache
def imports(code):
    """Every vitlab.* that the source `code` imports, those inside functions included; names may be no modules."""
    found = set()
    plain = "\n".join(line for line in code.splitlines() if not line.startswith("%"))
    for node in ast.walk(_parsed(plain) or ast.Module([])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {f"{node.value.id}.{node.attr}"}  # vitlab.fit, and much that is nothing of ours
    face = {f"vitlab.{name}": where.split(":")[0] for name, where in vitlab.PUBLIC.items()}
    return frozenset(face.get(name, name) for name in found if name.startswith("vitlab."))


def bare(code):
    """`code` without comments, docstrings and empty lines; unchanged where it is not plain Python."""
    tree = _parsed(code)
    if tree is None:
        return code
    lines = code.splitlines()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)]
    dropped = [(n.lineno, n.col_offset, n.end_lineno, n.end_col_offset) for n in texts]
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            dropped.append((row, len(lines[row - 1][:column].encode()), row, len(lines[row - 1].encode())))
    lines = [line.encode() for line in lines]  # ast's columns count bytes
    for first, start, last, end in sorted(dropped, reverse=True):
        lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:]]
    return "\n".join(line.decode().rstrip() for line in lines if line.strip())


def _parsed(code):
    try:
        return ast.parse(code)
    except SyntaxError:
        return None


def _file(name):
    if name == "vitlab":  # it holds lists of names; what is imported through it is found by its own name
        return None
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def _presents(name):
    last = name.rpartition(".")[2]
    parents = {name.rsplit(".", n)[0] for n in range(name.count(".") + 1)}
    return bool(parents & PRESENTATION.keys()) or last in PRESENTATION or last.endswith(("_plots", "_panel"))
