"""What measurements say of claims: the rule, what is judged at all, tables and sentences."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from vitlab.study.claims import get, load, select
from vitlab.study.verdicts import settle, settled, summary, table

ACCURACY = "S2/baseline/accuracy"  # 78.33 %, band of 0.7833


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ([78.2, 78.4, 78.5], "confirmed"),
        ([78.33], "confirmed"),  # an exact hit, however wide the margin of one run
        ([77.0, 78.4, 79.8], "confirmed"),
        ([77.3, 77.4, 77.2], "within noise"),  # the interval reaches into the band
        ([75.0, 75.3, 75.1], "refuted"),
        ([81.0, 81.2, 81.1], "refuted"),  # a baseline better than published speaks against what is claimed over it
        ([76.60], "within noise"),  # 1.73 away; band + 2.23 x 0.5 = 1.90
        ([76.40], "refuted"),
        ([60.0, 80.0], "refuted"),  # as one run of 70
    ],
)
def test_accuracy_with_seed_noise(values, status):
    assert settle(ACCURACY, values, as_published=True).status == status
    scaled = settle(ACCURACY, values, as_published=False)
    assert (scaled.status, scaled.reason) == ("pending", "not measured at the published scale")


def test_structural_claims_are_judged_to_the_printed_digits_at_any_scale():
    for published_ in (True, False):
        verdict = settle("S0/sparse/parameters", [2.857396], as_published=published_)
        assert verdict.status == "confirmed" and verdict.margin == 0
    assert settle("S0/sparse/parameters", 2.85, as_published=False).status == "refuted"
    assert settle("S0/dense/macs", 1253.5, as_published=False).status == "refuted"
    fewer = settle("S0/dense/macs", 800.0, as_published=False)
    assert fewer.status == "refuted"  # a count is right or wrong, never "exceeded"
    for exact in ("S0/dense-6/true-parameters", "S0/sparse/true-parameters"):
        assert settle(exact, get(exact).value + 1e-6, as_published=False).status == "refuted"
    at_edge = get("S3/baseline/parameters")
    assert settle(at_edge, 25.35, as_published=False).status == "confirmed"
    # which channels survive is learned, so the size of a pruned model needs the published training
    assert settle("S2/pruned-40/parameters", 5.0, as_published=False).status == "pending"
    assert settle("S2/pruned-40/parameters", 5.0, as_published=True).status == "refuted"


def test_absolute_speed_memory_and_power_are_never_judged():
    absolute = [c for c in load() if c.unit in ("ms", "s", "min", "samples/s", "W")]
    absolute += [c for c in load() if c.metric == "memory"]
    assert len(absolute) > 20
    for claim in absolute:
        verdict = settle(claim, [claim.value, claim.value * 1.01], as_published=True)
        assert verdict.mean, claim.id
        if not claim.unrun:
            why = "whole process" if claim.metric == "memory" else "hardware"
            assert verdict.status == "not testable here" and why in verdict.reason


@pytest.mark.parametrize(
    ("key", "value", "status"),
    [
        ("S3/baseline-on/speed-up", 1.36, "confirmed"),
        ("S3/baseline-on/speed-up", 0.95, "within noise"),  # one timing tells little
        ("S3/baseline-on/speed-up", [0.95] * 4, "refuted"),
        ("S3/baseline-on/speed-up", [1.9] * 4, "exceeded"),
        ("S3/pruned-alpha-1.2/accuracy-drop", 0.0, "within noise"),
        ("S3/pruned-alpha-1.2/accuracy-drop", -2.0, "exceeded"),  # lower is better
        ("S3/pruned-alpha-1.2/accuracy-drop", 4.0, "refuted"),
        ("S1/favit/memory-saved", 98.2, "confirmed"),
        ("S1/favit/memory-saved", 60.0, "refuted"),
        ("S2/pruned-40/latency-change", [-70.0] * 3, "exceeded"),
        ("S2/pruned-40/latency-change", [30.0] * 3, "refuted"),
        ("S4/kernel/kernel-speed-up", [4.0] * 2, "exceeded"),
    ],
)
def test_quotients_are_judged_only_at_the_published_scale(key, value, status):
    assert settle(key, value, as_published=True).status == status
    assert "dim 64" in settle(key, value, as_published=False, why="dim 64").reason
    assert settle(key, value, as_published=False).status not in ("confirmed", "refuted", "exceeded", "within noise")


def test_lists_words_and_statements():
    tokens = get("S3/alpha-1.0/tokens")
    good, bad = [134, 114, 88, 61, 38, 21, 10, 4], [134, 114, 88, 61, 38, 21, 10, 5]
    assert settle(tokens, [good, good], as_published=False).values == (tuple(good),) * 2
    assert settle(tokens, [good], as_published=False).status == "confirmed"
    assert settle(tokens, [bad], as_published=False).status == "refuted"
    assert settle("S4/baseline/complexity", "O(n ^ 2)", as_published=False).status == "confirmed"
    assert settle("S4/ripple/complexity", ["O(n^2)"], as_published=False).status == "refuted"
    for key in ("S1/favit/49-neighbours", "S4/ripple/3-stages-best"):
        assert settle(key, True, as_published=True).status == "confirmed"
        assert settle(key, [False, False], as_published=True).status == "refuted"
        assert settle(key, [True, False, True], as_published=True).status == "within noise"
    # what a mechanism does shows at any scale, which of two is more accurate does not
    assert settle("S1/favit/49-neighbours", False, as_published=False).status == "refuted"
    assert settle("S4/ripple/3-stages-best", False, as_published=False).status == "no run behind it"


@pytest.mark.parametrize("nothing", [None, [], ()])
def test_nothing_measured_is_pending_unless_something_can_be_said_without(nothing):
    for claim in load():
        verdict = settle(claim, nothing, as_published=True, why="no sensor")
        assert verdict.mean is None
        if not claim.unrun and not claim.own and claim.judged != "never":
            assert (verdict.status, verdict.reason) == ("pending", "no sensor")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "78", True, None])
def test_what_is_not_a_finite_number_is_refused(value):
    for as_published in (True, False):
        with pytest.raises(ValueError, match=ACCURACY):
            settle(ACCURACY, [78.0, value], as_published=as_published)
    with pytest.raises(ValueError, match="49-neighbours"):
        settle("S1/favit/49-neighbours", [0.5], as_published=True)


def test_verdicts_survive_json():
    samples = [
        settle(ACCURACY, [78.0, np.float64(78.5)], as_published=True),
        settle(ACCURACY, [78], as_published=False, why="3 epochs"),
        settle("S3/alpha-1.0/tokens", [[134, 114]], as_published=False),
        settle("S1/favit/beats-plain-vit", [True, False], as_published=True),
        settle("S4/ripple/complexity", "O(n)", as_published=True),
        settle(ACCURACY, None, as_published=True),
    ]
    rows = [json.loads(json.dumps(asdict(verdict), allow_nan=False)) for verdict in samples]
    again = settled([({"verdicts": rows}, "", 0.0)])
    assert again[: len(samples)] == samples
    assert {v.claim for v in again} == {c.id for c in load()}


def test_table_and_summary():
    chosen = select(project="S0", model="sparse", source="published")
    verdicts = [
        settle("S0/sparse/accuracy", [55.0, 55.4, 55.2], as_published=True),
        settle("S0/sparse/accuracy", [40.0], as_published=False, why="1 epoch instead of 3"),
        settle("S0/sparse/parameters", [2.857396], as_published=False),
        settle("S0/sparse/gumbel-top-k", False, as_published=False),
        settle("S2/baseline/accuracy", [78.0], as_published=True),  # belongs to another table
    ]
    frame = table(chosen, iter(verdicts))
    assert list(frame.columns) == ["claimed", "measured", "verdict", "note"]
    assert len(frame) == len(chosen) + 1  # the accuracy was tested twice
    exact, scaled = frame.loc["S0/sparse/accuracy"].itertuples()
    assert (exact.claimed, exact.measured, exact.verdict) == ("53.30 %", "55.20 ± 0.20 % (n = 3)", "exceeded")
    assert (scaled.measured, scaled.verdict) == ("40.00 % (n = 1)", "pending")
    assert scaled.note.startswith("1 epoch instead of 3; ")
    assert frame.loc["S0/sparse/parameters", "measured"] == "2.86 M (n = 1)"
    assert frame.loc["S0/sparse/gumbel-top-k", "measured"] == "no (n = 1)"
    pending = frame.loc["S0/sparse/macs"]
    assert "batch-mates" in get("S3/pruned-on/accuracy").note and "class token" in get("S2/baseline/parameters").note
    assert get("S0/dense/parameters").note == ""
    assert (pending.measured, pending.verdict) == ("-", "pending") and "ptflops" in pending.note
    odd = table(
        [get("S3/alpha-1.0/tokens"), get("S2/pruned-20/power-change"), get("S3/baseline-on/speed-up")],
        [
            settle("S3/alpha-1.0/tokens", [[134, 114]], as_published=True),
            settle("S2/pruned-20/power-change", [1.5], as_published=True),
            settle("S3/baseline-on/speed-up", [1.5, 1.6], as_published=True),
        ],
    )
    assert list(odd["measured"]) == ["134, 114 (n = 1)", "+1.50 % (n = 1)", "1.55 ± 0.07x (n = 2)"]
    whole = {"S2/baseline/input-tokens": ([65.0], "65 tokens"), "S0/dense/macs": ([1253.5], "1253.5 MMac"),
             "S2/baseline/accuracy": ([78.0, 80.0], "79.00 ± 1.41 %")}  # fmt: skip
    for key, (values, text) in whole.items():
        seen = table([get(key)], [settle(key, values, as_published=True)]).measured.iloc[0]
        assert seen == f"{text} (n = {len(values)})"
    assert len(table([], verdicts)) == 0
    sentence = summary([*verdicts, settle("S0/sparse/macs", None, as_published=True)])
    assert sentence == "4 of 6 claims judged: 2 confirmed, 1 exceeded, 1 refuted; 2 pending."
    assert summary([]) == "No claims."
    assert summary(verdicts[2:3]) == "1 of 1 claim judged: 1 confirmed."
