"""How sure a difference is: on the same images, over seeds, among several comparisons.

One sign convention: a change in accuracy, in points, negative = worse.
"""

import base64
import math
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np
import torch
from scipy.special import stdtr, stdtrit


@dataclass(frozen=True)
class Difference:
    """A difference in points with its 95 % interval [low, high], and the p-value of there being none."""

    points: float
    low: float
    high: float
    p: float

    @property
    def clear(self):
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self):
        return f"{self.points:+.2f} points (95 %: {self.low:+.2f} to {self.high:+.2f})"


def packed(right):
    """Bools, one an image, as text that a row can hold: a bit each, in base64. `unpacked` reads it."""
    return base64.b64encode(np.packbits(torch.as_tensor(right).bool().cpu().numpy())).decode()


def unpacked(text, n):
    """The `n` bools of a text by `packed`, an array; ValueError if it does not hold as many."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8))
    if not n <= len(bits) < n + 8:
        raise ValueError(f"{len(bits)} bits do not tell of {n} images")
    return bits[:n].astype(bool)


def paired_difference(correct_a, correct_b):
    """Accuracy of a minus that of b on the same images, as a Difference.

    correct_a, correct_b: bool N, which images were judged rightly. Only those on which the two disagree tell them
    apart: the interval is Wald's after adding 1/2 to each of the four counts (Agresti & Min 2005, "Wald+2"), p is
    the exact McNemar test's, two-sided. ValueError: nothing to compare, different lengths.
    """
    a, b = (torch.as_tensor(c).bool().flatten().cpu() for c in (correct_a, correct_b))
    if len(a) != len(b) or not len(a):
        raise ValueError(f"a paired comparison needs the same images for both, not {len(a)} and {len(b)}")
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    total, up, down = n + 2, only_a + 0.5, only_b + 0.5
    middle = (up - down) / total
    half = NormalDist().inv_cdf(0.975) * math.sqrt((up + down) / total - middle**2) / math.sqrt(total)
    points = 100 * (only_a - only_b) / n
    return Difference(points, 100 * (middle - half), 100 * (middle + half), _mcnemar(only_a, only_b))


def _mcnemar(only_a, only_b):
    """Two-sided p of a fair coin that falls `only_a` times one way and `only_b` times the other."""
    tosses, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(tosses, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**tosses)  # whole numbers of any length: nothing underflows


def t_interval(values):
    """(mean, half the 95 % interval) of values from independent runs by Student's t; ValueError below two of them."""
    values = [float(v) for v in values]
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least two, not {len(values)}")
    return fmean(values), float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))


def seed_difference(a, b):
    """a minus b over paired seeds (numbers in the same order), as a Difference by the paired t-test."""
    changes = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    middle, half = t_interval(changes)
    spread = stdev(changes) / math.sqrt(len(changes))
    p = float(2 * stdtr(len(changes) - 1, -abs(middle) / spread) if spread else middle == 0)
    return Difference(middle, middle - half, middle + half, p)


def paired_seeds(right_a, right_b):
    """Accuracy of a minus that of b over several seeds that were judged on the same images, as a Difference.

    right_a, right_b: a bool tensor N a seed, which images were judged rightly. Two things move the mean of the
    differences d: the seeds, by s^2(their means) / seeds, and the images, by the variance over images of d's mean over
    the seeds, / N (after adding the two images of Wald+2, on which a and b disagree once each way; see
    `paired_difference`). Their sum counts twice what a seed does to single images, which errs on the safe side. The
    interval is Student's t, with the degrees of freedom of Welch and Satterthwaite. ValueError: fewer than two seeds,
    other images.
    """
    a, b = (torch.stack([torch.as_tensor(r).flatten().cpu() for r in each]).double() for each in (right_a, right_b))
    if a.shape != b.shape or len(a) < 2:
        raise ValueError(f"two seeds or more on the same images are needed, not {tuple(a.shape)} and {tuple(b.shape)}")
    apart, (seeds, n) = a - b, a.shape
    middle, each = apart.mean().item(), apart.mean(0)
    of_seeds = apart.mean(1).var().item() / seeds
    of_images = ((each - middle).square().sum().item() + 1) / (n + 2) ** 2
    error = math.sqrt(of_seeds + of_images)
    freedom = error**4 / (of_seeds**2 / (seeds - 1) + of_images**2 / (n + 1))
    half = float(stdtrit(freedom, 0.975)) * error
    p = float(2 * stdtr(freedom, -abs(middle) / error))
    return Difference(100 * middle, 100 * (middle - half), 100 * (middle + half), p)


def holm(p_values):
    """p-values of several comparisons adjusted for their number (Holm 1979), in the given order.

    To reject where an adjusted value is at most 5 % keeps the chance of any false rejection at 5 %.
    """
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, worst)
    return adjusted
