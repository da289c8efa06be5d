"""Any ViT that can be pruned here as a `SlimViT` at full width: the same outputs, the same weight names."""

import copy

from torch import nn

from vitlab.compress.pruning.shape import SlimBlock, SlimConfig
from vitlab.compress.pruning.slim import SlimViT
from vitlab.models import layers as parts
from vitlab.models.vit import ViT

SUPPORTED = (
    "vitlab's ViT with softmax attention (any stem, MLP and pooling), timm's VisionTransformer and "
    "VisionTransformerDistilled (register tokens, LayerScale, QK-norm) and SlimViT"
)


def as_slim(model):
    """A `SlimViT` with a copy of the model's weights and the same outputs, on its device and in its mode.

    Raises ValueError, naming what is in the way and what is supported, for any other model.
    """
    if isinstance(model, SlimViT):
        return copy.deepcopy(model)
    if isinstance(model, ViT):
        config = _from_ours(model)
    elif any(c.__name__ == "VisionTransformer" and c.__module__.startswith("timm.") for c in type(model).__mro__):
        config = _from_timm(model)
    else:
        raise ValueError(f"a {type(model).__name__} cannot be pruned; supported: {SUPPORTED}")
    slim = SlimViT(config)
    state = {k.replace("fc_norm.", "norm."): v for k, v in model.state_dict().items()}
    slim.load_state_dict(state)
    like = next(model.parameters())
    return slim.to(like.device, like.dtype).train(model.training)


def _refuse(found):
    if names := [name for name, there in found.items() if there]:
        raise ValueError(f"this model has {', '.join(names)}, which cannot be pruned; supported: {SUPPORTED}")


def _from_ours(model):
    c = model.config
    strange = sorted({type(b.attn).__name__ for b in model.blocks if type(b.attn) is not parts.Attention})
    _refuse({f"the attention {', '.join(strange)}": strange})
    width = c.dim // c.heads
    blocks = tuple(
        SlimBlock(heads=((c.heads, width, width),), hidden=c.mlp_dim, scale=width**-0.5, drop_path=b.drop_path.rate)
        for b in model.blocks
    )
    return SlimConfig(
        image_size=c.image_size, patch_size=c.patch_size, in_chans=c.in_chans, num_classes=c.num_classes,
        dim=c.dim, norm_dim=c.dim, stem_dim=c.dim, stem=c.stem, blocks=blocks, cls_token=c.pool == "cls",
        distilled=c.distilled,
        pos="all" if c.pos == "learned" else "none", pool=c.pool, pool_norm=c.pool_norm, qkv_bias=c.qkv_bias,
        mlp=c.mlp, head_hidden=c.head_hidden, pos_dropout=c.dropout, dropout=c.dropout,
        attention_dropout=c.attention_dropout, head_dropout=c.dropout if c.head_hidden else 0.0,
        norm_eps=c.norm_eps,
    )  # fmt: skip


def _activation(act):
    if isinstance(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    # timm has its own classes of these, with the same formulas
    return {"GELUTanh": "gelu_tanh", "ReLU": "relu", "SiLU": "silu"}.get(type(act).__name__)


def _from_timm(model):
    from timm.layers import Mlp, PatchEmbed
    from timm.models.vision_transformer import Attention, Block

    first = model.blocks[0]
    plain = all(type(b) is Block and type(b.attn) is Attention and type(b.mlp) is Mlp for b in model.blocks)
    _refuse({"blocks, attention or MLPs other than timm's plain ones": not plain})
    names = ("norm", "norm1", "norm2", "fc_norm", "q_norm", "k_norm", "norm_pre")
    norms = [m for n, m in model.named_modules() if n.rpartition(".")[2] in names]
    norms = [m for m in norms if not isinstance(m, nn.Identity)]
    embed, prefix = model.patch_embed, model.num_prefix_tokens
    _refuse({
        "a patch embedding other than PatchEmbed with a bias and without norm": type(embed) is not PatchEmbed
        or not isinstance(embed.norm, nn.Identity) or embed.proj.bias is None,
        "images of variable size or not square": model.dynamic_img_size or len(set(embed.img_size)) > 1,
        "norms other than LayerNorm with one eps": not all(isinstance(m, nn.LayerNorm)
                                                           for m in norms) or len({m.eps for m in norms}) > 1,
        "a norm before the blocks": not isinstance(model.norm_pre, nn.Identity),
        "no last norm": isinstance(model.norm, nn.Identity) == isinstance(model.fc_norm, nn.Identity),
        "norms inside attention or MLP": any(not isinstance(m, nn.Identity) for b in model.blocks
                                             for m in (b.attn.norm, b.mlp.norm)),
        "gated attention": any(b.attn.gate is not None for b in model.blocks),
        "patch dropout": not isinstance(model.patch_drop, nn.Identity),
        f"pooling {model.global_pool!r}": model.global_pool not in ("token", "avg")
        or model.pool_include_prefix,
        f"the activation {type(first.mlp.act).__name__}": _activation(first.mlp.act) is None,
        "no classifier": not isinstance(model.head, nn.Linear),
        "register tokens beside a distillation token": hasattr(model, "dist_token") and prefix != 2,
    })  # fmt: skip
    blocks = tuple(
        SlimBlock(heads=((b.attn.num_heads, b.attn.head_dim, b.attn.head_dim),),
                  hidden=b.mlp.fc1.out_features, scale=b.attn.scale,
                  drop_path=getattr(b.drop_path1, "drop_prob", 0.0))
        for b in model.blocks
    )  # fmt: skip
    pos = "none" if model.pos_embed is None else "patches" if model.no_embed_class else "all"
    return SlimConfig(
        image_size=embed.img_size[0], patch_size=embed.patch_size[0], in_chans=embed.proj.in_channels,
        num_classes=model.num_classes, dim=model.embed_dim, norm_dim=model.embed_dim,
        stem_dim=model.embed_dim, blocks=blocks, cls_token=model.cls_token is not None,
        distilled=hasattr(model, "dist_token"),
        registers=model.num_reg_tokens, pos=pos, pool="cls" if model.global_pool == "token" else "mean",
        pool_norm="after" if isinstance(model.norm, nn.Identity) else "before",
        qkv_bias=first.attn.qkv.bias is not None, proj_bias=first.attn.proj.bias is not None,
        qk_norm=not isinstance(first.attn.q_norm, nn.Identity),
        layer_scale=not isinstance(first.ls1, nn.Identity),
        act=_activation(first.mlp.act), pos_dropout=model.pos_drop.p, dropout=first.attn.proj_drop.p,
        attention_dropout=first.attn.attn_drop.p, head_dropout=model.head_drop.p, norm_eps=norms[0].eps,
    )  # fmt: skip
