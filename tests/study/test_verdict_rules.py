"""Properties of the rules: what must hold for any measurement, and what is told without one."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitlab.study.claims import get, load
from vitlab.study.noise import interval
from vitlab.study.verdicts import CONTRADICTED, JUDGED, NO_RUN, counted, counts, mac_limit, settle

NUMERIC = [c for c in load() if c.numeric and c.judged != "never" and not c.unrun and not c.own]
DROP = "S3/pruned-alpha-1.2/accuracy-drop"
FEW = settings(deadline=None, max_examples=60, derandomize=True)


@st.composite
def measured(draw):
    """A claim with runs near and far of it."""
    claim = draw(st.sampled_from(NUMERIC))
    width = draw(st.sampled_from([0.1, 1.0, 5.0])) * max(claim.slack, 0.01 * claim.scale)
    runs = draw(st.lists(st.floats(-3, 3).map(lambda z: round(z, 6)), min_size=1, max_size=6))
    return claim, [claim.value + width * z for z in runs]


def judge(claim, values):
    return settle(claim, values, as_published=True).status


@FEW
@given(st.sampled_from(NUMERIC), st.floats(0, 3))
def test_an_exact_hit_is_confirmed_whatever_the_spread(claim, share):
    off = share * claim.scale
    assert judge(claim, claim.value) == judge(claim, [claim.value - off, claim.value + off]) == "confirmed"


@FEW
@given(measured(), st.randoms())
def test_the_order_of_seeds_changes_nothing(case, generator):
    claim, values = case
    mixed = generator.sample(values, len(values))
    one, other = settle(claim, values, as_published=True), settle(claim, mixed, as_published=True)
    assert one.status == other.status and one.margin == pytest.approx(other.margin)


@FEW
@given(measured())
def test_more_runs_never_weaken_what_one_run_said(case):
    claim, values = case
    one, more = judge(claim, sum(values) / len(values)), judge(claim, values)
    assert more == one or one == "within noise"
    assert judge(claim, values * 3) == more or more == "within noise"


def test_a_spread_does_not_weaken_what_the_mean_said():
    assert judge(DROP, 3.5) == judge(DROP, [2.5, 3.5, 4.5]) == "refuted"


@FEW
@given(measured(), st.floats(0, 1))
def test_a_wider_tolerance_never_refutes(case, more):
    claim, values = case
    wider = replace(claim, tolerance=claim.tolerance + more)
    order = ["refuted", "exceeded", "within noise", "confirmed"]
    before, after = judge(claim, values), judge(wider, values)
    assert after == before or order.index(after) > max(1, order.index(before))


@FEW
@given(st.lists(st.floats(-5, 5), min_size=3, max_size=6), st.floats(0, 2))
def test_a_larger_drop_never_speaks_more_for_a_bound(drops, more):
    order = ["direction opposes", "direction unclear", "direction agrees"]
    less, worse = (settle(DROP, values, as_published=False).status for values in (drops, [d + more for d in drops]))
    assert order.index(worse) <= order.index(less)


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


def test_what_is_told_without_a_run():
    def told(claim):
        return settle(claim, None, as_published=False)

    quotient = get("S3/baseline/evaluation-time").value / get("S3/baseline-alpha-1.5/evaluation-time").value
    fast = told("S3/baseline-alpha-1.5/speed-up")
    assert fast.status == CONTRADICTED and f"{quotient:.2f}x" in fast.reason and "1.59x at most" in fast.reason
    close = told("S3/pruned-alpha-1.2/speed-up")  # its own times agree, its operations do not allow it
    assert close.status == CONTRADICTED and "give 1.85x" in close.reason and "1.78x at most" in close.reason
    untestable = {c.id: told(c.id) for c in load() if c.untestable}
    assert {"S1/B0/parameters", "S4/ripple/macs", "S3/trained-pruned/best-accuracy"} < set(untestable)
    for name, verdict in untestable.items():
        assert verdict.status == "not testable here" and verdict.reason == get(name).untestable
    counted_here = settle("S4/ripple/macs", None, as_published=False, why="our layers count 1.476 GMac")
    assert counted_here.reason.endswith("our layers count 1.476 GMac")
    assert mac_limit([145] * 8) == 1 and mac_limit(get("S3/alpha-1.0/tokens").value) > 1.78
    for claim in ("S2/tiny-kd/power", "S2/tiny-kd/power-change", "S4/ripple/cifar100-accuracy", "S1/B3/accuracy",
                  "S4/hydra/training-speed-up", "S4/ripple/3-stages-best"):  # fmt: skip
        assert told(claim).status == NO_RUN, claim
    assert settle("S4/ripple/cifar100-accuracy", [70.0] * 3, as_published=True).status == "refuted"


def test_no_figure_counts_twice_and_our_own_facts_do_not():
    facts = [c for c in load() if c.source == "verified"]
    assert not counted(settle(c, [c.value], as_published=True) for c in facts if c.judged != "never")
    change, figure = (settle(f"S2/pruned-40/{m}", get(f"S2/pruned-40/{m}").value, as_published=True)
                      for m in ("accuracy-change", "accuracy"))  # fmt: skip
    pending = replace(figure, status="pending")
    assert counted([change, figure]) == [figure] and counted([change, pending]) == [change]
    assert counted([replace(change, status="pending"), pending]) == [pending] and counted([change]) == [change]
    order = settle("S2/pruned/accuracy-order", [True], as_published=True)  # of figures that count
    assert counted([order, figure]) == [figure] and counted([order]) == [order]
    frame = counts([change, pending, settle("S0/dense/macs", 1.0, as_published=True)])
    assert frame.loc["S2", "confirmed"] == frame.loc["S0", "refuted"] == 1 and set(frame) <= set(JUDGED)
