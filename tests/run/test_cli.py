"""Options, what `vitlab` says at once, run_all.sh."""

import dataclasses
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_projects import ROW

from vitlab import cli
from vitlab.models.vit import ViTConfig
from vitlab.run import notebooks
from vitlab.train.recipe import Recipe

REPOSITORY = Path(__file__).parents[2]

def test_help_comes_at_once_and_knows_every_field():
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", "from vitlab import cli; cli.main(['train', '--help'])"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3
    fields = [f.name for cls in (ViTConfig, Recipe) for f in dataclasses.fields(cls)]
    assert {f"--{name.replace('_', '-')}" for name in fields} <= set(answer.stdout.split())


def test_option_values():
    assert [cli.seconds(t) for t in ("90s", "25m", "1h30m")] == [90, 1500, 5400]
    assert cli.seeds("0,1,2") == [0, 1, 2] and cli.names("01, 05") == ["01", "05"]
    assert cli.assignment("dims=[64, 128]") == ("dims", "[64, 128]")
    assert notebooks.read_yaml("{lr: 1e-3, dims: [6, 1.5]}", "-p x") == {"lr": 1e-3, "dims": [6, 1.5]}
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


@needs_bash
def test_the_test_command_runs_every_stage_and_leaves_no_results(make):
    project = make({"01_a": [ROW.format(name="01_a"), "assert epochs == 7"]}, tiny={"01_a": {"epochs": 7}})
    shutil.copy(REPOSITORY / "run_all.sh", project.source)
    (project.source / "tests").mkdir()
    (project.source / "ruff.toml").write_text('exclude = ["notebooks", ".state"]')
    command = ["bash", str(project.source / "run_all.sh"), "--no-install", "--test"]
    environment = os.environ | {"VITLAB_PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
    for passes, code in ((False, 1), (True, 0)):
        (project.source / "tests" / "test_one.py").write_text(f"def test_one():\n    assert {passes}\n")
        answer = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert answer.returncode == code, answer.stdout + answer.stderr
        verdicts = [line.split(",")[0] for line in answer.stdout.splitlines() if line.startswith("===") and "," in line]
        assert verdicts == ["=== ruff: ok", f"=== pytest: {'ok' if passes else 'FAILED'}", "=== notebooks: ok"]
    assert not (project.source / "results").exists()


def test_data_describes_a_set_and_names_an_unknown_one(capsys):
    assert cli.main(["data", "tiny"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("tiny: 2,000 train, 500 val, 500 test images of 3x32x32, 10 classes, key ")
    assert cli.main(["data", "mnist"]) == 2
    assert "unknown data set 'mnist'" in capsys.readouterr().err
