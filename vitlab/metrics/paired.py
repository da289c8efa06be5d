"""The accuracies of two models on the same images: how far apart, and how sure."""

import math
from dataclasses import dataclass

import torch

Z = 1.959964  # of a normal's middle 95 %


@dataclass(frozen=True)
class Paired:
    """change: accuracy of a minus that of b, in points (negative: a is worse); low, high: its 95 % interval; p: that
    of a difference this large or larger by chance; n: images."""

    change: float
    low: float
    high: float
    p: float
    n: int

    @property
    def differs(self):
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0

    def __str__(self):
        return f"{self.change:+.2f} points (95 %: {self.low:+.2f} to {self.high:+.2f})"


def paired_difference(correct_a, correct_b):
    """How much more often a is right than b on the same images, as a `Paired`.

    correct_a, correct_b: bool, n images, or seeds x n images; over seeds each image counts by its mean. The interval
    is that of the drawing of the images, for these seeds: Wald's for the mean difference with half an image added
    to each cell of the table of both (Agresti and Min 2005), so that it is never empty. p is McNemar's, exact
    (1947), for one seed; the normal's, by the interval, for several. ValueError: shapes that do not fit.
    """
    a, b = (torch.as_tensor(x).cpu().double() for x in (correct_a, correct_b))
    if a.shape != b.shape or a.ndim not in (1, 2) or not a.numel():
        raise ValueError(f"{tuple(a.shape)} and {tuple(b.shape)}: n, or seeds x n, of the same images are needed")
    change = a - b if a.ndim == 1 else (a - b).mean(0)
    n = len(change)
    middle = change.sum().item() / (n + 2)
    spread = math.sqrt(((change.square().sum().item() + 1) / (n + 2) - middle**2) / (n + 2))
    if a.ndim == 1:
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        tail = sum(math.comb(better + worse, i) for i in range(min(better, worse) + 1))
        p = min(1.0, 2 * tail / 2 ** (better + worse))
    else:
        p = math.erfc(abs(middle) / spread / math.sqrt(2))
    return Paired(100 * change.mean().item(), *(100 * (middle + sign * Z * spread) for sign in (-1, 1)), p, n)
