"""What a replication at another scale tells: differences, losses under a bound or none, statements; Holm over them."""

import pandas as pd
import pytest
from scipy import stats

from vitlab.study import noise
from vitlab.study.claims import get, load
from vitlab.study.directions import DIRECTIONS, direction
from vitlab.study.verdicts import controlled, settle, settled

DROP = "S3/pruned-alpha-1.2/accuracy-drop"
AGREES, OPPOSES, UNCLEAR = DIRECTIONS


def scaled(claim, values, **options):
    return settle(claim, values, as_published=False, **options)


@pytest.mark.parametrize(
    ("apart", "status"),
    [([3.0, 2.5, 3.5], 0), ([-3.0, -2.5, -3.5], 1), ([0.1, -0.2, 0.3], 2), ([3.0, 3.0], None)],
)
def test_a_replication_tells_a_direction_from_three_seeds_on(apart, status):
    verdict = scaled("S0/sparse/accuracy", [50.0] * len(apart), differences=apart)
    assert verdict.status == ("pending" if status is None else DIRECTIONS[status])
    assert ("95 %, n = 3" in verdict.reason) == (status is not None)
    published = settle("S0/sparse/accuracy", [53.3] * 3, as_published=True, differences=apart)
    assert published.status == "confirmed" and published.p is None


def test_a_loss_that_was_to_stay_under_a_point_is_held_against_that_point():
    assert {c.id for c in load() if c.under is not None} == {DROP} and get(DROP).under == 1
    cases = {(2.0, 2.2, 2.4): OPPOSES, (0.9, 1.1, 1.0): UNCLEAR, (-0.5, 0.0, 0.1): AGREES, (-3.0, -2.0, -2.5): AGREES}
    for values, status in cases.items():
        verdict = scaled(DROP, values)
        assert verdict.status == status and "stay under" in verdict.reason, values
    # Student's t at 12 degrees of freedom, 10 of them those of the noise of two runs
    error = ((10 * 2 * 0.5**2 + 2 * 0.2**2) / 12 / 3) ** 0.5
    assert scaled(DROP, [2.0, 2.2, 2.4]).p == pytest.approx(2 * stats.t.sf(1.2 / error, 12))


def test_a_difference_of_two_relative_figures_goes_its_way_or_not():
    assert scaled("S2/pruned-40-kd/accuracy-change", [-9.0, -9.5, -10.0]).status == OPPOSES
    assert scaled("S2/pruned-40/latency-change", [30.0, 40.0, 35.0]).status == OPPOSES
    assert scaled("S2/pruned-40/parameters-change", [-28.0] * 3).status == "pending"  # no news


def test_what_was_claimed_to_lose_nothing_agrees_where_a_loss_is_ruled_out():
    close = scaled("S3/baseline-on/accuracy", [55.0] * 3, differences=[0.1, -0.2, 0.05])
    assert close.status == AGREES and "a loss of 0.72 points is ruled out" in close.reason
    test = stats.ttest_1samp([0.1, -0.2, 0.05], -get("S3/baseline-on/accuracy").slack, alternative="greater")
    assert close.p == pytest.approx(test.pvalue) and close.p < 0.05
    gain = scaled("S3/baseline-on/accuracy", [55.0] * 3, differences=[4.0, 4.5, 5.0])
    assert gain.status == AGREES  # more than none is no loss
    for apart, status in (([-4.0, -4.5, -5.0], OPPOSES), ([0.0, 2.0, -2.0], UNCLEAR), ([-0.6, -0.7, -0.5], UNCLEAR)):
        assert scaled("S3/baseline-on/accuracy", [55.0] * 3, differences=apart).status == status


def test_what_differs_by_no_more_than_the_tolerance_was_claimed_to_be_alike():
    """70.65 beside 70.79: a clear loss speaks against it."""
    for apart, status in (([-4.0, -4.5, -5.0], OPPOSES), ([0.0, 0.1, -0.1], AGREES)):
        assert scaled("S3/pruned-on/accuracy", [55.0] * 3, differences=apart).status == status
    # 70.79 beside 71.68 was a loss
    assert scaled("S3/pruned-off/accuracy", [55.0] * 3, differences=[-4.0, -4.5, -5.0]).status == AGREES


def test_an_agreed_no_loss_survives_the_correction():
    row = {"claim": "S3/baseline-on/accuracy", "values": [55.0] * 3, "as_published": False,
           "differences": [0.02, -0.02, 0.01]}  # fmt: skip
    others = [{"claim": f"S3/{name}/accuracy", "values": [55.0] * 3, "as_published": False, "differences": apart}
              for name, apart in {"pruned-off": [0.0, 0.2, -0.2], "pruned-on": [0.5, -0.5, -0.9]}.items()]  # fmt: skip
    found = {v.claim: v for v in settled([({"verdicts": [row, *others]}, "", 0.0)])}
    assert found[row["claim"]].status == AGREES and found[row["claim"]].p < 0.01
    assert found["S3/pruned-off/accuracy"].status == UNCLEAR


