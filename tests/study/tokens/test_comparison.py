"""Methods at equal cost and on the same images, held against what can be worked out by hand."""

import dataclasses
import itertools

import matplotlib.pyplot as plt
import pytest
import torch

from vitlab.compress.tokens.reduction import TokenConfig, reduce_tokens
from vitlab.compress.tokens.search import at_once, fit_budget
from vitlab.metrics.statistics import holm, paired_difference
from vitlab.study.tokens import comparison as tc
from vitlab.study.tokens import plots as token_plots


def test_methods_cost_the_same(evaluator, calibration):
    rows = tc.comparison(evaluator, [0.75], batch=2, seconds=0.0, seeds=(0, 1), calibration=calibration,
                         scores=("cls", "random", "grid"), passes=4)  # fmt: skip
    beside = rows.method.isin([tc.CLOCKED, tc.POOLED])
    other, rows = rows[beside].set_index("method"), rows[~beside]
    assert set(other.index) == {tc.CLOCKED, tc.POOLED} and other.kl[tc.POOLED] == pytest.approx(0, abs=1e-6)
    expected = {tc.ATTENTION, tc.RANDOM, tc.GRID, tc.EVIT, tc.CONSTANT, tc.TOME, tc.TOME_CALIBRATED, tc.INPUT,
                tc.PRICED, tc.LENGTHS, tc.ONCE, tc.PRICED_CALIBRATED}  # fmt: skip
    assert set(rows.method) == expected
    assert (rows.share <= 0.75).all() and (rows.share > 0.6).all()
    by = rows.set_index("method")
    counts = (evaluator.plain.config.tokens, *by.tokens[tc.CONSTANT])
    steps = [before - after for before, after in itertools.pairwise(counts)]
    assert max(steps) - min(steps) <= 1, "ToMe's own schedule: the same number in every block, up to rounding"
    assert len({evaluator.plain.config.tokens, *by.tokens[tc.ONCE]}) == 2, "in one block"
    once = at_once(evaluator.plain, 0.75 * evaluator.macs, pooled_last=True, action="size-priced")
    kl = [calibration.evaluate(reduce_tokens(evaluator.plain, config))["kl"] for config in once]
    assert by.tokens[tc.ONCE] == reduce_tokens(evaluator.plain, once[kl.index(min(kl))]).tokens
    draws = [TokenConfig(score="random", pooled_last=True, seed=s, counts=by.tokens[tc.RANDOM]) for s in (0, 1)]
    mean = sum(evaluator.evaluate(reduce_tokens(evaluator.plain, c))["accuracy"] for c in draws) / 2
    assert by.accuracy[tc.RANDOM] == pytest.approx(mean)
    token_plots.frontier(rows, [tc.TOME, tc.RANDOM])
    plt.close("all")


def test_what_a_method_chooses_it_chooses_on_train(evaluator, calibration):
    options, table = tc.chosen(calibration, 0.7, candidates=tc.CANDIDATES[2:5])
    for candidate, row in zip(tc.CANDIDATES[2:5], table.to_dict("records")):
        assert {k: row[k] for k in ("metric", "power")} == candidate
        fitted = fit_budget(calibration.plain, 0.7 * calibration.macs, action="size-priced", alpha=0.5,
                            pooled_last=True, **candidate)  # fmt: skip
        assert row["kl"] == calibration.evaluate(reduce_tokens(calibration.plain, fitted))["kl"]
    best = table.loc[table.kl.idxmin()]
    assert options == {"action": "size-priced", "metric": best.metric, "power": best.power}
    for choose in (lambda: tc.chosen(evaluator, 0.7), lambda: tc.calibrated(evaluator, evaluator, macs=1e9)):
        with pytest.raises(ValueError, match=r"split='val': .* chosen on train"):
            choose()


