import base64
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml

from vitlab import cli
from vitlab.run import notebooks, runner, selftest
from vitlab.run.notebooks import package_digest

REPOSITORY = Path(__file__).parents[2]
PARAMETERS = 'preset = "tiny"\nseeds = [0]\nrate = 0.5  # "a, b", c = d\nepochs = 1'
ROW = """
import json, os, pathlib
folder = pathlib.Path(os.environ["VITLAB_ROOT"]) / "results" / preset / {name!r}
folder.mkdir(parents=True, exist_ok=True)
(folder / "arm.json").write_text(json.dumps({{"epochs": epochs, "fresh": os.environ.get("VITLAB_FRESH")}}))
"""


@pytest.fixture(autouse=True)
def fixed_surroundings(monkeypatch):
    # the real one starts a process that imports torch
    monkeypatch.setattr(runner, "cuda_device", lambda: "")
    # somebody may be editing the package while its tests run
    monkeypatch.setattr(notebooks, "package_digest", lambda: "this package")


@pytest.fixture
def make(tmp_path):
    """make({stem: [cell, ...]}, reads={...}, tiny={...}) -> Project in a folder of its own."""

    def build(books, reads=None, **presets):
        source = tmp_path / "a project"
        (source / "notebooks").mkdir(parents=True, exist_ok=True)
        (source / "presets").mkdir(exist_ok=True)
        for stem, cells in books.items():
            write(source / "notebooks" / f"{stem}.ipynb", cells, (reads or {}).get(stem))
        for name, sections in ({"tiny": {}} | presets).items():
            filled = {stem: {} for stem in books} | sections
            (source / "presets" / f"{name}.yaml").write_text(yaml.safe_dump(filled))
        return notebooks.Project(source, source)

    return build


def write(path, cells, reads=None, parameters=PARAMETERS):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# Title of {path.stem}")])
    book.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    book.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    if reads:
        book.metadata["vitlab"] = {"reads": reads}
    nbformat.write(book, path)


def go(project, **options):
    jobs = runner.plan(project, "tiny", options.pop("only", None))
    outcomes = runner.run(project, jobs, **options)
    return {o.stem: o.status for o in outcomes}, outcomes, jobs


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
        tiny={"common": {"rate": 1}, "01_good": {"epochs": 7}},
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
    site = copy.parent / "site"
    page = (site / "01_good.html").read_text()
    assert picture in page and 'src=""' not in page
    assert "01_good.html" in (site / "index.html").read_text()
    assert (copy.parent / "02_bad.failed.ipynb").exists() and not (copy.parent / "02_bad.ipynb").exists()
    table = runner.summary(project, jobs, outcomes)
    assert "executed/tiny/02_bad.failed.ipynb" in table and "results/tiny/01_good/ (1 rows)" in table

    # a second run: only what failed, and what reads rows that have changed since, goes again
    assert [runner.standing(project, j) for j in jobs] == ["up to date", "failed", "up to date"]
    mended = ROW.format(name="02_bad").replace("epochs,", "-1,")
    write(project.source / "notebooks" / "02_bad.ipynb", [mended])
    statuses, outcomes, _ = go(project)
    assert statuses == {"01_good": "up to date", "02_bad": "done", "03_sums": "done"}
    assert runner.exit_code(outcomes) == 0 and not (copy.parent / "02_bad.failed.ipynb").exists()


def test_what_makes_a_finished_run_stale(make, monkeypatch):
    project = make({"01_a": [ROW.format(name="01_a")]})
    row = project.root / "results" / "tiny" / "01_a" / "arm.json"
    monkeypatch.setattr(notebooks, "render", lambda path: None)
    assert go(project)[0] == {"01_a": "done"}
    job, = runner.plan(project, "tiny")
    assert runner.standing(project, job) == "up to date"
    assert json.loads(row.read_text())["fresh"] is None
    seeded, = runner.plan(project, "tiny", seeds=[0, 1])
    assert runner.standing(project, seeded) == "stale"
    with monkeypatch.context() as patch:
        patch.setattr(notebooks, "package_digest", lambda: "another package")
        assert runner.standing(project, job) == "stale"
    assert go(project, resume=False)[0] == {"01_a": "done"}
    assert json.loads(row.read_text())["fresh"] == "1"
    row.unlink()
    assert runner.standing(project, job) == "stale"


