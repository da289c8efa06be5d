"""The study as a Slurm job array, on a real Slurm of one node (Debian: slurm-wlm, munge) that the test starts."""

import json
import os
import re

import pytest
from slurm_study import DAEMONS, compared, lacking, said, slurm, wait

from vitlab import cli
from vitlab.utils.files import write_record

TRAIN = """
import json, os, pathlib, time
root = pathlib.Path(os.environ["VITLAB_ROOT"])
class BudgetSpent(RuntimeError):
    pass
for seed in seeds:
    arm = root / "checkpoints" / f"{seed}-{rate}.json"
    if not arm.exists():
        arm.parent.mkdir(exist_ok=True)
        started = root / "started"
        if seeds == [1] and not started.exists():
            started.touch()
            raise BudgetSpent("the time is over: this task is to be queued again")
        arm.write_text(json.dumps({"job": os.environ["SLURM_JOB_ID"], "jobs": os.environ.get("VITLAB_JOBS")}))
"""

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture
def cluster(tmp_path_factory):
    """The folder of a running Slurm, for which sbatch and its like are set up."""
    if missing := lacking(DAEMONS):
        pytest.skip(f"{', '.join(missing)}: not installed (Debian: apt install slurm-wlm munge)")
    if os.geteuid():
        pytest.skip("Slurm's daemons are started as root")
    with slurm(tmp_path_factory.mktemp("slurm")) as folder:
        yield folder


def completed(folder):
    """What Slurm has noted of finished jobs: {number: (name, state)}."""
    path = folder / "completed"
    lines = path.read_text().splitlines() if path.exists() else []
    return {(f := dict(re.findall(r"(\w+)=(\S*)", line)))["JobId"]: (f["Name"], f["JobState"]) for line in lines}


def test_the_study_is_handed_to_slurm_and_leaves_what_a_plain_run_leaves(make, cluster, capsys):
    row = "\nfrom vitlab.utils.files import write_json"
    row += "\nwrite_json(root / 'results' / preset / {0!r} / f'{{rate}}.json', {{'seeds': seeds}})"
    project = make({"01_a": [TRAIN + row.format("01_a")], "03_sums": ["len(seeds)"]}, reads={"03_sums": ["*"]},
                   tiny={"01_a": {"seeds": [0, 1], "rate": 0.1}})  # fmt: skip
    command = ["run", "--project", str(project.source), "--preset", "tiny"]
    assert cli.main([*command, "--slurm", "--time=10"]) == 2, "an option of sbatch needs the equals sign"
    assert cli.main([*command, "--slurm=--partition=none"]) == 2
    assert "invalid partition" in capsys.readouterr().err
    assert cli.main([*command, "--slurm=--time=10 --ntasks=1"]) == 0
    assert "in 2 tasks" in capsys.readouterr().out
    wait(lambda: not said("squeue", "--noheader"), cluster)
    logs = "\n".join(p.read_text() for p in (project.root / ".state" / "slurm").glob("*.log"))
    wait(lambda: len(completed(cluster)) == 3, cluster, 20)
    ended = ["vitlab-run", "vitlab-train", "vitlab-train"]
    assert sorted(completed(cluster).values()) == [(name, "COMPLETED") for name in ended], logs
    assert logs.count("status='paused'") == 1, "what ran out of time was queued again"
    arms = [json.loads(p.read_text()) for p in (project.root / "checkpoints").iterdir()]
    assert len({arm["job"] for arm in arms}) == 2 and {arm["jobs"] for arm in arms} == {"2"}, "each task trained one"
    assert sorted(p.stem for p in project.executed("tiny").iterdir()) == ["01_a", "03_sums"]
    assert json.loads((project.root / "results/tiny/01_a/0.1.json").read_text()) == {"seeds": [0, 1]}
    assert cli.main([*command, "--slurm"]) == 0 and "up to date" in capsys.readouterr().out


def test_without_slurm_there_is_an_error(make, monkeypatch, capsys):
    project = make({"01_a": ["1"]})
    monkeypatch.setenv("PATH", str(project.source))
    command = ["run", "--project", str(project.source), "--preset", "tiny", "--slurm"]
    assert cli.main(command) == 2 and "no sbatch here" in capsys.readouterr().err
    assert cli.main([*command, "--fresh"]) == 2 and "--fresh" in capsys.readouterr().err


def test_rows_of_two_runs_are_held_against_each_other_without_their_times(tmp_path):
    for run, accuracy, seconds in (("a", 60.0, 1), ("b", 61.0, 2)):
        for seed, found in ((0, 50.0), (1, accuracy)):
            row = {"key": "k", "accuracy_top1": found, "seconds": seconds}
            write_record(tmp_path / run / "results/tiny/01_a" / f"{seed}.json", row)
    first, *others = compared(tmp_path / "a", tmp_path / "b")
    assert first.startswith("1 of 2 rows are those of ")
    assert len(others) == 1 and others[0].startswith("01_a/1: ['k', 60.0,") and "['k', 61.0," in others[0]
    assert len(compared(tmp_path / "a", tmp_path / "a")) == 1
