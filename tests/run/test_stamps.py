"""A stamp changes with what can change a number, and with nothing else."""

import shutil

import pytest

from vitlab.run import runner, stamps

CODE = "from vitlab.study.study import Study\nfrom vitlab.study import plots"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package's sources, which the test may edit; edit(file, old, new)."""
    copy = tmp_path / "vitlab"
    shutil.copytree(stamps.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    monkeypatch.setattr(stamps, "PACKAGE", copy)

    def edit(file, old, new):
        text = (copy / file).read_text()
        assert old in text
        (copy / file).write_text(text.replace(old, new, 1))

    return edit


def test_code_that_makes_a_number_counts_and_presentation_does_not(package):
    before = stamps.stamp([CODE], {})
    package("study/plots.py", "\nimport ", "\nprint()\nimport ")
    package("cli.py", "\nimport ", "\nprint()\nimport ")
    package("models/layers.py", '"""', '"""Another sentence. ')
    package("models/layers.py", "\nimport torch", "\n# a remark\n\nimport torch  # another")
    assert stamps.stamp([CODE], {}) == before
    package("models/layers.py", "\nimport torch", "\nprint()\nimport torch")
    after = stamps.stamp([CODE], {})
    assert stamps.difference(before, after) == "made by older code"
    # a notebook that has nothing to do with it keeps its stamp
    other = stamps.stamp(["import vitlab.utils.rng"], {})
    package("models/layers.py", "\nprint()", "")
    assert stamps.stamp(["import vitlab.utils.rng"], {}) == other and stamps.stamp([CODE], {}) == before


def test_imports_inside_functions_and_below_count():
    inside = "def f():\n    from vitlab.metrics import measure\n    return measure"
    assert {"vitlab.metrics.measure", "vitlab.metrics.counts", "vitlab.utils.device"} <= set(stamps.modules(inside))
    assert "vitlab.study.plots" not in stamps.modules(CODE) and "vitlab.train.loop" in stamps.modules(CODE)
    for code in ("import vitlab\nvitlab.fit", "from vitlab import fit"):
        assert "vitlab.train.loop" in stamps.modules(code)
    assert "vitlab.train.loop" in stamps.modules("%matplotlib inline\nimport vitlab.train.loop")


def test_parameters_and_cells_count_and_are_told_apart():
    stamp = stamps.stamp(["a = 1  # one"], {"seeds": [0]})
    assert stamps.difference(stamp, stamps.stamp(["a = 1"], {"seeds": [0]})) == ""
    assert stamps.difference(stamp, stamps.stamp(["a = 1"], {"seeds": [1]})) == "made with other parameters"
    assert stamps.difference(stamp, stamps.stamp(["a = 2"], {"seeds": [0]})) == "made by older code"
    assert stamps.difference(None, stamp) == "made by older code"


def test_a_notebooks_prose_does_not_count(make):
    project = make({"01_a": ["1"]})
    book = project.source / "notebooks" / "01_a.ipynb"
    (before,) = runner.plan(project, "tiny")
    book.write_text(book.read_text().replace("Title of", "Another title of"))
    (after,) = runner.plan(project, "tiny")
    assert before.stamp(project) == after.stamp(project) and before.notebook.title != after.notebook.title


def test_bare_leaves_strings_alone():
    code = 'x = "# no remark"  # a remark é\n\n\ndef f():\n    """é\n    prose"""\n    return "é"  # é\n'
    assert stamps.bare(code) == 'x = "# no remark"\ndef f():\n    return "é"'
    assert stamps.bare("%time f()\n# kept") == "%time f()\n# kept"


def test_what_is_left_out_is_there_and_has_a_reason():
    for name, why in stamps.PRESENTATION.items():
        assert why and ("." not in name or stamps._file(name)), name
