"""Running notebooks: copies, resuming, budgets, kernels, side by side."""

import base64
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from small_projects import PARAMETERS, ROW, go, write

from vitlab.run import notebooks, runner

REPOSITORY = Path(__file__).parents[2]


def test_run_keeps_clean_stamped_copies_and_skips_what_is_up_to_date(make, capfd, monkeypatch, tmp_path):
    broken = tmp_path / "jupyter" / "kernels" / "python3"
    broken.mkdir(parents=True)
    spec = {"argv": ["false"], "display_name": "broken", "language": "python"}
    (broken / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("VITLAB_DEADLINE", "1.0")  # of somebody else: without --budget there is none
    picture = base64.b64encode(b"not looked at").decode()
    speak = f"""import os, sys
print("epoch 1", sys.executable, os.getcwd(), os.environ.get("VITLAB_DEADLINE"), epochs)
from IPython.display import display
display({{"image/png": {picture!r}}}, raw=True)
f"{{os.getcwd()}}/figures/tiny/x.png"
"""
    project = make(
        {
            "01_good": [ROW.format(name="01_good"), speak],
            "02_bad": [ROW.format(name="02_bad"), "1 / 0"],
            "03_sums": [
                "import os, pathlib\n"
                "assert len(list(pathlib.Path(os.environ['VITLAB_ROOT'], 'results').rglob('*.json'))) == 2"
            ],
        },
        reads={"03_sums": ["*"]},
        tiny={"01_good": {"rate": 1, "epochs": 7}},
    )
    statuses, outcomes, jobs = go(project)
    assert statuses == {"01_good": "done", "02_bad": "failed", "03_sums": "done"}
    assert runner.exit_code(outcomes) == 1
    said = capfd.readouterr()
    assert f"epoch 1 {sys.executable} {project.root} None 7" in said.out
    assert "ZeroDivisionError" in said.err and "Unable to parse" not in said.err
    assert [o.note for o in outcomes][1] == "ZeroDivisionError: division by zero"

    copy = project.root / "executed" / "tiny" / "01_good.ipynb"
    text = copy.read_text()
    assert str(project.root) not in text and str(Path.home()) not in text and "figures/tiny/x.png" in text
    node, source = nbformat.read(copy, 4), nbformat.read(project.source / "notebooks" / "01_good.ipynb", 4)
    nbformat.validate(node)
    assert notebooks.source_cells(node) == [(c.cell_type, c.source) for c in source.cells]
    marks = node.metadata["vitlab"]
    assert (marks["status"], marks["rows"], marks["parameters"]) == (
        "done", 1, {"rate": 1, "epochs": 7, "preset": "tiny"})
    assert "papermill" not in node.metadata and all("papermill" not in c.metadata for c in node.cells)
    assert (copy.parent / "02_bad.failed.ipynb").exists() and not (copy.parent / "02_bad.ipynb").exists()
    table = runner.summary(project, jobs, outcomes)
    assert "executed/tiny/02_bad.failed.ipynb" in table and "results/tiny/01_good/ (1)" in table

    # a second run: only what failed, and what reads rows that have changed since, goes again
    assert [runner.standing(project, j) for j in jobs] == ["up to date", "failed", "up to date"]
    mended = ROW.format(name="02_bad").replace("epochs,", "-1,")
    write(project.source / "notebooks" / "02_bad.ipynb", [mended])
    statuses, outcomes, _ = go(project)
    assert statuses == {"01_good": "up to date", "02_bad": "done", "03_sums": "done"}
    assert runner.exit_code(outcomes) == 0 and not (copy.parent / "02_bad.failed.ipynb").exists()


def test_rows_of_other_data_lie_apart(make, monkeypatch):
    monkeypatch.setattr(runner.sources, "plan", lambda *_: None)  # the folder need not be there
    project = make({"01_a": []})
    write(project.source / "notebooks" / "01_a.ipynb", [], parameters=f"{PARAMETERS}\ndataset = 'tiny'")
    (here,), (same,), (other,) = (
        runner.plan(project, "tiny", overrides=given)
        for given in ({}, {"dataset": "tiny"}, {"dataset": "folder:/data/my birds"})
    )
    assert here.preset == same.preset == "tiny"
    assert other.preset == other.parameters["preset"] == "tiny-data-my-birds" and here.parameters["preset"] == "tiny"


def test_what_makes_a_finished_run_stale(make, monkeypatch):
    project = make({"01_a": [ROW.format(name="01_a")]})
    row = project.root / "results" / "tiny" / "01_a" / "arm.json"
    assert go(project)[0] == {"01_a": "done"}
    job, = runner.plan(project, "tiny")
    assert runner.standing(project, job) == "up to date"
    assert json.loads(row.read_text())["fresh"] is None
    seeded, = runner.plan(project, "tiny", seeds=[0, 1])
    assert runner.standing(project, seeded) == "made with other parameters"
    book = project.source / "notebooks" / "01_a.ipynb"
    source = book.read_text()
    book.write_text(source.replace("Title of", "Another title of"))
    assert runner.standing(project, *runner.plan(project, "tiny")) == "up to date"
    write(book, [ROW.format(name="01_a"), "1 + 1"])
    assert runner.standing(project, *runner.plan(project, "tiny")) == "made by older code"
    book.write_text(source)
    assert go(project, resume=False)[0] == {"01_a": "done"}
    assert json.loads(row.read_text())["fresh"] == "1"
    row.with_name("gone.json").write_text('{"stamp": "older"}')  # of an arm that there was before
    assert go(project, resume=False)[0] == {"01_a": "done"}
    row.with_name("gone.json").unlink()
    assert runner.standing(project, job) == "up to date"
    row.unlink()
    assert runner.standing(project, job) == "rows are missing"


def test_budget_pauses_and_leaves_the_rest(make):
    raising = """import os, time
class BudgetSpent(Exception): pass
if float(os.environ["VITLAB_DEADLINE"]) < time.time() + 60: raise BudgetSpent"""
    project = make({"01_a": [raising], "02_b": ["1"]})
    statuses, outcomes, _ = go(project, budget=60)
    assert statuses == {"01_a": "paused", "02_b": "not started"}
    assert runner.exit_code(outcomes) == 75
    assert not list((project.root / "executed").rglob("*.ipynb"))
    assert go(project, budget=0)[0] == {"01_a": "not started", "02_b": "not started"}


def test_a_cell_that_overruns_is_interrupted_and_a_dead_kernel_is_a_failure(make, monkeypatch):
    slow = "import time; time.sleep(99)"
    project = make({"01_dead": ["import os; os._exit(3)"], "03_slow": [slow]})
    statuses, outcomes, _ = go(project, only=["01"])
    assert statuses == {"01_dead": "failed"} and "died" in outcomes[0].note
    begun = time.time()
    statuses, outcomes, _ = go(project, only=["03"], budget=1.5)
    assert statuses == {"03_slow": "paused"} and runner.exit_code(outcomes) == 75
    assert time.time() - begun < 60


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_leaves_no_half_written_copy_and_no_kernel(make, jobs):
    project = make({"01_a": ["import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(99)"]})
    command = [sys.executable, "-m", "vitlab.cli", "run", "--preset", "tiny", "--project", project.source,
               "--seeds", "0,1,2", "--jobs", jobs]  # fmt: skip  # more than run at once: one is still to begin
    pipe = subprocess.PIPE
    # started in the background by a shell, this test would hand down that SIGINT is ignored
    heeded = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=REPOSITORY, preexec_fn=heeded)
    pid = next(int(line.split()[-1]) for line in process.stdout if "pid" in line)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in complaint and "Traceback" not in complaint
    assert not (project.root / "executed").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_choose_preset(monkeypatch):
    assert runner.choose_preset() == ("tiny", "no CUDA device")
    monkeypatch.setattr(runner, "cuda_device", lambda: "Some GPU")
    assert runner.choose_preset() == ("gpu", "Some GPU")


