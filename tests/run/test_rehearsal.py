"""A rehearsal: the whole of a preset on few images, of which nothing is left."""

from pathlib import Path

from small_projects import PARAMETERS, write

from vitlab import cli
from vitlab.data import datasets
from vitlab.study.study import Study

SEEN = """
import os
print("seen:", seconds, rate, os.environ["VITLAB_REHEARSAL"], os.environ["VITLAB_ROOT"])
"""
ROW = """
import os, pathlib
(pathlib.Path(os.environ["VITLAB_ROOT"]) / "row").write_text("x")
"""


def test_the_presets_run_is_tried_on_few_images_and_nothing_is_kept(make, capfd):
    project = make({"01_a": ["1"], "02_b": [SEEN, "1 / 0"]}, cpu={"01_a": {"rate": 3}, "02_b": {"rate": 2}})
    write(project.source / "notebooks" / "02_b.ipynb", [SEEN, ROW, "1 / 0"],
          parameters=PARAMETERS + "\nseconds = 2.0")  # fmt: skip
    before = sorted(project.source.rglob("*"))
    options = ["run", "--rehearse", "--preset", "cpu", "--project", str(project.source)]
    assert cli.main(options) == 1
    said = capfd.readouterr()
    assert "a rehearsal: 128 images of each split, nothing is kept" in said.out
    seen = next(line for line in said.out.splitlines() if line.startswith("seen:")).split()
    assert seen[1:4] == ["0.01", "2", "128"] and not Path(seen[4]).exists()
    assert "02_b" in said.out and "failed" in said.out and "ZeroDivisionError" in said.err
    assert sorted(project.source.rglob("*")) == before
    cli.main([*options, "-p", "seconds=0.5", "--only", "02"])
    assert "seen: 0.5 2 128" in capfd.readouterr().out
    assert cli.main(["run", "--list", "--rehearse", "--project", str(project.source)]) == 0


def test_it_is_for_this_machine(make, capsys):
    project = make({"01_a": ["1"]})
    assert cli.main(["run", "--rehearse", "--slurm", "--project", str(project.source)]) == 2
    assert "--rehearse goes without --slurm" in capsys.readouterr().err


def test_a_study_sees_few_images_of_every_split(tmp_path, monkeypatch):
    monkeypatch.setenv("VITLAB_REHEARSAL", "40")
    data = Study("01_baseline", root=tmp_path).data("tiny")
    whole = datasets.load("tiny")
    assert [len(split) for split in (data.train, data.val, data.test)] == [40, 40, 40]
    assert data.train.labels.bincount().tolist() == [4] * 10 and data.key != whole.key
    assert "40 images" in data.name
