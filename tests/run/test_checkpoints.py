"""Every command takes every kind of model that the package writes, and `train` makes any that stands by itself."""

import json

import pytest

import vitlab
from vitlab import cli
from vitlab.compress.pruning.gates import GatedViT
from vitlab.models import checkpoint
from vitlab.models.resnet import ResNetConfig
from vitlab.models.timm import TimmConfig


def kinds(folder):
    """A file of every kind of model that the package writes, of 10 classes."""
    config = vitlab.ViTConfig(image_size=32, patch_size=8, dim=32, depth=2, heads=2)
    dense = config.build()
    models = {
        "dense": dense, "gated": GatedViT(dense), "reduced": vitlab.reduce_tokens(dense, r_max=0.5),
        "slim": vitlab.prune(dense, criterion="magnitude", ratio=0.5),
        "cnn": ResNetConfig(widths=(4, 8), residual=()).build(),
        "timm": TimmConfig(name="vit_tiny_patch16_224", num_classes=10, options={"img_size": 32, "depth": 1}).build(),
    }  # fmt: skip
    models["slim and reduced"] = vitlab.reduce_tokens(models["slim"], r_max=0.5)
    for name, model in models.items():
        vitlab.save(model, folder / f"{name}.safetensors")
    return models


def test_commands_take_every_kind_of_model(tmp_path):
    for name, model in kinds(tmp_path).items():
        file, out = str(tmp_path / f"{name}.safetensors"), tmp_path / name
        assert cli.main(["evaluate", "--checkpoint", file, "--dataset", "tiny", "--out", str(out)]) == 0, name
        quick = ["--batch-size", "2", "--seconds", "0.001"]
        row = ["measure", "--checkpoint", file, "--out", str(out / "row.json"), *quick]
        assert cli.main(row) == 0, name
        found = json.loads((out / "row.json").read_text())
        assert found["params"] == sum(p.numel() for p in model.parameters()), name


@pytest.mark.parametrize("given", [
    ["resnet", "--widths", "[4, 8]", "--residual", "[1]"],
    ["timm:vit_tiny_patch16_224", "--options", "{'img_size': 32, 'depth': 1}"],
], ids=lambda g: g[0])  # fmt: skip
def test_train_takes_other_models(given, tmp_path):
    path = tmp_path / "model.safetensors"
    recipe = ["--epochs", "1", "--batch", "250", "--optimizer", "sgd", "--lr", "1e-2", "--mixup", "0"]
    where = ["--dataset", "tiny", "--device", "cpu", "--checkpoint", str(path)]
    assert cli.main(["train", "--model", *given, *recipe, *where]) == 0
    stored = checkpoint.read(path)
    assert stored.config.kind == given[0].split(":")[0] and stored.config.num_classes == 10
    assert stored.about["recipe"]["optimizer"] == "sgd" and stored.about["recipe"]["lr"] == 0.01
