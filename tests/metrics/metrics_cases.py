"""Small models and splits that the tests of metrics share."""

import timm
import torch
from torch import nn

from vitlab.data.datasets import Split

PIXELS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}


def random_split(n, classes, size=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, size, size), generator=draw, dtype=torch.uint8)
    return Split(images, torch.randint(0, classes, (n,), generator=draw))


def linear_model(classes, size=8, scale=1.0):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * size * size, classes))
    with torch.no_grad():
        model[2].weight.mul_(scale)
    return model


def small_timm(name="vit_tiny_patch16_224", patch_size=4, **options):
    return timm.create_model(name, patch_size=patch_size, **options)


def vit_macs(tokens, dim, depth, mlp, heads_out, stem):
    """qkv 3 N D^2, scores N^2 D, values N^2 D, proj N D^2, MLP 2 N D H; head on one token."""
    block = 3 * tokens * dim**2 + 2 * tokens**2 * dim + tokens * dim**2 + 2 * tokens * dim * mlp
    return stem + depth * block + dim * heads_out