def test_package_digest_sees_every_source_file(tmp_path):
    digests = [package_digest(tmp_path)]
    for name, text in (("a.py", "1"), ("sub/b.py", "1"), ("sub/b.py", "2"), ("c.toml", ""), ("d.pyc", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        digests.append(package_digest(tmp_path))
    assert len(set(digests[:-1])) == 5 and digests[-1] == digests[-2]


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
    monkeypatch.setattr(notebooks, "render", lambda path: None)
    slow = "import time; time.sleep(99)"
    project = make({"01_dead": ["import os; os._exit(3)"], "03_slow": [slow]})
    statuses, outcomes, _ = go(project, only=["01"])
    assert statuses == {"01_dead": "failed"} and "died" in outcomes[0].note
    begun = time.time()
    statuses, outcomes, _ = go(project, only=["03"], timeout=1.5)
    assert statuses == {"03_slow": "failed"} and "--notebook-timeout" in outcomes[0].note
    statuses, outcomes, _ = go(project, only=["03"], budget=1.5)
    assert statuses == {"03_slow": "paused"} and runner.exit_code(outcomes) == 75
    assert time.time() - begun < 60


def test_ctrl_c_leaves_no_half_written_copy_and_no_kernel(make):
    project = make({"01_a": ["import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(99)"]})
    command = [sys.executable, "-m", "vitlab.cli", "run", "--preset", "tiny", "--project", project.source]
    pipe = subprocess.PIPE
    # started in the background by a shell, this test would hand down that SIGINT is ignored
    heeded = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=REPOSITORY, preexec_fn=heeded)
    pid = next(int(line.split()[1]) for line in process.stdout if line.startswith("pid"))
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in complaint and "Traceback" not in complaint
    assert not (project.root / "executed").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("tiny", "message"),
    [
        ({"01_a": {"epoch": 3}}, "01_a has no parameter 'epoch'; it has: epochs, preset, rate, seeds"),
        ({"01_a": {"epochs": 3.5}}, "of type float, its default 1 is of type int"),
        ({"01_a": {"seeds": 3}}, "of type int"),
        ({"01_a": {"epochs": True}}, "of type bool"),
        ({"01_z": {}}, "no notebook for"),
        ({"common": {"rat": 3}}, "no notebook has the parameters"),
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
    with pytest.raises(ValueError, match="has no section for"):
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
    paths = notebooks.machine_paths(project)
    cases = {
        f"saved {project.root}/figures/x.png": "saved figures/x.png",
        f"in {project.root}.": "in ..",
        f"{project.root}2/x": f"{notebooks.clean_text(str(tmp_path), paths)}/p2/x",
        f"\x1b[32m{Path.home()}/a.py\x1b[0m": "\x1b[32m~/a.py\x1b[0m",
        "/mnt/sets/cifar10.npz": "$VITLAB_DATA/cifar10.npz",
        "/tmp/ipykernel_12/345.py:3": "<cell>:3",
        " 0%|  |\r50%|# |\r100%|##|\ndone\r\n": "100%|##|\ndone\r\n",
        f"a{Path.home()}/b": f"a{Path.home()}/b",
    }
    assert {k: notebooks.clean_text(k, paths) for k in cases} == cases


def test_clean_drops_widgets(tmp_path):
    output = nbformat.v4.new_output("display_data", {notebooks.WIDGET: {"model_id": "1"}, "text/plain": "0%"})
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[output])])
    book.metadata["widgets"] = {"state": {}}
    cleaned = notebooks.clean(book, notebooks.Project(tmp_path, tmp_path))
    assert cleaned.cells[0].outputs == [] and "widgets" not in cleaned.metadata
    assert len(book.cells[0].outputs) == 1  # the original stays