def test_paired_rows_are_differences_on_the_same_images(evaluator):
    configs = {"a": [TokenConfig(r_max=0.9, alpha=0.5)], "b": [TokenConfig(r_max=0.3)]}
    rows = tc.paired([evaluator], configs)
    right = {k: evaluator.right(evaluator.run(reduce_tokens(evaluator.plain, c[0]))) for k, c in configs.items()}
    for name in configs:
        found = paired_difference(right[name], evaluator.correct)
        assert rows.change[name] == found.points == pytest.approx(rows.accuracy[name] - evaluator.accuracy)
        assert (rows.low[name], rows.high[name]) == (found.low, found.high)
        assert rows.macs[name] == reduce_tokens(evaluator.plain, configs[name][0]).macs()
    alone = [paired_difference(right[name], evaluator.correct).p for name in configs]
    assert rows.p.tolist() == holm(alone)
    against = tc.paired([evaluator], configs, against="b")
    assert list(against.index) == ["a"] and against.change["a"] == paired_difference(right["a"], right["b"]).points
    chain = tc.paired([evaluator], configs, against={"a": "b", "b": "plain"})
    assert (chain.change["a"], chain.change["b"]) == (against.change["a"], rows.change["b"])
    assert chain.p.tolist() == holm([paired_difference(right["a"], right["b"]).p, alone[1]])
    assert [t.endswith("(unclear)") for t in rows.text] == (rows.p > 0.05).tolist(), "by Holm's p, not one interval"
    twice = tc.paired([evaluator, evaluator], {k: c * 2 for k, c in configs.items()})
    assert twice.change.tolist() == pytest.approx(rows.change.tolist())
    assert (twice.high > twice.low).all(), "equal changes of two seeds still rest on so few images"
    token_plots.intervals({"model": rows}, label="points")
    plt.close("all")


def test_scores_that_are_the_same_for_a_model_count_once(evaluator):
    found, pooled = tc.distinct(evaluator), evaluator.plain.config.pool == "mean"
    assert len(found) == (7 if pooled else 10) and "cls" in found
    runs = [evaluator.run(reduce_tokens(evaluator.plain, r_max=0.9, score=s)) for s in ("cls", "received")]
    assert torch.equal(*runs) == pooled


def test_payoff_gives_what_was_asked_for_or_an_empty_row(evaluator, calibration, monkeypatch):
    """With a clock that counts operations: all tokens where that is fast enough, fewer, and none where nothing is."""
    monkeypatch.setattr(tc, "TokenLatency", lambda model, *_, **options: lambda counts: reduce_tokens(
        model, action="size-priced", pooled_last=True, counts=counts).macs() / evaluator.macs)  # fmt: skip
    monkeypatch.setattr(evaluator, "times", lambda models, *_: {
        k: m.macs() / evaluator.macs if k == "reduced" else 1.0 for k, m in models.items()})  # fmt: skip
    rows = tc.payoff(evaluator, calibration, [2], (1.0, 0.7, 0.01), passes=4).set_index("goal")
    assert rows.tokens[1.0] == reduce_tokens(evaluator.plain, r_max=0.0).tokens
    assert rows.kl[1.0] == pytest.approx(0, abs=1e-6)
    assert rows.share[0.7] <= 0.7 < 0.8 * rows.share[1.0] + 0.1
    assert rows.speed_up[0.7] == pytest.approx(1 / rows.share[0.7])
    assert rows.isna().loc[0.01, ["tokens", "speed_up", "change"]].all()
    assert torch.equal(evaluator.correct, evaluator.logits.argmax(1) == evaluator.labels)


def test_a_cut_is_of_what_can_go_not_of_what_a_stem_keeps(evaluator):
    plain, floor = evaluator.plain, fit_floor(evaluator)
    assert tc.share_left(evaluator, 0.5) == pytest.approx((1 + floor) / 2)
    config = plain.config
    blocks = config.depth * (config.macs() - dataclasses.replace(config, depth=config.depth - 1).macs())
    assert 1 - blocks / config.macs() < floor < 1, "what is left holds the stem and the head"
    for cut in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match=rf"cut={cut}: .* between 0 and 1"):
            tc.share_left(evaluator, cut)


def fit_floor(evaluator):
    """The least share of the MACs that `fit_budget` can be asked for, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        try:
            fit_budget(evaluator.plain, middle * evaluator.macs, alpha=0.5, action="size-priced", pooled_last=True)
            high = middle
        except ValueError:
            low = middle
    return high
