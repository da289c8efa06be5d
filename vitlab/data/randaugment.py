"""RandAugment, TrivialAugmentWide and colour jitter: each image of a batch has its own operation and magnitude.

Formulas and ranges are torchvision's (`torchvision.transforms.autoaugment`, 31 bins; nearest neighbour, black
outside). On the CPU the images are grouped by operation; elsewhere each operation is applied to all images and kept for
those that drew it, so that nothing waits for the host. Both ways give the same pixels.
"""

import functools
from dataclasses import dataclass

import torch

from vitlab.data.geometry import affine, check_number, rotate

BINS = 31


def _each(values):
    """B -> B 1 1 1, float32."""
    return values.float().view(-1, 1, 1, 1)


def _grey(pixels):
    """Luma of float B 3 H W in 0..255, whole levels, B 1 H W."""
    red, green, blue = pixels.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_().unsqueeze(1)


def _blend(pixels, other, magnitude):
    """Move float images away from `other`: the further, the larger the magnitude; at -1 they are `other`."""
    return (pixels * _each(1 + magnitude) + other * _each(-magnitude)).clamp_(0, 255).to(torch.uint8)


def _brighten(images, magnitude):
    return _blend(images.float(), 0, magnitude)


def _saturate(images, magnitude):
    pixels = images.float()
    return _blend(pixels, _grey(pixels), magnitude)


def _contrast(images, magnitude):
    pixels = images.float()
    return _blend(pixels, _grey(pixels).mean((2, 3), keepdim=True), magnitude)


def _sharpen(images, magnitude):
    """Blend with a 3 x 3 smoothing (5 in the middle, 1 around, over 13); the border stays."""
    pixels = images.float()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    inner = pixels[:, :, 1:-1, 1:-1]
    # sums of whole numbers are exact in any order, unlike a convolution that may run in TF32
    smooth = ((rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner) / 13).round_()
    inner += (smooth - inner) * _each(-magnitude)
    return pixels.clamp_(0, 255).to(torch.uint8)


def _posterize(images, bits):
    step = torch.exp2(8 - _each(bits).clamp(0, 8))
    return ((images / step).floor_() * step).to(torch.uint8)


def _solarize(images, threshold):
    return torch.where(images >= _each(threshold), 255 - images, images)


def _autocontrast(images, _):
    from torchvision.transforms.v2 import functional  # seconds to import, and seldom needed

    return functional.autocontrast(images)


def _equalize(images, _):
    from torchvision.transforms.v2 import functional

    return functional.equalize(images)


# uint8 B 3 H W, magnitude float64 B in torchvision's units (shear: tangent; translation: pixels; Rotate: degrees;
# Brightness to Sharpness: factor - 1; Posterize: bits; Solarize: threshold); its order, and its centre of shearing
OPERATIONS = {
    "Identity": lambda images, _: images,
    "ShearX": lambda images, m: affine(images, xy=m, x=m * images.shape[2] / 2),
    "ShearY": lambda images, m: affine(images, yx=m, y=m * images.shape[3] / 2),
    "TranslateX": lambda images, m: affine(images, x=-m.trunc()),
    "TranslateY": lambda images, m: affine(images, y=-m.trunc()),
    "Rotate": rotate,
    "Brightness": _brighten,
    "Color": _saturate,
    "Contrast": _contrast,
    "Sharpness": _sharpen,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}


def apply_operations(images, operation, magnitude, names=tuple(OPERATIONS), grouped=None):
    """Apply to each image its own operation.

    images: uint8 B 3 H W; operation: int64 B, an index into names; magnitude: float64 B; grouped: which of the
    two ways, by default the one that suits the device. ValueError on another number of channels.
    """
    if images.shape[1] != 3:
        raise ValueError(f"colour operations need images of 3 channels, not {images.shape[1]}")
    changed = images.clone()
    for code, name in enumerate(names):
        if images.is_cpu if grouped is None else grouped:
            drawn = (operation == code).nonzero().flatten()
            if len(drawn):
                changed[drawn] = OPERATIONS[name](images[drawn], magnitude[drawn])
        else:
            drawn = (operation == code).view(-1, 1, 1, 1)
            changed = torch.where(drawn, OPERATIONS[name](images, magnitude), changed)
    return changed


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


class Rounds:
    """What is drawn in rounds, one operation an image in each: (operation, magnitude), both rounds x B."""

    names = tuple(OPERATIONS)

    def apply(self, images, operation, magnitude, grouped=None):
        for drawn in zip(operation, magnitude):
            images = apply_operations(images, *drawn, self.names, grouped)
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

    n: int = 2
    m: int = 9

    def __post_init__(self):
        if not (isinstance(self.n, int) and self.n >= 0 and isinstance(self.m, int) and 0 <= self.m < BINS):
            raise ValueError(f"randaugment takes n >= 0 operations at a bin m of 0..{BINS - 1}, not {self}")

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

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    names = ("Brightness", "Contrast", "Color")

    def __post_init__(self):
        for amount in (self.brightness, self.contrast, self.saturation):
            check_number(amount, "jitter's amount")

    def draw(self, images, generator):
        options = {"generator": generator, "device": images.device, "dtype": torch.float64}
        amounts = self.brightness, self.contrast, self.saturation
        drawn = [torch.rand(len(images), **options) * (v + min(1.0, v)) - min(1.0, v) for v in amounts]
        order = torch.rand(len(drawn), len(images), **options).argsort(0)
        return order, torch.stack(drawn).gather(0, order)
