"""Names of arms in figures."""

import math

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.transforms import Bbox
from scipy.optimize import isotonic_regression


def literal(text):
    """`text` as it is: between dollar signs matplotlib reads formulas, and fails at what is none."""
    return str(text).replace("$", r"\$")


def name_beside(ax, ends):
    """In place of a legend: {name: (x, y, colour)}, each named in its colour right of the axes, with a line to x, y.

    Comes last, when the limits of the axes are final. Names keep the order of their points and the height of a line.
    """
    ax.get_xlim(), ax.get_ylim()  # brings the limits up to date
    at = {name: np.clip(ax.transAxes.inverted().transform(ax.transData.transform((x, y))), 0, 1)
          for name, (x, y, _) in ends.items() if math.isfinite(y)}  # fmt: skip
    if not at:
        return
    names = sorted(at, key=lambda name: at[name][1])
    gaps = 0.15 / (ax.get_position().height * ax.figure.get_figheight()) * np.arange(len(names))  # inches
    room = 1 - gaps[-1]  # below 0 where they need more than the height: they stick out at both ends alike
    places = isotonic_regression([at[name][1] - gap for name, gap in zip(names, gaps)]).x
    for name, place in zip(names, gaps + np.clip(places, min(0, room / 2), max(room, room / 2))):
        colour = [0.7 * part for part in to_rgb(ends[name][2])]  # text is thin: darker
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
        ax.annotate(literal(name), at[name], (1.06, place), xycoords="axes fraction", color=colour, fontsize=8,
                    va="center", arrowprops=line | {"relpos": (0, 0.5)}, annotation_clip=False)  # fmt: skip


def name_near(ax, names, markers):
    """Each text of `names`, [(x, y, text)], right or left of its point, above or below: the first place that is free.

    markers: [(x, y)] of all that is drawn. A name that would cover a marker or another name, or cross the axis, is left
    out: the first of `names` matter most. Comes last, when the layout of the figure is final but for these.
    """
    ax.figure.draw_without_rendering()
    ways = {(8, 0): ("left", "center"), (-8, 0): ("right", "center"), (0, 7): ("center", "bottom"),
            (0, -7): ("center", "top")}  # fmt: skip
    taken = [Bbox.from_extents(*(at - 5), *(at + 5)) for at in ax.transData.transform(list(markers))]
    left, below, right, above = *ax.bbox.p0, ax.figure.bbox.x1, ax.bbox.y1
    for x, y, text in names:
        for at, (side, end) in ways.items():
            shown = ax.annotate(literal(text), (x, y), at, textcoords="offset points", fontsize=7, ha=side, va=end)
            shown.set_in_layout(False)
            box = shown.get_window_extent()
            inside = left < box.x0 and box.x1 < right and below < box.y0 and box.y1 < above
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
            shown.remove()
