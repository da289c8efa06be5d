"""The scoreboard: what an arm is compared with, changes by hand, the front, what was claimed, the figure."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from vitlab.study import scoreboard
from vitlab.study.claims import get
from vitlab.study.noise import image_noise, interval


def rows(*arms, **more):
    """Rows of (arm, seed, accuracy, ms, images/s)."""
    names = ("arm", "seed", "accuracy_top1", "latency_ms", "images_per_s")
    fixed = {"preset": "cpu", "notebook": "05_tokens", "dataset": "cifar10", "batch": 64, "params": 1e6, "macs": 2e6,
             "size_mb": 4.0, "peak_mb": 8.0, "mj_per_image": None, "why": ""}  # fmt: skip
    return pd.DataFrame(arms, columns=names).assign(**(fixed | more))


TWO = rows(("S3/baseline-small", 0, 60.0, 2.0, 100.0), ("S3/baseline-small", 1, 62.0, 2.0, 100.0),
           ("S3/pruned-on-small", 0, 59.0, 4.0, 150.0), ("S3/pruned-on-small", 1, 60.0, 2.0, 150.0))  # fmt: skip


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("S2/pruned-40", "S2/baseline"),
        ("S2/pruned-40-kd", "S2/baseline-tuned"),
        ("S2/torch-pruning", "S2/baseline-tuned"),
        ("S2/tiny-kd", "S2/baseline"),
        ("S0/sparse", "S0/dense-6"),
        ("S0/dense-6", "S0/dense"),
        ("S2/pruned-40-scratch", "S2/baseline-tuned"),
        ("S1/B1", "plain ViT"),
        ("ours, ToMe at its alpha", "ours"),
        ("ours/control", "ours/uncut"),
        ("cnn", "plain ViT"),
        ("ripple, 65 tokens", "softmax, 65 tokens"),
        ("softmax at hydra's MACs", "S4/baseline"),
        ("S4/ripple on tiny-imagenet", None),
    ],
)
def test_what_an_arm_is_compared_with(model, base):
    present = ("S0/dense", "S0/dense-6", "S2/baseline", "S2/baseline-tuned", "S4/baseline", "ours", "ours/uncut",
               "plain ViT", "softmax, 65 tokens")  # fmt: skip
    assert scoreboard.base_of(model, present) == base


@pytest.mark.parametrize(
    ("family", "models"),
    {
        "softmax attention": ["S0/dense-6", "softmax at hydra's MACs", "softmax with ripple's convolutions"],
        "sparse attention": ["S0/sparse", "top-k", "top-k, shared out", "both"],
        "heads removed": ["heads, budget", "heads, L1", "heads, hard-concrete"],
        "smaller model": ["dense, narrower", "S2/tiny", "S2/pruned-40-scratch"],
        "distilled": ["S2/tiny-kd", "S2/pruned-40-kd", "ours/kd-cnn", "ours/locality"],
        "channels pruned": ["pruned", "pruned, fine-tuned", "S2/pruned-40", "S2/torch-pruning", "ours/in-rounds"],
        "tokens dropped": ["S3/pruned-on", "S3/baseline-alpha-1.5", "ours, drop by attention at 1.85x"],
        "tokens dropped by a grid": ["ours, drop by a uniform grid at 1.85x"],
        "all tokens kept": ["S3/pruned-off", "S3/baseline, all tokens, pooled-last block at 1.85x"],
        "tokens merged, ours": ["S3/baseline, size-priced merge, calibrated at 1.85x", "ours + fewer tokens"],
        "tokens merged, ToMe": ["ours, ToMe, calibrated at 1.85x"],
        "several at once": ["ours/kd-cnn + fewer tokens"],
        "linear attention": ["S4/ripple", "hydra, 65 tokens", "ours, ripple", "linear"],
        "no attention": ["no attention", "ours, no attention"],
        "another recipe": ["step: muon", "S3/baseline, our recipe"],
        "other": ["something new"],
    }.items(),
)
def test_each_arm_is_of_its_family(family, models):
    for model in models:
        found = scoreboard.board(rows(("ours", 0, 60.0, 1.0, 9.0), ("S3/baseline", 0, 60.0, 1.0, 9.0),
                                      ("S0/dense", 0, 60.0, 1.0, 9.0), ("S2/baseline", 0, 60.0, 1.0, 9.0),
                                      ("S4/baseline", 0, 60.0, 1.0, 9.0), ("ours/uncut", 0, 60.0, 1.0, 9.0),
                                      (model, 0, 60.0, 1.0, 9.0)))  # fmt: skip
        assert found.set_index("arm").family[model] == family, model


def test_groups_are_of_families_that_there_are():
    assert set(scoreboard.GROUPS) < set(scoreboard.FAMILIES)
    assert not set(scoreboard.GROUPS.values()) & set(scoreboard.FAMILIES)
    frame = scoreboard.board(TWO.replace("S3/pruned-on-small", "S3/sparse-small"))
    figure = scoreboard.chart(frame.replace(scoreboard.GROUPS), [("latency_x", "change")])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["baseline", "another attention"]
    plt.close(figure)


def test_one_disturbed_seed_moves_no_speed():
    quiet = rows(*(("S3/baseline-small", seed, 60.0, 2.0, 100.0) for seed in range(3)),
                 *(("S3/pruned-on-small", seed, 59.0, 1.0, 150.0) for seed in range(3)))  # fmt: skip
    busy = quiet.assign(latency_ms=quiet.latency_ms.mask(quiet.index == 4, 50.0),
                        images_per_s=quiet.images_per_s.mask(quiet.index == 0, 9.0))  # fmt: skip
    columns = ["latency_ms", "images_per_s", "latency_x", "images_per_s_x", "latency_ms %", "images_per_s %"]
    one, other = (scoreboard.board(r)[columns].values.tolist() for r in (quiet, busy))
    assert one == other == [[2, 100, 1, 1, 0, 0], [1, 150, 2, 1.5, -50, 50]]


def test_speeds_are_compared_on_the_seeds_of_both():
    found = scoreboard.board(pd.concat([TWO, rows(("S3/baseline-small", 2, 60.0, 9.0, 9.0))], ignore_index=True))
    assert found.images_per_s_x.tolist() == [1, 1.5] and found.latency_x[1] == pytest.approx(2 / 3)


def test_changes_are_paired_by_seed_and_stand_beside_the_means():
    base, pruned = scoreboard.board(TWO).to_dict("records")
    assert (base["family"], pruned["family"], pruned["base"]) == ("baseline", "tokens dropped", "S3/baseline")
    assert (base["change"], base["latency_x"], base["accuracy_top1"]) == (0, 1, 61)
    assert (pruned["change"], pruned["n"], pruned["images_per_s_x"]) == (-1.5, 2, 1.5)
    assert pruned["latency_x"] == pytest.approx(2 / 3) and 0 < pruned["margin"] < 2
    assert pruned["accuracy_top1 %"] == pytest.approx(50 * (59 / 60 + 60 / 62) - 100)
    # what is its own base changes by 0 by definition; an accuracy has an interval of its own (t of 11 degrees: 2.20)
    assert pd.isna(base["margin"]) and pruned["margin"] == pytest.approx(2.200985 * ((10 * 0.5 + 0.5) / 11 / 2) ** 0.5)
    assert pruned["accuracy_margin"] == pytest.approx(2.200985 * ((10 * 0.25 + 0.5) / 11 / 2) ** 0.5)
    assert pd.isna(pruned["mj_per_image"]) and pruned["made by"] == ""
    tested = scoreboard.board(TWO.assign(n=10_000)).to_dict("records")[1]  # and that of the test images
    margin = interval([-1.0, -2.0], 0.5**0.5, 2**0.5 * image_noise(TWO.assign(n=10_000)))[2]
    assert tested["margin"] == pytest.approx(margin) and margin > 1.2 * pruned["margin"]


def test_an_arm_that_was_trained_for_longer_is_not_held_against_its_base():
    for epochs, fair in ((5, False), (2, True), (1, True)):
        _, pruned = scoreboard.board(TWO.assign(epochs=[2, 2, epochs, epochs])).to_dict("records")
        assert pd.notna(pruned["change"]) == pd.notna(pruned["latency_x"]) == pd.notna(pruned["macs %"]) == fair
        assert pruned["accuracy_top1"] == 59.5 and pruned["base"] == "S3/baseline"


def test_presets_are_never_mixed_and_older_code_is_told():
    with pytest.raises(ValueError, match=r"\['cpu', 'gpu'\] do not compare"):
        scoreboard.board(pd.concat([TWO, TWO.assign(preset="gpu")]))
    assert set(scoreboard.board(TWO.assign(why="made by older code"))["made by"]) == {"made by older code"}
    other = scoreboard.board(pd.concat([TWO, TWO.assign(notebook="06_other", accuracy_top1=1.0)]))
    assert other.change.tolist() == [0, -1.5, 0, 0]  # of its own notebook's base


def test_without_rows_there_is_an_empty_board_and_figure():
    board = scoreboard.board(pd.DataFrame())
    assert len(board) == 0 and set(scoreboard.board(TWO)) <= set(board)
    plt.close(scoreboard.chart(board, [("latency_x", "change"), ("macs", "accuracy_top1")]))
    assert "<table" in scoreboard.sortable(board).data


def test_the_front_is_what_none_other_beats():
    frame = pd.DataFrame({"cost": [3.0, 1.0, 2.0, 2.0, None], "accuracy_top1": [9.0, 5.0, 7.0, 6.0, 99.0]})
    assert scoreboard.front(frame, "cost").cost.tolist() == [1, 2, 3]
    assert scoreboard.front(frame, "cost", lower=False).cost.tolist() == [3]


def test_what_was_claimed_is_computed_from_the_claims():
    said = scoreboard.claimed().set_index("model")
    assert said.loc["S3/pruned-alpha-1.2", "images_per_s_x"] == 1.85
    drop = get("S3/pruned-alpha-1.2/accuracy-drop").value
    assert said.loc["S3/pruned-alpha-1.2", "change"] == pytest.approx(-drop)
    assert said.loc["S2/pruned-40-kd", "latency_x"] == pytest.approx(2.17 / 1.88)
    assert "S0/sparse" not in said.index and "S2/baseline" not in said.index


def test_the_chart_shows_every_arm_and_every_star():
    board = scoreboard.board(TWO)
    pairs = [("images_per_s_x", "change"), ("latency_x", "change")]
    figure = scoreboard.chart(board, pairs, said=scoreboard.claimed())
    left, right = figure.axes
    assert "64 images at a time" in left.get_xlabel() and "one image at a time" in right.get_xlabel()
    stars = next(line for line in left.lines if line.get_label() == "claimed")
    assert len(stars.get_xdata()) == scoreboard.claimed().images_per_s_x.notna().sum()
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"baseline", "tokens dropped", "claimed"}
    written = {text.get_text() for text in left.texts}
    assert {"token pruning,\nPruned model at alpha 1.2", "faster, more accurate"} <= written
    plt.close(figure)


def test_the_bars_are_those_of_what_is_drawn():
    board = scoreboard.board(TWO)
    figure = scoreboard.chart(board, [("latency_x", "change"), ("macs", "accuracy_top1")])
    for ax, margin in zip(figure.axes, ("margin", "accuracy_margin")):
        ends = [path.vertices[:, 1] for bars in ax.collections for path in bars.get_paths() if len(path.vertices) == 2]
        half = sorted(h for y in ends if (h := float(y.max() - y.min()) / 2) == h)
        assert half == pytest.approx(sorted(board[margin].dropna()))
    plt.close(figure)


def test_methods_stacked_stand_beside_their_product_and_sum():
    found = rows(("ours", 0, 80.0, 2.0, 100.0), ("ours/uncut", 0, 81.0, 2.0, 100.0), ("ours/kd", 0, 79.0, 2.0, 150.0),
                 ("ours + fewer", 0, 79.0, 2.0, 120.0), ("ours/kd + fewer", 0, 78.5, 2.0, 160.0),
                 ("ours/random + fewer", 0, 78.0, 2.0, 160.0))  # fmt: skip
    (line,) = scoreboard.stacked(scoreboard.board(found)).to_dict("records")
    assert (line["arm"], line["base"]) == ("ours/kd + fewer", "ours/uncut")
    assert (line["change"], line["images_per_s_x"]) == (-2.5, 1.6)
    assert line["added"] == -2 - 1 and line["multiplied"] == pytest.approx(1.5 * 1.2)
    assert len(scoreboard.stacked(scoreboard.board(TWO))) == len(scoreboard.stacked(scoreboard.board(TWO[:0]))) == 0


def test_a_sortable_table_has_a_click_on_each_heading():
    html = scoreboard.sortable(pd.DataFrame({"a": [1.0, None], "b": ["x", "y"]})).data
    assert html.count("onclick=") == 2 and "NaN" not in html
