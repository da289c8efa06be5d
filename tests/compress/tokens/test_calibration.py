"""Counts chosen by a budget of operations or of time, and the search."""

import dataclasses

import pytest
import torch
from vits import operations, pictures, small

from vitlab.compress.tokens import search
from vitlab.compress.tokens.latency import TokenLatency
from vitlab.compress.tokens.reduction import TokenConfig, reduce_tokens
from vitlab.data.datasets import load
from vitlab.metrics.predict import kl_divergence


def test_calibration_meets_its_budget_and_beats_an_even_split():
    model, images = small(image_size=16), pictures(32, side=16)
    budget = 0.75 * model.config.macs()
    config = search.calibrate(model, images, macs=budget, step=3, action="merge")
    even = search.fit_budget(model, budget, alpha=1.0, action="merge")
    assert reduce_tokens(model, config).macs() <= budget and reduce_tokens(model, even).macs() <= budget
    def moved(config):
        return kl_divergence(reduce_tokens(model, config)(images), model(images)).item()

    chosen, fixed = moved(config), moved(even)
    assert chosen <= fixed
    schedules = [search.fit_budget(model, budget, alpha=a, action="merge") for a in search.ALPHAS[:-1]]
    assert chosen <= min(map(moved, schedules))
    shielded = search.calibrate(model, images[:8], macs=budget, step=3, action="merge", protect=(0, 2)).counts
    assert shielded[0] == 17 and shielded[2] == shielded[1], "protected blocks remove nothing"
    assert moved(TokenConfig(r_max=0.0)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="no schedule of 'drop' costs this little"):
        search.calibrate(model, images[:2], macs=1, step=8)


def test_tokens_go_at_once_where_every_choice_costs_time():
    model, images = small(image_size=16, depth=4), pictures(16, side=16)
    budget = 0.7 * model.config.macs()
    found = search.at_once(model, budget, action="merge")
    assert [config.protect for config in found] == [(), (0,)]
    for block, config in enumerate(found):
        tokens = reduce_tokens(model, config).tokens
        assert tokens == (17,) * block + (tokens[-1],) * (4 - block)
        assert reduce_tokens(model, config).macs() <= budget
        more = [t + (layer >= block) for layer, t in enumerate(tokens)]
        assert reduce_tokens(model, config, counts=more).macs() > budget, "not one more token fits"
    assert search.at_once(model, budget, protect=(0, 1))[0].counts_for(17, 4, 1)[:2] == (17, 17)
    assert len(search.at_once(model, 0.4 * model.config.macs(), action="merge")) == 1, "the second is too late"

    def clock(counts):
        return sum(counts) + 10 * sum(after < before for before, after in zip((17, *counts), counts))

    # twice removing is 20 of 68 that all tokens take, and leaves 28 for tokens: once is enough
    counts = search.calibrate(model, images, latency=48, meter=clock, action="merge").counts
    assert len({17, *counts}) == 2 and clock(counts) <= 48


@pytest.mark.parametrize("options", [{"action": "drop"}, {"action": "size-priced"},
                                     {"action": "size-priced", "pooled_last": True}, {"action": "merge"},
                                     {"rule": "published"}])  # fmt: skip
@pytest.mark.parametrize("kind", [{}, {"pool": "mean", "mlp": "conv"}])
def test_timed_blocks_add_up_to_the_whole(options, kind):
    """With torch's counter of operations as the clock, the parts are exactly the whole, each timed once."""
    model, images = small(image_size=16, depth=3, **kind), pictures(2, side=16)
    meter = TokenLatency(model, images, timer=operations, **options)
    prefix = 1 - bool(kind)
    for counts in ((16, 16, 16), (12, 9, 9), (10, 10, 4), (16, 9, 5)):
        counts = tuple(c + prefix for c in counts)
        reduced = reduce_tokens(model, counts=counts, **options)
        assert meter(counts) == operations(reduced, images), counts
    before = dict(meter.timed)
    meter(counts)
    assert meter.timed == before
    with pytest.raises(ValueError, match="each must be at most the one before"):
        meter((9, 12, 4))


