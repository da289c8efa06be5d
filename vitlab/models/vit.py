"""The one Vision Transformer of the study.

A method is a field of its config: another attention, stem, MLP or pooling, other widths. Parameters are named as in
timm's `VisionTransformer`, so that weights move between the two (`models.timm`).
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from vitlab.models.attention import attention_class
from vitlab.models.checkpoint import as_dataclass, register
from vitlab.models.layers import ACTIVATIONS, STEMS, Block, norm
from vitlab.models.shape import BlockShape
from vitlab.utils.checks import is_number
from vitlab.utils.files import LATER

CHOICES = {
    "stem": STEMS, "mlp": ("plain", "conv", "glu", "glu_last"), "pos": ("learned", "patches", "none"),
    "pool": ("cls", "mean"), "pool_norm": ("before", "after"), "act": ACTIVATIONS,
}  # fmt: skip
COUNTS = dict.fromkeys(("image_size", "patch_size", "in_chans", "num_classes", "dim", "heads", "mlp_dim"), 1)


def later(default):
    """A field that came after arms had been trained."""
    return field(default=default, metadata=LATER)


@register("vit")
@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Shape of a ViT; plain data, so that a checkpoint can carry it.

    Sizes are in pixels (image, patch), channels (dim, mlp_dim, head_hidden) or counts. `mlp_dim` defaults to 4 * dim.
    `qkv_bias=False` and `head_hidden` (a hidden layer in the classifier) are what the earlier projects used.

    blocks: a `BlockShape` for each block, where they are not all of the widths that heads, mlp_dim and drop_path give;
    `shapes` has them in either case. Of a model with pruned embedding channels, norm_dim is what its LayerNorms'
    statistics run over (the removed channels count as zeros; None: plain LayerNorms), and stem_dim what a conv stem's
    inner widths derive from (None: dim). A field that is None is what is said beside it.
    """

    image_size: int = 32
    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 10
    dim: int = 192
    depth: int = 6
    heads: int = 3
    mlp_dim: int | None = None
    mlp: str = "plain"  # | "conv": a depthwise 3x3 over the patch grid between the two layers | "glu" | "glu_last"
    stem: str = "patch"  # "patch" | "conv": overlapping 3x3 convolutions | "residual": more of them, some residual
    pos: str = "learned"  # "learned" | of the "patches" alone | "none"
    pool: str = "cls"  # "cls" | "mean" of the patches
    pool_norm: str = "before"  # the last LayerNorm "before" | "after" pooling (timm's fc_norm)
    distilled: bool = False  # DeiT's second token and head
    qkv_bias: bool = True
    head_hidden: int | None = None
    attention: str = "softmax"
    attention_args: tuple = ()  # (("stages", 3), ...): keyword arguments of the attention class
    dropout: float = 0.0  # after the embedding, the projections and in the MLP
    attention_dropout: float = 0.0
    drop_path: float = 0.0  # stochastic depth: rate of the last block, rising linearly from 0
    norm_eps: float = 1e-6
    blocks: tuple | None = later(None)
    norm_dim: int | None = later(None)
    stem_dim: int | None = later(None)
    class_token: bool | None = later(None)  # None: where it is pooled
    registers: int = later(0)  # further tokens (Darcet et al. 2024)
    pool_prefix: bool = later(False)  # the mean is over all tokens
    pre_norm: bool = later(False)  # CLIP's: a norm before the blocks, no bias in the stem
    proj_bias: bool = later(True)
    qk_norm: bool = later(False)
    attention_norm: bool = later(False)  # before the projection
    mlp_norm: bool = later(False)  # before the second layer
    layer_scale: bool = later(False)
    act: str = later("gelu")
    pos_dropout: float | None = later(None)  # None: dropout
    head_dropout: float | None = later(None)  # None: dropout with a hidden layer, else 0

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("mlp_dim", self.mlp_dim or 4 * self.dim)
        pairs = self.attention_args.items() if isinstance(self.attention_args, dict) else self.attention_args
        put("attention_args", tuple((str(k), tuple(v) if isinstance(v, list) else v) for k, v in pairs))
        if self.blocks is not None:
            put("blocks", tuple(as_dataclass(BlockShape, b) for b in self.blocks))
            put("depth", len(self.blocks))
        self._check()
        # one way to say it, so that equal models have equal configs
        said = {"norm_dim": self.dim, "stem_dim": self.dim, "class_token": self.pool == "cls",
                "pos_dropout": self.dropout, "head_dropout": self.dropout if self.head_hidden else 0.0}  # fmt: skip
        for name in (n for n, value in said.items() if getattr(self, n) == value):
            put(name, None)
        if self.blocks and self.dim % self.heads == 0 and self.blocks == self._uniform():
            put("blocks", None)

    def _check(self):
        given = self.blocks is not None
        for name, least in (COUNTS | {"depth": int(not given), "registers": 0}).items():
            if not isinstance(value := getattr(self, name), int) or value < least:
                raise ValueError(f"{name}={value!r}: a whole number of at least {least} is needed")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}")
        if self.dim % self.heads and not given:
            raise ValueError(f"dim={self.dim} is not a multiple of heads={self.heads}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for name in ("dropout", "attention_dropout", "drop_path", "pos_dropout", "head_dropout"):
            if not (is_number(rate := getattr(self, name) or 0) and 0 <= rate < 1):
                raise ValueError(f"{name}={rate!r}: a rate in [0, 1) is needed")
        least = {"patch": 0, "conv": 1, "residual": 2}[self.stem]  # residual layers come after a halving
        if least and (self.patch_size & (self.patch_size - 1) or self.patch_size < least):
            raise ValueError(f"patch_size={self.patch_size}: the {self.stem} stem halves it: a power of two >= {least}")
        if self.distilled and (self.pool != "cls" or self.registers):
            raise ValueError("distilled=True needs pool='cls' and no registers: its token stands beside the CLS token")
        if self.class_token is False and self.pool == "cls":
            raise ValueError("pool='cls' needs the class token")
        if self.norm_dim is not None and self.norm_dim < self.dim:
            raise ValueError(f"norm_dim={self.norm_dim} is less than the {self.dim} channels that there are")
        if given and self.attention not in ("softmax", "topk"):
            raise ValueError(f"attention={self.attention!r} cannot have blocks of their own widths; softmax, topk can")
        for name, value in self.attention_args:
            if isinstance(value, tuple) and len(value) != self.depth:
                raise ValueError(f"{name}={value}: one for all blocks, or one for each of the {self.depth}, is needed")

    def _uniform(self):
        rates = [self.drop_path * i / max(self.depth - 1, 1) for i in range(self.depth)]
        return tuple(BlockShape.uniform(self.dim, self.heads, self.mlp_dim, rate) for rate in rates)

    @property
    def shapes(self):
        """The `BlockShape` of every block."""
        return self._uniform() if self.blocks is None else self.blocks

    def arguments(self, index):
        """What the attention of block `index` is built with, beside the config: an argument may have one a block."""
        shape = {} if self.blocks is None else {"shape": self.blocks[index]}
        return shape | {k: v[index] if isinstance(v, tuple) else v for k, v in self.attention_args}

    @property
    def stem_width(self):
        """What a conv stem's inner widths derive from."""
        return self.stem_dim or self.dim

    @property
    def grid(self):
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def mlp_layers(self):
        """Matrices of D x H in the MLP."""
        return 3 if self.mlp.startswith("glu") else 2

    @property
    def has_class_token(self):
        return self.pool == "cls" if self.class_token is None else self.class_token

    @property
    def prefix_tokens(self):
        """Tokens before the patches: the CLS token, the distillation token, registers, those that there are."""
        return self.has_class_token + self.distilled + self.registers

    @property
    def tokens(self):
        """Tokens in the sequence."""
        return self.grid**2 + self.prefix_tokens

    def build(self):
        """A ViT of this shape with new weights."""
        return ViT(self)

    def parameters(self):
        """Number of parameters."""
        with torch.device("meta"):  # shapes are enough
            return sum(p.numel() for p in self.build().parameters())

    def products(self, block):
        """Channels that take part in the two products of tokens with tokens, those that are filled up counted."""
        padded = 0 if self.qk_norm else 2 * block.padded * len(block.each_head)
        return padded or sum(qk + v for qk, v in block.each_head if qk)

    def macs(self):
        """Multiply-accumulates of one image (matmuls and convolutions), in closed form.

        Per block with N tokens, width D, query/key width Q and value width V over the heads, H MLP channels:
        N D (2 Q + V) + N^2 (Q + V) + N V D, or what an attention of another kind says, + 2 N D H (3 with a GLU)
        + 9 n H for a depthwise 3x3 over n patches. Where heads are filled up (`BlockShape.padded`), Q and V are those
        of the filled-up widths; else a head without query/key channels averages its values: no product of tokens.
        """
        n, d = self.tokens, self.dim
        hidden, classes, total = self.head_hidden, self.num_classes, STEMS[self.stem].macs(self)
        total += (d * classes if hidden is None else d * hidden + hidden * classes) * (1 + self.distilled)
        for i, block in enumerate(self.shapes):
            if self.attention == "softmax":
                total += n * d * (2 * block.qk + 2 * block.v) + n * n * self.products(block)
            else:
                with torch.device("meta"):  # shapes are enough
                    total += attention_class(self.attention)(d, self.heads, config=self, **self.arguments(i)).macs()
            total += block.hidden * (self.mlp_layers * n * d + (9 * self.grid**2 if self.mlp == "conv" else 0))
        return total


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021, eq. 1-4), pre-norm.

    `attention(dim, heads, config=..., **attention_args)` builds each block's attention; by default the class
    that `config.attention` names.
    """

    def __init__(self, config, attention=None):
        super().__init__()
        attention = attention or attention_class(config.attention)
        self.config = config
        token = lambda n: nn.Parameter(torch.zeros(1, n, config.dim)) if n else None  # noqa: E731
        self.patch_embed = STEMS[config.stem](config)
        self.cls_token, self.dist_token = token(int(config.has_class_token)), token(int(config.distilled))
        self.reg_token = token(config.registers)
        self.pos_embed = token({"learned": config.tokens, "patches": config.grid**2, "none": 0}[config.pos])
        self.pos_drop = nn.Dropout(config.dropout if config.pos_dropout is None else config.pos_dropout)
        self.norm_pre = norm(config) if config.pre_norm else None
        self.blocks = nn.ModuleList(Block(config, attention, index) for index in range(config.depth))
        self.norm = norm(config)
        dropped = config.head_dropout and config.head_hidden is None
        self.head_drop = nn.Dropout(config.head_dropout) if dropped else None
        self.head = self._head()
        self.head_dist = self._head() if config.distilled else None
        self.apply(_init)
        for part in (self.cls_token, self.dist_token, self.pos_embed, self.reg_token):
            if part is not None:
                nn.init.trunc_normal_(part, std=0.02)

    def _head(self):
        config, dim, classes = self.config, self.config.dim, self.config.num_classes
        if (hidden := config.head_hidden) is None:
            return nn.Linear(dim, classes)
        drop = nn.Dropout(config.dropout if config.head_dropout is None else config.head_dropout)
        return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), drop, nn.Linear(hidden, classes))

    def embed(self, images):
        """images B C H W -> tokens B N D: patches, then the prefix tokens before them, with positions."""
        config = self.config
        wanted = (config.in_chans, config.image_size, config.image_size)
        if images.shape[1:] != wanted:
            raise ValueError(f"images of shape {tuple(images.shape[1:])}; this model takes {wanted}")
        x = self.patch_embed(images)  # B N D
        if config.pos == "patches":
            x = x + self.pos_embed
        prefix = [t for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        x = torch.cat([*(t.expand(len(x), -1, -1) for t in prefix), x], dim=1) if prefix else x
        x = self.pos_drop(x + self.pos_embed if config.pos == "learned" else x)
        return x if self.norm_pre is None else self.norm_pre(x)

    def pool(self, x):
        """tokens B N D -> what the head reads, B D (distilled: B 2 D)."""
        config = self.config
        if config.pool == "mean":
            x = x if config.pool_prefix else x[:, config.prefix_tokens :]
            return self.norm(x).mean(dim=1) if config.pool_norm == "before" else self.norm(x.mean(dim=1))
        # LayerNorm is per token: normalise only those that are read
        return self.norm(x[:, : 1 + config.distilled]).squeeze(1)

    def classify(self, pooled):
        """Pooled features -> logits B K. A distilled model gives (logits, distillation logits) in training."""
        pooled = pooled if self.head_drop is None else self.head_drop(pooled)
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
        if module.weight.numel():
            nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
