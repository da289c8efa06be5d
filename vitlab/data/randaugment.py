"""RandAugment, TrivialAugmentWide and colour jitter: each image of a batch has its own operation and magnitude.

Formulas and ranges are torchvision's (`torchvision.transforms.autoaugment`, 31 bins; nearest neighbour, black
outside). On the CPU the images are grouped by operation; elsewhere each operation is applied to all images and kept for
those that drew it, so that nothing waits for the host. Both ways give the same pixels.
"""

import functools
from dataclasses import dataclass

import torch

from vitlab.data.geometry import Operation, Rotate, affine, limited

BINS = 31


def _each(values):
    """B -> B 1 1 1, float32."""
    return values.float().view(-1, 1, 1, 1)


def _grey(images):
    """Luma in whole levels, float B 1 H W."""
    red, green, blue = images.float().unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_().unsqueeze(1)


def _blend(images, other, magnitude):
    """Move images away from `other`, the further the larger the magnitude; at -1 they are `other`."""
    return (images * _each(1 + magnitude) + other * _each(-magnitude)).clamp_(0, 255).to(torch.uint8)


def _sharpen(images, magnitude):
    """Blend with a 3 x 3 smoothing (5 in the middle, 1 around, over 13); the border stays."""
    pixels = images.float()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    inner = pixels[:, :, 1:-1, 1:-1]
    # sums of whole numbers are exact in any order, unlike a convolution that may run in TF32
    smooth = ((rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner) / 13).round_()
    inner += (smooth - inner) * _each(-magnitude)
    return pixels.clamp_(0, 255).to(torch.uint8)


def _torchvision():
    from torchvision.transforms.v2 import functional  # takes seconds, and is seldom needed

    return functional


# (uint8 B 3 H W, magnitude float64 B) -> images, in torchvision's order and units (shear: tangent, about the top left;
# translation: pixels; Rotate: degrees; Brightness to Sharpness: factor - 1; Posterize: bits; Solarize: threshold)
OPERATIONS = {
    "Identity": lambda images, _: images,
    "ShearX": lambda images, m: affine(images, xy=m, x=m * images.shape[2] / 2),
    "ShearY": lambda images, m: affine(images, yx=m, y=m * images.shape[3] / 2),
    "TranslateX": lambda images, m: affine(images, x=-m.trunc()),
    "TranslateY": lambda images, m: affine(images, y=-m.trunc()),
    "Rotate": Rotate().apply,
    "Brightness": lambda images, m: _blend(images, 0, m),
    "Color": lambda images, m: _blend(images, _grey(images), m),
    "Contrast": lambda images, m: _blend(images, _grey(images).mean((2, 3), keepdim=True), m),
    "Sharpness": _sharpen,
    "Posterize": lambda images, m: images & (256 - torch.exp2(8 - _each(m).clamp(0, 8))).to(torch.uint8),
    "Solarize": lambda images, m: torch.where(images >= _each(m), 255 - images, images),
    "AutoContrast": lambda images, _: _torchvision().autocontrast(images),
    "Equalize": lambda images, _: _torchvision().equalize(images),
}


@functools.lru_cache(maxsize=64)
def magnitudes(wide, height, width, device="cpu"):
    """torchvision's magnitudes, float64 14 31, and which operations take a random sign, bool 14.

    wide: TrivialAugmentWide's ranges instead of RandAugment's. Cached: copying to a GPU waits for the host.
    """
    shear, turn, colour, bits = (0.99, 135.0, 0.99, 6) if wide else (0.3, 30.0, 0.9, 4)
    across, down = (32.0, 32.0) if wide else (150 / 331 * width, 150 / 331 * height)
    largest = {"ShearX": shear, "ShearY": shear, "TranslateX": across, "TranslateY": down, "Rotate": turn}
    largest |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), colour)
    ranges = {name: torch.linspace(0.0, largest.get(name, 0.0), BINS) for name in OPERATIONS}
    ranges["Posterize"] = 8 - (torch.arange(BINS) / ((BINS - 1) / bits)).round()
    ranges["Solarize"] = torch.linspace(255.0, 0.0, BINS)
    signed = torch.tensor([name in largest for name in OPERATIONS])
    return torch.stack(list(ranges.values())).double().to(device), signed.to(device)


class Rounds(Operation):
    """One operation an image in each of some rounds: (operation, magnitude), rounds x B each, are drawn.

    operation: int64, an index into `names`; magnitude: float64. ValueError for images that have not 3 channels.
    """

    names = tuple(OPERATIONS)

    def apply(self, images, operation, magnitude, grouped=None):
        """grouped: which of the two ways, by default the one that suits the device."""
        if images.shape[1] != 3:
            raise ValueError(f"colour operations need images of 3 channels, not {images.shape[1]}")
        grouped = images.is_cpu if grouped is None else grouped
        for codes, amounts in zip(operation, magnitude):
            before, images = images, images.clone()
            for code, name in enumerate(self.names):
                drawn = codes == code
                if not grouped:
                    images = torch.where(drawn.view(-1, 1, 1, 1), OPERATIONS[name](before, amounts), images)
                elif drawn.any():
                    images[drawn] = OPERATIONS[name](before[drawn], amounts[drawn])
        return images

    def _draw(self, images, generator, bins, wide):
        """An operation for each bin (rounds x B), and the magnitude that the bin means there, of either sign."""
        options = {"generator": generator, "device": images.device}
        table, signed = magnitudes(wide, *images.shape[2:], images.device)
        operation = torch.randint(len(table), bins.shape, **options)
        negative = torch.randint(2, bins.shape, **options).bool() & signed[operation]
        magnitude = table[operation, bins]
        return operation, torch.where(negative, -magnitude, magnitude)


@dataclass(frozen=True)
class RandAugment(Rounds):
    """`n` operations an image, drawn with replacement, all at bin `m` of 0..30 (arXiv:1909.13719)."""

    n: int = limited(2)
    m: int = limited(9, BINS - 1)

    def draw(self, images, generator):
        bins = torch.full((self.n, len(images)), self.m, device=images.device)
        return self._draw(images, generator, bins, wide=False)


@dataclass(frozen=True)
class TrivialAugment(Rounds):
    """One operation an image at a random bin of the wide ranges: TrivialAugmentWide (arXiv:2103.10158)."""

    def draw(self, images, generator):
        bins = torch.randint(BINS, (1, len(images)), generator=generator, device=images.device)
        return self._draw(images, generator, bins, wide=True)


@dataclass(frozen=True)
class Jitter(Rounds):
    """torchvision's ColorJitter without hue: factors in 1 -+ these, not below 0, in an order drawn for each image."""

    brightness: float = limited(0.0)
    contrast: float = limited(0.0)
    saturation: float = limited(0.0)

    names = ("Brightness", "Contrast", "Color")

    def draw(self, images, generator):
        options = {"generator": generator, "device": images.device, "dtype": torch.float64}
        amounts = self.brightness, self.contrast, self.saturation
        drawn = [torch.rand(len(images), **options) * (v + min(1.0, v)) - min(1.0, v) for v in amounts]
        order = torch.rand(len(drawn), len(images), **options).argsort(0)
        return order, torch.stack(drawn).gather(0, order)
