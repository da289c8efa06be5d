"""Intervals and tests of differences, against scipy's and against formulas worked out by hand."""

import math

import pytest
import torch
from scipy import stats

from vitlab.metrics.predict import kl_divergence
from vitlab.metrics.statistics import (
    Difference,
    holm,
    paired_difference,
    paired_seeds,
    seed_difference,
    t_interval,
)


def pair(both, only_a, only_b, neither):
    """Two runs' hits and misses with these counts."""
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return torch.tensor(a), torch.tensor(b)


def test_kl_divergence_is_scipys():
    draw = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(50, 7, generator=draw) for _ in range(2))
    expected = stats.entropy(reference.softmax(1).double(), logits.softmax(1).double(), axis=1).mean()
    assert kl_divergence(logits, reference).item() == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(logits, logits + 3).item() == pytest.approx(0, abs=1e-6), "a constant changes no prediction"


COUNTS = [(800, 60, 30, 110), (10, 3, 3, 4), (9000, 210, 260, 530), (5, 0, 0, 5), (0, 4, 0, 0)]


@pytest.mark.parametrize("counts", COUNTS)
def test_a_paired_difference_is_mcnemars(counts):
    found = paired_difference(*pair(*counts))
    _, only_a, only_b, _ = counts
    assert found.points == pytest.approx(100 * (only_a - only_b) / sum(counts))
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert found.p == pytest.approx(expected, rel=1e-9)
    a, b, c, d = (x + 0.5 for x in counts)
    n = a + b + c + d
    half = stats.norm.ppf(0.975) * math.sqrt((b + c) - (b - c) ** 2 / n) / n
    assert (found.low, found.high) == pytest.approx((100 * ((b - c) / n - half), 100 * ((b - c) / n + half)))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw, truth, inside = torch.Generator().manual_seed(1), 2.0, 0
    for _ in range(400):
        u = torch.rand(500, generator=draw)
        found = paired_difference(u < 0.84, (u >= 0.04) & (u < 0.86))  # disagree on 4 % and 2 % of the images
        inside += found.low <= truth <= found.high
    assert 0.92 <= inside / 400 <= 0.98


def test_a_difference_is_clear_outside_its_interval_only():
    assert Difference(1, 0.2, 1.8, 0.01).clear and Difference(-1, -1.8, -0.2, 0.01).clear
    assert not Difference(1, -0.2, 2.2, 0.1).clear
    one, other = paired_difference(*pair(800, 60, 30, 110)), paired_difference(*pair(800, 30, 60, 110))
    assert one.clear and one.points == -other.points and one.low == pytest.approx(-other.high)


def test_intervals_over_seeds_are_scipys():
    a, b = [90.1, 91.4, 90.8], [89.9, 90.2, 90.5]
    mean, half = t_interval(a)
    assert (mean - half, mean + half) == pytest.approx(stats.t.interval(0.95, 2, sum(a) / 3, stats.sem(a)))
    found, expected = seed_difference(a, b), stats.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert seed_difference([1, 2], [1, 2]).p == 1 and seed_difference([2, 3], [1, 2]).p == 0


def test_seeds_on_the_same_images_cover_the_truth_as_often_as_they_say():
    """Two methods that are alike but for chance: of the images, of the seeds, and of each seed on each image."""
    draw, inside = torch.Generator().manual_seed(2), {0.02: 0, 0.2: 0}
    for spread in inside:
        for _ in range(300):
            hard, taste = torch.randn(400, generator=draw), 0.3 * torch.randn(2, 400, generator=draw)
            seeds, own = spread * torch.randn(2, 3, 1, generator=draw), 0.3 * torch.randn(2, 3, 400, generator=draw)
            found = paired_seeds(*(hard + taste[:, None] + seeds + own > -1))
            inside[spread] += found.low <= 0 <= found.high
    assert all(0.93 <= n / 300 <= 0.995 for n in inside.values()), inside


def test_images_count_where_the_seeds_agree():
    """Three equal changes are no proof, and 10,000 images with seeds that differ little are one."""
    a, b = pair(8000, 60, 30, 1910)
    same, one = paired_seeds([a] * 3, [b] * 3), paired_difference(a, b)
    assert (same.points, same.low, same.high) == pytest.approx((one.points, one.low, one.high), abs=0.01)
    assert same.p == pytest.approx(one.p, abs=0.002)
    shifted = [pair(8000, 60 + k, 30, 1910 - k) for k in (-3, 0, 3)]
    found = paired_seeds(*zip(*shifted))
    over_seeds = seed_difference(*([100 * r.double().mean().item() for r in each] for each in zip(*shifted)))
    assert found.clear and found.low < over_seeds.low < found.points < over_seeds.high < found.high
    alike = paired_seeds([a] * 3, [a] * 3)
    assert alike.p == 1 and alike.low < 0 < alike.high


def test_holm_worked_out_by_hand():
    # sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1, never falling
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([0.04]) == [0.04] and holm([]) == []


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="same images for both, not 2 and 3"):
        paired_difference([True, False], [True, False, True])
    for one, other in (([[True]], [[True]]), ([[True, False]] * 2, [[True]] * 2)):
        with pytest.raises(ValueError, match="two seeds or more on the same images"):
            paired_seeds(one, other)
    with pytest.raises(ValueError, match="at least two, not 1"):
        t_interval([90.0])
