"""RandAugment, TrivialAugmentWide and colour jitter: what is drawn, one draw an image.

Operations and magnitudes are torchvision's (`torchvision.transforms.autoaugment`, 31 bins). Each class
draws its parameters first and applies them second, so that they can be looked at and tested.
"""

import functools
from dataclasses import dataclass

import torch

from vitlab.data.imageops import CODE, DRAWN, apply_operations

BINS = 31


@functools.lru_cache(maxsize=64)
def magnitudes(wide, height, width, device="cpu"):
    """torchvision's magnitudes, float64 14 31, and which operations take a random sign, bool 14.

    wide: TrivialAugmentWide's ranges instead of RandAugment's. Cached: copying to a GPU waits for the host.
    """
    pixels = {"TranslateX": 150 / 331 * width, "TranslateY": 150 / 331 * height}
    shear, turn, colour, bits = (0.99, 135.0, 0.99, 6) if wide else (0.3, 30.0, 0.9, 4)
    largest = dict.fromkeys(("ShearX", "ShearY"), shear) | {"Rotate": turn}
    largest |= dict.fromkeys(pixels, 32.0) if wide else pixels
    largest |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), colour)
    table = torch.stack([torch.linspace(0.0, largest.get(name, 0.0), BINS) for name in DRAWN]).double()
    table[CODE["Posterize"]] = 8 - (torch.arange(BINS) / ((BINS - 1) / bits)).round()
    table[CODE["Solarize"]] = torch.linspace(255.0, 0.0, BINS)
    return table.to(device), torch.tensor([name in largest for name in DRAWN]).to(device)


def _draw(images, generator, bins, wide):
    """(operation, magnitude), each like `bins` (... B)."""
    options = {"generator": generator, "device": images.device}
    table, signed = magnitudes(wide, *images.shape[2:], images.device)
    operation = torch.randint(len(DRAWN), bins.shape, **options)
    negative = torch.randint(2, bins.shape, **options).bool() & signed[operation]
    magnitude = table[operation, bins]
    return operation, torch.where(negative, -magnitude, magnitude)


class Rounds:
    """What is drawn in rounds, one operation an image in each: (operation, magnitude), both rounds x B."""

    names = DRAWN  # the operations that may occur

    def apply(self, images, params, grouped=None):
        for operation, magnitude in zip(*params):
            images = apply_operations(images, operation, magnitude, self.names, grouped)
        return images


@dataclass(frozen=True)
class RandAugment(Rounds):
    """`n` operations an image, drawn with replacement, all at bin `m` of 0..30 (arXiv:1909.13719)."""

    n: int = 2
    m: int = 9

    def __post_init__(self):
        if not (isinstance(self.n, int) and self.n >= 0 and isinstance(self.m, int) and 0 <= self.m < BINS):
            raise ValueError(f"randaugment takes n >= 0 operations at a bin m of 0..{BINS - 1}, not {self}")

    def draw(self, images, generator):
        bins = torch.full((self.n, len(images)), self.m, device=images.device)
        return _draw(images, generator, bins, wide=False)


@dataclass(frozen=True)
class TrivialAugment(Rounds):
    """One operation an image at a random bin of the wide ranges: TrivialAugmentWide (arXiv:2103.10158)."""

    def draw(self, images, generator):
        bins = torch.randint(BINS, (1, len(images)), generator=generator, device=images.device)
        return _draw(images, generator, bins, wide=True)


@dataclass(frozen=True)
class Jitter(Rounds):
    """torchvision's ColorJitter, in an order drawn for each image.

    The factors lie within 1 -+ brightness, contrast, saturation (not below 0), the turn of the hue within
    -+ hue (at most 0.5).
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self):
        amounts = self._amounts().values()
        if not all(isinstance(v, (int, float)) and 0 <= v < float("inf") for v in amounts) or self.hue > 0.5:
            raise ValueError(f"jitter takes amounts >= 0, hue at most 0.5, not {self}")

    def _amounts(self):
        named = {"Brightness": self.brightness, "Contrast": self.contrast, "Color": self.saturation, "Hue": self.hue}
        return {name: amount for name, amount in named.items() if amount != 0}

    @property
    def names(self):
        return tuple(self._amounts())

    def draw(self, images, generator):
        options = {"generator": generator, "device": images.device, "dtype": torch.float64}
        count, operations, magnitudes = len(images), [], []
        for name, amount in self._amounts().items():
            low = max(-1.0, -amount)
            magnitudes.append(torch.rand(count, **options) * (amount - low) + low)
            operations.append(torch.full((count,), CODE[name], device=images.device))
        if not operations:
            return torch.empty(0, count), torch.empty(0, count)
        order = torch.rand(len(operations), count, **options).argsort(0)
        return torch.stack(operations).gather(0, order), torch.stack(magnitudes).gather(0, order)
