"""timm's models: its Vision Transformer as ours, exactly or refused by name; any of its models by a config."""

from dataclasses import dataclass

import torch
from torch import nn

from vitlab.models.checkpoint import register
from vitlab.models.shape import BlockShape
from vitlab.models.vit import ViT, ViTConfig

NORMS = ("norm", "norm1", "norm2", "fc_norm", "q_norm", "k_norm", "norm_pre")
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "ReLU": "relu", "SiLU": "silu"}


def from_timm(source, share=True):
    """Our ViT with the weights and outputs of timm's `VisionTransformer` or `VisionTransformerDistilled`.

    share: its parameters are the source's own, so that training one trains the other; else copies. Their names are
    timm's, but for `fc_norm`, which is `norm`. Device and mode are the source's. In training a distilled model gives
    both heads' logits. What cannot be represented exactly (attention pooling, parallel blocks, images that are not
    square, ...) is refused by name (ValueError), since passing over it would silently give wrong outputs.
    """
    config = timm_config(source)
    with torch.device("meta"):
        model = ViT(config)
    mine = dict(model.named_parameters())
    theirs = {name.replace("fc_norm.", "norm."): p for name, p in source.named_parameters()}
    if {n: p.shape for n, p in mine.items()} != {n: p.shape for n, p in theirs.items()}:
        odd = sorted(set(mine) ^ set(theirs)) or "shapes"
        raise ValueError(f"this timm model's parameters are not those of vitlab's ViT: {odd}")
    for name, parameter in theirs.items():
        owner, _, leaf = name.rpartition(".")
        copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(owner), leaf, parameter if share else copied)
    return model.train(source.training)


def as_vit(model):
    """`model` if it is a ViT of ours, timm's as ours (sharing its parameters); ValueError for any other."""
    if isinstance(model, ViT):
        return model
    if any(c.__module__.startswith("timm.") for c in type(model).__mro__):
        return from_timm(model)
    raise ValueError(f"a {type(model).__name__} is neither vitlab's ViT nor a timm VisionTransformer")


def timm_config(model):
    """The ViTConfig of a timm VisionTransformer; ValueError names whatever it has that a ViT of ours has not."""
    from timm.layers import GluMlp
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise ValueError(f"vitlab's ViT cannot stand for timm's {type(model).__name__}, only for VisionTransformer and "
                         "VisionTransformerDistilled themselves")  # fmt: skip
    _refuse(_strange_blocks(model))
    first, embed = model.blocks[0], model.patch_embed
    norms = [m for n, m in model.named_modules() if n.rpartition(".")[2] in NORMS and not isinstance(m, nn.Identity)]
    _refuse(_strange(model, norms))
    has = lambda module: not isinstance(module, nn.Identity)  # noqa: E731
    gated, dropout = isinstance(first.mlp, GluMlp), first.attn.proj_drop.p
    distilled = type(model) is VisionTransformerDistilled
    blocks = tuple(
        BlockShape(heads=((b.attn.num_heads, b.attn.head_dim, b.attn.head_dim),), hidden=b.mlp.fc2.in_features,
                   scale=b.attn.scale, drop_path=getattr(b.drop_path1, "drop_prob", 0.0))
        for b in model.blocks
    )  # fmt: skip
    return ViTConfig(
        image_size=embed.img_size[0], patch_size=embed.patch_size[0], in_chans=embed.proj.in_channels,
        num_classes=model.num_classes, dim=model.embed_dim, heads=first.attn.num_heads, mlp_dim=blocks[0].hidden,
        drop_path=blocks[-1].drop_path, blocks=blocks, class_token=model.cls_token is not None, distilled=distilled,
        registers=model.num_reg_tokens, pool="cls" if model.global_pool == "token" else "mean",
        pos="none" if model.pos_embed is None else "patches" if model.no_embed_class else "learned",
        pool_prefix=model.pool_include_prefix and model.global_pool == "avg",
        pool_norm="before" if has(model.norm) else "after", pre_norm=has(model.norm_pre),
        qkv_bias=first.attn.qkv.bias is not None, proj_bias=first.attn.proj.bias is not None,
        qk_norm=has(first.attn.q_norm), attention_norm=has(first.attn.norm), mlp_norm=has(first.mlp.norm),
        layer_scale=has(first.ls1), act=_activation(first.mlp.act),
        mlp=("glu_last" if first.mlp.gate_last else "glu") if gated else "plain",
        pos_dropout=model.pos_drop.p, dropout=dropout, attention_dropout=first.attn.attn_drop.p,
        head_dropout=0.0 if distilled else model.head_drop.p, norm_eps=norms[0].eps,
    )  # fmt: skip


