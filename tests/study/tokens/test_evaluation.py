"""Token reduction, measured: figures and rows held against what can be worked out by hand."""

import dataclasses

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from vitlab.compress.tokens.reduction import TokenConfig, reduce_tokens
from vitlab.metrics.measure import measure
from vitlab.models.vit import ViT, ViTConfig
from vitlab.study import zoo
from vitlab.study.study import Arm
from vitlab.study.tokens import evaluation as ts
from vitlab.study.tokens import panel as token_panel
from vitlab.study.tokens import plots as token_plots
from vitlab.train.loop import History


def test_an_evaluator_counts_what_it_sees(evaluator, tiny):
    right = (evaluator.plain(evaluator.images).argmax(1) == tiny.val.take(40).labels).float().mean().item()
    assert evaluator.accuracy == pytest.approx(100 * right)
    same = evaluator.evaluate(reduce_tokens(evaluator.plain, r_max=0.0))
    assert same["change"] == 0 and same["share"] == 1 and same["kl"] == pytest.approx(0, abs=1e-7)
    reduced = reduce_tokens(evaluator.plain, r_max=0.9, alpha=1.0)
    found = evaluator.evaluate(reduced)
    with torch.no_grad():
        after, before = (m(evaluator.images).double().softmax(1) for m in (reduced, evaluator.plain))
    assert found["kl"] == pytest.approx((before * (before / after).log()).sum(1).mean().item(), rel=1e-3, abs=1e-6)
    assert found["macs"] == reduced.macs() < evaluator.macs


def test_a_sweep_has_every_setting_and_the_mean_over_seeds(evaluator):
    rows = ts.sweep([evaluator, evaluator], {"drop": {}, "merge": {"action": "merge"}}, [1.0, 2.0], (0.3, 0.8))
    assert len(rows) == 8 and set(rows.method) == {"drop", "merge"}
    assert rows.latency_ms.isna().all()
    one = rows[(rows.method == "merge") & (rows.alpha == 2.0) & (rows.r_max == 0.8)].iloc[0]
    model = reduce_tokens(evaluator.plain, alpha=2.0, r_max=0.8, action="merge")
    assert one.tokens == model.tokens and one.accuracy == evaluator.evaluate(model)["accuracy"]


def test_choose_takes_the_cheapest_that_is_allowed_else_the_least_bad():
    rows = pd.DataFrame({"alpha": [1, 2, 3], "change": [-2.0, -0.5, -0.1], "macs": [10, 20, 30]})
    for allowed, alpha, there_is_one in ((0.5, 2, True), (5.0, 1, True), (0.0, 3, False)):
        found = ts.choose(rows, allowed)
        assert (found.alpha, found.allowed) == (alpha, there_is_one)


def test_speed_has_the_limit_of_the_closed_form(evaluator):
    config = TokenConfig(r_max=0.8, alpha=1.0)
    rows = ts.speed(evaluator, {"drop": config}, [1, 2], seconds=0.0)
    assert rows.limit.tolist() == [evaluator.macs / reduce_tokens(evaluator.plain, config).macs()] * 2
    assert rows.measured.tolist() == (rows.plain_ms / rows.reduced_ms).tolist()


def test_adaptive_rows_come_with_a_control_of_the_same_cost(evaluator, tiny):
    rows = ts.adaptive(evaluator, ts.Evaluator(evaluator.plain, tiny, 30, split="train"))
    for chosen, fixed in ((rows.iloc[0], rows.iloc[1]), (rows.iloc[2], rows.iloc[3])):
        assert sum(chosen.used) == 40 and fixed.used is None
        # whole tokens: the control can miss the cost by one step
        assert fixed.macs <= chosen.macs * (1 + 1e-9) and fixed.macs > 0.85 * chosen.macs
        assert fixed.chosen == f"one for all, at the mean cost {chosen.chosen}"
        assert chosen.closer == pytest.approx(fixed.kl - chosen.kl, abs=1e-6)
        assert chosen.low <= chosen.closer <= chosen.high


