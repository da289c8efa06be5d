"""`run_all.sh` killed by SIGKILL at random moments and started again, beside a run that nobody disturbed.

    python tests/run/kills.py 20

prints a line a kill: when, what was killed, what it had come to, and, at the next start, what it went on from. Each run
is killed until it is through, then compared, and a new one is begun, until there were so many kills. Moments are
counted in seconds of processor time that a run has taken, so that others on the machine do not move them.
"""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import torch
from PIL import Image

from vitlab.study.study import read_rows
from vitlab.utils.files import read_record
from vitlab.utils.tensors import load_tensors

sys.path.insert(0, str(Path(__file__).parent))
from small_projects import write

RUN_ALL = Path(__file__).parents[2] / "run_all.sh"
TIMES = {"measured_s", "train_s", "latency_ms", "latency_ms_q25", "latency_ms_q75", "images_per_s", "seconds",
         "finished", "commit", "dirty"}  # of a run, not of what it found; peak_mb and all accuracies have to agree
START = """
import functools
from vitlab.compress.distill import Distill
from vitlab.study import plots, study as module, zoo
# the state is saved at the end of each epoch and four times a second within it
module.fit = functools.partial(module.fit, save_every=0, save_within=0.25)
study = module.Study({stem!r}, preset, device="cpu")
data = study.data("tiny")
spec = zoo.scaled("ours", dict(
    dataset="tiny", image_size=32, dim=32, depth=2, heads=2, mlp_dim=64, epochs=epochs, batch=100, warmup=1,
    dropout=0.1, drop_path=0.1, ema=0.9, mixup=0.2, augment="crop(4)+flip+trivial",
    dtype="float32"))  # "auto" takes what it times to be faster, which need not be the same in both runs
"""
END = """
rows = study.rows(arms, data, seconds=0.05, batch=16)
study.save(plots.confusion(study.scores(arms[0], data).confusion, data.classes), "confusion")
study.conclude(f"The best reads {rows.accuracy_top1.max()} %.")
"""
BOOKS = {
    "01_train": [START.format(stem="01_train"), "arms = study.arms(spec, data, seeds)", END],
    "02_tune": [START.format(stem="02_tune"), "first = study.arm(spec, data)",
                "arms = [study.arm(spec, data, start=first, objective=Distill(first.model), name='tuned')]", END],
}  # fmt: skip


def project(folder, epochs, stems=tuple(BOOKS)):
    """A project of these notebooks: one trains two arms, another goes on from the first of them; its folder."""
    (folder / "notebooks").mkdir(parents=True)
    (folder / "presets").mkdir()
    parameters = f'preset = "tiny"\nseeds = [0, 1]\nepochs = {epochs}'
    for stem in stems:
        write(folder / "notebooks" / f"{stem}.ipynb", BOOKS[stem], parameters=parameters)
    (folder / "presets" / "tiny.yaml").write_text("".join(f"{stem}: {{}}\n" for stem in stems))
    return folder


