"""How a ViT comes apart, ours or timm's: its embedding, the halves of its blocks, its head.

Token reduction happens inside a block, so the blocks are run piece by piece with the model's own modules.
What cannot be run that way exactly is refused by name, since passing over it would silently give wrong
outputs.
"""

import math

import torch
import torch.nn.functional as F

from vitlab.compress.slim import SlimViT
from vitlab.models.parts import Attention, attend
from vitlab.models.vit import ViT


def anatomy(model):
    """The `Ours`, `Slim` or `Timm` reading of `model`; ValueError names what it has that is not handled."""
    if isinstance(model, ViT):
        return Ours(model)
    if isinstance(model, SlimViT):
        return Slim(model)
    try:
        from timm.models import VisionTransformer
    except ImportError:
        VisionTransformer = ()
    if isinstance(model, VisionTransformer):
        return Timm(model)
    raise ValueError(f"{type(model).__name__} is neither vitlab's ViT or SlimViT nor a timm VisionTransformer")


def _refuse(found):
    found = [name for name, has in found.items() if has]
    if found:
        raise ValueError(f"token reduction does not handle {', '.join(found)}, which this model has")


class _Anatomy:
    """prefix: tokens that always stay; read: how many of them the head reads (0: the patches' mean);
    grid: (rows, columns) of patches; late_norm: whether the last norm follows the mean."""

    def __init__(self, model):
        self.model = model

    @property
    def patches(self):
        return math.prod(self.grid)

    @property
    def depth(self):
        return len(self.model.blocks)

    @staticmethod
    def scale(block):
        """Factor of the attention logits; None is width ** -0.5."""
        return None

    def attend(self, block, query, key, value, bias):
        """Fused attention -> tokens B M (heads d), before the projection."""
        rate = self.attention_dropout(block) if block.training else 0.0
        mask = None if bias is None else bias.to(query.dtype)
        out = attend(query, key, value, mask=mask, dropout=rate, scale=self.scale(block))
        return out.transpose(1, 2).flatten(2)

    def split_rows(self, block, x, rows):
        """Queries of the first `rows` tokens, keys and values of all: the other queries are not computed."""
        qkv, heads = block.attn.qkv, self.heads(block)
        inner = qkv.weight.shape[0] // 3
        bias = (None, None) if qkv.bias is None else (qkv.bias[:inner], qkv.bias[inner:])
        query = F.linear(x[:, :rows], qkv.weight[:inner], bias[0])
        both = F.linear(x, qkv.weight[inner:], bias[1])
        query = query.unflatten(2, (heads, -1)).transpose(1, 2)
        key, value = both.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return *self.normed(block, query, key), value

    def normed(self, block, query, key):
        return query, key


class Ours(_Anatomy):
    """vitlab's ViT with softmax attention."""

    def __init__(self, model):
        super().__init__(model)
        _refuse({
            f"{type(block.attn).__name__} (only softmax attention has the scores)": True
            for block in model.blocks if type(block.attn).forward is not Attention.forward
        })  # fmt: skip
        self.read_shape(model.config)

    def read_shape(self, config):
        self.prefix, self.grid = config.prefix_tokens, (config.grid, config.grid)
        self.read = 1 + config.distilled if config.pool == "cls" else 0
        self.late_norm = config.pool == "mean" and config.pool_norm == "after"

    def embed(self, images):
        return self.model.embed(images)

    @staticmethod
    def heads(block):
        return block.attn.heads

    @staticmethod
    def attention_dropout(block):
        return block.attn.dropout

    @staticmethod
    def split(block, x):
        return block.attn.split(x)

    @staticmethod
    def inner(block, x):
        return x

    @staticmethod
    def project(block, x):
        """Attention's output before the projection -> what is added to the residual."""
        return block.drop_path(block.drop(block.attn.proj(x)))

    @staticmethod
    def added(block, x):
        """What the MLP gives -> what is added to the residual; linear, token by token."""
        return block.drop_path(x)

    def mlp(self, block, x):
        return self.added(block, block.mlp(block.norm2(x)))

    @staticmethod
    def local(block):
        """The MLP's convolution over the grid, or None."""
        return block.mlp.conv

    def local_mlp(self, block, x, mix):
        """The MLP with `mix` (hidden tokens -> hidden tokens) in place of its convolution over the grid."""
        mlp = block.mlp
        hidden = mix(mlp.fc1(block.norm2(x)))
        return self.added(block, mlp.drop(mlp.fc2(mlp.drop(mlp.act(hidden)))))

    def mean_mlp(self, block, x, weight, mix=None):
        """Mean over the tokens (weights B N 1 that sum to 1) of x + MLP, the second layer after the mean."""
        mlp = block.mlp
        hidden = mlp.fc1(block.norm2(x))
        hidden = hidden if mix is None else mix(hidden)
        hidden = (mlp.drop(mlp.act(hidden)) * weight).sum(1, keepdim=True)
        return ((x * weight).sum(1, keepdim=True) + self.added(block, mlp.drop(mlp.fc2(hidden)))).squeeze(1)

    def finish(self, x, size):
        """tokens -> logits; with sizes (B N) the pooled mean counts each token as often as it stands for."""
        model = self.model
        if self.read or size is None:
            return model.classify(model.pool(x))
        weight = (size / size.sum(1, keepdim=True))[..., None].to(x.dtype)
        if self.late_norm:
            return self.finish_mean((x * weight).sum(1))
        return model.classify((model.norm(x) * weight).sum(1))

    def finish_mean(self, pooled):
        return self.model.classify(self.model.norm(pooled))


