"""Token reduction, measured: figures and rows held against what can be worked out by hand."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from vitlab.compress.tokens import reduction as tokens
from vitlab.data import datasets
from vitlab.models.vit import ViT, ViTConfig
from vitlab.study.tokens import contest as tc
from vitlab.study.tokens import evaluation as ts
from vitlab.study.tokens import panel as token_panel
from vitlab.study.tokens import plots as token_plots


@pytest.fixture(scope="module")
def tiny():
    return datasets.load("tiny")


@pytest.fixture(scope="module", params=["cls", "mean"])
def probe(request, tiny):
    torch.manual_seed(0)
    model = ViT(ViTConfig(image_size=32, patch_size=8, dim=32, depth=3, heads=2, mlp_dim=64, pool=request.param))
    return ts.Evaluator(model.eval(), tiny, 40)


def test_a_probe_counts_what_it_sees(probe, tiny):
    right = (probe.plain(probe.images).argmax(1) == tiny.val.take(40).labels).float().mean().item()
    assert probe.accuracy == pytest.approx(100 * right)
    same = probe.look(tokens.reduce_tokens(probe.plain, r_max=0.0))
    assert same["lost"] == 0 and same["share"] == 1 and same["kl"] == pytest.approx(0, abs=1e-7)
    reduced = tokens.reduce_tokens(probe.plain, r_max=0.9, alpha=1.0)
    look = probe.look(reduced)
    with torch.no_grad():
        after, before = (m(probe.images).double().softmax(1) for m in (reduced, probe.plain))
    assert look["kl"] == pytest.approx((before * (before / after).log()).sum(1).mean().item(), rel=1e-3, abs=1e-6)
    assert look["macs"] == reduced.macs() < probe.macs


def test_a_sweep_has_every_setting_and_the_mean_over_seeds(probe):
    rows = ts.sweep([probe, probe], {"drop": {}, "merge": {"action": "merge"}}, [1.0, 2.0], (0.3, 0.8))
    assert len(rows) == 8 and set(rows.method) == {"drop", "merge"}
    assert (rows["std"] == 0).all() and rows.latency_ms.isna().all()
    one = rows[(rows.method == "merge") & (rows.alpha == 2.0) & (rows.r_max == 0.8)].iloc[0]
    model = tokens.reduce_tokens(probe.plain, alpha=2.0, r_max=0.8, action="merge")
    assert one.tokens == model.tokens and one.accuracy == probe.look(model)["accuracy"]


def test_choose_takes_the_cheapest_that_is_allowed_else_the_least_bad():
    rows = pd.DataFrame({"alpha": [1, 2, 3], "lost": [2.0, 0.5, 0.1], "macs": [10, 20, 30]})
    assert ts.choose(rows, 0.5).alpha == 2
    assert ts.choose(rows, 5.0).alpha == 1
    assert ts.choose(rows, 0.0).alpha == 3


def test_rivals_cost_the_same(probe):
    rows = tc.contest(probe, [0.75], batch=2, seconds=0.0, seeds=(0, 1), late=-1, calibration=probe.images[:8],
                      scores=("cls", "random", "grid"), passes=4)  # fmt: skip
    assert set(rows.group) == {"merge", "drop by score", "control", tc.OTHER}
    other = rows[rows.group == tc.OTHER].set_index("rival")
    assert set(other.index) == {tc.CLOCKED, tc.LEAN} and other.kl[tc.LEAN] == pytest.approx(0, abs=1e-6)
    rows = rows[rows.group != tc.OTHER]
    assert {tc.LATE, tc.CALIBRATED, *tc.ACTIONS, "drop, random"} <= set(rows.rival)
    assert (rows.share <= 0.75).all() and (rows.share > 0.6).all()
    counts = rows.set_index("rival").tokens["drop, random"]
    draws = [tokens.TokenConfig(score="random", pooled_last=True, seed=s, counts=counts) for s in (0, 1)]
    mean = sum(probe.look(tokens.reduce_tokens(probe.plain, c))["accuracy"] for c in draws) / 2
    assert rows.set_index("rival").accuracy["drop, random"] == pytest.approx(mean)
    both = tc.pooled([rows, rows.assign(accuracy=rows.accuracy + 2)]).set_index("rival")
    assert both.accuracy["drop, cls"] == pytest.approx(rows.set_index("rival").accuracy["drop, cls"] + 1)
    assert both.spread["drop, cls"] == pytest.approx(2**0.5)


def test_equal_latency_is_read_off_the_line_between_shares():
    times = (4.0, 6.0, 3.0, 5.0, 7.0, 8.0)
    rows = pd.DataFrame({"rival": [tc.TOME, tc.TOME, "fast", "fast", "slow", "slow"], "kl": [0.4, 0.2, 0.3, 0.1, 9, 8],
                         "at": [0.5, 0.7] * 3, "lost": 0.0, "speed_up": [10 / t for t in times]})  # fmt: skip
    found = tc.same_latency(rows)
    assert "slow" not in set(found.rival), "never as fast as that"
    assert found[found.rival == "fast"].kl.tolist() == pytest.approx([0.2, 0.1]), "40 % is half way from 30 to 50; 60"
    assert found[found.rival == tc.TOME].kl.tolist() == pytest.approx([0.4, 0.2])
    assert found[found.rival == tc.TOME]["at"].tolist() == [0.5, 0.7]


def test_payoff_gives_what_was_asked_for_or_an_empty_row(probe, monkeypatch):
    """With a clock that counts operations: all tokens where that is fast enough, fewer, and none where nothing is."""
    monkeypatch.setattr(tc, "TokenLatency", lambda model, *_, **options: lambda counts: tokens.reduce_tokens(
        model, action="ward", pooled_last=True, counts=counts).macs() / probe.macs)  # fmt: skip
    monkeypatch.setattr(probe, "times", lambda models, *_: {k: m.macs() / probe.macs if k == "reduced" else 1.0
                                                           for k, m in models.items()})  # fmt: skip
    rows = tc.payoff(probe, probe.images[:8], [2], (1.0, 0.7, 0.01), passes=4).set_index("goal")
    assert rows.tokens[1.0] == tokens.reduce_tokens(probe.plain, r_max=0.0).tokens and rows.kl[1.0] == pytest.approx(0, abs=1e-6)
    assert rows.share[0.7] <= 0.7 < 0.8 * rows.share[1.0] + 0.1
    assert rows.speed_up[0.7] == pytest.approx(1 / rows.share[0.7])
    assert rows.tokens[0.01] is None and rows.isna().loc[0.01, ["speed_up", "lost"]].all()


def test_agreement_is_the_overlap_of_what_is_kept(probe):
    table = ts.agreement(probe, ("cls", "norm", "grid"), block=1)
    assert (table.values.diagonal() == 100).all() and (table.values == table.values.T).all()
    parts = tokens.reduce_tokens(probe.plain).adapter
    counts = (parts.prefix + 16, parts.prefix + 8, parts.prefix + 8)
    sets = []
    for score in ("cls", "norm"):
        _, seen = tokens.reduce_tokens(probe.plain, counts=counts, score=score)(probe.images, intermediates=True)
        sets.append([set(row.tolist()) for row in seen["kept"][1]])
    shared = sum(len(a & b) / 8 for a, b in zip(*sets)) / 40 * 100
    assert table["cls"]["norm"] == pytest.approx(shared)


def test_speed_has_the_limit_of_the_closed_form(probe):
    config = tokens.TokenConfig(r_max=0.8, alpha=1.0)
    rows = ts.speed(probe, {"drop": config}, [1, 2], seconds=0.0)
    assert rows.limit.tolist() == [probe.macs / tokens.reduce_tokens(probe.plain, config).macs()] * 2
    assert rows.measured.tolist() == (rows.plain_ms / rows.reduced_ms).tolist()


def test_adaptive_rows_come_with_a_control_of_the_same_cost(probe, tiny):
    rows = ts.adaptive(probe, ts.Evaluator(probe.plain, tiny, 30, split="train"))
    for chosen, fixed in ((rows.iloc[0], rows.iloc[1]), (rows.iloc[2], rows.iloc[3])):
        assert sum(chosen.used) == 40 and fixed.used is None
        # whole tokens: the control can miss the cost by one step
        assert fixed.macs <= chosen.macs * (1 + 1e-9) and fixed.macs > 0.85 * chosen.macs


def test_answers_are_quotients_and_differences():
    names = ("S3/baseline", "S3/baseline-on", "S3/baseline-alpha-1.5", "S3/pruned-off", "S3/pruned-on",
             "S3/pruned-alpha-1.2")  # fmt: skip
    rows = pd.DataFrame({"arm": names, "seed": 0, "accuracy_top1": [70.0, 69, 68, 67, 66, 65],
                         "images_per_s": [100.0, 150, 160, 100, 150, 200]})  # fmt: skip

    class Trained:
        def __init__(self, seconds):
            self.history = type("H", (), {"seconds": seconds})

    found = ts.answers(rows, [Trained(90)])
    assert found["S3/pruned-alpha-1.2/speed-up"] == [2.0]
    assert found["S3/pruned-on/speed-up"] == [1.5]
    assert found["S3/pruned-alpha-1.2/accuracy-drop"] == [5.0]
    assert found["S3/trained-pruned/training-time"] == [1.5]
    assert found["S3/baseline-on/evaluation-time"] == pytest.approx([10_000 / 150])


def test_reduced_arms_share_the_weights_and_the_shipped_model_is_found():
    arm = ts.shipped("checkpoints/demo/ours-cifar10.safetensors")
    fewer = ts.reduced(arm, "fewer", r_max=0.3)
    assert fewer.name == "fewer" and fewer.model.plain is arm.model and fewer.model.tokens[-1] < 64
    assert ts.reduced(fewer, "plain").model is arm.model
    assert arm.spec.changes, "a shipped model is never as published"
    with pytest.raises(FileNotFoundError):
        ts.shipped("checkpoints/demo/none.safetensors")


def test_pictures_of_kept_and_merged_patches():
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    images[..., :2, :] = 200
    there = token_plots.present(torch.tensor([[0, 3, -1]]), 4)
    assert there.tolist() == [[True, False, False, True]]
    faded = token_plots.faded(images, there, (2, 2))
    assert (faded[..., :2, :2] == 200).all() and (faded[..., 2:, :2] > 200).all() and (faded[..., 2:, 2:] == 0).all()
    owner = torch.tensor([[0, 1, 0, 1]])  # each column of patches is one token
    assert (token_plots.mosaic(images, owner, (2, 2)) == 100).all()


@pytest.mark.parametrize("action", ["drop", "fuse", "merge"])
def test_panel_is_a_figure_without_a_person(probe, action, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    figure = token_panel.panel({"m": probe}, image=2, action=action, interactive=False)
    bars = figure.subfigs[1].axes[0].patches
    assert sum(b.get_height() for b in bars) == pytest.approx(2, abs=1e-4), "two sets of probabilities"
    assert len(figure.subfigs[0].axes) == 1 + 3
    plt.close("all")


def test_panel_redraws_when_a_slider_moves(probe, monkeypatch):
    seen = []
    monkeypatch.setattr(token_panel, "draw", lambda probe, image, **options: seen.append((image, options)))
    box = token_panel.panel({"m": probe}, interactive=True, image=1)
    knobs = {w.description: w for row in box.children[:2] for w in row.children}
    knobs["alpha"].value = 2.5
    knobs["image"].value = 4
    assert seen[-1][0] == 4 and seen[-1][1]["alpha"] == 2.5 and seen[0][0] == 1
    count = len(seen)
    knobs["score"].value = "entropy"
    knobs["action"].value = "edge"
    assert len(seen) == count + 1, "a score below zero cannot weigh: it says so instead of drawing"
    assert "error" not in str(box.children[2].outputs).lower()
