"""Properties of the rules: what must hold for any measurement, and what is told without one."""

import random
from dataclasses import replace

import pytest

from vitlab.study.claims import get, load
from vitlab.study.noise import interval
from vitlab.study.verdicts import (
    CONTRADICTED,
    DIRECTIONS,
    JUDGED,
    NO_RUN,
    Verdict,
    controlled,
    counted,
    counts,
    mac_limit,
    settle,
)

NUMERIC = [c for c in load() if c.numeric and c.judged != "never" and not c.unrun and not c.own]
DROP = "S3/pruned-alpha-1.2/accuracy-drop"


def draws(count=300):
    """Claims with random measurements near and far of them."""
    generator = random.Random(0)
    for _ in range(count):
        claim = generator.choice(NUMERIC)
        width = generator.choice([0.1, 1.0, 5.0]) * max(claim.slack, 0.01 * claim.scale)
        yield claim, [claim.value + generator.gauss(0, width) for _ in range(generator.randint(1, 6))], generator


def judge(claim, values):
    return settle(claim, values, as_published=True).status


def test_an_exact_hit_is_confirmed_whatever_the_spread():
    for claim, _, generator in draws():
        off = generator.uniform(0, 3) * claim.scale
        assert judge(claim, claim.value) == judge(claim, [claim.value - off, claim.value + off]) == "confirmed"


def test_the_order_of_seeds_changes_nothing():
    for claim, values, generator in draws():
        mixed = generator.sample(values, len(values))
        one, other = settle(claim, values, as_published=True), settle(claim, mixed, as_published=True)
        assert one.status == other.status and one.margin == pytest.approx(other.margin)


def test_more_runs_never_weaken_what_one_run_said():
    for claim, values, _ in draws():
        mean = sum(values) / len(values)
        one, more = judge(claim, mean), judge(claim, values)
        assert more == one or one == "within noise"
        assert judge(claim, values * 3) == more or more == "within noise"
    assert judge(DROP, 3.5) == judge(DROP, [2.5, 3.5, 4.5]) == "refuted"


def test_a_wider_tolerance_never_refutes():
    for claim, values, generator in draws():
        wider = replace(claim, tolerance=claim.tolerance + generator.random())
        order = ["refuted", "exceeded", "within noise", "confirmed"]
        before, after = judge(claim, values), judge(wider, values)
        assert after == before or order.index(after) > max(1, order.index(before))


def test_noise_of_differences_and_of_relative_figures():
    def single(claim):
        return settle(claim, get(claim).value, as_published=True).margin

    absolute = single("S2/pruned-40/accuracy")
    assert single(DROP) == pytest.approx(2**0.5 * absolute)
    # per cent of a baseline of 78.33 %
    assert single("S2/pruned-40/accuracy-change") == pytest.approx(2**0.5 * absolute / 0.7833)
    assert interval([1.0], 0.0)[2] == interval([1.0, 2.0], 0.0)[2] == 0
    same = {get(f"S2/{m}/{k}").tolerance for m in ("baseline", "tiny-kd", "pruned-40") for k in ("size", "parameters")}
    assert same == {0.02}


@pytest.mark.parametrize(
    ("apart", "status"),
    [([3.0, 2.5, 3.5], 0), ([-3.0, -2.5, -3.5], 1), ([0.1, -0.2, 0.3], 2), ([3.0, 3.0], None)],
)
def test_a_scaled_replication_tells_a_direction_from_three_seeds_on(apart, status):
    verdict = settle("S0/sparse/accuracy", [50.0] * len(apart), as_published=False, differences=apart)
    assert verdict.status == ("pending" if status is None else DIRECTIONS[status])
    assert ("95 %, n = 3" in verdict.reason) == (status is not None)
    published = settle("S0/sparse/accuracy", [53.3] * 3, as_published=True, differences=apart)
    assert published.status == "confirmed" and published.p is None


