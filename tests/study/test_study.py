"""Fit-or-load, rows, conclusions and claims of a notebook."""

import copy
import dataclasses
import json

import matplotlib
import pandas as pd
import pytest
import torch

from vitlab.models import checkpoint
from vitlab.study import zoo
from vitlab.study.claims import get, select
from vitlab.study.study import DEMO, Study, arm_key, read_rows
from vitlab.train.loop import BudgetSpent
from vitlab.train.recipe import Recipe
from vitlab.utils.files import read_json

matplotlib.use("Agg")

CHANGES = {"dataset": "tiny", "image_size": 32, "patch_size": 16, "dim": 24, "depth": 2, "heads": 2, "epochs": 1,
           "batch": 200}  # fmt: skip


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.delenv("VITLAB_FRESH", raising=False)
    monkeypatch.delenv("VITLAB_DEADLINE", raising=False)
    found = Study("01_baseline", "tiny", device="cpu", root=tmp_path, log=lambda line: found.lines.append(line))
    found.lines = []
    return found


@pytest.fixture
def spec():
    return zoo.scaled("S0/dense", CHANGES)


def test_an_arm_is_trained_once_and_then_loaded_the_same(study, spec, tmp_path):
    data = study.data("tiny")
    first = study.arm(spec, data, seed=3)
    again = Study("02_other", "tiny", device="cpu", root=tmp_path, log=study.lines.append).arm(spec, data, seed=3)
    assert first.key == again.key and "trained before" in study.lines[-1]
    assert all(torch.equal(a, b) for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values()))
    assert again.history.rows == first.history.rows and not again.model.training
    assert not list((tmp_path / ".state").rglob("*.safetensors"))  # the training state is not kept


def test_fresh_trains_again_once(study, spec, monkeypatch):
    data = study.data("tiny")
    study.arm(spec, data)
    monkeypatch.setenv("VITLAB_FRESH", "1")
    fresh = Study("01_baseline", "tiny", device="cpu", root=study.root, log=study.lines.append)
    fresh.arm(spec, data)
    assert "training 1 epochs" in study.lines[-2]
    fresh.arm(spec, data)
    assert "trained before" in study.lines[-1]


def test_an_arm_that_comes_with_the_project_is_not_trained(study, spec, tmp_path, monkeypatch):
    data = study.data("tiny")
    first = study.arm(spec, data)
    kept = tmp_path / "demo"
    kept.mkdir()
    about = checkpoint.read(study.root / "checkpoints" / "tiny" / f"{first.key}.safetensors").about
    checkpoint.save(copy.deepcopy(first.model).half(), kept / "small.safetensors", about)
    monkeypatch.setattr("vitlab.study.study.DEMO", kept)
    other = Study("01_baseline", "cpu", device="cpu", root=tmp_path / "new", log=study.lines.append)
    found = other.arm(spec, data)
    assert "comes with the project" in study.lines[-1] and found.key == first.key
    assert all(torch.equal(a.half().float(), b) for a, b in
               zip(first.model.state_dict().values(), found.model.state_dict().values()))  # fmt: skip
    monkeypatch.setenv("VITLAB_FRESH", "1")
    Study("01_baseline", "cpu", device="cpu", root=tmp_path / "new", log=study.lines.append).arm(spec, data)
    assert "epoch 1/1" in study.lines[-1], "--fresh trains it here"


def test_a_run_out_of_time_goes_on_from_its_state(study, spec, monkeypatch):
    data = study.data("tiny")
    longer = dataclasses.replace(spec, recipe=dataclasses.replace(spec.recipe, epochs=2))
    whole = study.arm(longer, data, seed=1).model.head.bias

    def spend(epoch, *_):
        if epoch == 0 and not study.lines[-1].startswith("time budget"):
            monkeypatch.setenv("VITLAB_DEADLINE", "1")

    spend.describe = lambda: "stops once"
    with pytest.raises(BudgetSpent):
        study.arm(longer, data, seed=2, on_epoch=[spend])
    monkeypatch.delenv("VITLAB_DEADLINE")
    arm = study.arm(longer, data, seed=2, on_epoch=[spend])
    assert arm.history.resumed == 1 and len(arm.history) == 2 and not torch.equal(arm.model.head.bias, whole)


