"""Pictures, and torchvision's functions, that the tests of augmentation share."""

import math

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

SIZES = [(32, 32), (24, 40), (17, 23)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count, size=(32, 32), channels=3, seed=0):
    """Smooth pictures with some noise, among them a flat one and one of two levels."""
    draw = seeded(seed)
    coarse = torch.rand(count, channels, 5, 5, generator=draw)
    smooth = F.interpolate(coarse, size, mode="bicubic") * 255
    images = (smooth + 6 * torch.randn(smooth.shape, generator=draw)).clamp(0, 255).to(torch.uint8)
    images[0] = 77
    if count > 1:
        images[1] = (images[1] > 128) * 200
    return images


def difference(a, b):
    return (a.int() - b.int()).abs()


REFERENCE = {
    "Identity": lambda x, m: x,
    "ShearX": lambda x, m: TF.affine(x, 0.0, [0, 0], 1.0, [math.degrees(math.atan(m)), 0.0], center=[0, 0]),
    "ShearY": lambda x, m: TF.affine(x, 0.0, [0, 0], 1.0, [0.0, math.degrees(math.atan(m))], center=[0, 0]),
    "TranslateX": lambda x, m: TF.affine(x, 0.0, [int(m), 0], 1.0, [0.0, 0.0]),
    "TranslateY": lambda x, m: TF.affine(x, 0.0, [0, int(m)], 1.0, [0.0, 0.0]),
    "Rotate": TF.rotate,
    "Brightness": lambda x, m: TF.adjust_brightness(x, 1 + m),
    "Color": lambda x, m: TF.adjust_saturation(x, 1 + m),
    "Contrast": lambda x, m: TF.adjust_contrast(x, 1 + m),
    "Sharpness": lambda x, m: TF.adjust_sharpness(x, 1 + m),
    "Posterize": lambda x, m: TF.posterize(x, int(m)),
    "Solarize": TF.solarize,
    "AutoContrast": lambda x, m: TF.autocontrast(x),
    "Equalize": lambda x, m: TF.equalize(x),
}

FULL = "crop(4)+flip+randaugment(2,9)+jitter(0.4,0.4,0.4)+rotate(15)+erase(0.25)+trivial+rrc(0.08,1.0)"
