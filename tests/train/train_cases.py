"""A small model and recipe that the tests of training share."""

import dataclasses

import torch

from vitlab.models.vit import ViT, ViTConfig
from vitlab.train.loop import fit
from vitlab.train.recipe import Recipe
from vitlab.utils import rng

CONFIG = ViTConfig(image_size=16, patch_size=8, dim=16, depth=2, heads=2, dropout=0.1, drop_path=0.2)

RECIPE = Recipe(
    epochs=3, batch=16, warmup=1, smoothing=0.1, mixup=0.5, cutmix=0.5, mix_off=1, clip=1.0, ema=0.9,
    augment="crop(2)+flip",
)  # fmt: skip


def trained(data, recipe=RECIPE, config=CONFIG, **options):
    rng.seed_all(1)
    model = ViT(dataclasses.replace(config, num_classes=4))
    return model, fit(model, data, recipe, log=None, **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