def test_rows_are_written_with_provenance_and_read_back(study, spec):
    data = study.data("tiny")
    arm = study.arm(spec, data)
    row = study.row(arm, data, seconds=0.02, batch=8, note="mine")
    stored = read_json(study.folder("results") / "S0-dense-small-tiny-s0.json")
    assert json.loads(json.dumps(row)).items() <= stored.items()
    assert {"commit", "dirty", "versions", "device", "finished"} <= stored.keys()
    assert stored["params"] == sum(p.numel() for p in arm.model.parameters())
    assert stored["macs"] == arm.model.config.macs()
    assert stored["trained_in"] == arm.history.dtype == "float32"
    assert stored["as_published"] is False and "epochs 1 instead of 3" in stored["changes"]
    frame = read_rows(study.root, "tiny")
    assert len(frame) == 1 and frame.accuracy_top1[0] == row["accuracy_top1"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    images = (data.test.images.float() / 255 - mean) / std
    by_hand = (arm.model(images).argmax(1) == data.test.labels).float().mean() * 100
    assert row["accuracy_top1"] == pytest.approx(by_hand.item())


def test_an_arm_is_one_file_that_every_command_can_read(study, spec):
    arm = study.arm(spec, study.data("tiny"))
    (path,) = (study.root / "checkpoints" / "tiny").iterdir()
    about = checkpoint.read(path).about
    assert (about["key"], about["name"], about["seed"], about["dataset"]) == (arm.key, spec.name, 0, "tiny")
    assert about["history"] == arm.history.rows and about["recipe"]["epochs"] == 1
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(checkpoint.load(path)(images), arm.model(images))


def test_an_arm_goes_on_from_another_and_leaves_it_as_it_was(study, spec):
    data = study.data("tiny")
    first = study.arm(spec, data)
    before = first.model.head.weight.clone()
    tuned = study.arm(dataclasses.replace(spec, name="tuned"), data, start=first)
    assert tuned.key != first.key and tuned.name == "tuned" and torch.equal(first.model.head.weight, before)
    assert not torch.equal(tuned.model.head.weight, before)
    assert (first.epochs, tuned.epochs) == (1, 2)  # those of the start are its own too, trained now or before
    again = study.arm(spec, data, start=first, name="tuned")
    assert again.epochs == study.row(again, data, seconds=0.02, batch=8)["epochs"] == 2
    assert torch.equal(again.model.head.weight, tuned.model.head.weight)


def test_the_demo_is_the_arm_that_its_key_says():
    stored = checkpoint.read(DEMO / "ours-cifar10.safetensors")
    about = stored.about
    assert arm_key(stored.config, Recipe(**about["recipe"] | {"seed": about["seed"]}), about["data"]) == about["key"]
    assert about["history"][-1]["epoch"] == about["recipe"]["epochs"]


def test_a_checkpoint_is_an_arm_even_without_its_history(study, spec, tmp_path):
    model = spec.config.build()
    checkpoint.save(model, tmp_path / "mine.safetensors")
    arm = study.load(tmp_path / "mine.safetensors", spec)
    assert arm.name == spec.name and len(arm.history) == 0 and torch.equal(arm.model.head.weight, model.head.weight)
    checkpoint.save(spec.config.build(), tmp_path / "other.safetensors")
    assert study.load(tmp_path / "other.safetensors", spec).key != arm.key


def test_conclusions_are_rows_in_a_stable_order(study, capsys):
    study.conclude("ours is **better**", about="accuracy")
    study.conclude("it is faster")
    study.conclude("ours is *worse*", about="accuracy")
    stored = read_json(study.folder("results") / "conclusions.json")
    assert [c["text"] for c in stored["conclusions"]] == ["ours is *worse*", "it is faster"]
    assert "commit" in stored and len(read_rows(study.root, "tiny")) == 0
    again = Study("01_baseline", "tiny", device="cpu", root=study.root, log=study.lines.append)
    again.conclude("new")  # a notebook that is run again starts afresh
    assert [c["text"] for c in read_json(study.folder("results") / "conclusions.json")["conclusions"]] == ["new"]


def test_claims_are_settled_written_and_pending_ones_shown(study):
    study.settle("S0/dense/parameters", [5.526346], as_published=True)
    study.settle("S0/dense/macs", [1253.5], as_published=True)
    assert study.verdicts["S0/dense/macs"].shared == 0  # no arm was read on test images
    chosen = [get("S0/dense/parameters"), get("S0/dense/macs"), get("S0/dense/accuracy")]
    table = study.claims_table(chosen)
    assert table.verdict.tolist() == ["confirmed", "refuted", "pending"]
    stored = read_json(study.folder("results") / "claims.json")["verdicts"]
    assert [v["status"] for v in stored] == ["confirmed", "refuted"]
    assert "1 confirmed" in study.claims_summary(chosen) and len(read_rows(study.root, "tiny")) == 0


def test_a_notebook_says_of_directions_what_the_whole_study_says(study):
    gaps = {"pruned-off": [-0.8, -0.9, -1.0], "pruned-on": [-0.5, -0.6, -0.7], "trained-pruned": [-0.1, 0.1, 0.3]}
    for name, apart in gaps.items():
        study.settle(f"S3/{name}/accuracy", [55.0] * 3, as_published=False, differences=apart)
    assert study.verdicts["S3/pruned-off/accuracy"].status == "direction agrees"
    chosen = [get(claim) for claim in study.verdicts]
    assert set(study.claims_table(chosen).verdict) == {"direction unclear"}
    assert "3 direction unclear" in study.claims_summary(chosen)


def test_rows_settle_all_claims_that_are_selected(study):
    chosen = select(project="S2", model="baseline")
    counted = pd.DataFrame([{"arm": "S2/baseline", "seed": 0, "params": 9_751_306, "macs": 620e6, "as_published": True,
                             "changes": "", "accuracy_top1": 78.3}])  # fmt: skip
    study.settle_rows(counted, chosen)
    status = {v.claim.split("/")[2]: v.status for v in study.verdicts.values()}
    assert len(status) == len(chosen)
    assert (status["parameters"], status["macs"], status["accuracy"]) == ("confirmed",) * 3
    assert (status["power"], status["size"]) == ("no run behind it", "pending")
    timed = pd.DataFrame([{"arm": f"S2/{m}", "seed": s, "latency_ms": ms, "as_published": False, "changes": "dim 64"}
                          for m, ms in (("baseline", 2.0), ("pruned-40", 1.8)) for s in range(3)])  # fmt: skip
    study.settle_rows(timed, [get("S2/pruned-40/latency-change")], in_turns=True)
    assert study.verdicts["S2/pruned-40/latency-change"].status == "direction agrees"