def test_reduced_arms_share_the_weights():
    model = ViT(ViTConfig(image_size=32, patch_size=8, dim=32, depth=3, heads=2, mlp_dim=64)).eval()
    arm = Arm("plain", 0, "key", model, History(), zoo.get("ours"))
    fewer = ts.reduced(arm, "fewer", r_max=0.3)
    assert fewer.name == "fewer" and fewer.model.plain is arm.model and fewer.model.tokens[-1] < 17
    assert ts.reduced(fewer, "plain").model is arm.model
    noted = ts.reduced(arm, "noted", r_max=0.3, changes=("r_max 0.3 instead of 0.6",))
    assert noted.spec.why.endswith("r_max 0.3 instead of 0.6") and not arm.spec.changes


def test_pictures_of_kept_and_merged_patches():
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    images[..., :2, :] = 200
    there = token_plots.present(torch.tensor([[0, 3, -1]]), 4)
    assert there.tolist() == [[True, False, False, True]]
    faded = token_plots.faded(images, there.view(1, 2, 2))
    assert (faded[..., :2, :2] == 200).all() and (faded[..., 2:, :2] > 200).all() and (faded[..., 2:, 2:] == 0).all()
    owner = torch.tensor([[[0, 1], [0, 1]]])  # each column of patches is one token
    assert (token_plots.mosaic(images, owner) == 100).all()


@pytest.mark.parametrize("action", ["drop", "fuse", "merge"])
def test_panel_is_a_figure_without_a_person(evaluator, action, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    figure = token_panel.panel({"m": evaluator}, image=2, action=action, interactive=False)
    bars = figure.subfigs[1].axes[0].patches
    assert sum(b.get_height() for b in bars) == pytest.approx(2, abs=1e-4), "two sets of probabilities"
    assert len(figure.subfigs[0].axes) == 1 + 3
    plt.close("all")


def test_panel_redraws_when_a_slider_moves(evaluator, monkeypatch):
    seen = []
    monkeypatch.setattr(token_panel, "draw", lambda evaluator, image, **options: seen.append((image, options)))
    box = token_panel.panel({"m": evaluator}, interactive=True, image=1)
    knobs = {w.description: w for row in box.children[:2] for w in row.children}
    knobs["alpha"].value = 2.5
    knobs["image"].value = 4
    assert seen[-1][0] == 4 and seen[-1][1]["alpha"] == 2.5 and seen[0][0] == 1
    assert knobs["score"].disabled and "score changes nothing" in box.children[2].value
    knobs["action"].value = "drop"
    assert not knobs["score"].disabled and not box.children[2].value
    count = len(seen)
    knobs["score"].value = "entropy"
    knobs["action"].value = "fuse"
    assert len(seen) == count + 1, "a score below zero cannot weigh: it says so instead of drawing"
    assert "error" not in str(box.children[3].outputs).lower()


def test_what_a_row_tells_is_not_run_again(evaluator, tiny, monkeypatch):
    model = reduce_tokens(evaluator.plain, config := TokenConfig(r_max=0.9, alpha=1.0))
    seen = dataclasses.replace(tiny, test=tiny.val.take(len(evaluator.labels)))
    row = measure(model, seen, batch=2, seconds=0.001)
    by_running = evaluator.judged(config)
    evaluator._judged.clear()
    evaluator.remember(config, row)
    monkeypatch.setattr(evaluator, "run", None)
    assert torch.equal(evaluator.judged(config), by_running) and 0 < by_running.sum() < len(by_running)
    assert torch.equal(*ts.judged(pd.DataFrame([row])), by_running)
    with pytest.raises(ValueError, match="do not tell of 40 images"):
        evaluator.remember(config, measure(model, dataclasses.replace(tiny, test=tiny.val.take(24)), seconds=0.001))
