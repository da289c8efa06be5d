"""What goes wrong around a study: full disks, folders that cannot be written, damaged files, two runs at once."""

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import resource
import socket
import subprocess
import threading

import matplotlib
import pytest
import torch
from small_projects import ROW, go

from vitlab.models import checkpoint
from vitlab.models.vit import ViT, ViTConfig
from vitlab.run import runner
from vitlab.study import plots, zoo
from vitlab.study.study import Study, read_rows
from vitlab.train.loop import fit
from vitlab.train.recipe import Recipe
from vitlab.utils import rng
from vitlab.utils.files import locked, read_record, write_json

matplotlib.use("Agg")
CONFIG = ViTConfig(image_size=32, patch_size=16, dim=64, depth=1, heads=1)
CHANGES = {"dataset": "tiny", "image_size": 32, "patch_size": 16, "dim": 24, "depth": 1, "heads": 2, "epochs": 1,
           "batch": 500}  # fmt: skip


@pytest.fixture(params=["tmpfs", "RLIMIT_FSIZE"])
def small_disk(request, tmp_path):
    """(folder, context in which it takes files of 100 kB at most)."""
    if request.param == "RLIMIT_FSIZE":

        @contextlib.contextmanager
        def full():
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        yield tmp_path, full
        return
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", disk], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield disk, contextlib.nullcontext
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_said_and_what_was_there_stays_whole(small_disk):
    folder, full = small_disk
    small = dataclasses.replace(CONFIG, dim=8).build()
    checkpoint.save(small, folder / "m.safetensors")
    write_json(folder / "row.json", {"accuracy": 87.25})
    with full():
        with pytest.raises(OSError, match=r"m\.safetensors cannot be written"):
            checkpoint.save(CONFIG.build(), folder / "m.safetensors")
        with pytest.raises(OSError):
            write_json(folder / "row.json", {"accuracy": "1" * 200_000})
    assert torch.equal(checkpoint.load(folder / "m.safetensors").head.weight, small.head.weight)
    assert json.loads((folder / "row.json").read_text()) == {"accuracy": 87.25}
    assert {p.name for p in folder.iterdir()} <= {"m.safetensors", "row.json", "disk"}


def test_a_notebook_that_finds_the_disk_full_has_failed_and_the_others_go_on(small_disk, make, capfd):
    folder, full = small_disk
    row = {stem: ROW.format(name=stem) for stem in ("01_large", "02_small")}
    project = make({"01_large": [row["01_large"], "'x' * 200_000"], "02_small": [row["02_small"]]})
    (project.root / "executed").symlink_to(folder)
    with full():
        statuses, (outcome, _), _ = go(project)
    assert statuses == {"01_large": "failed", "02_small": "done"}
    # there is no room for the copy; or not even for what papermill writes as it goes
    assert re.search(r"copy in executed/ cannot be written: .*No space left|File too large", outcome.note)
    assert re.search("No space left|File too large", err := capfd.readouterr().err) and "Traceback" not in err
    assert [p.name for p in project.executed("tiny").iterdir()] == ["02_small.ipynb"]
    if folder != project.root.parent:  # where there is room again
        subprocess.run(["mount", "-o", "remount,size=10m", folder], check=True)
    assert go(project)[0] == {"01_large": "done", "02_small": "up to date"}


def test_a_notebook_whose_lock_cannot_be_written_has_failed_and_the_others_go_on(make):
    project = make({"01_a": ["1"], "02_b": ["1"]})
    (project.root / ".state/run/tiny/01_a.lock").mkdir(parents=True)
    statuses, (outcome, _), _ = go(project)
    assert statuses == {"01_a": "failed", "02_b": "done"} and "01_a.lock" in outcome.note


