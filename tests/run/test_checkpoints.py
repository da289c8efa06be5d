"""`train` makes any kind of model that stands by itself (test_export.py: every command takes every kind)."""

import pytest

from vitlab import cli
from vitlab.models import checkpoint


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