def test_blocks_of_one_shape_are_timed_once_timms_too():
    timm = pytest.importorskip("timm")
    vit_timm = timm.models.VisionTransformer(16, 4, 3, 5, embed_dim=32, depth=3, num_heads=2).eval()
    found = TokenLatency(vit_timm, pictures(1, side=16), timer=lambda run: run() is not None, action="merge")
    assert found((12, 12, 12)) == 4, "embedding and three blocks"
    clocked = TokenLatency(vit_timm.train(), pictures(1, side=16), seconds=0.0)
    assert clocked((12, 12, 8)) > 0 and set(clocked.timed) == {
        "embedding", (17, 12, 0), (12, 12, 0), (12, 8, "last")}  # fmt: skip
    assert vit_timm.training, "the model is as it was"


def test_calibration_to_a_clock_that_counts_operations_is_calibration_to_operations():
    model, images = small(image_size=16), pictures(16, side=16)
    reduced = reduce_tokens(model, action="size-priced")
    budget = 0.7 * model.config.macs()
    options = {"step": 4, "passes": 12, "action": "size-priced"}
    by_clock = search.calibrate(model, images, latency=budget, meter=lambda counts: reduced.reduce_by(
        counts=counts).macs(), **options)  # fmt: skip
    assert by_clock == search.calibrate(model, images, macs=budget, **options)
    whole = reduce_tokens(model, r_max=0.0).tokens
    assert search.calibrate(model, images, latency=1.0, meter=lambda counts: 1.0).counts == whole, "nothing to gain"
    for wrong in ({}, {"macs": 1.0, "latency": 1.0, "meter": len}, {"latency": 1.0}, {"macs": 1.0, "meter": len}):
        with pytest.raises(ValueError, match=r"give macs=\.\.\., or latency=\.\.\. with meter"):
            search.calibrate(model, images, **wrong)
    with pytest.raises(ValueError, match=r"latency=0.5: no schedule of 'drop' costs this little"):
        search.calibrate(model, images[:2], latency=0.5, meter=lambda counts: 1.0)


def test_calibration_tells_how_far_it_is_and_what_it_cannot_use(monkeypatch):
    model, images, said = small(image_size=16), pictures(8, side=16), []
    budget = 0.7 * model.config.macs()
    monkeypatch.setattr(search, "EVERY", 0.0)
    search.calibrate(model, images, macs=budget, passes=10, log=said.append)
    assert len(said) == 10 and "pass 10 of at most 10  KL" in said[-1] and said[-1].endswith("left at most 0m00s")
    with pytest.raises(ValueError, match=r"torch.uint8: give them normalised"):
        search.calibrate(model, (images * 50).byte(), macs=budget)
    images[3] = torch.nan
    with pytest.raises(ValueError, match="1 of 8 images hold values that are not finite"):
        search.calibrate(model, images, macs=budget)


def test_a_timm_model_and_a_data_set_are_calibrated_by_operations():
    timm, data = pytest.importorskip("timm"), load("tiny")
    data = dataclasses.replace(data, train=data.train.take(16))
    model = timm.models.VisionTransformer(16, 4, 3, 10, embed_dim=32, depth=3, num_heads=2).eval()
    budget = 0.8 * reduce_tokens(model, r_max=0.0).macs()
    found = search.calibrate(model, data, macs=budget, passes=8, log=None)
    assert reduce_tokens(model, found).macs() <= budget
    assert reduce_tokens(model, search.fit_budget(model, budget)).macs() <= budget


def test_search_is_shared_and_resumed(tmp_path):
    pytest.importorskip("optuna")

    def evaluate(config):
        return 1 - config.r_max**2, 1 - config.r_max + 1 / config.alpha

    options = {"storage": tmp_path / "deep" / "study.db", "name": "s"}
    first = search.search(evaluate, trials=3, **options)
    done = [t.params for t in first.trials]
    again = search.search(evaluate, trials=5, **options)
    assert len(done) == 3 and len(again.trials) == 5
    assert [t.params for t in again.trials[:3]] == done
    front = search.best(again)
    assert front == sorted(front, key=lambda row: -row["accuracy"])
    assert [row["latency"] for row in front] == sorted((row["latency"] for row in front), reverse=True)
