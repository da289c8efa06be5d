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

__version__ = "0.1.0"

# kind of model -> the module that registers its config (see models.checkpoint); a new method adds its line
KINDS = {
    "vit": "vitlab.models.vit",
    "resnet": "vitlab.models.resnet",
    "timm": "vitlab.models.timm",
    "gated": "vitlab.compress.pruning.gates",
    "reduced": "vitlab.compress.tokens.reduction",
}