def test_clean_joins_what_one_stream_said(tmp_path):
    parts = [("stdout", "a\r"), ("stdout", "b\n"), ("stderr", "c\n"), ("stdout", "d")]
    outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in parts]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=outputs)])
    cleaned = notebooks.clean(book, notebooks.Project(tmp_path, tmp_path)).cells[0].outputs
    assert [(o.name, o.text) for o in cleaned] == [("stdout", "b\n"), ("stderr", "c\n"), ("stdout", "d")]


def test_choose_preset(make, monkeypatch, tmp_path):
    project = make({}, gpu={})
    assert runner.choose_preset(project) == ("tiny", "no CUDA device")
    monkeypatch.setattr(runner, "cuda_device", lambda: "Some GPU")
    monkeypatch.setenv("VITLAB_DATA", str(tmp_path))
    monkeypatch.setattr(runner.socket, "create_connection", lambda *a, **k: (_ for _ in ()).throw(OSError()))
    name, why = runner.choose_preset(project)
    assert name == "tiny" and "VITLAB_DATA" in why
    (tmp_path / "cifar10.npz").touch()
    assert runner.choose_preset(project) == ("gpu", "Some GPU, CIFAR under VITLAB_DATA")


def test_option_values():
    assert [cli.seconds(t) for t in ("90s", "25m", "1h30m")] == [90, 1500, 5400]
    assert cli.seeds("0,1,2") == [0, 1, 2] and cli.names("01, 05") == ["01", "05"]
    assert cli.assignment("dims=[64, 128]") == ("dims", [64, 128])
    for function, bad in ((cli.seconds, "25"), (cli.seconds, ""), (cli.seconds, "0m"), (cli.seeds, "a"),
                          (cli.seeds, "-1"), (cli.assignment, "x")):
        with pytest.raises(cli.argparse.ArgumentTypeError, match=repr(bad)):
            function(bad)


def test_list_tells_where_each_preset_stands(make, capsys):
    project = make({"01_a": ["1"]}, gpu={})
    assert cli.main(["run", "--list", "--project", str(project.source)]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["notebook", "gpu", "tiny", "title"]
    assert line.split() == ["01_a", "never", "run", "never", "run", "Title", "of", "01_a"]


def test_bad_input_is_one_line(make, capsys):
    project = make({"01_a": ["1"]})
    assert cli.main(["run", "--preset", "big", "--project", str(project.source)]) == 2
    assert capsys.readouterr().err == "error: no preset 'big'; there are: tiny\n"


def test_nbval_of_prepared_notebooks(make):
    project = make(
        {"01_a": [ROW.format(name="01_a"), "assert epochs == 7"]}, tiny={"01_a": {"epochs": 7}}
    )
    assert selftest._notebooks(project) == 0
    assert not (project.root / "results").exists()  # they went to a folder of their own


needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")


def script(*options, cwd, **environment):
    command = ["bash", str(REPOSITORY / "run_all.sh"), *options]
    environment = os.environ | {"VITLAB_PYTHON": sys.executable} | environment
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


@needs_bash
def test_run_all_names_unknown_options_before_it_installs(tmp_path):
    answer = script("--bogus", "--nope", cwd=tmp_path)
    assert answer.returncode == 2 and "unknown options: --bogus --nope" in answer.stderr and not answer.stdout


@needs_bash
def test_run_all_from_another_folder_with_another_interpreter(make, tmp_path):
    project = make({"01_a": ["1"]})
    answer = script("--no-install", "--list", "--project", str(project.source), cwd=tmp_path)
    assert answer.returncode == 0 and "Title of 01_a" in answer.stdout, answer.stderr
    answer = script("--list", cwd=tmp_path, VITLAB_PYTHON="/nowhere/python")
    assert answer.returncode == 2 and "VITLAB_PYTHON=/nowhere/python is no Python >= 3.11" in answer.stderr


def test_data_describes_a_set_and_names_an_unknown_one(capsys):
    assert cli.main(["data", "tiny"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("tiny: train 2,000, val 500, test 500; 10 classes, 32 pixels, key ")
    assert cli.main(["data", "mnist"]) == 2
    assert "unknown data set 'mnist'" in capsys.readouterr().err
