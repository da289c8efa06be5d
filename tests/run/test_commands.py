"""`vitlab train | evaluate | measure` on the bundled images, one epoch of a very small model."""

import json
import os
import socket
import subprocess
import sys

import pytest

from vitlab import cli
from vitlab.models import checkpoint
from vitlab.run import commands, study_run
from vitlab.train import loop

SMALL = ["--dataset", "tiny", "--epochs", "1", "--batch", "250", "--dim", "16", "--depth", "1", "--heads", "1",
         "--patch-size", "16", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "ripple.safetensors"
    code = cli.main(["train", "--attention", "ripple", "--ripple-stages", "1", *SMALL, "--checkpoint", str(path)])
    assert code == 0
    return path


def test_train_leaves_a_model_a_description_and_logs(trained):
    model = checkpoint.load(trained)
    assert (model.config.attention, dict(model.config.attention_args)) == ("ripple", {"stages": 1})
    assert (model.config.dim, model.config.mlp_dim, model.config.num_classes) == (16, 64, 10)
    about = checkpoint.read(trained).about
    assert about["dataset"] == "tiny" and len(about["history"]) == 1 and about["recipe"]["batch"] == 250
    # 10 of 200 epochs
    assert about["recipe"]["warmup"] == 0.05
    assert not trained.with_name(trained.name + commands.STATE).exists()


def test_tensorboard_gets_loss_accuracy_and_learning_rate(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(trained.with_name(trained.name + ".logs"))).Reload()
    assert {"loss", "accuracy", "val_accuracy", "lr"} <= set(log.Tags()["scalars"])


def test_evaluate_writes_what_it_prints(trained, tmp_path, capsys):
    assert cli.main(["evaluate", "--checkpoint", str(trained), "--out", str(tmp_path / "new"), "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "new" / "results.json").read_text())
    out = capsys.readouterr().out
    assert f"top-1 {result['top1']:.2f} %" in out and out.startswith("threads: "), "it says how many it computes with"
    assert len(result["per_class"]) == 10 and sum(map(sum, result["confusion"])) == result["n"] == 500
    hits = sum(row[i] for i, row in enumerate(result["confusion"]))
    assert result["top1"] == pytest.approx(100 * hits / 500) and result["device"]
    assert (tmp_path / "new" / "confusion.png").stat().st_size and (tmp_path / "new" / "confusion.pdf").exists()


def test_measure_a_checkpoint_and_a_timm_model(trained, tmp_path, capsys):
    given = ["measure", "--seconds", "0.01", "--batch-size", "4", "--device", "cpu"]
    row = tmp_path / "row.json"
    assert cli.main([*given, "--checkpoint", str(trained), "--dataset", "tiny", "--out", str(row)]) == 0
    found = json.loads(row.read_text())
    assert found["dataset"] == "tiny" and found["accuracy_top1"] is not None and found["params"] > 0
    timm = pytest.importorskip("timm")
    assert cli.main([*given, "--timm", "vit_tiny_patch16_224", "--dataset", "tiny", "--out", str(row)]) == 0
    found = json.loads(row.read_text())
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    assert found["params"] == sum(p.numel() for p in model.parameters()) and found["accuracy_top1"] is None
    assert "not measured" in capsys.readouterr().out


def test_a_stopped_run_goes_on_and_ends_where_an_undisturbed_one_does(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    two = [a if a != "1" or SMALL[i - 1] != "--epochs" else "2" for i, a in enumerate(SMALL)]
    assert cli.main(["train", *two, "--checkpoint", str(whole)]) == 0
    from vitlab.train import loop as train

    # the budget is spent before the second epoch
    check = train._check_deadline

    def spent(history, state, log):
        if len(history) == 1:
            monkeypatch.setenv("VITLAB_DEADLINE", "1")
        check(history, state, log)

    monkeypatch.setattr(train, "_check_deadline", spent)
    assert cli.main(["train", *two, "--checkpoint", str(parts)]) == 75
    assert not parts.exists() and parts.with_name(parts.name + commands.STATE).exists()
    monkeypatch.setattr(train, "_check_deadline", check)
    monkeypatch.delenv("VITLAB_DEADLINE")
    assert cli.main(["train", *two, "--checkpoint", str(parts)]) == 2  # not without being told to
    assert cli.main(["train", *two, "--checkpoint", str(parts), "--resume"]) == 0
    states = [checkpoint.load(p).state_dict() for p in (whole, parts)]
    assert all((a == b).all() for a, b in zip(states[0].values(), states[1].values()))


def test_two_trainings_on_one_file_are_kept_apart(tmp_path, monkeypatch, capsys):
    path, complaints = tmp_path / "m.safetensors", []
    lock = tmp_path / "m.safetensors.logs" / "training.lock"
    command = ["train", *SMALL, "--checkpoint", str(path)]
    die = "import os, sys; from vitlab.utils.files import locked\nwith locked(sys.argv[1]): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", die, lock]).returncode == -9
    left = lock.read_text()

    def fit(*given, **options):  # while the first trains, two others come
        for resume in ([], ["--resume"]):
            path.with_name(path.name + commands.STATE).touch()
            complaints.append((cli.main([*command, *resume]), capsys.readouterr().err))
            path.with_name(path.name + commands.STATE).unlink()
        return loop.fit(*given, **options)

    monkeypatch.setattr(commands, "fit", fit)
    assert cli.main(command) == 0, "a lock that a dead process left is taken over"
    holder = f"{lock} is still held by {socket.gethostname()}, process {os.getpid()}, since 20"
    assert left and [code for code, _ in complaints] == [2, 2] and all(holder in error for _, error in complaints)
    assert checkpoint.load(path).config.dim == 16


@pytest.mark.parametrize("given, said", [
    (["--ripple-stages", "2"], "--ripple-stages needs --attention ripple"),
    (["--hydra-branches", "2", "--attention", "ripple"], "--hydra-branches needs --attention hydra"),
    (["--no-kernels"], "--no-kernels needs --attention linear or ripple or hydra, not softmax"),
    (["--attention", "ripple", "--ripple-stages", "9"], "stages=9"),
    (["--heads", "3"], "heads=3"),
    (["--dataset", "mnist"], "mnist"),
    (["--resume"], "no run was stopped there"),
])  # fmt: skip
def test_mistakes_in_training_are_said_in_a_line(given, said, tmp_path, capsys):
    assert cli.main(["train", *SMALL, *given, "--checkpoint", str(tmp_path / "m.safetensors")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_other_mistakes(trained, tmp_path, capsys):
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors")
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    for arguments, said in (
        (["train", *SMALL, "--checkpoint", str(trained)], "exists"),
        (["evaluate", "--checkpoint", str(tmp_path / "none"), "--dataset", "tiny", *out], "is not there"),
        (["evaluate", "--checkpoint", str(text), "--dataset", "tiny", *out], "holds no model"),
        (["evaluate", "--checkpoint", str(text), *out], "holds no model"),
        (["measure"], "either --checkpoint FILE or --timm NAME"),
        (["measure", "--timm", "vit_tiny_patch16_225"], "vit_tiny_patch16_224"),
    ):
        assert cli.main(arguments) == 2, arguments
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_kernels_reaches_the_model(tmp_path, capsys):
    path = tmp_path / "hydra.safetensors"
    given = ["--attention", "hydra", "--hydra-branches", "2", "--no-kernels", "--checkpoint", str(path)]
    assert cli.main(["train", *SMALL, *given]) == 0
    assert "kernels are switched off" in capsys.readouterr().out
    assert dict(checkpoint.load(path).config.attention_args) == {"branches": 2, "kernels": "off"}


@pytest.mark.parametrize("given", [None, "1"])
def test_what_is_measured_after_side_by_side_training_gets_all_cores_again(monkeypatch, given):
    asked = []
    monkeypatch.setenv("OMP_NUM_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")

    def choose(jobs=1):
        asked.append((jobs, os.environ.get("OMP_NUM_THREADS")))
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        return ""

    monkeypatch.setattr(study_run.threads, "choose", choose)
    monkeypatch.setattr(study_run.runner, "run", lambda *_, alone: [alone()][:0])
    monkeypatch.setattr(study_run.runner, "summary", lambda *_: "")
    monkeypatch.setattr(study_run.signal, "signal", lambda *_: None)
    assert cli.main(["run", "--preset", "tiny", "--jobs", "2"]) == 0
    assert asked == [(2, given)] + [(1, None)] * (given is None), "what the user has set stays"
