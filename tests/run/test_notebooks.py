"""What is read off a notebook and a preset, and what an executed copy loses."""

from pathlib import Path

import nbformat
import pytest
from small_projects import write

from vitlab.run import notebooks, publish, runner


@pytest.mark.parametrize(
    ("tiny", "message"),
    [
        ({"01_a": {"epoch": 3}}, "01_a has no parameter 'epoch'; it has: epochs, preset, rate, seeds"),
        ({"01_a": {"epochs": 3.5}}, "of type float, its default 1 is of type int"),
        ({"01_a": {"seeds": 3}}, "of type int"),
        ({"01_a": {"epochs": True}}, "of type bool"),
        ({"01_z": {}}, "and no other: 01_z"),
    ],
)
def test_presets_are_refused_before_anything_starts(make, tiny, message):
    project = make({"01_a": ["1"]}, tiny=tiny)
    with pytest.raises(ValueError, match=message):
        runner.plan(project, "tiny")


def test_other_refusals(make):
    project = make({"01_a": ["1"], "02_b": ["1"]})
    with pytest.raises(ValueError, match=r"no preset 'gpu'; there are: tiny"):
        runner.plan(project, "gpu")
    with pytest.raises(ValueError, match=r"no notebook .'09'.; there are: 01_a, 02_b"):
        runner.plan(project, "tiny", only=["09"])
    with pytest.raises(ValueError, match="has no parameter 'x'"):
        runner.plan(project, "tiny", overrides={"x": 1})
    (project.source / "presets" / "tiny.yaml").write_text("01_a: {}\n")
    with pytest.raises(ValueError, match=r"a section for each notebook is needed .01_a, 02_b., and no other: 02_b"):
        runner.plan(project, "tiny")
    for text in ("epochs = 3 * x", "f(3)", "a, b = 1, 2"):
        book = project.source / "notebooks" / "02_b.ipynb"
        write(book, [], parameters=text)
        with pytest.raises(ValueError, match=r"02_b.*is not `name = literal`"):
            notebooks.inspect(book)


def test_parameters_are_read_off_the_cell(tmp_path):
    text = "a: int = 3  # how many\nb = c = -1e-3\nd = {'k': (1, None)}"
    write(tmp_path / "01_a.ipynb", [], parameters=text)
    found = notebooks.inspect(tmp_path / "01_a.ipynb")
    assert found.parameters == {"a": 3, "b": -1e-3, "c": -1e-3, "d": {"k": (1, None)}}
    assert found.title == "Title of 01_a" and found.stem == "01_a"


def test_clean_text(tmp_path, monkeypatch):
    monkeypatch.setenv("VITLAB_DATA", "/mnt/sets")
    project = notebooks.Project(tmp_path / "p", tmp_path / "p")
    paths = publish.machine_paths(project)
    cases = {
        f"saved {project.root}/figures/x.png": "saved figures/x.png",
        f"in {project.root}.": "in ..",
        f"{project.root}2/x": f"{publish.clean_text(str(tmp_path), paths)}/p2/x",
        f"\x1b[32m{Path.home()}/a.py\x1b[0m": "\x1b[32m~/a.py\x1b[0m",
        "/mnt/sets/cifar10.npz": "$VITLAB_DATA/cifar10.npz",
        "/tmp/ipykernel_12/345.py:3": "<cell>:3",
        f"a{Path.home()}/b": f"a{Path.home()}/b",
    }
    assert {k: publish.clean_text(k, paths) for k in cases} == cases


def test_clean_drops_widgets(tmp_path):
    output = nbformat.v4.new_output("display_data", {publish.WIDGET: {"model_id": "1"}, "text/plain": "0%"})
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[output])])
    book.metadata["widgets"] = {"state": {}}
    cleaned = publish.clean(book, notebooks.Project(tmp_path, tmp_path))
    assert cleaned.cells[0].outputs == [] and "widgets" not in cleaned.metadata
    assert len(book.cells[0].outputs) == 1  # the original stays


def test_clean_joins_what_one_stream_said(tmp_path):
    parts = [("stdout", "a\r"), ("stdout", "b\n"), ("stderr", "c\n"), ("stdout", "0%|  |\r50%|# |"),
             ("stdout", "\r100%|##|\ndone\r\n")]  # fmt: skip
    outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in parts]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=outputs)])
    cleaned = publish.clean(book, notebooks.Project(tmp_path, tmp_path)).cells[0].outputs
    joined = [("stdout", "b\n"), ("stderr", "c\n"), ("stdout", "100%|##|\ndone\r\n")]
    assert [(o.name, o.text) for o in cleaned] == joined
