"""How a ViT comes apart, its embedding, the halves of its blocks, its head.

Token reduction happens inside a block, so the blocks are run piece by piece with the model's own modules.
What cannot be run that way exactly is refused by name, since passing over it would silently give wrong
outputs.
"""

import math

import torch.nn.functional as F

from vitlab.models.attention import Attention
from vitlab.models.timm import as_vit


def adapter(model):
    """The `Adapter` of a ViT, or of a timm VisionTransformer as ours; ValueError names what is not handled."""
    return Adapter(as_vit(model))


def _refuse(found):
    found = [name for name, has in found.items() if has]
    if found:
        raise ValueError(f"token reduction does not handle {', '.join(found)}, which this model has")


class Adapter:
    """prefix: tokens that always stay; read: how many of them the head reads (0: the patches' mean);
    grid: (rows, columns) of patches.

    Heads of unequal widths are filled up to one with zeros wherever tokens are reduced.
    """

    def __init__(self, model):
        self.model = model
        _refuse({
            **{f"{type(b.attn).__name__} (only softmax attention has the scores)": True
               for b in model.blocks if type(b.attn).forward is not Attention.forward},
            "blocks without a head": not all(shape.heads for shape in model.config.shapes),
            "blocks without MLP channels": not all(shape.hidden for shape in model.config.shapes),
        })  # fmt: skip
        config = model.config
        self.prefix, self.grid = config.prefix_tokens, (config.grid, config.grid)
        self.read = 1 + config.distilled if config.pool == "cls" else 0

    @property
    def patches(self):
        return math.prod(self.grid)

    @property
    def depth(self):
        return len(self.model.blocks)

    @staticmethod
    def scale(block):
        """Factor of the attention logits."""
        return block.attn.scale

    def attend(self, block, query, key, value, bias):
        """Fused attention -> tokens B M (heads d), before the projection."""
        rate = block.attn.dropout if block.training else 0.0
        mask = None if bias is None else bias.to(query.dtype)
        scale = block.attn.scale
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate, scale=scale)
        return out.transpose(1, 2).flatten(2)

    def embed(self, images):
        return self.model.embed(images)

    @staticmethod
    def split(block, x):
        return block.attn.split(x)

    @staticmethod
    def split_rows(block, x, rows):
        """Queries of the first `rows` tokens, keys and values of all: the other queries are not computed."""
        return block.attn.split(x, rows)

    @staticmethod
    def inner(block, x):
        """What is left of filled-up heads, and the norm before the projection, before tokens are averaged."""
        out = block.attn.joined(x.unflatten(2, (block.attn.heads, -1)))
        return out if block.attn.norm is None else block.attn.norm(out)

    @staticmethod
    def project(block, x):
        """Attention's output before the projection -> what is added to the residual."""
        return block.attended(block.attn.proj(x))

    def mlp(self, block, x):
        return block.mixed(block.mlp(block.norm2(x)))

    @staticmethod
    def local(block):
        """The MLP's convolution over the grid, or None."""
        return block.mlp.conv

    def local_mlp(self, block, x, mix):
        """The MLP with `mix` (hidden tokens -> hidden tokens) in place of its convolution over the grid."""
        return block.mixed(block.mlp(block.norm2(x), mix))

    def finish(self, x, size):
        """tokens -> logits; with sizes (B N) the pooled mean counts each token as often as it stands for."""
        model = self.model
        if self.read or size is None:
            return model.classify(model.pool(x))
        if not model.config.pool_prefix:
            x, size = x[:, self.prefix :], size[:, self.prefix :]
        weight = (size / size.sum(1, keepdim=True))[..., None].to(x.dtype)
        if model.config.pool_norm == "after":
            return model.classify(model.norm((x * weight).sum(1)))
        return model.classify((model.norm(x) * weight).sum(1))
