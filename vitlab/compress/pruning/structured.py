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
def slim(model, masks=None, norm="all"):
    """The plain, physically smaller ViT that equals `masked(model, masks)`.

    model: anything `prunable` takes, or a `GatedViT`, whose gates are multiplied into the weights (and whose
    masks and zero gates are left out as well). masks: {structure: tensor, non-zero = kept}.
    norm: "all": LayerNorms count removed embedding channels as the zeros they are in the masked model;
    "kept": plain LayerNorms over the channels that are left, faster, not equal once the embedding is pruned.
    """
    gated = masked(model, masks or {})
    core, values = gated.core, {k: v.detach() for k, v in gated.values().items()}
    state = core.state_dict() | gated.folded()
    config = narrow(core.config, values, norm)
    small = config.build().to(next(core.parameters()).device, next(core.parameters()).dtype)
    small.load_state_dict(sliced(state, core.config, values))
    return small.train(model.training)


def sliced(state, config, masks):
    """The rows and columns that are left under `masks` of weights {name: tensor}, "norm.weight" among them."""
    blocks, embed = kept(config, masks)
    embed = embed.to(state["norm.weight"].device)
    new = {}
    for name, w in state.items():
        if name.startswith("blocks."):
            continue
        if name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
            new[name] = w[..., embed]
        elif name.startswith(("norm.", "patch_embed.proj.")):
            new[name] = w[embed]
        elif name in ("head.weight", "head_dist.weight", "head.0.weight", "head_dist.0.weight"):
            new[name] = w[:, embed]
        else:
            new[name] = w
    for j, (i, heads, hidden) in enumerate(blocks):
        part = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        new |= {f"blocks.{j}.{k}": v for k, v in _block(part, config.shapes[i], heads, hidden, embed).items()}
    return new


def _block(state, block, heads, hidden, embed):
    device = embed.device
    empty = torch.zeros(0, dtype=torch.long)
    qk = torch.cat([qk for qk, _ in heads] or [empty]).to(device)
    v = torch.cat([v for _, v in heads] or [empty]).to(device)
    rows, hidden = torch.cat([qk, block.qk + qk, 2 * block.qk + v]), hidden.to(device)
    cut = {
        "norm1.weight": lambda w: w[embed], "norm1.bias": lambda w: w[embed],
        "attn.qkv.weight": lambda w: w[rows][:, embed], "attn.qkv.bias": lambda w: w[rows],
        "attn.proj.weight": lambda w: w[embed][:, v], "attn.proj.bias": lambda w: w[embed],
        "attn.rank": lambda w: w[qk], "attn.gate": lambda w: w[head_index(block, "v").to(device)[v].unique()],
        "ls1.gamma": lambda w: w[embed], "ls2.gamma": lambda w: w[embed],
        "norm2.weight": lambda w: w[embed], "norm2.bias": lambda w: w[embed],
        "mlp.fc1.weight": lambda w: w[hidden][:, embed], "mlp.fc1.bias": lambda w: w[hidden],
        "mlp.conv.weight": lambda w: w[hidden], "mlp.conv.bias": lambda w: w[hidden],
        "mlp.fc2.weight": lambda w: w[embed][:, hidden], "mlp.fc2.bias": lambda w: w[embed],
    }  # fmt: skip
    new = {k: cut[k](w) if k in cut else w for k, w in state.items()}  # QK-norms stay as they are
    gone = [] if heads else ["norm1", "attn.qkv", "attn.q_norm", "attn.k_norm"]
    gone += [] if len(hidden) else ["norm2", "mlp.fc1", "mlp.conv"]
    return {k: w for k, w in new.items() if k.rpartition(".")[0] not in gone}


def prune(model, data=None, *, criterion="taylor", kinds=("qk", "v", "mlp"), images=256, seed=0, norm="all",
          uniform=True, **budget):  # fmt: skip
    """The plain, smaller ViT that is left of a model within a budget: scored, selected and cut in one call.

    model: a ViT of ours or timm's, or a GatedViT. data: a Dataset, of which `images` of the training split are drawn
    from `seed`, or [(images, labels), ...] as the model takes them; "magnitude", "geometric-median", "random" and
    "gates" need none. criterion, kinds: as in `score`; norm: as in `slim`; budget: one of ratio=, macs=, latency=, and
    further options of `select`. uniform: the heads of a block get one width; False: each its own, which keeps better
    units and is slower. Raises ValueError for a model that cannot be pruned, a budget that cannot be met, or that the
    model meets as it is.
    """
    shape = shape_of(model)
    if isinstance(data, Dataset):
        data = calibration(data, images, seed=seed, size=shape.image_size)
    scores = score(model, criterion, kinds=kinds, data=data, seed=seed)
    masks = select(shape, scores, uniform=uniform, **budget)
    return slim(model, masks, norm)