def test_a_run_that_met_a_full_disk_goes_on_bit_identical(tmp_path):
    data = Study("x", root=tmp_path, device="cpu").data("tiny")
    recipe = Recipe(epochs=3, batch=500, warmup=0)

    def trained(**options):
        rng.seed_all(1)
        model = ViT(CONFIG)
        fit(model, data, recipe, log=None, save_every=0, **options)
        return model

    def fill(epoch, *_):
        if epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    # a hook in both: without any the threads may share the images of a batch, which adds gradients in another order
    whole, state = trained(on_epoch=[lambda *_: None]), tmp_path / "state"
    try:
        with pytest.raises(OSError, match="state cannot be written"):
            trained(checkpoint=state, on_epoch=[fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    again = trained(checkpoint=state, on_epoch=[lambda *_: None])
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


@pytest.fixture
def study(tmp_path):
    return Study("01_a", root=tmp_path, device="cpu", log=lambda line: None)


@contextlib.contextmanager
def heeding_modes():
    """Root may write everywhere; within this, it may not where a folder's mode says so, as anybody else."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)  # third version of the interface, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable capabilities, then those beyond 32
    assert libc.capget(head, sets) == 0
    effective = sets[0]
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(head, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(head, sets) == 0


def test_figures_that_cannot_be_written_are_said_and_rows_stay(study):
    study.write_row("arm", {"arm": "arm"})
    (study.root / "figures").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="figures"):
        study.save(plots.confusion([[1, 0], [0, 1]], "ab"), "confusion")
    assert len(read_rows(study.root, "tiny")) == 1 and (study.root / "figures").is_file()
    (study.root / "figures").unlink()
    (study.root / "figures").mkdir(mode=0o500)
    with heeding_modes(), pytest.raises(PermissionError, match="figures"):
        study.save(plots.confusion([[1, 0], [0, 1]], "ab"), "confusion")
    assert len(read_rows(study.root, "tiny")) == 1 and not list((study.root / "figures").iterdir())


def test_a_damaged_arm_is_refused_by_name_and_trained_again_once_it_is_gone(study):
    spec, data = zoo.scaled("S0/dense", CHANGES), study.data("tiny")
    first, other = study.arm(spec, data), study.arm(spec, data, seed=1)
    path, second = (study.root / "checkpoints" / "tiny" / f"{arm.key}.safetensors" for arm in (first, other))
    whole = path.read_bytes()
    flipped = whole[:-100] + bytes([whole[-100] ^ 16]) + whole[-99:]  # one bit of one weight
    for content, said in ((whole[:-100], "cut short"), (flipped, "damaged"), (b"", "cut short"),
                          (second.read_bytes(), f"holds another arm .{other.key}")):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{first.key}\.safetensors .*{said}"):
            study.arm(spec, data)
    path.unlink()
    again = study.arm(spec, data)
    assert torch.equal(again.model.head.weight, first.model.head.weight)
    assert again.history["val_accuracy"] == first.history["val_accuracy"]


def test_a_flipped_bit_in_a_training_state_is_seen(tmp_path, study):
    fit(ViT(CONFIG), study.data("tiny"), Recipe(epochs=1, batch=500), checkpoint=tmp_path / "state", log=None)
    whole = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(whole[:-5000] + bytes([whole[-5000] ^ 1]) + whole[-4999:])
    with pytest.raises(ValueError, match=r"state is not a readable checkpoint .*damaged.*delete it to start anew"):
        fit(ViT(CONFIG), study.data("tiny"), Recipe(epochs=2, batch=500), checkpoint=tmp_path / "state", log=None)


def test_results_cut_short_are_named_and_a_copy_cut_short_is_made_again(make):
    project = make({"01_a": [ROW.format(name="01_a")]})
    assert go(project)[0] == {"01_a": "done"}
    copy, row = project.root / "executed/tiny/01_a.ipynb", project.root / "results/tiny/01_a/arm.json"
    row.write_text(row.read_text()[:-1])
    with pytest.raises(ValueError, match=r"arm\.json is not valid JSON"):
        read_rows(project.root, "tiny")
    copy.write_text(copy.read_text()[:200])
    (job,) = runner.plan(project, "tiny")
    assert runner.standing(project, job) == "never run"
    assert go(project)[0] == {"01_a": "done"} and len(read_rows(project.root, "tiny")) == 1


def test_an_edited_digit_in_any_result_is_refused_by_name(study):
    study.write_row("arm", {"arm": "arm", "accuracy_top1": 87.25})
    study.conclude("It reads 87.25 %.")
    study.settle("S0/dense/parameters", [87.25], as_published=True)
    files = {path.name: path for path in study.folder("results").iterdir()}
    for name, path in files.items():
        path.write_text(path.read_text().replace("87.25", "88.25"))
        with pytest.raises(ValueError, match=rf"{name} is damaged or was edited.*delete it"):
            read_record(path)
    with pytest.raises(ValueError, match=r"arm\.json is damaged"):
        read_rows(study.root, "tiny")
    assert files.keys() == {"arm.json", "conclusions.json", "claims.json"}


def test_two_runs_at_once_share_the_work(make, capfd):
    count = "with open(os.environ['VITLAB_ROOT'] + '/count', 'a') as file: file.write('x')\nimport time; time.sleep(2)"
    project = make({"01_a": [ROW.format(name="01_a"), count], "02_b": [ROW.format(name="02_b"), count]})
    found = []
    runs = [threading.Thread(target=lambda: found.append(go(project)[0])) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    statuses = {stem: sorted(f[stem] for f in found) for stem in ("01_a", "02_b")}
    assert statuses == {stem: ["done", "up to date"] for stem in statuses}
    assert (project.root / "count").read_text() == "xx"
    assert f", process {os.getpid()}, since 20" in capfd.readouterr().out.partition("waiting for ")[2]


def test_an_arm_that_two_want_at_once_is_trained_once(tmp_path):
    spec, said, found, together = zoo.scaled("S0/dense", CHANGES), [], [], threading.Barrier(2)
    other_waits = threading.Event()

    def log(line):
        said.append(line)
        if "waiting for" in line:
            other_waits.set()
        elif ": training" in line:
            other_waits.wait(60)  # so that the first is not through before the other comes

    def want(study, data):
        together.wait()
        found.append(study.arm(spec, data).model.head.weight)

    studies = [Study("01_a", root=tmp_path, device="cpu", log=log) for _ in range(2)]
    threads = [threading.Thread(target=want, args=(study, study.data("tiny"))) for study in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sum(words in line for line in said) for words in (": training", "trained before")] == [1, 1]
    assert any(f"waiting for {socket.gethostname()}, process {os.getpid()}" in line for line in said)
    assert torch.equal(*found)


def test_a_run_does_not_wait_beyond_its_budget(make):
    project = make({"01_a": [ROW.format(name="01_a")]})
    with locked(project.root / ".state/run/tiny/01_a.lock"):
        statuses, (outcome,), _ = go(project, budget=1)
    assert statuses == {"01_a": "not started"} and f"process {os.getpid()}" in outcome.note