def test_directions_of_relative_figures_statements_and_of_no_loss():
    def scaled(claim, values, **options):
        return settle(claim, values, as_published=False, **options).status

    assert scaled(DROP, [2.0, 2.2, 2.4]) == "direction agrees"  # a loss, as claimed
    assert scaled("S2/pruned-40-kd/accuracy-change", [-9.0, -9.5, -10.0]) == "direction opposes"
    assert scaled("S2/pruned-40/latency-change", [30.0, 40.0, 35.0]) == "direction opposes"
    assert scaled("S2/pruned-40/parameters-change", [-28.0] * 3) == "pending"  # no news
    for values, status in (([True] * 3, 0), ([False] * 3, 1), ([True, False, True], 2)):
        assert scaled("S1/favit/beats-plain-vit", values) == DIRECTIONS[status]
    assert scaled("S3/baseline-on/accuracy", [55.0] * 3, differences=[-4.0, -4.5, -5.0]) == "direction opposes"
    assert scaled("S3/baseline-on/accuracy", [55.0] * 9, differences=[0.0] * 9) == "direction agrees"


def test_holm_over_the_directions_of_a_project():
    def direction(claim, p):
        return Verdict(claim=claim, status="direction agrees", p=p)

    family = [direction("S3/pruned-off/accuracy", 0.03), direction("S3/pruned-on/accuracy", 0.001)]
    assert [v.status for v in controlled(family)] == ["direction agrees"] * 2
    three = [*family, direction("S3/baseline-on/accuracy", 0.04), direction("S0/sparse/accuracy", 0.04)]
    found = {v.claim: v.status for v in controlled(three)}
    assert found["S3/pruned-on/accuracy"] == found["S0/sparse/accuracy"] == "direction agrees"
    assert found["S3/pruned-off/accuracy"] == found["S3/baseline-on/accuracy"] == "direction unclear"


def test_what_is_told_without_a_run():
    def told(claim):
        return settle(claim, None, as_published=False)

    quotient = get("S3/baseline/evaluation-time").value / get("S3/baseline-alpha-1.5/evaluation-time").value
    fast = told("S3/baseline-alpha-1.5/speed-up")
    assert fast.status == CONTRADICTED and f"{quotient:.2f}x" in fast.reason and "1.59x at most" in fast.reason
    close = told("S3/pruned-alpha-1.2/speed-up")  # above 1.78x, but by less than its tolerance
    assert close.status == "pending" and "give 1.85x" in close.reason and "1.78x at most" in close.reason
    assert mac_limit([145] * 8) == 1 and mac_limit(get("S3/alpha-1.0/tokens").value) > 1.78
    for claim in ("S2/tiny-kd/power", "S2/tiny-kd/power-change", "S4/ripple/cifar100-accuracy", "S1/B3/accuracy",
                  "S4/hydra/training-speed-up", "S4/ripple/3-stages-best"):  # fmt: skip
        assert told(claim).status == NO_RUN, claim
    ripple = settle("S4/ripple/cifar100-accuracy", [15.0] * 3, as_published=False, differences=[2.0, 2.5, 2.2])
    assert ripple.status == NO_RUN and ripple.reason.startswith("direction agrees: scaled down, +2.23")
    assert settle("S4/ripple/cifar100-accuracy", [70.0] * 3, as_published=True).status == "refuted"


def test_no_figure_counts_twice_and_our_own_facts_do_not():
    facts = [c for c in load() if c.source == "verified"]
    assert not counted(settle(c, [c.value], as_published=True) for c in facts if c.judged != "never")
    change, figure = (settle(f"S2/pruned-40/{m}", get(f"S2/pruned-40/{m}").value, as_published=True)
                      for m in ("accuracy-change", "accuracy"))  # fmt: skip
    pending = replace(figure, status="pending")
    assert counted([change, figure]) == [figure] and counted([change, pending]) == [change]
    assert counted([replace(change, status="pending"), pending]) == [pending] and counted([change]) == [change]
    frame = counts([change, pending, settle("S0/dense/macs", 1.0, as_published=True)])
    assert frame.loc["S2", "confirmed"] == frame.loc["S0", "refuted"] == 1 and set(frame) <= set(JUDGED)
