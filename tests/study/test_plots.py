"""Figures and tables: not blank, told apart, with what they say."""

from itertools import pairwise

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vitlab.study import plots
from vitlab.study.label_plots import name_beside, name_near

matplotlib.use("Agg")


def test_figures_are_written_as_png_and_pdf_and_look_like_figures(tmp_path):
    plots.theme()
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    frame = pd.DataFrame(np.random.default_rng(0).random((4, 3)), index=list("abcd"), columns=list("xyz"))
    rows = pd.DataFrame({"arm": ["a", "a", "b"], "macs": [1e6, 1e6, 5e6], "latency_ms": [1.0, 1.1, 2.0],
                         "accuracy_top1": [50.0, 52.0, 60.0], "dataset": ["x", "x", "y"]})  # fmt: skip
    made = {
        "pictures": plots.pictures(images, columns=3, rows=["one", "two"]),
        "patches": plots.patches(images[0], 4),
        "tradeoff": plots.tradeoff(rows),
        "bars": plots.bars(frame, unit="u"),
        "heatmap": plots.heatmap(frame, label="l"),
        "confusion": plots.confusion([[3, 1], [0, 4]], ["cat", "dog"]),
        "per_class": plots.per_class({"a": [50.0] * 40, "b": [60.0] * 40}, [str(i) for i in range(40)]),
        "attention": plots.attention(images[:2], {"last": torch.rand(2, 4, 4)}, ["cat", "dog"]),
    }
    for name, figure in made.items():
        plots.save(figure, tmp_path / "figures" / name)
        png = np.asarray(Image.open(tmp_path / "figures" / f"{name}.png").convert("L"))
        assert png.std() > 5, f"{name} is blank"
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert len(list((tmp_path / "figures").iterdir())) == 2 * len(made)
    matplotlib.pyplot.close("all")


def test_only_patches_without_any_weight_are_black():
    sparse, dense = torch.tensor([[[0.0, 0.0], [1e-6, 1.0]]]), torch.tensor([[[0.0, 0.1], [0.5, 1.0]]])
    maps = {"several zeros": sparse, "scaled from its least": dense}
    figure = plots.attention(torch.full((1, 3, 4, 4), 9, dtype=torch.uint8), maps, ["cat"])
    unread, least = (ax.images[0].get_array()[::2, ::2].sum(-1) for ax in figure.axes[1:3])
    assert unread[0, 0] == unread[0, 1] == 0 and 0.2 < unread[1, 0] < unread[1, 1]
    assert 0.2 < least[0, 0] < least[0, 1] < least[1, 0] < least[1, 1]
    matplotlib.pyplot.close("all")


def test_no_two_of_many_arms_look_the_same():
    look = plots.colours(str(i) for i in range(25))
    assert len(set(look.values())) == 25 and look["3"] == plots.colours(map(str, range(5)))["3"]


def test_confusion_rows_are_percentages_of_the_truth():
    figure = plots.confusion([[3, 1], [0, 4]], ["cat", "dog"])
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert texts == ["75", "25", "0", "100"]
    matplotlib.pyplot.close("all")


def test_the_table_has_mean_and_deviation_over_seeds_and_says_what_was_not_measured():
    rows = pd.DataFrame({"arm": ["a", "a", "b"], "accuracy_top1": [70.0, 72.0, 80.0], "power_w": [None] * 3})
    table = plots.table(rows, ["accuracy_top1", "power_w"])
    assert table.loc["a", "Accuracy (%)"] == "71.00 ± 1.41"
    assert table.loc["b", "Accuracy (%)"] == "80.00"
    assert set(table["Power (W)"]) == {"not measured"} and table.seeds.tolist() == [2, 1]


def test_names_stand_beside_their_points_in_order_and_apart():
    ax = matplotlib.pyplot.subplots(figsize=(4, 3))[1]
    heights = {"a": 1.0, "$b": 1.001, "c": 1.002, "d": 10.0, "missing": float("nan")}
    ax.plot([0, 1], [0, 10])
    name_beside(ax, {name: (1, y, "C0") for name, y in heights.items()})
    places = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert list(places) == ["a", r"\$b", "c", "d"]
    inches = np.diff(list(places.values())) * ax.get_position().height * 3
    assert (inches > 0.149).all() and places["d"] > 0.9
    assert abs(np.mean(list(places.values())[:3]) - ax.texts[1].xy[1]) < 0.01  # around their points
    name_beside(ax, {str(i): (1, 5, "C0") for i in range(40)})  # more than fit: beyond both ends alike
    many = [text.get_position()[1] for text in ax.texts[-40:]]
    assert many[0] < 0 and abs(many[0] + many[-1] - 1) < 1e-9
    matplotlib.pyplot.close("all")


def test_names_near_points_cover_no_marker_and_no_other_name():
    figure, ax = matplotlib.pyplot.subplots(figsize=(4, 3))
    crowd = [(0.5 + x / 50, 0.5 + y / 50) for x in range(-3, 4) for y in range(-3, 4)]
    points = [(0.2, 0.8), (0.95, 0.2), (0.5, 0.5), (0.2, 0.81)]
    ax.set(xlim=(0, 1), ylim=(0, 1))
    name_near(ax, [(*at, f"a name, $ {i}") for i, at in enumerate(points)], [*points, *crowd])
    figure.draw_without_rendering()
    boxes = {text.get_text()[-1]: text.get_window_extent() for text in ax.texts}
    assert set(boxes) == {"0", "1", "3"}  # the one in the middle of the crowd has no room
    assert boxes["0"].x0 > ax.transData.transform(points[0])[0]  # right of its point, where there is room
    assert boxes["1"].x1 < ax.transData.transform(points[1])[0]  # and left of it near the edge
    for box in boxes.values():
        assert not any(box.contains(*at) for at in ax.transData.transform([*points, *crowd]))
        assert box.count_overlaps(list(boxes.values())) == 1 and figure.bbox.fully_containsx(box.x1)
    matplotlib.pyplot.close(figure)


@pytest.mark.parametrize("low, high", [(0.33, 0.7), (2.1, 2.6), (16, 29), (3, 9), (0.1, 30), (1, 5000)])
def test_a_logarithmic_axis_has_numbers_that_do_not_overlap(low, high):
    figure, ax = plt.subplots(figsize=(3.6, 3))
    ax.plot([low, high], [0, 0])
    ax.set(xscale="log")
    plots.plain_log(ax.xaxis)
    figure.canvas.draw()
    left, right = ax.get_xlim()
    labels = zip(ax.get_xticks(), ax.get_xticklabels())
    shown = [label.get_window_extent() for at, label in labels if left <= at <= right]
    assert len(shown) >= 3
    assert all(one.x1 < other.x0 for one, other in pairwise(shown))
