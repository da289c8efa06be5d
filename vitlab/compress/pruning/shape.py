"""What of a ViT can be pruned, and what is left of its shape under masks.

A structure is named "blocks.<i>.<kind>" or "embed"; its gate, score or mask is a flat tensor with an
entry a unit, ordered as in the weights (head by head).
"""

from dataclasses import replace

import torch

from vitlab.models.attention import Attention
from vitlab.models.shape import runs
from vitlab.models.timm import as_vit

KINDS = ("qk", "v", "heads", "mlp", "block", "embed")
SUPPORTED = (
    "vitlab's ViT with softmax attention (any stem and pooling; plain and conv MLPs) and timm's VisionTransformer and "
    "VisionTransformerDistilled that convert to one (`models.timm`)"
)


def prunable(model):
    """The model as a ViT whose units can be left out exactly: itself, or timm's as ours, sharing its parameters.

    Raises ValueError, naming what is in the way and what is supported, for any other model.
    """
    try:
        model = as_vit(model)
    except ValueError as error:
        raise ValueError(f"{error}; supported: {SUPPORTED}") from error
    config, strange = model.config, {type(b.attn).__name__ for b in model.blocks if type(b.attn) is not Attention}
    found = {
        f"the attention {', '.join(sorted(strange))}": strange,
        "gated MLPs": config.mlp.startswith("glu"),
        "a norm before the blocks": config.pre_norm,
        "norms inside attention or MLP": config.attention_norm or config.mlp_norm,
    }
    if names := [name for name, there in found.items() if there]:
        raise ValueError(f"this model has {', '.join(names)}, which cannot be pruned; supported: {SUPPORTED}")
    return model


def sizes(config, kinds=None):
    """{structure: units} of these kinds (None: all that can be). ValueError for unknown ones and "qk" under QK-norm."""
    kinds = [k for k in KINDS if k != "qk" or not config.qk_norm] if kinds is None else kinds
    if unknown := [k for k in kinds if k not in KINDS]:
        raise ValueError(f"kinds {', '.join(map(repr, unknown))}: choose from {', '.join(KINDS)}")
    if "qk" in kinds and config.qk_norm:
        raise ValueError("kind 'qk' cannot be pruned exactly under QK-norm, whose statistics run over a head's channels"
                         "; supported for this model: v, heads, mlp, block, embed")  # fmt: skip
    found = {}
    for i, block in enumerate(config.shapes):
        units = {"qk": block.qk, "v": block.v, "heads": len(block.each_head), "mlp": block.hidden, "block": 1}
        found |= {f"blocks.{i}.{k}": n for k, n in units.items() if k in kinds and n}
    return found | ({"embed": config.dim} if "embed" in kinds else {})


def kind_of(structure):
    """The kind of a structure's name."""
    return structure.rpartition(".")[2]


def head_index(block, kind):
    """For every "qk" or "v" channel of a block, the number of its head (int64)."""
    widths = torch.tensor([w[kind == "v"] for w in block.each_head], dtype=torch.long)
    return torch.arange(len(widths)).repeat_interleave(widths)


def check(config, masks):
    """Raise ValueError unless every mask names a structure of the model and has its length."""
    known = sizes(config)
    for name, mask in masks.items():
        if name not in known:
            raise ValueError(f"mask {name!r}: this model has no such structure; it has {', '.join(known)}")
        if mask.shape != (known[name],):
            raise ValueError(f"mask {name!r} has shape {tuple(mask.shape)}, the model needs ({known[name]},)")


def kept(config, masks):
    """What is left under `masks` ({structure: tensor}, non-zero = kept, absent = all kept).

    Returns [(block index, [(query/key channels, value channels) of a kept head], MLP channels)] for the blocks left,
    and the embedding channels, as int64 indices. Heads without values are gone; the rest are sorted by their widths.
    """
    check(config, masks)

    def get(name, n):
        return masks[name].cpu() != 0 if name in masks else torch.ones(n, dtype=torch.bool)

    blocks = []
    for i, block in enumerate(config.shapes):
        if not get(f"blocks.{i}.block", 1).all():
            continue
        live = get(f"blocks.{i}.heads", len(block.each_head))
        left = {kind: get(f"blocks.{i}.{kind}", size) for kind, size in (("qk", block.qk), ("v", block.v))}
        channels = [[(left[kind] & (head_index(block, kind) == h)).nonzero().flatten() for kind in left]
                    for h in live.nonzero().flatten()]  # fmt: skip
        heads = [(qk, v) for qk, v in channels if len(v)]
        heads.sort(key=lambda head: (-len(head[0]), -len(head[1])))
        blocks.append((i, heads, get(f"blocks.{i}.mlp", block.hidden).nonzero().flatten()))
    return blocks, get("embed", config.dim).nonzero().flatten()


def narrow(config, masks):
    """The config left under `masks`; its LayerNorms count removed embedding channels as zeros."""
    left, embed = kept(config, masks)
    blocks = tuple(
        replace(config.shapes[i], heads=runs([(len(qk), len(v)) for qk, v in heads]), hidden=len(hidden))
        for i, heads, hidden in left
    )
    if not len(embed):
        raise ValueError(f"embed: at least 1 embedding channel must be left of {config.dim}")
    whole = config.norm_dim or config.dim
    return replace(config, blocks=blocks, dim=len(embed), norm_dim=whole, stem_dim=config.stem_width)
