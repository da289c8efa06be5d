"""Random augmentation of whole image batches: one draw an image, from an explicit generator, on any device.

`Augment("crop(4)+flip+randaugment(2,9)")` reads a spec into operations. `normalize` makes the float images a
model takes; `mix` mixes them (mixup, cutmix) and gives soft targets.
"""

import ast
import dataclasses
import re

import torch
import torch.nn.functional as F

from vitlab.data.geometry import Crop, Erase, Flip, ResizedCrop, Rotate, constant, inside
from vitlab.data.randaugment import Jitter, RandAugment, TrivialAugment

OPERATIONS = {
    "crop": Crop,
    "flip": Flip,
    "rrc": ResizedCrop,
    "rotate": Rotate,
    "jitter": Jitter,
    "randaugment": RandAugment,
    "trivial": TrivialAugment,
    "erase": Erase,
}


def parse(spec):
    """The operations of a spec such as "crop(4)+flip", as a list; ValueError names what is wrong."""
    if not isinstance(spec, str):
        raise ValueError(f"an augmentation is a text such as 'crop(4)+flip', not {spec!r}")
    return [_operation(part.strip()) for part in spec.split("+")] if spec.strip() else []


def _operation(text):
    """One operation from `name` or `name(arguments)`; the arguments are literals."""
    found = re.fullmatch(r"(\w+)(?:\((.*)\))?", text)
    kinds = {name: [f.name for f in dataclasses.fields(kind) if f.repr] for name, kind in OPERATIONS.items()}
    allowed = "+".join(f"{name}({', '.join(fields)})" for name, fields in kinds.items())
    if not found or found[1] not in OPERATIONS:
        raise ValueError(f"unknown augmentation {text!r}; allowed: {allowed}")
    try:
        return OPERATIONS[found[1]](*ast.literal_eval(f"[{found[2] or ''}]"))
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"augmentation {text!r}: {error}; allowed: {allowed}") from error


class Augment:
    """A sequence of random operations, from a spec: operations joined by "+", applied from left to right.

    crop(padding), flip, rrc(low, high), rotate(degrees), jitter(brightness, contrast, saturation), randaugment(n, m),
    trivial, erase(p); "" changes nothing. mean: the data's mean colour in [0, 1], one number a channel, which
    `erase` fills with. Calling it on uint8 B C H W images with a generator on their device gives such images.
    """

    def __init__(self, spec="", mean=(0.5,)):
        filled = lambda one: dataclasses.replace(one, mean=tuple(mean)) if isinstance(one, Erase) else one  # noqa: E731
        self.operations = [filled(one) for one in parse(spec)]

    def __call__(self, images, generator):
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise ValueError(f"a batch of images is uint8 B C H W, not {images.dtype} {tuple(images.shape)}")
        for operation in self.operations:
            images = operation.apply(images, *operation.draw(images, generator))
        return images


def normalize(images, mean, std, size=None):
    """(pixels - mean) / std as float32 B C H W, optionally resized on the images' device.

    images: B C H W, uint8, or float in [0, 1]; mean, std: numbers, one a channel (or one for all), of pixels
    in [0, 1]; size: pixels a side, bilinear, antialiased only where it shrinks.
    """
    largest = 1.0 if images.is_floating_point() else 255.0
    scale = constant(tuple(1 / (largest * s) for s in std), images.device)
    shift = constant(tuple(-m / s for m, s in zip(mean, std)), images.device)
    pixels = images.to(torch.float32, copy=True)
    if size is not None and images.shape[2:] != (size, size):
        shrinks = size < max(images.shape[2:])
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=shrinks)
    # in place: a second large buffer costs more than the arithmetic
    return pixels.mul_(scale).add_(shift)


def beta(alpha, count, generator):
    """`count` draws of Beta(alpha, alpha), float64 on the generator's device.

    A Gamma(alpha) variable is a Gamma(alpha + 1) one times U^(1 / alpha) (Marsaglia & Tsang 2000, section
    6); in logarithms it does not underflow at a small alpha, where both would be 0.
    """
    shape = torch.full((2, count), alpha + 1.0, dtype=torch.float64, device=generator.device)
    uniform = torch.rand(2, count, generator=generator, dtype=torch.float64, device=generator.device)
    logarithm = torch._standard_gamma(shape, generator=generator).log() + (1 - uniform).log() / alpha
    return torch.sigmoid(logarithm[0] - logarithm[1])


def draw_mix(shape, generator, mixup, cutmix):
    """What `mix` does to a batch of this shape: (partner int64 B, own share of each pixel B 1 H|1 W|1).

    Either mixup (arXiv:1710.09412), one share an image, or cutmix (arXiv:1905.04899), a box of the partner,
    shares 0 and 1; where both are on, each image takes either with probability 1/2.
    """
    count, _, height, width = shape
    device = generator.device
    partner = torch.randperm(count, generator=generator, device=device)
    if not cutmix:
        return partner, beta(mixup, count, generator).view(-1, 1, 1, 1)
    side = (1 - beta(cutmix, count, generator)).sqrt()
    corner = torch.rand(2, count, generator=generator, dtype=torch.float64, device=device)
    half = [(0.5 * side * size).long() for size in (height, width)]
    top, left = ((centre * size).long() - h for centre, size, h in zip(corner, (height, width), half))
    own = 1.0 - inside(top, left, 2 * half[0], 2 * half[1], height, width).double()
    if mixup:
        either = torch.rand(count, generator=generator, device=device).view(-1, 1, 1, 1) < 0.5
        own = torch.where(either, own, beta(mixup, count, generator).view(-1, 1, 1, 1))
    return partner, own


def mix(images, labels, num_classes, generator, mixup=0.0, cutmix=0.0, smoothing=0.0):
    """Mix each image with another of the batch; give (images, soft targets B K float32).

    images: float B C H W; labels: int64 B; mixup, cutmix: alpha of the Beta distribution of the share, one
    draw an image, 0 = off (with both on, each image takes either); smoothing: share of the target spread over
    all classes. A target has the labels in the very shares their pixels have.
    """
    targets = F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes
    if not mixup and not cutmix:
        return images, targets
    partner, own = draw_mix(images.shape, generator, mixup, cutmix)
    share = own.mean((1, 2, 3)).float().unsqueeze(1)  # B 1
    mixed = torch.lerp(images[partner], images, own.to(images.dtype))
    return mixed, torch.lerp(targets[partner], targets, share)
