"""A Slurm of one node, and the whole study handed to it, with its `sacct`.

    python tests/run/slurm_study.py OUT [--plain DIR] [--project DIR] [OPTION of `vitlab run` ...]

starts a Slurm with accounting (Debian: slurm-wlm munge slurmdbd mariadb-server; as root), gives it `run_all.sh --slurm
--preset tiny`, waits, and prints what sacct says of the jobs and how many rows each notebook left in OUT. DIR holds
what `VITLAB_ROOT=DIR ./run_all.sh --preset tiny` left: rows of arms are held against those. They agree to the last bit
with the same OMP_NUM_THREADS only.
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from vitlab.study.study import read_rows
from vitlab.utils.files import read_record

RUN_ALL = Path(__file__).parents[2] / "run_all.sh"
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
ACCOUNTING = ("mariadb-install-db", "mariadbd", "slurmdbd", "sacctmgr", "sacct")
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
TO_ACCOUNTS = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[2]}
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
"""
ACCOUNTS = """
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={ports[2]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
"""
SACCT = "JobID%12,JobName%14,State,ExitCode,Elapsed,TotalCPU,MaxRSS,AllocCPUS,NodeList"
# what a row says of an arm that no clock has a part in
FOUND = ("key", "accuracy_top1", "accuracy_top5", "nll", "ece", "params", "macs", "val_accuracy")


@contextlib.contextmanager
def slurm(folder, accounting=False):
    """Start a Slurm of one node in the empty `folder`, for which sbatch and its like are set up; stop it at the end."""
    os.chmod(folder, 0o700)  # whoever reaches the database's socket may do anything with it
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    values = {"folder": folder, "host": socket.gethostname().partition(".")[0], "ports": free_ports(3),
              "cpus": os.cpu_count()}  # fmt: skip
    (folder / "slurm.conf").write_text((CONFIG + TO_ACCOUNTS * accounting).format(**values))
    (folder / "slurmdbd.conf").write_text(ACCOUNTS.format(**values))
    (folder / "slurmdbd.conf").chmod(0o600)
    surroundings = {"SLURM_CONF": f"{folder}/slurm.conf", "MYSQL_UNIX_PORT": f"{folder}/db.socket"}  # for slurmdbd
    munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
    started = []

    def start(*command, until):
        with (folder / f"{command[0]}.out").open("w") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
        wait(until, folder)

    with mock.patch.dict(os.environ, surroundings):
        try:
            start("munged", "--foreground", "--force", *(f"--{k}={folder}/munge.{v}" for k, v in munge.items()),
                  until=(folder / "munge.socket").exists)  # fmt: skip
            if accounting:
                place = ["--no-defaults", "--user=root", f"--datadir={folder}/db"]
                subprocess.run(["mariadb-install-db", *place], check=True, capture_output=True)
                start("mariadbd", *place, "--skip-networking", "--skip-grant-tables", f"--socket={folder}/db.socket",
                      until=(folder / "db.socket").exists)  # fmt: skip
                start("slurmdbd", "-D", until=lambda: "Cluster" in said("sacctmgr", "show", "cluster"))
                subprocess.run(["sacctmgr", "--immediate", "add", "cluster", "one"], capture_output=True)
            start("slurmctld", "-D", until=lambda: "UP" in said("scontrol", "ping"))
            start("slurmd", "-D", until=lambda: "idle" in said("sinfo", "--noheader", "--format=%T"))
            yield folder
        finally:
            subprocess.run(["scancel", "--me"], capture_output=True)
            for process in reversed(started):
                process.terminate()
                process.wait(60)


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def lacking(programs):
    return [name for name in programs if not shutil.which(name)]


def said(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout


def wait(condition, folder, seconds=300):
    end = time.time() + seconds
    while not condition():
        logs = {path.name: path.read_text()[-2000:] for path in folder.glob("*.out")}
        assert time.time() < end, f"{said('squeue')}\n{logs}"
        time.sleep(0.5)


def accounts():
    """What sacct says of all jobs, as text."""
    return said("sacct", "--allusers", "--duplicates", "--starttime=now-7days", f"--format={SACCT}")


def found(root):
    """{notebook/row: what it says in FOUND} of the rows with an accuracy."""
    rows = {f"{path.parent.name}/{path.stem}": read_record(path) for path in root.glob("results/tiny/*/*.json")}
    return {name: [row.get(column) for column in FOUND] for name, row in rows.items() if "accuracy_top1" in row}


def compared(root, plain):
    """Lines that say how many rows of two runs are the same, and what the others are."""
    mine, other = found(root), found(plain)
    names = sorted(mine.keys() | other.keys())
    apart = [f"{name}: {mine.get(name)} here, {other.get(name)} there"
             for name in names if mine.get(name) != other.get(name)]  # fmt: skip
    return [f"{len(names) - len(apart)} of {len(names)} rows are those of {plain} in {', '.join(FOUND)}", *apart]


def main(options, given):
    if missing := lacking(DAEMONS + ACCOUNTING):
        sys.exit(f"not installed: {', '.join(missing)} (Debian: slurm-wlm munge slurmdbd mariadb-server)")
    command = [RUN_ALL, "--no-install", "--preset", "tiny", f"--slurm={options.slurm}", *given]
    place = {"VITLAB_ROOT": str(options.out.resolve()), "VITLAB_PYTHON": sys.executable}
    with tempfile.TemporaryDirectory() as empty, slurm(Path(empty), accounting=True) as folder:
        begun = time.time()
        subprocess.run(command, check=True, env=os.environ | place)
        wait(lambda: not said("squeue", "--noheader"), folder, 12 * 3600)
        time.sleep(5)  # until what ended last is in the accounts
        print(f"all ended after {time.time() - begun:.0f} s\n\n{accounts()}")
    rows = read_rows(options.out, "tiny")
    counts = {path.name: len(list(path.glob("*.json"))) for path in sorted(options.out.glob("results/tiny/*"))}
    print(f"{len(rows)} rows; result files: {counts}")
    if options.plain:
        print(*compared(options.out, options.plain), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--plain", type=Path, metavar="DIR")
    parser.add_argument("--slurm", default="--ntasks=1", metavar="OPTIONS")
    main(*parser.parse_known_args())
