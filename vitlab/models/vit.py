"""The one Vision Transformer of the study.

Every method is a constructor argument of this model: another attention class, stem, MLP or pooling.
Parameters are named as in timm's `VisionTransformer`, so that weights move between the two.
"""

import dataclasses
import importlib
import json
from dataclasses import dataclass

import torch
from torch import nn

from vitlab.models.parts import STEMS, Attention, Block

POOLS = ("cls", "mean")
POSITIONS = ("learned", "none")
ATTENTIONS = {"softmax": Attention}  # name in a config -> class; the modules below add theirs
PROVIDERS = dict.fromkeys(("linear", "ripple", "hydra"), "vitlab.models.linear")


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Shape of a ViT; plain data, so that a checkpoint can carry it.

    Sizes are in pixels (image, patch), channels (dim, mlp_dim, head_hidden) or counts. `mlp_dim` defaults to
    4 * dim. `qkv_bias=False` and `head_hidden` (a hidden layer in the classifier) are what the
    earlier projects used. `pool_norm="after"` is timm's `fc_norm`: the last LayerNorm follows the mean.
    """

    image_size: int = 32
    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 10
    dim: int = 192
    depth: int = 6
    heads: int = 3
    mlp_dim: int | None = None
    mlp: str = "plain"  # "plain" | "conv": a depthwise 3x3 over the patch grid between the two layers
    stem: str = "patch"  # "patch" | "conv": overlapping 3x3 convolutions | "residual": more of them, some residual
    pos: str = "learned"  # "learned" | "none"
    pool: str = "cls"  # "cls" | "mean"
    pool_norm: str = "before"  # the last LayerNorm "before" | "after" pooling
    distilled: bool = False  # DeiT's second token and head
    qkv_bias: bool = True
    head_hidden: int | None = None
    attention: str = "softmax"
    attention_args: tuple = ()  # (("stages", 3), ...): keyword arguments of the attention class
    dropout: float = 0.0  # after the embedding, the projections and in the MLP
    attention_dropout: float = 0.0
    drop_path: float = 0.0  # stochastic depth: rate of the last block, rising linearly from 0
    norm_eps: float = 1e-6

    def __post_init__(self):
        object.__setattr__(self, "mlp_dim", self.mlp_dim or 4 * self.dim)
        pairs = self.attention_args.items() if isinstance(self.attention_args, dict) else self.attention_args
        object.__setattr__(self, "attention_args", tuple((str(k), v) for k, v in pairs))
        for name in ("image_size", "patch_size", "in_chans", "num_classes", "dim", "depth", "heads", "mlp_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: a whole number of at least 1 is needed")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}")
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not a multiple of heads={self.heads}")
        choices = {"stem": STEMS, "pool": POOLS, "pos": POSITIONS, "mlp": ("plain", "conv"),
                   "pool_norm": ("before", "after")}  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for name in ("dropout", "attention_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a rate in [0, 1) is needed")
        if self.stem != "patch" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size={self.patch_size}: the {self.stem} stem halves the image, so a power of two")
        if self.stem == "residual" and self.patch_size == 1:
            raise ValueError("patch_size=1: the residual stem has its residual layers after halvings; take stem='conv'")
        if self.distilled and self.pool != "cls":
            raise ValueError("distilled=True needs pool='cls': the distillation token stands beside it")

    @property
    def grid(self):
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def prefix_tokens(self):
        """Tokens before the patches: the CLS token, and the distillation token if there is one."""
        return (self.pool == "cls") + self.distilled

    @property
    def tokens(self):
        """Tokens in the sequence."""
        return self.grid**2 + self.prefix_tokens


def attention_class(name):
    """The attention class of that name; the module that provides it is imported when it is first asked for."""
    if name not in ATTENTIONS and name in PROVIDERS:
        importlib.import_module(PROVIDERS[name])
    if name not in ATTENTIONS:
        raise ValueError(f"attention={name!r}: choose one of {', '.join({**ATTENTIONS, **PROVIDERS})}")
    return ATTENTIONS[name]


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021, eq. 1-4), pre-norm.

    `attention(dim, heads, config=..., **attention_args)` builds each block's attention; by default the class
    that `config.attention` names.
    """

    def __init__(self, config, attention=None):
        super().__init__()
        attention = attention or attention_class(config.attention)
        self.config = config
        dim = config.dim
        self.patch_embed = STEMS[config.stem](config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.pool == "cls" else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.distilled else None
        learned = config.pos == "learned"
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, dim)) if learned else None
        self.pos_drop = nn.Dropout(config.dropout)
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, attention, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.head = self._head()
        self.head_dist = self._head() if config.distilled else None
        self.apply(_init)
        for token in (self.cls_token, self.dist_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    def _head(self):
        dim, hidden, classes = self.config.dim, self.config.head_hidden, self.config.num_classes
        if hidden is None:
            return nn.Linear(dim, classes)
        return nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(self.config.dropout), nn.Linear(hidden, classes)
        )

    def embed(self, images):
        """images B C H W -> tokens B N D: patches, then the prefix tokens before them, then positions."""
        if images.shape[1:] != (self.config.in_chans, self.config.image_size, self.config.image_size):
            side = self.config.image_size
            raise ValueError(
                f"images of shape {tuple(images.shape[1:])}; this model takes ({self.config.in_chans}, {side}, {side})"
            )
        x = self.patch_embed(images)  # B N D
        prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.dist_token) if t is not None]
        x = torch.cat([*prefix, x], dim=1) if prefix else x
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return self.pos_drop(x)

    def pool(self, x):
        """tokens B N D -> what the head reads, B D (distilled: B 2 D)."""
        if self.config.pool == "mean":
            before = self.config.pool_norm == "before"
            return self.norm(x).mean(dim=1) if before else self.norm(x.mean(dim=1))
        # LayerNorm is per token: normalise only those that are read
        return self.norm(x[:, : 1 + self.config.distilled]).squeeze(1)

    def classify(self, pooled):
        """Pooled features -> logits B K. A distilled model gives (logits, distillation logits) in training."""
        if not self.config.distilled:
            return self.head(pooled)
        both = self.head(pooled[:, 0]), self.head_dist(pooled[:, 1])
        return both if self.training else (both[0] + both[1]) / 2

    def forward(self, images, intermediates=False):
        """images B C H W, float, normalised -> logits B K.

        With `intermediates=True`: (logits, {"embed": B N D, "tokens": [B N D a block], "attention":
        [B heads N N a block, or None where the attention has no such map], "pooled": B D}).
        """
        x = self.embed(images)
        if not intermediates:
            for block in self.blocks:
                x = block(x)
            return self.classify(self.pool(x))
        seen = {"embed": x, "tokens": [], "attention": []}
        for block in self.blocks:
            seen["attention"].append(block.attn.map(block.norm1(x)))
            x = block(x)
            seen["tokens"].append(x)
        seen["pooled"] = self.pool(x)
        return self.classify(seen["pooled"]), seen


