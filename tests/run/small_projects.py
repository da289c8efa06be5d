"""Projects of small notebooks: how to write and run them."""

import nbformat

from vitlab.run import runner

PARAMETERS = 'preset = "tiny"\nseeds = [0]\nrate = 0.5  # "a, b", c = d\nepochs = 1'
ROW = """
import json, os, pathlib
folder = pathlib.Path(os.environ["VITLAB_ROOT"]) / "results" / preset / {name!r}
folder.mkdir(parents=True, exist_ok=True)
row = {{"epochs": epochs, "fresh": os.environ.get("VITLAB_FRESH"), "stamp": os.environ.get("VITLAB_STAMP")}}
(folder / "arm.json").write_text(json.dumps(row))
"""


def write(path, cells, reads=None, parameters=PARAMETERS):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# Title of {path.stem}")])
    book.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    book.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    if reads:
        book.metadata["vitlab"] = {"reads": reads}
    nbformat.write(book, path)


def go(project, **options):
    jobs = runner.plan(project, "tiny", options.pop("only", ()))
    outcomes = runner.run(project, jobs, **options)
    return {o.stem: o.status for o in outcomes}, outcomes, jobs
