"""Arms held against each other, by numbers worked out otherwise."""

import pandas as pd
import pytest

from vitlab.models.vit import ViTConfig
from vitlab.study import noise
from vitlab.study.comparisons import compared, in_turns, ordered


def rows(accuracies, n=10_000, column="accuracy_top1"):
    return pd.DataFrame([{"arm": arm, "seed": seed, column: value, "n": n}
                         for arm, values in accuracies.items() for seed, value in enumerate(values)])  # fmt: skip


ARMS = {"a": [80.0, 81.0, 82.0], "b": [81.8, 82.8, 83.8], "c": [80.3, 81.1, 82.2], "d": [10.0, 10.0, 10.0]}


def test_a_pair_is_the_change_of_the_same_two_arms_and_shares_its_error_with_the_others():
    several = rows({k: ARMS[k] for k in "abc"})
    found = compared(several, {"better": ("b", "a")})
    alone = noise.change(several, "b", "a")
    assert found.text["better"] == alone and not alone.endswith("(unclear)")
    many = compared(several, {"better": ("b", "a"), **{f"pair {i}": ("c", "a") for i in range(30)}})
    assert many.change["better"] == found.change["better"] == pytest.approx(1.8)
    assert many.p["better"] == pytest.approx(31 * found.p["better"], rel=0.1)
    assert many.text["better"].endswith("(unclear)"), "31 comparisons: what one alone would show is no proof"


def test_accuracies_on_validation_have_the_noise_of_so_many_images():
    by_validation = rows(ARMS, column="val_accuracy").drop(columns="n")
    few, all_of_them = (compared(by_validation, {"x": ("b", "a")}, "val_accuracy", images=n) for n in (500, 10_000))
    assert few.high["x"] - few.low["x"] > 2 * (all_of_them.high["x"] - all_of_them.low["x"])


def test_seeds_that_only_one_arm_has_are_left_out():
    partly = rows(ARMS).query("arm != 'b' or seed < 2")
    assert compared(partly, {"x": ("b", "a")}).change["x"] == pytest.approx(1.8)


def test_an_order_is_told_by_the_step_that_holds_least():
    held, step, shared = ordered(rows(ARMS), ("b", "c", "a"))
    assert shared == noise.image_noise(rows(ARMS))
    assert held == [True, True, True] and step == pytest.approx([0.3, 0.1, 0.2])  # c over a, not b over c
    held, step, _ = ordered(rows(ARMS), ("b", "a"), ("d", "c"))
    assert held == [False] * 3 and step == pytest.approx([-70.3, -71.1, -72.2])
    partly = rows(ARMS).query("arm != 'b' or seed < 2")
    assert ordered(partly, ("b", "a"))[1] == pytest.approx([1.8, 1.8])


@pytest.mark.alone
def test_models_are_timed_in_turns_in_each_round():
    small, large = (ViTConfig(image_size=16, patch_size=8, dim=32, depth=d, heads=2).build() for d in (1, 24))
    found = in_turns({"small": small, "large": large}, 2, 0.0, rounds=2)
    assert list(found) == ["small", "large"] and len(found) == 2 and (found.large > found.small).all()
