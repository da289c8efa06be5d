"""Fit-or-load, rows, figures, claims and the README's computed parts."""

import copy
import dataclasses
import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vitlab import plots, readme, zoo
from vitlab.claims import get
from vitlab.files import plain, read_json
from vitlab.models import explain, vit
from vitlab.models.vit import ViT, ViTConfig
from vitlab.notebooks import project
from vitlab.recipe import LATER
from vitlab.study import DEMO, Study, arm_key, read_rows
from vitlab.train import BudgetSpent, cross_entropy

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


def test_the_key_tells_apart_whatever_changes_the_result_and_nothing_else(study, spec):
    data = study.data("tiny")
    key = study.arm(spec, data).key
    slower = dataclasses.replace(spec, recipe=dataclasses.replace(spec.recipe, dtype="float32"))
    assert study.arm(slower, data).key == key
    muon = dataclasses.replace(spec.recipe, optimizer="muon", rest_lr=1e-3)
    others = [
        study.arm(spec, data, seed=1).key,
        study.arm(dataclasses.replace(spec, recipe=muon), data).key,
        study.arm(dataclasses.replace(spec, recipe=dataclasses.replace(muon, rest_lr=2e-3)), data).key,
        study.arm(dataclasses.replace(spec, recipe=dataclasses.replace(spec.recipe, lr=5e-4)), data).key,
        study.arm(dataclasses.replace(spec, config=dataclasses.replace(spec.config, depth=1)), data).key,
        study.arm(spec, dataclasses.replace(data, key="another")).key,
        study.arm(spec, data, objective=lambda m, b: cross_entropy(m, b), variant="mine").key,
    ]
    assert len({key, *others}) == 8


def test_a_field_that_came_later_leaves_the_keys_of_the_arms_before_it():
    """At its default it is as if it were not there: the committed demo's recipe was written without it."""
    recipe, config = plain(zoo.get("S3/baseline").recipe), zoo.get("S3/baseline").config
    without = {k: v for k, v in recipe.items() if k not in LATER}
    assert set(LATER) < set(recipe) and set(read_json(DEMO / "ours-cifar10.json")["recipe"]) <= set(without)
    assert arm_key(config, recipe, "d") == arm_key(config, without, "d")
    assert arm_key(config, recipe | {"rest_lr": 1.0}, "d") != arm_key(config, without, "d")


def test_an_objective_of_ones_own_must_be_named_in_the_key(study, spec):
    with pytest.raises(ValueError, match="needs a `variant`"):
        study.arm(spec, study.data("tiny"), objective=lambda m, b: cross_entropy(m, b))


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
    vit.save(copy.deepcopy(first.model).half(), kept / "small.safetensors")
    described = read_json(study.root / "checkpoints" / "tiny" / f"{first.key}.json")
    (kept / "small.json").write_text(json.dumps(described | {"key": first.key}))
    monkeypatch.setattr("vitlab.study.DEMO", kept)
    other = Study("01_baseline", "cpu", device="cpu", root=tmp_path / "new", log=study.lines.append)
    found = other.arm(spec, data)
    assert "comes with the project" in study.lines[-1] and found.key == first.key
    assert all(torch.equal(a.half().float(), b) for a, b in
               zip(first.model.state_dict().values(), found.model.state_dict().values()))  # fmt: skip
    monkeypatch.setenv("VITLAB_FRESH", "1")
    Study("01_baseline", "cpu", device="cpu", root=tmp_path / "new", log=study.lines.append).arm(spec, data)
    assert "epoch 1/1" in study.lines[-1], "--fresh trains it here"


@pytest.mark.parametrize("described", sorted(DEMO.glob("*.json")), ids=lambda p: p.stem)
def test_a_described_demo_is_the_arm_that_its_key_says(described):
    about = read_json(described)
    recipe = about["recipe"] | {"seed": about["seed"]}
    assert arm_key(ViTConfig(**about["config"]), recipe, about["data"], about["variant"]) == about["key"]
    model = vit.load(described.with_suffix(".safetensors"))
    assert model.config == ViTConfig(**about["config"]) and about["history"][-1]["epoch"] == recipe["epochs"]


