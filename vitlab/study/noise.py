"""How far figures of one model may lie apart by chance: the noise that verdicts and sentences allow for."""

import math
from statistics import fmean, stdev

from vitlab.metrics.measure import show
from vitlab.metrics.statistics import t_interval

# standard deviation of a single run: points for an accuracy, a share of the figure for the others; what is
# counted, and a peak of allocated memory, repeats exactly
NOISE = {"accuracy": 0.5, "speed": 0.02, "power": 0.02, "memory": 0.0, "structural": 0.0}


def interval(values, noise):
    """(mean, standard deviation or None, margin): half the 95 % interval of the mean of the `values` of runs.

    Student's t over two runs or more; one run lies within 1.96 times its `noise`, in the values' unit.
    """
    if len(values) == 1:
        return float(values[0]), None, 1.96 * noise
    mean, margin = t_interval(values)
    return mean, stdev(values), margin


def sampling_error(accuracy, images):
    """Standard deviation (points) of an accuracy (%) for want of more test images than `images`."""
    share = accuracy / 100
    return 100 * math.sqrt(share * (1 - share) / images)


def run_noise(rows):
    """Standard deviation (points) to expect of one run's accuracy: its seed's, and the finite test set's."""
    return math.hypot(NOISE["accuracy"], sampling_error(rows.accuracy_top1.mean(), rows.n.min()))


def word(difference, noise=NOISE["accuracy"]):
    """A change in accuracy as said in a sentence: "-1.20 points"; within twice the noise of two runs it says so."""
    inside = abs(difference) <= 2 * math.sqrt(2) * noise
    return f"{difference:+.2f} points" + (" (within the noise of two runs)" if inside else "")


def over_seeds(values, column):
    """A column's values over seeds as text: "71.00 ± 1.41" (standard deviation), or "not measured"."""
    values = [float(v) for v in values if v is not None and v == v]
    text = show(fmean(values) if values else None, column)
    return text + (f" ± {show(stdev(values), column)}" if len(values) > 1 else "")