def test_notebooks_and_seeds_run_side_by_side(make, capfd, monkeypatch):
    # each kernel waits until another one is there, so that one after the other they would never end
    meet = """import os, pathlib, time
here = pathlib.Path(os.environ["VITLAB_ROOT"])
if "VITLAB_JOBS" in os.environ:
    (here / f"{os.getpid()}.here").touch()
    while len(list(here.glob("*.here"))) < 2:
        time.sleep(0.1)
(here / f"seeds-{'-'.join(map(str, seeds))}-{os.environ.get('VITLAB_FRESH')}").touch()
print("jobs", os.environ.get("VITLAB_JOBS"))"""
    project = make({"01_a": [meet, ROW.format(name="01_a")], "02_b": [meet, ROW.format(name="02_b")]})
    statuses, outcomes, _ = go(project, width=2)
    assert statuses == {"01_a": "done", "02_b": "done"} and [o.stem for o in outcomes] == ["01_a", "02_b"]
    said = capfd.readouterr().out.splitlines()
    assert {f"{stem}-s0 | jobs 2" for stem in ("01_a", "02_b")} <= set(said)
    assert all((project.root / "executed" / "tiny" / f"{stem}.ipynb").exists() for stem in ("01_a", "02_b"))
    for file in project.root.glob("*.here"):
        file.unlink()

    # two seeds of one notebook: each alone, side by side and trained anew; then both, found trained, undisturbed
    job, = runner.plan(project, "tiny", ["01"], seeds=[3, 4])
    assert [o.status for o in runner.run(project, [job], resume=False, width=2)] == ["done"]
    ran = {f.name.removeprefix("seeds-") for f in project.root.glob("seeds-*")}
    assert ran == {"0-None", "3-1", "4-1", "3-4-None"}
    said = capfd.readouterr().out.splitlines()
    assert {f"01_a-s{s} | jobs 2" for s in (3, 4)} | {"jobs None"} <= set(said)
