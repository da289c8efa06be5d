"""A small fast ResNet for small images: the CNN teacher, trained on the same data as its student."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from vitlab.models.checkpoint import register


@register("resnet")
@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Shape of a `ResNet`. widths: channels of the stages, the first at full resolution, each later one at
    half of the one before; residual: stages (from 0) that end in a residual pair of convolutions.

    The defaults are ResNet-9 (Page 2018, DAWNBench; 6.6 M parameters, 0.38 G MACs at 32 x 32);
    widths (32, 64, 128, 256) are a quarter of it.
    """

    image_size: int = 32
    in_chans: int = 3
    num_classes: int = 10
    widths: tuple = (64, 128, 256, 512)
    residual: tuple = (1, 3)
    logit_scale: float = 0.125

    def __post_init__(self):
        for name in ("widths", "residual"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.widths or any(not isinstance(w, int) or w < 1 for w in self.widths):
            raise ValueError(f"widths={self.widths}: whole numbers of at least 1 are needed, one a stage")
        if not set(self.residual) <= set(range(len(self.widths))):
            raise ValueError(f"residual={self.residual}: stages from 0 to {len(self.widths) - 1}")
        if self.image_size % 2 ** (len(self.widths) - 1):
            raise ValueError(f"image_size={self.image_size} cannot be halved {len(self.widths) - 1} times")

    def build(self):
        """A ResNet of this shape with new weights."""
        return ResNet(self)

    def macs(self):
        """Multiply-accumulates of one image (convolutions and the linear layer), in closed form."""
        total, side, width = self.widths[-1] * self.num_classes, self.image_size, self.in_chans
        for i, out in enumerate(self.widths):
            total += 9 * side**2 * width * out  # before its pooling
            side //= 2 if i else 1
            total += 2 * 9 * side**2 * out * out * (i in self.residual)
            width = out
        return total


class ResNet(nn.Module):
    """images B C H W, normalised -> logits B K; with `intermediates=True` also {"features": [B C_i H_i W_i
    after each stage], "pooled": B C}."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        inputs = (config.in_chans, *config.widths)
        self.stages = nn.ModuleList(
            _Stage(inputs[i], width, pool=i > 0, residual=i in config.residual) for i, width in enumerate(config.widths)
        )
        self.head = nn.Linear(config.widths[-1], config.num_classes, bias=False)

    def forward(self, images, intermediates=False):
        x, features = images, []
        for stage in self.stages:
            x = stage(x)
            if intermediates:
                features.append(x)
        pooled = x.amax((2, 3))
        logits = self.head(pooled) * self.config.logit_scale
        return (logits, {"features": features, "pooled": pooled}) if intermediates else logits


class _Stage(nn.Module):
    def __init__(self, inputs, outputs, *, pool, residual):
        super().__init__()
        self.pool = pool
        self.conv = _conv(inputs, outputs)
        self.residual = nn.Sequential(_conv(outputs, outputs), _conv(outputs, outputs)) if residual else None

    def forward(self, x):
        x = self.conv(x)
        x = F.max_pool2d(x, 2) if self.pool else x
        return x if self.residual is None else x + self.residual(x)


def _conv(inputs, outputs):
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())
