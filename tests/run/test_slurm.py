"""The study as a Slurm job array, on a real Slurm of one node (Debian: slurm-wlm, munge) that the test starts."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest

from vitlab import cli

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerParameters=sched_interval=3,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES
"""
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


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def cluster(tmp_path_factory, monkeypatch):
    """The folder of a running Slurm, for which sbatch and its like are set up."""
    if missing := [name for name in DAEMONS if not shutil.which(name)]:
        pytest.skip(f"{', '.join(missing)}: not installed (Debian: apt install slurm-wlm munge)")
    if os.geteuid():
        pytest.skip("Slurm's daemons are started as root")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    text = CONFIG.format(folder=folder, host=socket.gethostname().partition(".")[0], ports=free_ports(2),
                         cpus=os.cpu_count())  # fmt: skip
    (folder / "slurm.conf").write_text(text)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
    commands = [["munged", "--foreground", "--force", *(f"--{k}={folder}/munge.{v}" for k, v in munge.items())],
                ["slurmctld", "-D"], ["slurmd", "-D"]]  # fmt: skip
    started = []
    try:
        for command in commands:
            log = (folder / f"{command[0]}.out").open("w")
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
            if command[0] == "munged":
                wait(lambda: (folder / "munge.socket").exists(), folder)
        wait(lambda: "idle" in said("sinfo", "--noheader", "--format=%T"), folder)
        yield folder
    finally:
        subprocess.run(["scancel", "--me"], capture_output=True)
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def said(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout


def wait(condition, folder, seconds=300):
    end = time.time() + seconds
    while not condition():
        logs = {path.name: path.read_text()[-2000:] for path in folder.glob("*.out")}
        assert time.time() < end, f"{said('squeue')}\n{logs}"
        time.sleep(0.5)


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
