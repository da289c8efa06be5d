"""Where a ViT looks: one map of the patch grid per image, from its attention maps."""

import torch

from vitlab.utils.device import evaluating


def rollout(maps, residual=0.5):
    """Attention rollout (Abnar & Zuidema 2020, eq. 1): the product over the blocks of
    residual * I + (1 - residual) * mean over heads. maps: [B heads N N a block] -> B N N, rows sum to 1.
    """
    if any(m is None for m in maps):
        raise ValueError("rollout needs the attention map of every block; a block here has none")
    joint = None
    for attention in maps:
        mean = attention.mean(dim=1)  # B N N
        step = residual * torch.eye(mean.shape[-1], device=mean.device, dtype=mean.dtype)
        step = step + (1 - residual) * mean
        joint = step if joint is None else step @ joint
    return joint


def to_grid(attention, config):
    """Attention B N N -> what the head draws from each patch, B grid grid, each map scaled to [0, 1].

    A CLS model's head reads the CLS row; a mean-pooled one's the mean over all rows.
    """
    rows = attention[:, 0] if config.pool == "cls" else attention.mean(dim=1)
    patches = rows[:, config.prefix_tokens :]
    low, high = patches.amin(1, keepdim=True), patches.amax(1, keepdim=True)
    scaled = (patches - low) / (high - low).clamp_min(1e-12)
    return scaled.unflatten(1, (config.grid, config.grid))


def attention_maps(model, images):
    """{"last block": B g g, "rollout": B g g} of a ViT on normalised images B C H W, in eval mode."""
    with evaluating(model), torch.no_grad():
        _, seen = model(images, intermediates=True)
    maps = seen["attention"]
    return {
        "last block": to_grid(maps[-1].mean(dim=1), model.config),
        "rollout": to_grid(rollout(maps), model.config),
    }