def _init(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def save(model, path):
    """Write weights and configuration to one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    from vitlab.files import atomic, plain

    meta = {"format": "vitlab-vit-1", "config": json.dumps(plain(model.config))}
    with atomic(path) as part:
        save_file({k: v.detach().contiguous().cpu() for k, v in model.state_dict().items()}, part, meta)


def load(path, device="cpu"):
    """The ViT that `save` wrote, in eval mode; float32 whatever the file's precision."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta = file.metadata() or {}
        if meta.get("format") != "vitlab-vit-1":
            raise ValueError(f"{path} was not written by vitlab.models.vit.save (its metadata: {meta})")
        state = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a mapping
    stored = json.loads(meta["config"])
    fields = {f.name for f in dataclasses.fields(ViTConfig)}
    if unknown := sorted(set(stored) - fields):
        raise ValueError(f"{path} holds options that this version does not know: {', '.join(unknown)}")
    model = ViT(ViTConfig(**stored))
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval().to(device)


def from_timm(source):
    """Our ViT with the weights of a `timm.models.VisionTransformer` (plain or distilled DeiT).

    Whatever this model cannot represent exactly (register tokens, LayerScale, QK-norm, ...) is refused
    by name (ValueError), since silently dropping it would give wrong outputs.
    """
    state = source.state_dict()
    unsupported = {
        "register tokens": getattr(source, "num_reg_tokens", 0) or getattr(source, "reg_token", None) is not None,
        "LayerScale": any(k.endswith("ls1.gamma") for k in state),
        "QK-norm": any(".q_norm." in k for k in state),
        "norm before the blocks": any(k.startswith("norm_pre.") for k in state),
        "position embedding without the prefix tokens": getattr(source, "no_embed_class", False)
        and getattr(source, "num_prefix_tokens", 0) > 0,
        "attention pooling": getattr(source, "attn_pool", None) is not None,
        "a stem that is not one convolution": not hasattr(source.patch_embed, "proj"),
        "a size other than square": len(set(source.patch_embed.img_size)) > 1,
        "MLPs that are not two linear layers with GELU": not all(
            hasattr(b, "mlp") and isinstance(getattr(b.mlp, "act", None), nn.GELU) for b in source.blocks
        ),
        "mean pooling over a model with a CLS token": source.global_pool == "avg" and source.num_prefix_tokens > 0,
    }
    found = [name for name, has in unsupported.items() if has]
    if found or source.global_pool not in ("token", "avg"):
        found += [] if source.global_pool in ("token", "avg") else [f"global_pool={source.global_pool!r}"]
        raise ValueError(f"this timm model has {', '.join(found)}, which vitlab's ViT does not have")
    embed, block = source.patch_embed, source.blocks[0]
    config = ViTConfig(
        image_size=embed.img_size[0], patch_size=embed.patch_size[0], in_chans=embed.proj.in_channels,
        num_classes=source.num_classes, dim=source.embed_dim, depth=len(source.blocks), heads=block.attn.num_heads,
        mlp_dim=block.mlp.fc1.out_features, pool="cls" if source.global_pool == "token" else "mean",
        pool_norm="after" if isinstance(source.norm, nn.Identity) else "before",
        pos="none" if source.pos_embed is None else "learned", distilled="dist_token" in state,
        qkv_bias=block.attn.qkv.bias is not None, norm_eps=block.norm1.eps,
    )  # fmt: skip
    model = ViT(config)
    renamed = {k.replace("fc_norm.", "norm."): v for k, v in state.items()}
    model.load_state_dict(renamed)
    return model.train(source.training)


def macs(config):
    """Closed-form multiply-accumulates of one image through a plain softmax ViT (matmuls and convolutions).

    Per block with N tokens and width D: 4 N D^2 (qkv, proj) + 2 N^2 D (the two attention products)
    + 2 N D H (MLP of width H) + 9 n H over the n patches if the MLP has its depthwise 3x3.
    """
    n, d, h, patches = config.tokens, config.dim, config.mlp_dim, config.grid**2
    block = 4 * n * d * d + 2 * n * n * d + 2 * n * d * h + (9 * patches * h if config.mlp == "conv" else 0)
    stem = STEMS[config.stem].macs(config)
    hidden = config.head_hidden
    head = d * config.num_classes if hidden is None else d * hidden + hidden * config.num_classes
    return config.depth * block + stem + head * (1 + config.distilled)

