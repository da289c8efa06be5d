"""Random crops, flips, rotations and erasing of whole batches: one draw an image, on any device.

Each class draws its parameters for the batch first (`draw`) and applies them second (`apply`), so that they
can be looked at and tested; neither waits for the host on a GPU. The rules of the draws are torchvision's.
Images are uint8 B C H W.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def check_number(value, name, most=math.inf):
    """ValueError unless `value` is a finite number of 0..most."""
    if not (isinstance(value, (int, float)) and 0 <= value <= most and value < math.inf):
        raise ValueError(f"{name} must be a number of 0..{most}, not {value!r}")


def _check_range(value, name):
    numbers = isinstance(value, (tuple, list)) and all(isinstance(v, (int, float)) for v in value)
    if not numbers or len(value) != 2 or not 0 < value[0] <= value[1] < math.inf:
        raise ValueError(f"{name} must be two numbers above 0, the smaller first, not {value!r}")


@functools.lru_cache(maxsize=256)
def constant(values, device):
    """Numbers as a 1 C 1 1 tensor; kept, because copying them to a GPU waits for the host."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


def _uniform(generator, device, *shape, low=0.0, high=1.0):
    return torch.rand(*shape, generator=generator, device=device, dtype=torch.float64) * (high - low) + low


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


def inside(top, left, tall, wide, height, width):
    """Which pixels lie in each image's box (int64 B each): bool B 1 height width."""
    rows, columns = _within(top, tall, height), _within(left, wide, width)
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)


def _within(start, length, size):
    """Which of the places 0 to size - 1 lie within [start, start + length): bool B size."""
    place = torch.arange(size, device=start.device)
    return (place >= start[:, None]) & (place < (start + length)[:, None])


@dataclass(frozen=True)
class Crop:
    """Pad every side by `padding` reflected pixels and cut out the image's size at random."""

    padding: int = 4

    def __post_init__(self):
        if not (isinstance(self.padding, int) and self.padding >= 0):
            raise ValueError(f"crop takes a padding >= 0, not {self}")

    def draw(self, images, generator):
        """(top, left) in the padded image, int64 2 x B."""
        return torch.randint(2 * self.padding + 1, (2, len(images)), generator=generator, device=images.device)

    def apply(self, images, top, left):
        count, channels, height, width = images.shape
        if self.padding >= min(height, width):
            raise ValueError(f"crop({self.padding}): the padding must be below the size, {height}x{width}")
        # torch reflects whole numbers on the CPU only; levels up to 255 are exact in float
        source = images if images.is_cpu else images.float()
        padded = F.pad(source, (self.padding,) * 4, mode="reflect").to(images.dtype)
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
        check_number(self.p, "flip's probability", 1)

    def draw(self, images, generator):
        return (_uniform(generator, images.device, len(images)) < self.p,)

    def apply(self, images, flipped):
        # choosing whole images from both versions copies memory in long runs, unlike a mask
        both = torch.cat((images, images.flip(3)))
        return both.index_select(0, torch.arange(len(images), device=images.device) + flipped * len(images))


def affine(images, xx=1.0, xy=0.0, x=0.0, yx=0.0, yy=1.0, y=0.0):
    """Nearest-neighbour affine map, black outside, from output to input pixels measured from the centre.

    images: B C H W; the input's x is xx * x + xy * y + x of the output's, its y likewise, each a number or float64 B.
    """
    height, width = images.shape[2:]
    across, down = (torch.arange(n, device=images.device) - (n - 1) / 2 for n in (width, height))
    down, across = torch.meshgrid(down, across, indexing="ij")
    base = torch.stack((across, down, torch.ones_like(down)), -1).view(1, -1, 3)
    none = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    theta = torch.stack([none + v for v in (xx, yx, xy, yy, x, y)], 1).float().view(-1, 3, 2)
    theta /= torch.stack((none + width / 2, none + height / 2), 1).float().unsqueeze(1)
    grid = base.expand(len(images), -1, -1).bmm(theta).view(-1, height, width, 2)
    moved = F.grid_sample(images.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return moved.to(images.dtype)


def rotate(images, degrees):
    """Rotate each image about its centre by its own angle. images B C H W; degrees B, counter-clockwise."""
    cos, sin = torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))
    return affine(images, xx=cos, xy=-sin, yx=sin, yy=cos)


@dataclass(frozen=True)
class Rotate:
    """Rotate by an angle within -+ `degrees` about the centre, nearest neighbour, black outside."""

    degrees: float = 15.0

    def __post_init__(self):
        check_number(self.degrees, "rotate's degrees", 360)

    def draw(self, images, generator):
        return (_uniform(generator, images.device, len(images), low=-self.degrees, high=self.degrees),)

    def apply(self, images, degrees):
        return rotate(images, degrees)


@dataclass(frozen=True)
class Erase:
    """With probability `p` fill a box of `scale` of the area and aspect `ratio` (arXiv:1708.04896) with `mean`.

    torchvision erases after normalising, where its 0 is the data's mean colour; here erasing comes before:
    `Augment(spec, mean=...)` sets that colour, one number a channel in [0, 1].
    """

    p: float = 0.5
    scale: tuple = (0.02, 0.33)
    ratio: tuple = (0.3, 3.3)
    mean: tuple = (0.5,)

    def __post_init__(self):
        check_number(self.p, "erase's probability", 1)
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

    def apply(self, images, top, left, tall, wide):
        fill = constant(self.mean, images.device).mul(255).round_().to(images.dtype)
        return torch.where(inside(top, left, tall, wide, *images.shape[2:]), fill, images)


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

    def apply(self, images, top, left, tall, wide):
        down = _resampling(top, tall, images.shape[2]).unsqueeze(1)  # B 1 H H
        across = _resampling(left, wide, images.shape[3]).unsqueeze(1)  # B 1 W W
        return (down @ images.float() @ across.mT).round_().clamp_(0, 255).to(images.dtype)


def _resampling(start, length, size):
    """Matrices, B size size, that resize [start, start + length) to `size` samples: antialiased bilinear."""
    scale = (length / size).view(-1, 1, 1)
    place = torch.arange(size, device=start.device)
    centre = scale * (place.view(1, -1, 1) + 0.5)
    weight = 1 - ((place - start.view(-1, 1, 1) + 0.5 - centre) / scale.clamp(min=1)).abs()
    weight = weight.clamp_(min=0) * _within(start, length, size).unsqueeze(1)
    return weight / weight.sum(2, keepdim=True)
