"""Exact structured pruning of Vision Transformers.

    small = prune(model, data, macs=0.6 * shape_of(model).macs())

is, in steps,

    scores = score(model, "taylor", data=calibration(data))
    masks = select(shape_of(model), scores, macs=0.6 * shape_of(model).macs(), uniform=True)
    small = slim(model, masks)                       # a plain model, equal to masked(model, masks)

or, with trained gates, `fit(GatedViT(model), data, recipe, objective=L1())` and `score(gated, "gates")`.
"""

import copy

import torch

from vitlab.compress.pruning.budget import select
from vitlab.compress.pruning.criteria import calibration, score
from vitlab.compress.pruning.gates import GatedViT
from vitlab.compress.pruning.shape import head_index, kept, narrow, prunable
from vitlab.data.datasets import Dataset

READERS = ("cls_token", "dist_token", "reg_token", "pos_embed", "head.weight", "head_dist.weight", "head.0.weight",
           "head_dist.0.weight")  # their last axis is the embedding  # fmt: skip


def shape_of(model):
    """The `ViTConfig` of a model: its widths, `.macs()` and `.parameters()`."""
    if isinstance(model, GatedViT):
        return model.shape
    return prunable(model).config


def masked(model, masks):
    """A `GatedViT` of full size in which what `masks` leaves out is multiplied by zero; no trainable gates.

    Of a GatedViT: a copy with its gates.
    """
    if not isinstance(model, GatedViT):
        return GatedViT(model, kinds=(), masks=masks)
    gated = copy.deepcopy(model)
    gated.mask(masks)
    return gated


@torch.no_grad()
def slim(model, masks=None):
    """The plain, physically smaller ViT that equals `masked(model, masks)`.

    model: anything `prunable` takes, or a `GatedViT`, whose gates are multiplied into the weights (and whose
    masks and zero gates are left out as well). masks: {structure: tensor, non-zero = kept}.
    """
    gated = masked(model, masks or {})
    core, values = gated.core, {k: v.detach() for k, v in gated.values().items()}
    state = core.state_dict() | gated.folded()
    small = narrow(core.config, values).build().to(next(core.parameters()).device, next(core.parameters()).dtype)
    small.load_state_dict(sliced(state, core.config, values))
    return small.train(model.training)


def sliced(state, config, masks):
    """The rows and columns that are left under `masks` of weights {name: tensor}, "norm.weight" among them."""
    blocks, embed = kept(config, masks)
    embed = embed.to(state["norm.weight"].device)
    new = {}
    for name, w in state.items():
        if name.startswith(("norm.", "patch_embed.proj.")):
            new[name] = w[embed]
        elif not name.startswith("blocks."):
            new[name] = w[..., embed] if name in READERS else w
    for j, (i, heads, hidden) in enumerate(blocks):
        rows, columns = _left(config.shapes[i], heads, hidden.to(embed.device), embed)
        gone = [] if heads else ["norm1", "attn.qkv", "attn.q_norm", "attn.k_norm"]
        gone += [] if len(hidden) else ["norm2", "mlp.fc1", "mlp.conv"]
        for name, w in state.items():
            part = name.removeprefix(f"blocks.{i}.")
            layer, kind = part.rpartition(".")[::2]
            if part == name or layer in gone:
                continue
            found = rows.get(part, rows.get(layer))  # QK-norms stay as they are
            w = w if found is None else w[found]
            new[f"blocks.{j}.{part}"] = w[:, columns[layer]] if kind == "weight" and layer in columns else w
    return new


def _left(block, heads, hidden, embed):
    """({layer or parameter: rows}, {layer: columns of its weight}) that are left of a block."""
    empty = torch.zeros(0, dtype=torch.long)
    qk, v = (torch.cat([head[i] for head in heads] or [empty]).to(embed.device) for i in (0, 1))
    rows = dict.fromkeys(("norm1", "attn.proj", "ls1", "norm2", "mlp.fc2", "ls2"), embed)
    rows |= dict.fromkeys(("mlp.fc1", "mlp.conv"), hidden)
    rows |= {"attn.qkv": torch.cat([qk, block.qk + qk, 2 * block.qk + v]), "attn.rank": qk,
             "attn.gate": head_index(block, "v").to(embed.device)[v].unique()}  # fmt: skip
    return rows, {"attn.qkv": embed, "attn.proj": v, "mlp.fc1": embed, "mlp.fc2": hidden}


def prune(model, data=None, *, criterion="taylor", kinds=("qk", "v", "mlp"), images=256, seed=0, uniform=True,
          **budget):  # fmt: skip
    """The plain, smaller ViT that is left of a model within a budget: scored, selected and cut in one call.

    model: a ViT of ours or timm's, or a GatedViT. data: a Dataset, of which `images` of the training split are drawn
    from `seed`, or [(images, labels), ...] as the model takes them; "magnitude", "geometric-median", "random" and
    "gates" need none. criterion, kinds: as in `score`; budget: one of ratio=, macs=, latency=, and
    further options of `select`. uniform: the heads of a block get one width; False: each its own, which keeps better
    units and is slower. Raises ValueError for a model that cannot be pruned, a budget that cannot be met, or that the
    model meets as it is.
    """
    shape = shape_of(model)
    if isinstance(data, Dataset):
        data = calibration(data, images, seed=seed, size=shape.image_size)
    scores = score(model, criterion, kinds=kinds, data=data, seed=seed)
    masks = select(shape, scores, uniform=uniform, **budget)
    return slim(model, masks)
