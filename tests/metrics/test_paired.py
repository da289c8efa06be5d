"""Paired differences against scipy and the published formula."""

import math

import numpy as np
import pytest
import torch

from vitlab.metrics.paired import paired_difference


def drawn(n=400, seed=0, rates=(0.8, 0.7)):
    rng = np.random.default_rng(seed)
    hard = rng.random(n)
    return [torch.tensor(hard + 0.3 * rng.random(n) < rate) for rate in rates]


def test_the_test_is_mcnemars():
    stats = pytest.importorskip("scipy.stats")
    for seed in range(5):
        a, b = drawn(seed=seed)
        more, less = int((a & ~b).sum()), int((b & ~a).sum())
        found = paired_difference(a, b)
        assert found.p == pytest.approx(stats.binomtest(more, more + less).pvalue)
        assert found.change == pytest.approx(100 * (a.double().mean() - b.double().mean()).item())
        assert found.differs == (found.low > 0 or found.high < 0)


def test_the_interval_is_agresti_and_mins_and_close_to_the_bootstrap():
    stats = pytest.importorskip("scipy.stats")
    a, b = drawn(n=500)
    found = paired_difference(a, b)
    n, more, less = len(a) + 2, int((a & ~b).sum()) + 0.5, int((b & ~a).sum()) + 0.5
    half = 1.959964 * math.sqrt(more + less - (more - less) ** 2 / n) / n
    assert (found.low, found.high) == pytest.approx((100 * ((more - less) / n - half), 100 * ((more - less) / n + half)))
    boot = stats.bootstrap(((a.double() - b.double()).numpy(),), np.mean, method="percentile", rng=0)
    interval = boot.confidence_interval
    assert (found.low, found.high) == pytest.approx((100 * interval.low, 100 * interval.high), abs=0.3)


def test_equal_models_do_not_differ_and_seeds_are_averaged():
    a, b = drawn()
    same = paired_difference(a, a)
    assert same.change == 0 and same.p == 1 and same.low < 0 < same.high and not same.differs
    twice = paired_difference(torch.stack([a, a]), torch.stack([b, b]))
    once = paired_difference(a, b)
    assert (twice.change, twice.low, twice.high) == pytest.approx((once.change, once.low, once.high))
    other = paired_difference(torch.stack([a, b]), torch.stack([b, a]))
    assert other.change == 0 and other.p == pytest.approx(1)
    assert str(once).startswith(f"{once.change:+.2f} points (95 %: ")
    for wrong in ((a, b[:-1]), (a[None, None], b[None, None]), (a[:0], b[:0])):
        with pytest.raises(ValueError, match="of the same images are needed"):
            paired_difference(*wrong)

