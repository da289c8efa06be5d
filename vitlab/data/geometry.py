"""Random crops, flips, rotations and erasing of whole batches: one draw an image, on any device.

The rules of the draws are torchvision's. Images are uint8 B C H W.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


def limited(default, most=1000):
    """A field of an `Operation` that takes numbers of 0..most; whole ones where it is an int."""
    return field(default=default, metadata={"most": most})


class Operation:
    """What draws its parameters for a batch first (`draw`) and applies them second (`apply`), to be looked at between.

    Neither waits for the host on a GPU. ValueError for fields out of their limits.
    """

    def __post_init__(self):
        for known in (f for f in dataclasses.fields(self) if "most" in f.metadata):
            value, most = getattr(self, known.name), known.metadata["most"]
            if not isinstance(value, (int, known.type)) or not 0 <= value <= most:
                kind = "whole number" if known.type is int else "number"
                raise ValueError(f"{known.name} must be a {kind} of 0..{most}, not {value!r}")


@functools.lru_cache(maxsize=256)
def constant(values, device):
    """Numbers as a 1 C 1 1 tensor; kept, because copying them to a GPU waits for the host."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


def _uniform(generator, device, *shape, low=0.0, high=1.0):
    return torch.rand(*shape, generator=generator, device=device, dtype=torch.float64) * (high - low) + low


def _box(images, generator, scale, ratio, most):
    """(sides int64 B, other sides int64 B, bool B whether they fit) of a box an image, by torchvision's rule.

    The first of ten with a share within `scale` of the area and sides of a ratio within `ratio` that are no longer
    than `most`, a pair.
    """
    tries = images.device, len(images), 10
    area = _uniform(generator, *tries, low=scale[0], high=scale[1]) * math.prod(images.shape[2:])
    aspect = _uniform(generator, *tries, low=math.log(ratio[0]), high=math.log(ratio[1])).exp()
    sides, others = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (sides > 0) & (sides <= most[0]) & (others > 0) & (others <= most[1])
    first = fits.long().argmax(1, keepdim=True)
    return sides.gather(1, first).squeeze(1), others.gather(1, first).squeeze(1), fits.any(1)


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
class Crop(Operation):
    """Pad every side by `padding` reflected pixels and cut out the image's size at random."""

    padding: int = limited(4)

    def draw(self, images, generator):
        """(top, left) in the padded image, int64 2 x B."""
        return torch.randint(2 * self.padding + 1, (2, len(images)), generator=generator, device=images.device)

    def apply(self, images, top, left):
        height, width = images.shape[2:]
        if self.padding >= min(height, width):
            raise ValueError(f"crop({self.padding}): the padding must be below the size, {height}x{width}")
        # torch reflects whole numbers on the CPU only; levels up to 255 are exact in float
        source = images if images.is_cpu else images.float()
        padded = F.pad(source, (self.padding,) * 4, mode="reflect").to(images.dtype)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # B C top left H W
        return windows[torch.arange(len(images), device=images.device), :, top, left]


@dataclass(frozen=True)
class Flip(Operation):
    """Mirror left and right with probability 1/2."""

    def draw(self, images, generator):
        return (_uniform(generator, images.device, len(images)) < 0.5,)

    def apply(self, images, flipped):
        # choosing whole images from both versions copies memory in long runs, unlike a mask
        both = torch.cat((images, images.flip(3)))
        return both.index_select(0, torch.arange(len(images), device=images.device) + flipped * len(images))


def affine(images, xx=1.0, xy=0.0, x=0.0, yx=0.0, yy=1.0, y=0.0):
    """Nearest-neighbour affine map, black outside, from output to input pixels measured from the centre.

    images: B C H W; the input's x is xx * x + xy * y + x of the output's, its y likewise, each a number or float64 B.
    """
    height, width = images.shape[2:]
    centred = (torch.arange(n, device=images.device) - (n - 1) / 2 for n in (height, width))
    down, across = torch.meshgrid(*centred, indexing="ij")
    base = torch.stack((across, down, torch.ones_like(down)), -1).view(1, -1, 3)
    none = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    theta = torch.stack([none + v for v in (xx, yx, xy, yy, x, y)], 1).float().view(-1, 3, 2)
    theta /= torch.stack((none + width / 2, none + height / 2), 1).float().unsqueeze(1)
    grid = base.expand(len(images), -1, -1).bmm(theta).view(-1, height, width, 2)
    moved = F.grid_sample(images.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return moved.to(images.dtype)


@dataclass(frozen=True)
class Rotate(Operation):
    """Rotate counter-clockwise by an angle within -+ `degrees` about the centre, nearest neighbour, black outside."""

    degrees: float = limited(15.0, 360)

    def draw(self, images, generator):
        return (_uniform(generator, images.device, len(images), low=-self.degrees, high=self.degrees),)

    def apply(self, images, degrees):
        cos, sin = torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))
        return affine(images, xx=cos, xy=-sin, yx=sin, yy=cos)


@dataclass(frozen=True)
class Erase(Operation):
    """With probability `p` fill a box of 2-33 % of the area and aspect 0.3-3.3 (arXiv:1708.04896) with `mean`.

    torchvision erases after normalising, where its 0 is the data's mean colour; here erasing comes before:
    `Augment(spec, mean=...)` sets that colour, one number a channel in [0, 1].
    """

    p: float = limited(0.5, 1)
    mean: tuple = field(default=(0.5,), repr=False)  # not of the spec

    def draw(self, images, generator):
        """(top, left, height, width), int64 B, the last two 0 where nothing is erased."""
        height, width = images.shape[2:]
        tall, wide, fits = _box(images, generator, (0.02, 0.33), (0.3, 3.3), (height - 1, width - 1))
        tall, wide = tall * fits, wide * fits
        top, left = _place(generator, height - tall), _place(generator, width - wide)
        erased = _uniform(generator, images.device, len(images)) < self.p
        return top, left, tall * erased, wide * erased

    def apply(self, images, top, left, tall, wide):
        fill = constant(self.mean, images.device).mul(255).round_().to(images.dtype)
        return torch.where(inside(top, left, tall, wide, *images.shape[2:]), fill, images)


@dataclass(frozen=True)
class ResizedCrop(Operation):
    """Cut a box of `low`..`high` of the area and aspect 3/4-4/3, and resize it to the image's size.

    torchvision's RandomResizedCrop for square images: bilinear with antialiasing.
    """

    low: float = limited(0.08, 1)
    high: float = limited(1.0, 1)

    def draw(self, images, generator):
        """(top, left, height, width), int64 B."""
        height, width = images.shape[2:]
        wide, tall, fits = _box(images, generator, (self.low, self.high), (3 / 4, 4 / 3), (width, height))
        tall, wide = torch.where(fits, tall, height), torch.where(fits, wide, width)
        return _place(generator, height - tall), _place(generator, width - wide), tall, wide

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