def test_a_statement_is_told_by_its_margin_or_by_six_seeds():
    claim = "S1/favit/beats-plain-vit"
    for values, status in (([True] * 3, UNCLEAR), ([False] * 5, UNCLEAR), ([True] * 6, AGREES), ([False] * 6, OPPOSES),
                           ([True] * 5 + [False], UNCLEAR), ([True] * 2, "pending")):  # fmt: skip
        verdict = scaled(claim, values)
        assert verdict.status == status, values
        if len(values) > 2:
            assert verdict.p == pytest.approx(stats.binomtest(sum(values), len(values)).pvalue)
    for apart, status in (([3.0, 2.5, 3.5], AGREES), ([-3.0, -2.5, -3.5], OPPOSES), ([0.1, 0.2, 0.3], UNCLEAR)):
        verdict = scaled(claim, [v > 0 for v in apart], differences=apart)
        assert verdict.status == status and "points (95 %, n = 3)" in verdict.reason and verdict.p is not None
    # more accurate, but no seed has all that was stated
    assert scaled("S0/sparse/cheaper-and-better", [False] * 3, differences=[3.0, 2.5, 3.5]).status == UNCLEAR


def test_the_words_fit_what_was_measured():
    fast = scaled("S3/baseline-on/speed-up", [1.15, 1.16, 1.17], in_turns=True).reason
    assert fast.startswith("1.16 ± 0.0") and "x (95 %, n = 3)" in fast and "scaled down" not in fast
    assert scaled("S2/pruned-40/latency-change", [30.0, 40.0, 35.0]).reason.startswith("+35.00 ± ")
    assert scaled(DROP, [2.0, 2.2, 2.4]).reason.startswith("2.20 ± ")


def test_what_was_timed_in_turns_has_less_noise():
    changes = [-9.0, -10.0, -8.0]  # of a claimed -10.6 %
    apart, turns = (scaled("S2/pruned-40/latency-change", changes, in_turns=i) for i in (False, True))
    assert (apart.status, turns.status) == (UNCLEAR, AGREES)
    assert turns.margin == pytest.approx(apart.margin / 4, rel=0.2)
    again = settled([({"verdicts": [vars(turns)]}, "", 0.0)])[0]
    assert again == turns and again.in_turns
    for claim, values in ((DROP, [2.0, 2.2, 2.4]), ("S2/baseline/accuracy", [78.0])):  # it says nothing of accuracies
        assert scaled(claim, values, in_turns=True).margin == scaled(claim, values).margin


def test_one_difference_has_one_interval_everywhere():
    """By the seeds and by the test images, as in `noise.change`, which notebooks and README quote."""
    rows = pd.DataFrame([{"arm": arm, "seed": s, "accuracy_top1": 70.0 + 9 * (arm == "a") + s, "n": 10_000}
                         for arm in ("a", "b") for s in range(3)])  # fmt: skip
    shared, apart = noise.image_noise(rows), [9.0] * 3
    for claim, values in (("S1/favit/beats-plain-vit", [True] * 3), ("S0/sparse/accuracy", [80.0] * 3)):
        verdict = scaled(claim, values, differences=apart, shared=shared)
        assert noise.change(rows, "a", "b") in verdict.reason.replace(" (95 %, n = 3)", "")
        assert settled([({"verdicts": [vars(verdict)]}, "", 9.0)])[0] == verdict
        older = {k: v for k, v in vars(verdict).items() if k != "shared"}
        assert settled([({"verdicts": [older]}, "", shared)])[0].reason.endswith(verdict.reason)
    lost = scaled("S2/pruned-40/accuracy-change", [-9.0] * 3, shared=shared).reason  # in per cent of 78.33
    wider = 2**0.5 * 100 / 78.33
    margin = noise.interval([-9.0] * 3, 0.5 * wider, shared * wider)[2]
    assert lost.startswith(f"-9.00 ± {margin:.2f} %")
    fast = [scaled("S2/pruned-40/latency-change", [-9.0] * 3, shared=s).reason for s in (0.0, 5.0)]
    assert fast[0] == fast[1]


def test_what_is_never_judged_has_no_direction():
    memory = scaled("S2/pruned-40/memory-change", [-8.0])
    assert memory.status == "not testable here" and "seeds" not in memory.reason and "whole process" in memory.reason
    assert direction(get("S2/pruned-40/memory-change"), [-8.0] * 3) == (None, "", None)


def test_holm_over_the_directions_of_a_project():
    def gap(claim, points):
        return scaled(claim, [55.0] * 3, differences=[points - 0.1, points, points + 0.1])

    family = [gap("S3/pruned-off/accuracy", -0.9), gap("S3/trained-pruned/accuracy", -1.5)]
    assert family[0].p < 0.05 and [v.status for v in controlled(family)] == [AGREES] * 2
    three = [*family, gap("S3/pruned-on/accuracy", -0.6), gap("S0/sparse/accuracy", 0.9)]
    found = {v.claim: v for v in controlled(three)}
    assert found["S3/trained-pruned/accuracy"].status == found["S0/sparse/accuracy"].status == AGREES
    unclear = found["S3/pruned-off/accuracy"]
    assert unclear.status == unclear.direction == UNCLEAR and "3 comparisons (Holm)" in unclear.reason


def test_directions_without_a_run_behind_the_claim_are_corrected_too():
    ripple = scaled("S4/ripple/cifar100-accuracy", [15.0] * 3, differences=[0.9, 1.0, 0.8])
    assert ripple.status == "no run behind it" and ripple.reason.startswith(f"{AGREES}: +0.90 ± ") and ripple.p < 0.05
    others = [scaled(f"S4/{m}", [15.0] * 3, differences=[0.1, -0.1, 0.3])
              for m in ("hydra/cifar100-accuracy", "hydra/tiny-imagenet-accuracy")]  # fmt: skip
    told = controlled([ripple, *others])[0]
    assert told.status == "no run behind it" and told.reason.startswith(f"{UNCLEAR}: +0.90 ± ")
