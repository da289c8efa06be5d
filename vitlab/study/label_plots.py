"""Names of arms in figures."""

import math

import numpy as np
from matplotlib.colors import to_rgb
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