class Started:
    """`run_all.sh` at work on the project in `folder`, its lines in `lines` as they come."""

    def __init__(self, folder):
        command = ["bash", RUN_ALL, "--no-install", "--preset", "tiny", "--project", folder]
        env = {k: v for k, v in os.environ.items() if k not in ("VITLAB_ROOT", "VITLAB_FRESH", "VITLAB_DEADLINE")}
        # how many threads are faster is timed, and the next run may find otherwise; only equal numbers give equal bits
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(min(2, os.cpu_count())))}
        self.process = subprocess.Popen(command, env=env | threads | {"VITLAB_PYTHON": sys.executable}, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        self.lines, self.worked = [], 0.0
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self.reader.start()

    def ended(self, said=None, work=math.inf):
        """Whether it came to its end; waits no longer than until a line matches `said` or it has worked so long."""
        while self.process.poll() is None:
            self.worked = max(self.worked, sum(map(worked, [self.process.pid, *descendants(self.process.pid)])))
            if self.worked >= work or (said and self.told(said)):
                return False
            time.sleep(0.05)
        return True

    def kill(self, everything):
        """SIGKILL for the runner alone, whose kernel has to notice, or for all of it, as when the power goes."""
        for pid in [self.process.pid, *(descendants(self.process.pid) if everything else ())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def told(self, pattern):
        return [line.strip() for line in list(self.lines) if re.search(pattern, line)]


def descendants(pid):
    found = []
    with contextlib.suppress(OSError):  # it has just ended
        for child in (c for f in Path(f"/proc/{pid}/task").glob("*/children") for c in f.read_text().split()):
            found += [int(child), *descendants(int(child))]
    return found


def worked(pid):
    """Seconds of processor time that a process has taken, with its children that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def check_whole(folder):
    """Every file under its own name is whole, at any moment: read each, or fail."""
    for path in folder.rglob("*.json"):
        read_record(path)
    for path in folder.rglob("*.safetensors"):
        assert load_tensors(path)[0]
    for path in (folder / "figures").rglob("*.png"):
        Image.open(path).verify()
    for path in (folder / "executed").rglob("*.ipynb"):
        nbformat.validate(nbformat.read(path, 4))


def timeless(value):
    """Plain data without the times in it."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def outcome(folder):
    """What a run found: {file: rows without times}, {arm: its tensors and what is said of it without times}."""
    rows = {str(p.relative_to(folder)): timeless(read_record(p)) for p in folder.rglob("results/**/*.json")}
    arms = {}
    for path in folder.rglob("checkpoints/**/*.safetensors"):
        tensors, said = load_tensors(path)
        arms[path.name] = tensors, timeless(json.loads(said["about"])), said["config"]
    return rows, arms


def differences(one, other):
    """What two outcomes differ in, as words; [] where they are bit-identical."""
    found = [f"rows {k}" for k in one[0].keys() | other[0].keys() if one[0].get(k) != other[0].get(k)]
    for name in one[1].keys() | other[1].keys():
        (a, *about), (b, *told) = (side[1].get(name, ({},)) for side in (one, other))
        if about != told or a.keys() != b.keys() or not all(torch.equal(a[k], b[k]) for k in a):
            found.append(f"arm {name}")
    return found


def undisturbed(folder):
    """(outcome, seconds of work to the first epoch's line, seconds in all) of a run that nobody disturbs."""
    run = Started(folder)
    run.ended(said="epoch ")
    first = run.worked
    run.ended()
    assert run.process.returncode == 0, "".join(run.lines)
    return outcome(folder), first, run.worked


def disturbed(folder, draw, kills, begin, end, log):
    """Start and kill, at most `kills` times, then leave the last start alone; the number of kills. Of five kills one
    comes while it starts (`begin`: seconds to the first epoch), the others within `end - begin` of the first arm."""
    count = 0
    while True:
        run, moment = Started(folder), draw.uniform(0.3 * begin, begin)
        if draw.random() < 0.8:
            run.ended(said=", seed ")  # the first arm is loaded or trained
            moment = run.worked + draw.uniform(0, end - begin)
        through = run.ended(work=moment if count < kills else math.inf)
        resumed = run.told("trained before|epoch ")[:1]
        if count and resumed:
            log(f"         went on: {resumed[0][:100]}")
        if through:
            assert run.process.returncode == 0, "".join(run.lines)
            log(f"         through in {run.worked:.1f} s")
            return count
        everything = draw.random() < 0.5
        run.kill(everything)
        count += 1
        check_whole(folder)
        state, parts = list(folder.rglob(".state/training/**/*.safetensors")), list(folder.rglob("*.part"))
        within = any(k.startswith("begun.") for path in state for k in load_tensors(path)[0])
        log(f"kill {count:2} at {moment:5.2f} s, {'everything' if everything else 'the runner alone'}: "
            f"{len(list(folder.rglob('checkpoints/**/*.safetensors')))} arms done, training state "
            f"{'within an epoch' if within else 'at an epoch' if state else 'none'}, {len(parts)} unfinished files; "
            f"last line: {(run.told('.') or ['none'])[-1][:70]}")  # fmt: skip


def check_end(folder, whole):
    """A disturbed run's end against the other's: bit-identical, each arm one row, copies of all notebooks."""
    check_whole(folder)
    found = differences(whole, outcome(folder))
    assert not found, f"not what the undisturbed run found: {'; '.join(found)}"
    rows = read_rows(folder, "tiny")
    assert len(rows) and not rows.duplicated(["notebook", "arm", "dataset", "seed"]).any()
    assert {p.name for p in folder.glob("executed/tiny/*")} == {p.name for p in folder.glob("notebooks/*")}
    assert not list(folder.rglob(".state/**/*.safetensors"))


def main(kills, seed=0, epochs=12):
    """The whole log, printed."""
    base, draw, done = Path(tempfile.mkdtemp()), random.Random(seed), 0
    whole, begin, end = undisturbed(project(base / "whole", epochs))
    print(f"undisturbed: first epoch after {begin:.1f} s, all after {end:.1f} s; {len(whole[0])} result files, "
          f"{len(whole[1])} arms", flush=True)  # fmt: skip
    while done < kills:
        folder = project(base / f"after {done}", epochs)
        print(f"a new run, after {done} kills", flush=True)
        count = disturbed(folder, draw, kills - done, begin, end, lambda text: print(text, flush=True))
        check_end(folder, whole)
        done += count
        print(f"rows, weights and histories after {count} kills are bit-identical to the undisturbed run's", flush=True)
    shutil.rmtree(base)


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(int, sys.argv[2:]))