def test_weights_without_their_description_are_not_an_arm(study, spec):
    data = study.data("tiny")
    arm = study.arm(spec, data)
    (study.root / "checkpoints" / "tiny" / f"{arm.key}.json").unlink()
    study.arm(spec, data)
    assert "training" in study.lines[-2]


def test_a_run_out_of_time_goes_on_from_its_state(study, spec, monkeypatch):
    data = study.data("tiny")
    longer = dataclasses.replace(spec, recipe=dataclasses.replace(spec.recipe, epochs=2))
    whole = study.arm(longer, data, seed=1).model.head.bias

    def spend(epoch, *_):
        if epoch == 0:
            monkeypatch.setenv("VITLAB_DEADLINE", "1")

    with pytest.raises(BudgetSpent):
        study.arm(longer, data, seed=2, on_epoch=[spend], variant="x")
    monkeypatch.delenv("VITLAB_DEADLINE")
    arm = study.arm(longer, data, seed=2, on_epoch=[lambda *_: None], variant="x")
    assert arm.history.resumed == 1 and len(arm.history) == 2 and not torch.equal(arm.model.head.bias, whole)


def test_rows_are_written_with_provenance_and_read_back(study, spec):
    data = study.data("tiny")
    arm = study.arm(spec, data)
    row = study.row(arm, data, seconds=0.02, batch=8, note="mine")
    stored = read_json(study.folder("results") / "S0-dense-tiny-s0.json")
    assert json.loads(json.dumps(row)).items() <= stored.items()
    assert {"commit", "dirty", "versions", "device", "finished"} <= stored.keys()
    assert stored["params"] == sum(p.numel() for p in arm.model.parameters())
    assert stored["macs"] == vit.macs(arm.model.config)
    assert stored["as_published"] is False and "epochs 1 instead of 3" in stored["changes"]
    frame = read_rows(study.root, "tiny")
    assert len(frame) == 1 and frame.accuracy_top1[0] == row["accuracy_top1"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    images = (data.test.images.float() / 255 - mean) / std
    by_hand = (arm.model(images).argmax(1) == data.test.labels).float().mean() * 100
    assert row["accuracy_top1"] == pytest.approx(by_hand.item())


def test_claims_are_settled_written_and_pending_ones_shown(study):
    study.settle("S0/dense/parameters", [5.526346], as_published=True)
    study.settle("S0/dense/macs", [1253.5], as_published=True)
    chosen = [get("S0/dense/parameters"), get("S0/dense/macs"), get("S0/dense/accuracy")]
    table = study.claims_table(chosen)
    assert table.verdict.tolist() == ["confirmed", "refuted", "pending"]
    stored = read_json(study.folder("results") / "claims.json")["verdicts"]
    assert [v["status"] for v in stored] == ["confirmed", "refuted"]
    assert "1 confirmed" in study.claims_summary(chosen) and len(read_rows(study.root, "tiny")) == 0


def test_changes_are_listed_against_the_published_and_unknown_ones_refused(spec):
    assert zoo.scaled("S0/dense").changes == ()
    assert zoo.scaled("S0/dense", {"epochs": 3, "dim": 192, "compile": "on"}).changes == ()
    assert "dim 24 instead of 192" in spec.why and "tiny instead of cifar10" in spec.why
    assert spec.config.mlp_dim == 96  # four times the width, as published
    assert zoo.scaled("S2/baseline", {"dim": 64}).config.mlp_dim == 64
    with pytest.raises(ValueError, match="has no wings"):
        zoo.scaled("S0/dense", {"wings": 2})
    with pytest.raises(ValueError, match="unknown model 'S9'"):
        zoo.scaled("S9")


def test_our_baseline_keeps_to_its_budget():
    config = zoo.get("ours").config
    with torch.device("meta"):
        parameters = sum(p.numel() for p in ViT(config).parameters())
    assert 3e6 <= parameters <= 5e6 and vit.macs(config) <= 0.4e9


def test_rollout_of_uniform_and_identical_attention_is_known():
    uniform = torch.full((1, 2, 4, 4), 0.25)
    expected = 0.5 * torch.eye(4) + 0.125  # one block: half residual, half 1 / 4
    torch.testing.assert_close(explain.rollout([uniform])[0], expected)
    torch.testing.assert_close(explain.rollout([uniform, uniform])[0], expected @ expected)
    stay = torch.eye(4).expand(1, 3, 4, 4)
    torch.testing.assert_close(explain.rollout([stay] * 5)[0], torch.eye(4))
    with pytest.raises(ValueError, match="every block"):
        explain.rollout([uniform, None])


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_looks_gives_grids_of_the_right_patches(pool):
    config = ViTConfig(image_size=16, patch_size=4, dim=16, depth=2, heads=2, pool=pool)
    maps = explain.looks(ViT(config), torch.randn(3, 3, 16, 16))
    for grid in maps.values():
        assert grid.shape == (3, 4, 4)
        assert grid.amin((1, 2)).eq(0).all() and torch.allclose(grid.amax((1, 2)), torch.ones(3))
    attention = torch.zeros(1, 17, 17) if pool == "cls" else torch.zeros(1, 16, 16)
    attention[:, 0 if pool == "cls" else slice(None), 6 if pool == "cls" else 5] = 1  # patch 5: row 1, column 1
    assert explain.to_grid(attention, config)[0].nonzero().tolist() == [[1, 1]]


def test_figures_are_written_as_png_and_pdf_and_look_like_figures(tmp_path):
    plots.theme()
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    frame = pd.DataFrame(np.random.default_rng(0).random((4, 3)), index=list("abcd"), columns=list("xyz"))
    rows = pd.DataFrame({"arm": ["a", "a", "b"], "macs": [1e6, 1e6, 5e6], "latency_ms": [1.0, 1.1, 2.0],
                         "accuracy_top1": [50.0, 52.0, 60.0]})  # fmt: skip
    made = {
        "pictures": plots.pictures(images, columns=3, rows=["one", "two"]),
        "patches": plots.patches(images[0], 4),
        "tradeoff": plots.tradeoff(rows),
        "bars": plots.bars(frame, unit="u"),
        "heatmap": plots.heatmap(frame, label="l"),
        "confusion": plots.confusion([[3, 1], [0, 4]], ["cat", "dog"]),
        "per_class": plots.per_class({"a": [50.0] * 40, "b": [60.0] * 40}, [str(i) for i in range(40)]),
        "attention": plots.attention(images[:2], {"last": torch.rand(2, 4, 4)}, ["cat", "dog"]),
    }
    for name, figure in made.items():
        plots.save(figure, tmp_path / "figures" / name)
        png = np.asarray(Image.open(tmp_path / "figures" / f"{name}.png").convert("L"))
        assert png.std() > 5, f"{name} is blank"
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert len(list((tmp_path / "figures").iterdir())) == 2 * len(made)
    matplotlib.pyplot.close("all")


def test_no_two_of_many_arms_look_the_same():
    look = plots.colours(str(i) for i in range(25))
    assert len(set(look.values())) == 25 and look["3"] == plots.colours(map(str, range(5)))["3"]


def test_confusion_rows_are_percentages_of_the_truth():
    figure = plots.confusion([[3, 1], [0, 4]], ["cat", "dog"])
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert texts == ["75", "25", "0", "100"]
    matplotlib.pyplot.close("all")


def test_the_table_has_mean_and_deviation_over_seeds_and_says_what_was_not_measured():
    rows = pd.DataFrame({"arm": ["a", "a", "b"], "accuracy_top1": [70.0, 72.0, 80.0], "power_w": [None] * 3})
    table = plots.table(rows, ["accuracy_top1", "power_w"])
    assert table.loc["a", "Accuracy (%)"] == "71.00 ± 1.41"
    assert table.loc["b", "Accuracy (%)"] == "80.00"
    assert set(table["Power (W)"]) == {"not measured"} and table.seeds.tolist() == [2, 1]


def test_readme_parts_are_filled_between_their_markers_only():
    text = "a\n<!-- results -->\nold\n<!-- /results -->\nb\n<!-- status -->\n<!-- /status -->\n"
    filled = readme.fill(text, {"results": "new\n", "status": "ran\n"})
    assert filled == "a\n<!-- results -->\nnew\n<!-- /results -->\nb\n<!-- status -->\nran\n<!-- /status -->\n"
    with pytest.raises(ValueError, match="0 pairs of <!-- status -->"):
        readme.fill(text.replace("<!-- status -->", ""), {"status": ""})


def test_the_readme_says_what_the_committed_rows_say():
    assert not readme.stale(project().source), "README.md is stale: run `vitlab readme`"