def _refuse(found):
    if names := [name for name, there in found.items() if there]:
        raise ValueError(f"this timm model has {', '.join(names)}, which vitlab's ViT does not have")


def _strange_blocks(model):
    from timm.layers import Attention, GluMlp, Mlp
    from timm.models.vision_transformer import Block

    kinds = lambda modules, *known: sorted({type(m).__name__ for m in modules if type(m) not in known})  # noqa: E731
    blocks = [b for b in model.blocks if type(b) is Block]
    attentions = kinds([b.attn for b in blocks], Attention)
    mlps = kinds([b.mlp for b in blocks], Mlp, GluMlp)
    return {
        f"blocks of type {', '.join(kinds(model.blocks, Block))}": len(blocks) < len(model.blocks),
        f"attention other than timm's Attention ({', '.join(attentions)})": attentions,
        f"MLPs of type {', '.join(mlps)}": mlps,
        "gated attention": any(getattr(b.attn, "gate", None) is not None for b in blocks),
    }


def _strange(model, norms):
    from timm.layers import PatchEmbed

    embed, act = model.patch_embed, model.blocks[0].mlp.act
    plain = type(embed) is PatchEmbed and isinstance(embed.norm, nn.Identity)
    pool = model.global_pool
    return {
        "a stem other than PatchEmbed without a norm": not plain,
        "dynamic image sizes": model.dynamic_img_size or getattr(embed, "dynamic_img_pad", False),
        "images or patches that are not square": plain and (
            len(set(embed.img_size)) > 1 or len(set(embed.patch_size)) > 1),
        "norms other than LayerNorm with one eps": not norms or not all(isinstance(m, nn.LayerNorm) for m in norms)
        or len({m.eps for m in norms}) > 1,
        "no last norm": isinstance(model.norm, nn.Identity) == isinstance(model.fc_norm, nn.Identity),
        "patch dropout": not isinstance(model.patch_drop, nn.Identity),
        "attention pooling": model.attn_pool is not None,
        f"global_pool={pool!r}": model.attn_pool is None and pool not in ("token", "avg"),
        f"the activation {type(act).__name__}": _activation(act) is None,
        "no classifier": not isinstance(model.head, nn.Linear),
        "gradient checkpointing": model.grad_checkpointing,
    }  # fmt: skip


def _activation(act):
    if isinstance(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return ACTIVATIONS.get(type(act).__name__)  # timm has its own classes of these, with the same formulas


@register("timm")
@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """Any model of timm's: `timm.create_model(name, num_classes=..., **options)`, with new weights.

    options: keyword arguments of its (a dictionary, kept as pairs): img_size, global_pool, drop_path_rate, ...
    """

    name: str
    num_classes: int = 1000
    options: tuple = ()

    def __post_init__(self):
        import timm

        pairs = self.options.items() if isinstance(self.options, dict) else self.options
        object.__setattr__(self, "options", tuple(sorted((str(k), v) for k, v in pairs)))
        if not timm.is_model(self.name):
            from difflib import get_close_matches

            near = ", ".join(get_close_matches(self.name, timm.list_models(), n=3)) or "see timm.list_models()"
            raise ValueError(f"name={self.name!r}: timm has no such model ({near})")

    def build(self):
        """The model, in timm's own class."""
        import timm

        model = timm.create_model(self.name, num_classes=self.num_classes, **dict(self.options))
        model.config = self
        return model

    @property
    def _input(self):
        import timm

        options = dict(self.options)
        chans, side, _ = timm.get_pretrained_cfg(self.name).input_size
        side = options.get("img_size", side)
        return options.get("in_chans", chans), side if isinstance(side, int) else side[0]

    @property
    def in_chans(self):
        return self._input[0]

    @property
    def image_size(self):
        """Side of the images in pixels: the option img_size, else that of the pretrained weights."""
        return self._input[1]

    def macs(self):
        """Multiply-accumulates of one image, counted on a model without data."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"):
            model, images = self.build().eval(), torch.zeros(1, self.in_chans, self.image_size, self.image_size)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(images)
        return counter.get_total_flops() // 2
