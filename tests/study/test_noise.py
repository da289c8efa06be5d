"""The noise that verdicts and sentences allow for."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vitlab.metrics.statistics import packed
from vitlab.study.comparisons import compared
from vitlab.study.noise import change, changes, image_noise, interval, no_loss_p, p_value, paired_image_noise, run_noise


def test_run_noise_is_that_of_the_seed_and_of_the_images():
    rows = pd.DataFrame({"accuracy_top1": [40.0, 60.0], "n": [100, 100]})
    assert run_noise(rows) == pytest.approx((0.5**2 + 5**2) ** 0.5)


def test_a_change_is_paired_by_seed_and_says_when_it_is_unclear():
    """Against scipy's Student's t at 12 degrees of freedom: 10 of the prior's and 2 of three seeds."""
    accuracy = {"a": [82.0, 84.0, 83.0], "b": [80.0, 81.5, 81.5], "c": [81.9, 84.2, 82.7]}
    rows = pd.DataFrame(
        [
            {"arm": arm, "seed": seed, "accuracy_top1": v, "n": 10**9}
            for arm, values in accuracy.items()
            for seed, v in enumerate(values)
        ]
    )
    differences = pd.Series([2.0, 2.5, 1.5])
    error = ((10 * 2 * 0.5**2 + 2 * differences.var()) / 12 / 3) ** 0.5
    assert change(rows, "a", "b") == f"+2.00 ± {2.178813 * error:.2f} points"
    assert change(rows, "c", "a").endswith("points (unclear)")
    assert change(rows[rows.seed > 0], "a", "b").startswith("+2.00")


def test_changes_of_several_arms_share_their_error():
    """Student's t by scipy at 12 degrees of freedom (10 of the prior's, 2 of three seeds), then Holm by hand."""
    by_seed = pd.DataFrame({"whole": [60.0, 61.0, 62.0], "a": [58.0, 59.5, 59.5], "b": [60.1, 61.0, 61.9]})
    found = changes(by_seed, "whole", 0.5)
    error = ((10 * 2 * 0.5**2 + 2 * pd.Series([-2.0, -1.5, -2.5]).var()) / 12 / 3) ** 0.5
    assert list(found.index) == ["a", "b"] and found.change.tolist() == pytest.approx([-2.0, 0.0])
    assert found.high["a"] == pytest.approx(-2 + stats.t.ppf(0.975, 12) * error)
    assert found.low["a"] + found.high["a"] == pytest.approx(-4)
    assert found.p["a"] == pytest.approx(2 * 2 * stats.t.sf(2 / error, 12))
    assert found.p["b"] == 1.0
    assert changes(by_seed[:1], "whole", 0.5).change["a"] == -2.0  # one seed: the prior's noise alone


def test_more_seeds_do_not_lessen_what_the_test_images_leave_open():
    """30 seeds on 100 images: the images' own 5 points stay, by hand with scipy's t."""
    rows = pd.DataFrame([{"arm": arm, "seed": s, "accuracy_top1": 50.0 + 3 * (arm == "a"), "n": 100}
                         for arm in ("a", "b") for s in range(30)])  # fmt: skip
    images = image_noise(rows)
    assert images == pytest.approx(100 * (0.515 * 0.485 / 100) ** 0.5)
    seeds = (10 * 2 * 0.5**2 / 39 / 30) ** 0.5
    margin = stats.t.ppf(0.975, 39) * (seeds**2 + 2 * images**2) ** 0.5
    assert change(rows, "a", "b") == f"+3.00 ± {margin:.2f} points (unclear)"
    by_seed = rows.pivot(index="seed", columns="arm", values="accuracy_top1")
    one = changes(by_seed, "b", 0.5, shared=images).loc["a"]
    assert one.high == pytest.approx(3 + margin)
    assert one.p == pytest.approx(2 * stats.t.sf(3 * stats.t.ppf(0.975, 39) / margin, 39))
    assert interval([1.0], 0.5, 2.0)[2] > interval([1.0, 1.0, 1.0], 0.5, 2.0)[2] > stats.t.ppf(0.975, 12) * 2.0
    assert p_value([3.0] * 9, 0.5, 5.0) > 0.5 > p_value([3.0] * 9, 0.5)


def test_only_images_on_which_two_arms_disagree_leave_their_difference_open():
    """One seed: McNemar's variance, by hand; more: that of the images' mean differences. Independent runs agree with
    the binomial noise, the same run with itself has none."""
    draw = np.random.default_rng(0)
    a, b = draw.random((2, 3, 4000)) < 0.8
    b[0, :3600] = a[0, :3600]  # seed 0: alike on most images
    runs = [(arm, seed, right) for arm, of in (("a", a), ("b", b)) for seed, right in enumerate(of)]
    rows = pd.DataFrame([{"arm": arm, "seed": seed, "n": 4000, "accuracy_top1": 100 * right.mean(),
                          "right": packed(right)} for arm, seed, right in runs])  # fmt: skip
    first = rows[rows.seed == 0]
    up, down = (a[0] & ~b[0]).sum() / 4000, (b[0] & ~a[0]).sum() / 4000
    mcnemar = (up + down - (up - down) ** 2) / 4000
    assert paired_image_noise(first, "a", "b") == pytest.approx(100 * (mcnemar / 2) ** 0.5)
    assert paired_image_noise(rows[rows.seed == 1], "a", "b") == pytest.approx(image_noise(rows), rel=0.05)
    by_hand = (a.astype(float) - b).mean(0).std() / (2 * 4000) ** 0.5
    assert paired_image_noise(rows, "a", "b") == pytest.approx(100 * by_hand)
    assert paired_image_noise(rows, "a", "a") == 0
    untold = rows.assign(right=None)
    assert paired_image_noise(untold, "a", "b") == image_noise(untold)
    elsewhere = rows.assign(dataset=rows.arm)
    assert paired_image_noise(elsewhere, "a", "b") == image_noise(elsewhere)
    assert change(rows, "a", "b") == change(rows, "a", "b", paired_image_noise(rows, "a", "b"))
    assert compared(rows, {"x": ("a", "b"), "y": ("b", "a")}).p["x"] == compared(rows, {"y": ("a", "b")}).p["y"] * 2

def test_no_loss_by_the_spread_of_paired_differences():
    """Against scipy's one-sided t-test."""
    apart = [0.1, -0.2, 0.05]
    assert no_loss_p(apart, 0.7) == pytest.approx(stats.ttest_1samp(apart, -0.7, alternative="greater").pvalue)
    assert no_loss_p([0.0] * 3, 0.7) == 0.0 and no_loss_p([-0.8] * 3, 0.7) == no_loss_p([0.0], 0.7) == 1.0
