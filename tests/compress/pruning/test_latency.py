"""The table of latencies against a cost that is known to add up."""

import pytest

from vitlab.compress.pruning.latency import LatencyTable, timed
from vitlab.compress.pruning.shape import narrow
from vitlab.compress.pruning.structured import shape_of
from vitlab.models.vit import ViTConfig

from .cases import ours, random_masks


def test_latency_table_adds_up_what_was_measured():
    shape = shape_of(ours("cls"))
    cost = lambda c: 1.0 + sum(0.5 + b.qk / 10 + b.v / 10 + b.hidden / 50 for b in c.shapes)  # noqa: E731
    table = LatencyTable(shape, points=3, measure=cost)
    assert isinstance(shape, ViTConfig) and table(shape) == pytest.approx(cost(shape))
    left = narrow(shape, random_masks(ours("cls")))
    assert table(left) == pytest.approx(cost(left))
    assert timed(left, batch=2, seconds=0.01) > 0
