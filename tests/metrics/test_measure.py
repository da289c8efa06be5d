"""The row: every column, what was not measured, and what is refused."""

import json
import math
import types

import pytest
import torch
from metrics_cases import PIXELS, random_split, small_timm, vit_macs
from torch import nn

from vitlab.metrics import measure
from vitlab.metrics.measure import accuracy


def test_the_row_has_every_column_and_says_what_was_not_measured():
    split = random_split(20, 10, size=16)
    data = types.SimpleNamespace(test=split, num_classes=10, **PIXELS)
    model = small_timm(img_size=16, embed_dim=48, depth=1, num_classes=10)
    row = measure.measure(model, data, batch=8, seconds=0.05)
    assert list(row)[: len(measure.COLUMNS)] == list(measure.COLUMNS)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    found = accuracy(model, split, **PIXELS, num_classes=10)
    assert (row["accuracy_top1"], row["accuracy_top5"], row["n"]) == (found.top1, found.top5, 20)
    assert row["params"] == sum(p.numel() for p in model.parameters())
    assert row["macs"] == vit_macs(17, 48, 1, 192, 10, stem=16 * 48 * 48)
    assert row["size_mb"] == pytest.approx(row["params"] * 4e-6, rel=0.05)
    assert row["latency_ms_q25"] <= row["latency_ms"] <= row["latency_ms_q75"]
    assert row["peak_mb"] > row["activations_mb"] > 8 * 17 * 192 * 4e-6
    assert (row["dtype"], row["shape"], row["batch"]) == ("float32", [3, 16, 16], 8)
    if not torch.cuda.is_available():
        assert set(row["not_measured"]) == {"power_w", "idle_power_w", "mj_per_image"}
        assert measure.show(row["power_w"], "power_w", unit=True) == "not measured"
    blind = measure.measure(model, shape=(3, 16, 16), batch=2, seconds=0.01, dtype=torch.bfloat16)
    assert (blind["accuracy_top1"], blind["n"], blind["dtype"]) == (None, None, "bfloat16")
    with pytest.raises(ValueError, match="shape"):
        measure.measure(model)


@pytest.mark.parametrize(
    "options, says",
    [({"batch": 0}, "batch=0"), ({"batch": 2.5}, "batch=2.5"), ({"seconds": 0}, "seconds=0"),
     ({"seconds": math.nan}, "seconds=nan"), ({"seconds": -1}, "seconds=-1")],
)  # fmt: skip
def test_nonsense_is_not_measured(options, says):
    with pytest.raises(ValueError, match=says):
        measure.measure(nn.Flatten(), shape=(3, 8, 8), **options)


def test_show():
    assert measure.show(9_750_000, "params") == "9.75"
    assert measure.show(9_750_000, "params", unit=True) == "9.75 M"
    assert measure.show(1234.56, "images_per_s", unit=True) == "1,234.6 images/s"
    assert measure.show(0.0123, "ece", unit=True) == "1.23 %"
    assert measure.show(None, "params", unit=True) == "not measured"
    with pytest.raises(ValueError, match="accuracy_top1"):
        measure.show(1, "accuracy")
