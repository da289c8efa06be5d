"""The published models and ours, scaled: what changes, what does not."""


import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml

from vitlab.compress.pruning.gates import GatedConfig
from vitlab.metrics import measure
from vitlab.models.resnet import ResNetConfig
from vitlab.models.vit import ViT
from vitlab.study import zoo

ROOT = Path(__file__).parents[2]


def test_changes_are_listed_against_the_published_and_unknown_ones_refused():
    spec = zoo.scaled("S0/dense", {"dataset": "tiny", "dim": 24, "heads": 2})
    assert zoo.scaled("S0/dense").changes == ()
    assert zoo.scaled("S0/dense", {"epochs": 3, "dim": 192, "compile": "on"}).changes == ()
    assert "dim 24 instead of 192" in spec.why and "tiny instead of cifar10" in spec.why
    assert spec.config.mlp_dim == 96  # four times the width, as published
    assert zoo.scaled("S2/baseline", {"dim": 64}).config.mlp_dim == 64
    assert (zoo.scaled("S0/dense").name, spec.name) == ("S0/dense", "S0/dense-small")
    assert zoo.scaled("S0/dense", {"depth": 13}).name == "S0/dense-large" and "scaled down" in spec.title
    assert zoo.scaled("ours", {"drop_path": 0.0, "epochs": 2}).name == "ours"  # as large as before
    names = [zoo.scaled("ours", {"dim": dim, "depth": depth}).name for dim, depth in ((128, 5), (64, 4))]
    assert names == ["ours-small", "ours-tiny"]  # notebook 01's on a laptop, and that of 02, 03 and 06
    named = pd.Series([*names, "ours-tiny/uncut", "S2/tiny-kd-small", "S4/ripple-small on tiny-imagenet", "S2/tiny"])
    assert named.str.replace(zoo.STAND_IN, "", regex=True).tolist() == [
        "ours", "ours", "ours/uncut", "S2/tiny-kd", "S4/ripple on tiny-imagenet", "S2/tiny"]  # fmt: skip
    with pytest.raises(ValueError, match="has no wings"):
        zoo.scaled("S0/dense", {"wings": 2})
    with pytest.raises(ValueError, match="unknown model 'S9'"):
        zoo.scaled("S9")


def test_our_baseline_keeps_to_its_budget():
    config = zoo.get("ours").config
    with torch.device("meta"):
        parameters = sum(p.numel() for p in ViT(config).parameters())
    assert 3e6 <= parameters <= 5e6 and config.macs() <= 0.4e9


def test_a_model_of_any_kind_can_be_scaled_by_its_own_fields(monkeypatch):
    cnn = dataclasses.replace(zoo.get("ours"), name="cnn", config=ResNetConfig(widths=(8, 16, 16, 16)))
    monkeypatch.setitem(zoo.SPECS, "cnn", cnn)
    spec = zoo.scaled("cnn", {"widths": (4, 8, 8, 8), "epochs": 2})
    assert spec.config.widths == (4, 8, 8, 8) and "widths (4, 8, 8, 8) instead of (8" in spec.why
    with pytest.raises(ValueError, match=r"cnn has no dim; its fields: .*widths"):
        zoo.scaled("cnn", {"dim": 8})


def test_the_number_of_classes_is_the_datas_also_within_a_wrapper():
    gated = dataclasses.replace(zoo.get("ours"), config=GatedConfig(base=zoo.get("ours").config))
    for spec in (zoo.get("ours"), gated):
        fitted = zoo.fitted(spec, SimpleNamespace(num_classes=7))
        assert fitted.config.num_classes == 7 and fitted.changes == ()


def test_our_model_of_the_laptop_keeps_to_its_size_and_is_a_transformer():
    changes = yaml.safe_load((ROOT / "presets" / "cpu.yaml").read_text())["01_baseline"]["changes"]["ours"]
    model = zoo.scaled("ours", changes).config.build().eval()
    parts = measure.macs_by_part(model, (3, 32, 32))
    assert measure.parameters(model) <= 1e6 and sum(parts.values()) <= 80e6
    stem = parts.get("stem", 0) + parts.get("head", 0) + parts.get("other", 0)
    assert sum(parts.values()) - stem > sum(parts.values()) / 2, "attention and MLP are more than half of the work"
