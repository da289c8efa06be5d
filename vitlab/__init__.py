"""vitlab: a reproducible study of the ways to make a Vision Transformer cheaper.

The folders are floors, from the top down; a file imports only from its own floor or from one further down:

    run/       papermill over the notebooks: presets, order, resume, stamps, reports
    study/     what a notebook works with: arms, rows, claims, figures
    compress/  structured pruning, token reduction, distillation
    train/     the one training loop, recipes, resumable state
    metrics/   the one measuring stick: accuracy, operations, time, memory, energy
    models/    the one ViT, its attentions and kernels, a CNN
    data/      data sets on the device, batched augmentation
    utils/     files, seeds, devices, provenance
"""

import importlib
import sys

__version__ = "0.1.0"

# What a user needs, by name; imported when it is first used, so that importing the package costs nothing.
PUBLIC = {
    "load_data": "vitlab.data.datasets:load",
    "ViT": "vitlab.models.vit:ViT",
    "ViTConfig": "vitlab.models.vit:ViTConfig",
    "Recipe": "vitlab.train.recipe:Recipe",
    "fit": "vitlab.train.loop:fit",
    "measure": "vitlab.metrics.measure:measure",
    "prune": "vitlab.compress.pruning.structured:prune",
    "reduce_tokens": "vitlab.compress.tokens.reduction:reduce_tokens",
    "calibrate": "vitlab.compress.tokens.search:calibrate",
    "distill": "vitlab.compress.distill:Distill",
    "from_timm": "vitlab.models.timm:from_timm",
    "save": "vitlab.models.checkpoint:save",
    "load": "vitlab.models.checkpoint:load",
}

# kind of model -> the module that registers its config (see models.checkpoint); a new method adds its line
KINDS = {
    "vit": "vitlab.models.vit",
    "favit": "vitlab.models.favit",
    "resnet": "vitlab.models.resnet",
    "timm": "vitlab.models.timm",
    "gated": "vitlab.compress.pruning.gates",
    "reduced": "vitlab.compress.tokens.reduction",
}


def __getattr__(name):
    if name not in PUBLIC:
        raise AttributeError(f"vitlab has no {name!r}; it has {', '.join(PUBLIC)}")
    module, _, attribute = PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__():
    return sorted([*globals(), *PUBLIC])


if "timm" in sys.modules:  # then torch is there, too, and this costs nothing
    importlib.import_module("vitlab.models.favit").register_with_timm()
