"""Random crops, flips, rotations and erasing of whole batches: one draw an image, on any device.

Each class draws its parameters for the batch first (`draw`) and applies them second (`apply`), so that they
can be looked at and tested; neither waits for the host on a GPU. The rules of the draws are torchvision's.
Images are B C H W, uint8 or float.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vitlab.data.imageops import rotate


def _check_number(value, name, most):
    if not (isinstance(value, (int, float)) and 0 <= value <= most):
        raise ValueError(f"{name} must be a number of 0..{most}, not {value!r}")


@functools.lru_cache(maxsize=256)
def constant(values, device):
    """Numbers as a 1 C 1 1 tensor; kept, because copying them to a GPU waits for the host."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


def _uniform(generator, device, *shape, low=0.0, high=1.0):
    return torch.rand(*shape, generator=generator, device=device, dtype=torch.float64) * (high - low) + low


def _check_range(value, name):
    numbers = isinstance(value, (tuple, list)) and all(isinstance(v, (int, float)) for v in value)
    if not numbers or len(value) != 2 or not 0 < value[0] <= value[1] < math.inf:
        raise ValueError(f"{name} must be two numbers above 0, the smaller first, not {value!r}")


def _box(generator, device, count, height, width, scale, ratio, tries=10):
    """Heights and widths, int64 count x tries, by torchvision's rule for boxes; those of a try may exceed the image."""
    area = _uniform(generator, device, count, tries, low=scale[0], high=scale[1]) * (height * width)
    aspect = _uniform(generator, device, count, tries, low=math.log(ratio[0]), high=math.log(ratio[1])).exp()
    return (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()


def _first(fits, values, otherwise):
    """The value of the first try that fits (count x tries), else `otherwise`."""
    chosen = values.gather(1, fits.long().argmax(1, keepdim=True)).squeeze(1)
    return torch.where(fits.any(1), chosen, otherwise)


def _place(generator, room):
    """A whole number from 0 to `room` for each entry, uniformly."""
    return (_uniform(generator, room.device, *room.shape) * (room + 1)).long()


@dataclass(frozen=True)
class Crop:
    """Pad every side by `padding` reflected pixels and cut out the image's size at random."""

    padding: int = 4

    def __post_init__(self):
        if not (isinstance(self.padding, int) and self.padding >= 0):
            raise ValueError(f"crop takes a padding >= 0, not {self}")

    def draw(self, images, generator):
        """(top, left) in the padded image, int64 B."""
        top, left = torch.randint(2 * self.padding + 1, (2, len(images)), generator=generator, device=images.device)
        return top, left

    def apply(self, images, params):
        count, channels, height, width = images.shape
        if self.padding >= min(height, width):
            raise ValueError(f"crop({self.padding}): the padding must be below the size, {height}x{width}")
        # torch reflects whole numbers on the CPU only; levels up to 255 are exact in float
        source = images if images.device.type == "cpu" else images.float()
        padded = F.pad(source, (self.padding,) * 4, mode="reflect").to(images.dtype)
        top, left = params
        # every row of the result is one run of memory: its place in the padded batch, B C H
        row = torch.arange(count * channels, device=images.device).view(count, channels, 1) * padded.shape[2]
        row = row + top.view(-1, 1, 1) + torch.arange(height, device=images.device)
        start = row * padded.shape[3] + left.view(-1, 1, 1)
        return padded.reshape(-1).unfold(0, width, 1).index_select(0, start.flatten()).view(images.shape)


@dataclass(frozen=True)
class Flip:
    """Mirror left and right with probability `p`."""

    p: float = 0.5

    def __post_init__(self):
        _check_number(self.p, "flip's probability", 1)

    def draw(self, images, generator):
        return (_uniform(generator, images.device, len(images)) < self.p,)

    def apply(self, images, params):
        # choosing whole images from both versions copies memory in long runs, unlike a mask
        both = torch.cat((images, images.flip(3)))
        return both.index_select(0, torch.arange(len(images), device=images.device) + params[0] * len(images))


@dataclass(frozen=True)
class Rotate:
    """Rotate by an angle within -+ `degrees` about the centre, nearest neighbour, black outside."""

    degrees: float = 15.0

    def __post_init__(self):
        _check_number(self.degrees, "rotate's degrees", 360)

    def draw(self, images, generator):
        return (_uniform(generator, images.device, len(images), low=-self.degrees, high=self.degrees),)

    def apply(self, images, params):
        return rotate(images, params[0])


@dataclass(frozen=True)
class Erase:
    """With probability `p` fill a box of `scale` of the area and aspect `ratio` (arXiv:1708.04896).

    torchvision erases after normalising, where its 0 is the data's mean colour; here erasing comes before, and
    fills with `mean`, the data's mean colour in [0, 1] (which `Augment(spec, mean=...)` sets), or without one
    with the image's own mean colour.
    """

    p: float = 0.5
    scale: tuple = (0.02, 0.33)
    ratio: tuple = (0.3, 3.3)
    mean: tuple | None = None

    def __post_init__(self):
        _check_number(self.p, "erase's probability", 1)
        _check_range(self.scale, "erase scale")
        _check_range(self.ratio, "erase ratio")

    def draw(self, images, generator):
        """(top, left, height, width), int64 B, the last two 0 where nothing is erased."""
        count, _, height, width = images.shape
        device, none = images.device, torch.zeros(count, dtype=torch.long, device=images.device)
        tall, wide = _box(generator, device, count, height, width, self.scale, self.ratio)
        fits = (tall < height) & (wide < width)
        tall, wide = _first(fits, tall, none), _first(fits, wide, none)
        top, left = _place(generator, height - tall), _place(generator, width - wide)
        erased = _uniform(generator, device, count) < self.p
        return top, left, tall * erased, wide * erased

    def apply(self, images, params):
        top, left, tall, wide = params
        y, x = (torch.arange(size, device=images.device) for size in images.shape[2:])
        rows = (y >= top[:, None]) & (y < (top + tall)[:, None])
        columns = (x >= left[:, None]) & (x < (left + wide)[:, None])
        inside = (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)
        return torch.where(inside, self._fill(images), images)

    def _fill(self, images):
        """What to fill with, in the images' dtype and units, B|1 C|1 1 1."""
        whole = not images.is_floating_point()
        if self.mean is None:
            fill = images.float().mean((2, 3), keepdim=True) / (255 if whole else 1)
        else:
            fill = constant(self.mean, images.device)
        if fill.shape[1] not in (1, images.shape[1]):
            raise ValueError(f"erase: a mean of {fill.shape[1]} values for images of {images.shape[1]} channels")
        return (fill.mul(255).round_() if whole else fill).to(images.dtype)


@dataclass(frozen=True)
class ResizedCrop:
    """Cut a box of `low`..`high` of the area and aspect `ratio` (width / height), and resize it to the image's size.

    torchvision's RandomResizedCrop: bilinear with antialiasing.
    """

    low: float = 0.08
    high: float = 1.0
    ratio: tuple = (3 / 4, 4 / 3)

    def __post_init__(self):
        _check_range((self.low, self.high), "rrc scale")
        _check_range(self.ratio, "rrc ratio")

    def draw(self, images, generator):
        """(top, left, height, width), int64 B."""
        count, _, height, width = images.shape
        scale = self.low, self.high
        wide, tall = _box(generator, images.device, count, height, width, scale, self.ratio)
        fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
        # where no try fits: as much of the middle as the ratio allows
        shape = min(max(width / height, self.ratio[0]), self.ratio[1])
        middle = torch.ones_like(wide[:, 0])
        tall = _first(fits, tall, middle * min(height, round(width / shape)))
        wide = _first(fits, wide, middle * min(width, round(height * shape)))
        room_y, room_x = height - tall, width - wide
        top, left = _place(generator, room_y), _place(generator, room_x)
        found = fits.any(1)
        return torch.where(found, top, room_y // 2), torch.where(found, left, room_x // 2), tall, wide

    def apply(self, images, params):
        top, left, tall, wide = params
        down = _resampling(top, tall, images.shape[2]).unsqueeze(1)  # B 1 H H
        across = _resampling(left, wide, images.shape[3]).unsqueeze(1)  # B 1 W W
        resized = down @ images.float() @ across.mT
        return (resized if images.is_floating_point() else resized.round_().clamp_(0, 255)).to(images.dtype)


def _resampling(start, length, size):
    """Matrices, B size size, that resize [start, start + length) to `size` samples: antialiased bilinear."""
    scale = (length / size).view(-1, 1, 1)
    place = torch.arange(size, device=start.device)
    centre = scale * (place.view(1, -1, 1) + 0.5)
    weight = 1 - ((place - start.view(-1, 1, 1) + 0.5 - centre) / scale.clamp(min=1)).abs()
    inside = (place >= start[:, None]) & (place < (start + length)[:, None])  # B size
    weight = weight.clamp_(min=0) * inside.unsqueeze(1)
    return weight / weight.sum(2, keepdim=True)