class Slim(Ours):
    """A SlimViT: heads of any widths, filled up to one with zeros wherever tokens are reduced."""

    def __init__(self, model):
        _Anatomy.__init__(self, model)
        _refuse({
            "blocks without a head": any(not block.attn.heads for block in model.blocks),
            "blocks without MLP channels": any(not block.mlp.hidden for block in model.blocks),
        })  # fmt: skip
        self.read_shape(model.config)

    @staticmethod
    def scale(block):
        return block.attn.scale

    @staticmethod
    def split(block, x):
        return block.attn.filled(x)

    def split_rows(self, block, x, rows):
        return block.attn.filled(x, rows)

    @staticmethod
    def inner(block, x):
        return block.attn.kept(x.unflatten(2, (block.attn.heads, -1)))

    @staticmethod
    def project(block, x):
        return block.drop_path(block.ls1(block.drop(block.attn.proj(x))))

    @staticmethod
    def added(block, x):
        return block.drop_path(block.ls2(x))


class Timm(_Anatomy):
    """timm's VisionTransformer: CLS, distillation and register tokens, LayerScale, QK-norm, drop-path."""

    def __init__(self, model):
        super().__init__(model)
        from timm.layers import Attention as TimmAttention
        from timm.layers import GluMlp, Mlp, SwiGLU
        from timm.models import VisionTransformer
        from timm.models.deit import VisionTransformerDistilled
        from timm.models.vision_transformer import Block

        blocks = model.blocks
        plain = all(type(b) is Block for b in blocks)
        kinds = sorted({type(b).__name__ for b in blocks if type(b) is not Block})
        attentions = [b.attn for b in blocks] if plain else []
        mlps = [b.mlp for b in blocks] if plain else []
        _refuse({
            f"{type(model).__name__}": type(model) not in (VisionTransformer, VisionTransformerDistilled),
            f"blocks of type {', '.join(kinds)}": not plain,
            "attention other than timm's Attention": any(type(a) is not TimmAttention for a in attentions),
            "gated attention": any(getattr(a, "gate", None) is not None for a in attentions),
            "MLPs that mix tokens": any(not isinstance(m, (Mlp, GluMlp, SwiGLU)) for m in mlps),
            "attention pooling": getattr(model, "attn_pool", None) is not None,
            f"global_pool={model.global_pool!r}": model.global_pool not in ("token", "avg", "map", "prr"),
            "patch dropout": not isinstance(model.patch_drop, torch.nn.Identity),
            "dynamic image sizes": model.dynamic_img_size,
            "gradient checkpointing": model.grad_checkpointing,
        })  # fmt: skip
        self.prefix, self.grid = model.num_prefix_tokens, tuple(model.patch_embed.grid_size)
        distilled = getattr(model, "dist_token", None) is not None
        self.read = 1 + distilled if model.global_pool == "token" else 0
        # fc_norm follows the mean; LayerScale and projections are linear, so the mean may be taken first
        self.late_norm = False

    def embed(self, images):
        model = self.model
        return model.norm_pre(model._pos_embed(model.patch_embed(images)))

    @staticmethod
    def heads(block):
        return block.attn.num_heads

    @staticmethod
    def attention_dropout(block):
        return block.attn.attn_drop.p

    def split(self, block, x):
        b, n, _ = x.shape
        attn = block.attn
        query, key, value = attn.qkv(x).reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return *self.normed(block, query, key), value

    def normed(self, block, query, key):
        return block.attn.q_norm(query), block.attn.k_norm(key)

    @staticmethod
    def inner(block, x):
        """The norm between attention and projection, which has to come before tokens are averaged."""
        return block.attn.norm(x)

    @staticmethod
    def project(block, x):
        return block.drop_path1(block.ls1(block.attn.proj_drop(block.attn.proj(x))))

    @staticmethod
    def mlp(block, x):
        return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    @staticmethod
    def local(block):
        return None

    def finish(self, x, size):
        model = self.model
        if self.read:
            # the norm is per token: normalise only those that are read
            return model.forward_head(model.norm(x[:, : self.read]))
        x = model.norm(x)
        if size is None:
            return model.forward_head(x)
        skip = 0 if model.pool_include_prefix else self.prefix
        weight = size[:, skip:]
        weight = (weight / weight.sum(1, keepdim=True))[..., None].to(x.dtype)
        return model.head(model.head_drop(model.fc_norm((x[:, skip:] * weight).sum(1))))
