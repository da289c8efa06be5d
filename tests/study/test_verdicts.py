"""What measurements say of claims: the rule, what is judged at all, tables and sentences."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from vitlab.study.claims import get, load, select
from vitlab.study.verdicts import Verdict, answers, settle, summary, table

ACCURACY = "S2/baseline/accuracy"  # 78.33 %, band of 0.7833


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ([78.2, 78.4, 78.5], "confirmed"),
        ([77.0, 78.4, 79.8], "within noise"),  # centred, but too noisy to say more
        ([77.3, 77.6, 77.5], "within noise"),  # the interval crosses the edge of the band
        ([75.0, 75.3, 75.1], "refuted"),
        ([81.0, 81.2, 81.1], "exceeded"),
        ([78.33], "within noise"),  # one run does not confirm an accuracy
        ([76.60], "within noise"),  # 1.73 away; band + 1.96 x 0.5 = 1.76
        ([76.50], "refuted"),
        ([80.20], "exceeded"),
        ([60.0, 80.0], "within noise"),  # two seeds far apart
    ],
)
def test_accuracy_with_seed_noise(values, status):
    assert settle(ACCURACY, values, as_published=True).status == status
    assert settle(ACCURACY, values, as_published=False).status == "not comparable"


def test_margin_is_the_t_interval_of_the_mean():
    values = [78.2, 78.9, 78.4, 78.0]
    verdict = settle(ACCURACY, values, as_published=True)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    ends = (verdict.mean - verdict.margin, verdict.mean + verdict.margin)
    assert ends == pytest.approx((low, high), rel=1e-4)
    assert verdict.std == pytest.approx(np.std(values, ddof=1))


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
    assert settle("S2/pruned-40/parameters", 5.0, as_published=False).status == "not comparable"
    assert settle("S2/pruned-40/parameters", 5.0, as_published=True).status == "refuted"


def test_absolute_speed_memory_and_power_are_never_judged():
    absolute = [c for c in load() if c.unit in ("ms", "s", "min", "samples/s", "W")]
    absolute += [c for c in load() if c.metric == "memory"]
    assert len(absolute) > 20
    for claim in absolute:
        verdict = settle(claim, [claim.value, claim.value * 1.01], as_published=True)
        assert verdict.status == "not comparable" and verdict.mean, claim.id
        assert "hardware" in verdict.reason


@pytest.mark.parametrize(
    ("key", "value", "status"),
    [
        ("S3/pruned-alpha-1.2/speed-up", 1.85, "confirmed"),
        ("S3/pruned-alpha-1.2/speed-up", 1.3, "refuted"),
        ("S3/pruned-alpha-1.2/speed-up", 2.6, "exceeded"),
        ("S3/pruned-alpha-1.2/accuracy-drop", 0.0, "within noise"),
        ("S3/pruned-alpha-1.2/accuracy-drop", -2.0, "exceeded"),  # lower is better
        ("S3/pruned-alpha-1.2/accuracy-drop", 4.0, "refuted"),
        ("S1/favit/memory-saved", 98.2, "confirmed"),
        ("S1/favit/memory-saved", 60.0, "refuted"),
        ("S2/pruned-40/latency-change", -30.0, "exceeded"),
        ("S2/pruned-40/latency-change", 0.0, "refuted"),
        ("S2/pruned-40/power-change", -19.9, "confirmed"),
        ("S4/kernel/kernel-speed-up", 4.0, "exceeded"),
    ],
)
def test_quotients_are_judged_only_at_the_published_scale(key, value, status):
    assert settle(key, value, as_published=True).status == status
    assert settle(key, value, as_published=False, why="dim 64").reason == "dim 64"
    assert settle(key, value, as_published=False).status == "not comparable"


def test_lists_words_and_statements():
    tokens = get("S3/alpha-1.0/tokens")
    good, bad = [134, 114, 88, 61, 38, 21, 10, 4], [134, 114, 88, 61, 38, 21, 10, 5]
    assert settle(tokens, good, as_published=False).status == "confirmed"
    assert settle(tokens, [good, good], as_published=False).values == (tuple(good),) * 2
    assert settle(tokens, torch.tensor(good), as_published=False).status == "confirmed"
    assert settle(tokens, [bad], as_published=False).status == "refuted"
    assert settle("S4/baseline/complexity", "O(n ^ 2)", as_published=False).status == "confirmed"
    assert settle("S4/ripple/complexity", ["O(n^2)"], as_published=False).status == "refuted"
    for key in ("S1/favit/49-neighbours", "S4/ripple/3-stages-best"):
        assert settle(key, True, as_published=True).status == "confirmed"
        assert settle(key, [False, np.bool_(False)], as_published=True).status == "refuted"
        assert settle(key, [True, False, True], as_published=True).status == "within noise"
    # what a mechanism does shows at any scale, which of two is more accurate does not
    assert settle("S1/favit/49-neighbours", False, as_published=False).status == "refuted"
    assert settle("S4/ripple/3-stages-best", False, as_published=False).status == "not comparable"


@pytest.mark.parametrize("nothing", [None, [], (), np.array([])])
def test_nothing_measured_is_pending(nothing):
    for claim in load():
        verdict = settle(claim, nothing, as_published=True, why="no sensor")
        assert (verdict.status, verdict.reason, verdict.mean) == ("pending", "no sensor", None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "78", True, None])
def test_what_is_not_a_finite_number_is_refused(value):
    for as_published in (True, False):
        with pytest.raises(ValueError, match=ACCURACY):
            settle(ACCURACY, [78.0, value], as_published=as_published)
    with pytest.raises(ValueError, match="49-neighbours"):
        settle("S1/favit/49-neighbours", [0.5], as_published=True)


def test_verdicts_survive_json():
    samples = [
        settle(ACCURACY, np.array([78.0, 78.5], dtype=np.float32), as_published=True),
        settle(ACCURACY, [torch.tensor(78.0)], as_published=False, why="3 epochs"),
        settle("S3/alpha-1.0/tokens", [[134, 114]], as_published=False),
        settle("S1/favit/beats-plain-vit", [True, False], as_published=True),
        settle("S4/ripple/complexity", "O(n)", as_published=True),
        settle(ACCURACY, None, as_published=True),
    ]
    for verdict in samples:
        assert Verdict.from_row(json.loads(json.dumps(verdict.to_row(), allow_nan=False))) == verdict
    row = samples[0].to_row()
    with pytest.raises(ValueError, match="colour"):
        Verdict.from_row(row | {"colour": 1})
    with pytest.raises(ValueError, match="status"):
        Verdict.from_row({"claim": ACCURACY})
    with pytest.raises(ValueError, match="'proven'"):
        Verdict.from_row(row | {"status": "proven"})


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
    assert (scaled.measured, scaled.verdict) == ("40.00 % (n = 1)", "not comparable")
    assert scaled.note.startswith("1 epoch instead of 3; ")
    assert frame.loc["S0/sparse/parameters", "measured"] == "2.86 M (n = 1)"
    assert frame.loc["S0/sparse/gumbel-top-k", "measured"] == "no (n = 1)"
    pending = frame.loc["S0/sparse/macs"]
    assert "batch-mates" in get("S3/pruned-on/accuracy").note and "class token" in get("S2/baseline/parameters").note
    assert get("S0/dense/parameters").note == ""
    assert (pending.measured, pending.verdict) == ("-", "pending") and "ptflops" in pending.note
    odd = table(
        [get("S3/alpha-1.0/tokens"), get("S2/pruned-20/power-change"), get("S3/pruned-alpha-1.2/speed-up")],
        [
            settle("S3/alpha-1.0/tokens", [134, 114], as_published=True),
            settle("S2/pruned-20/power-change", [1.5], as_published=True),
            settle("S3/pruned-alpha-1.2/speed-up", [1.5, 1.6], as_published=True),
        ],
    )
    assert list(odd["measured"]) == ["134, 114 (n = 1)", "+1.50 % (n = 1)", "1.55 ± 0.07x (n = 2)"]
    assert len(table([], verdicts)) == 0
    sentence = summary([*verdicts, settle("S0/sparse/macs", None, as_published=True)])
    judged = "4 of 6 claims judged: 1 confirmed, 1 refuted, 1 within noise, 1 exceeded"
    assert sentence == f"{judged}; 1 not comparable, 1 pending."
    assert summary([]) == "No claims."
    assert summary(verdicts[2:3]) == "1 of 1 claim judged: 1 confirmed."


# ---------------------------------------------------------------- rows that answer


def rows(**columns):
    frame = pd.DataFrame(columns)
    return frame.assign(seed=frame.get("seed", 0), as_published=frame.get("as_published", True),
                        changes=frame.get("changes", ""))  # fmt: skip


def test_rows_answer_claims_of_their_arm_in_the_claims_unit():
    measured = rows(arm=["S2/baseline"] * 2 + ["S2/pruned-40"] * 2, seed=[0, 1, 0, 1], macs=[620e6] * 2 + [310e6] * 2,
                    accuracy_top1=[80.0, 82.0, 60.0, 61.5], latency_ms=[2.0, 4.0, 1.0, 3.0],
                    power_w=[None] * 4)  # fmt: skip
    assert answers(get("S2/baseline/accuracy"), measured) == ([80.0, 82.0], True, "")
    assert answers(get("S2/baseline/macs"), measured)[0] == [0.62, 0.62]
    assert answers(get("S2/pruned-40/accuracy-change"), measured)[0] == pytest.approx([-25.0, -25.0])
    assert answers(get("S2/pruned-40/latency-change"), measured)[0] == pytest.approx([-50.0, -25.0])
    for absent in ("S2/baseline/power", "S2/baseline/throughput", "S2/pruned-30/accuracy", "S2/pruned-40/power-change"):
        assert answers(get(absent), measured) == ([], False, "not measured in this run"), absent


def test_relative_figures_are_paired_by_seed():
    arms = ["S3/baseline", "S3/baseline", "S3/baseline-on", "S3/baseline-on", "S3/pruned-alpha-1.2"]
    measured = rows(arm=arms, seed=[0, 1, 1, 0, 1], images_per_s=[100.0, 200.0, 300.0, 120.0, 100.0],
                    accuracy_top1=[70.0, 72.0, 0, 0, 70.5])  # fmt: skip
    assert answers(get("S3/baseline-on/speed-up"), measured)[0] == pytest.approx([1.5, 1.2])
    assert answers(get("S3/pruned-alpha-1.2/accuracy-drop"), measured)[0] == pytest.approx([1.5])
    assert answers(get("S3/baseline/evaluation-time"), measured)[0] == [100.0, 50.0]


def test_a_stand_in_answers_but_not_as_published_and_never_for_a_shape():
    small = rows(arm=["S2/baseline-small"], accuracy_top1=[50.0], macs=[1e6], as_published=[False], changes=["dim 64"])
    assert answers(get("S2/baseline/accuracy"), small) == ([50.0], False, "dim 64")
    assert answers(get("S2/baseline/macs"), small)[0] == []
    on = rows(arm=["S4/baseline", "S4/baseline on tiny-imagenet"], accuracy_top1=[70.0, 60.0])
    assert answers(get("S4/baseline/cifar100-accuracy"), on)[0] == [70.0]
    assert answers(get("S4/baseline/tiny-imagenet-accuracy"), on)[0] == [60.0]
