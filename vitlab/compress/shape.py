"""The shape of a ViT with uneven widths, its cost in closed form, and what is left of it under masks.

A structure is named "blocks.<i>.<kind>" or "embed"; its gate, score or mask is a flat tensor with an
entry a unit, ordered as in the weights (head by head).
"""

from dataclasses import dataclass, replace

import torch

from vitlab.models.parts import STEMS

FILLED = 2  # at most so many times the channels, to fill unequal heads up to one width
KINDS = ("qk", "v", "heads", "mlp", "block", "embed")


@dataclass(frozen=True, kw_only=True)
class SlimBlock:
    """Widths of one block.

    heads: runs of equal heads, ((count, query/key width, value width), ...); () leaves of the attention
    what its output bias adds. hidden: MLP channels; 0 likewise. scale: of the attention logits, the
    unpruned head_dim ** -0.5 however many dimensions are left.
    """

    heads: tuple
    hidden: int
    scale: float
    drop_path: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "heads", tuple(tuple(run) for run in self.heads))

    @property
    def each_head(self):
        """((query/key width, value width), ...) of every head."""
        return tuple((qk, v) for count, qk, v in self.heads for _ in range(count))

    @property
    def width(self):
        """The widest of all query, key and value widths."""
        return max((width for head in self.each_head for width in head), default=0)

    @property
    def qk(self):
        """Query (or key) channels of all heads."""
        return sum(qk for qk, _ in self.each_head)

    @property
    def v(self):
        """Value channels of all heads."""
        return sum(v for _, v in self.each_head)


@dataclass(frozen=True, kw_only=True)
class SlimConfig:
    """Shape of a slim ViT; plain data, saved with the weights.

    dim: embedding channels left; norm_dim: channels the LayerNorms' statistics run over (the removed ones
    count as zeros; equal to dim: plain LayerNorms); stem_dim: what the conv stem's inner widths derive from.
    """

    image_size: int
    patch_size: int
    num_classes: int
    dim: int
    norm_dim: int
    stem_dim: int
    blocks: tuple
    in_chans: int = 3
    stem: str = "patch"
    cls_token: bool = True
    distilled: bool = False
    registers: int = 0
    pos: str = "all"  # positions of "all" tokens | only of the "patches" | "none"
    pool: str = "cls"
    pool_norm: str = "before"
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    mlp: str = "plain"
    act: str = "gelu"
    head_hidden: int | None = None
    pos_dropout: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    head_dropout: float = 0.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        blocks = (b if isinstance(b, SlimBlock) else SlimBlock(**b) for b in self.blocks)
        object.__setattr__(self, "blocks", tuple(blocks))
        if not 1 <= self.dim <= self.norm_dim:
            raise ValueError(f"dim={self.dim}: at least 1 embedding channel must be left of {self.norm_dim}")

    @property
    def grid(self):
        return self.image_size // self.patch_size

    @property
    def prefix_tokens(self):
        return self.cls_token + self.distilled + self.registers

    @property
    def tokens(self):
        return self.grid**2 + self.prefix_tokens

    def padded(self, block):
        """Width that all heads of `block` are filled up to with zeros, so that one fused attention does them.

        0 where they need none, or where the filling (`FILLED`) would be more than what is filled up.
        """
        widths = [width for head in block.each_head for width in head]
        if self.qk_norm or len(set(widths)) < 2 or block.width * len(widths) > FILLED * sum(widths):
            return 0
        return block.width

    def products(self, block):
        """Channels that take part in the two products of tokens with tokens."""
        padded = 2 * self.padded(block) * len(block.each_head)
        return padded or sum(qk + v for qk, v in block.each_head if qk)

    def macs(self):
        """Multiply-accumulates of one image (matmuls and convolutions), in closed form.

        Per block with N tokens, width D, query/key width Q and value width V over the heads, H MLP channels:
        N D (2 Q + V) + N^2 (Q + V) + N V D + 2 N D H, and 9 n H for a depthwise 3x3 over n patches. Where heads are
        `padded`, the products of tokens are those of the padded widths. Else a head without query/key channels
        averages its values: no product of tokens.
        """
        n, d = self.tokens, self.dim
        total = STEMS[self.stem].macs(self.stem_config)
        total -= self.grid**2 * self.stem_fan_in * (self.stem_dim - d)
        for block in self.blocks:
            total += n * d * (2 * block.qk + 2 * block.v) + n * n * self.products(block) + 2 * n * d * block.hidden
            total += 9 * self.grid**2 * block.hidden if self.mlp == "conv" else 0
        hidden = self.head_hidden
        head = d * self.num_classes if hidden is None else d * hidden + hidden * self.num_classes
        return total + head * (1 + self.distilled)

    @property
    def stem_config(self):
        """The shape that the stem is built from, before embedding channels are taken from its last layer."""
        return replace(self, dim=self.stem_dim, norm_dim=self.stem_dim)

    @property
    def stem_fan_in(self):
        """Inputs of one output channel of the stem's last layer."""
        return STEMS[self.stem].fan_in(self.stem_config)

    def parameters(self):
        """Trainable parameters, in closed form (without a conv stem's inner layers, never pruned)."""
        d, bias = self.dim, int(self.proj_bias)
        tokens = {"all": self.tokens, "patches": self.grid**2, "none": 0}[self.pos]
        total = d * (tokens + self.prefix_tokens) + 2 * d
        total += d * (self.stem_fan_in + 1)
        for block in self.blocks:
            total += 2 * bias * d + 2 * d * self.layer_scale
            if block.heads:
                total += 2 * d + (2 * block.qk + block.v) * (d + self.qkv_bias) + block.v * d
                total += 4 * block.heads[0][1] * self.qk_norm
            if block.hidden:
                total += 2 * d + block.hidden * (2 * d + bias) + 10 * block.hidden * (self.mlp == "conv")
        hidden, classes = self.head_hidden, self.num_classes
        head = (d + 1) * classes if hidden is None else (d + 1) * hidden + (hidden + 1) * classes
        return total + head * (1 + self.distilled)


def sizes(config, kinds=KINDS):
    """{structure: units} of the given kinds. ValueError for unknown kinds and for "qk" under QK-norm."""
    if unknown := [k for k in kinds if k not in KINDS]:
        raise ValueError(f"kinds {', '.join(map(repr, unknown))}: choose from {', '.join(KINDS)}")
    if "qk" in kinds and config.qk_norm:
        raise ValueError(
            "kind 'qk' cannot be pruned exactly under QK-norm, whose statistics run over a head's channels; "
            "supported for this model: v, heads, mlp, block, embed"
        )
    found = {}
    for i, block in enumerate(config.blocks):
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
    known = sizes(config, [k for k in KINDS if not (k == "qk" and config.qk_norm)])
    for name, mask in masks.items():
        if name not in known:
            if config.qk_norm and kind_of(name) == "qk":
                sizes(config, ["qk"])
            raise ValueError(f"mask {name!r}: this model has no such structure; it has {', '.join(known)}")
        if mask.shape != (known[name],):
            raise ValueError(f"mask {name!r} has shape {tuple(mask.shape)}, the model needs ({known[name]},)")


def kept(config, masks):
    """What is left under `masks` ({structure: tensor}, non-zero = kept, absent = all kept).

    Returns [(block index, [(query/key channels, value channels) of a kept head], MLP channels)] for the
    blocks left, and the embedding channels; channels are int64 indices. Heads without values are gone, as
    they add nothing; the rest are sorted so that equal widths stand together.
    """
    check(config, masks)
    get = lambda name, n: masks[name].cpu() != 0 if name in masks else torch.ones(n, dtype=torch.bool)  # noqa: E731
    blocks = []
    for i, block in enumerate(config.blocks):
        if not get(f"blocks.{i}.block", 1).all():
            continue
        live = get(f"blocks.{i}.heads", len(block.each_head))
        channels = []
        for kind, size in (("qk", block.qk), ("v", block.v)):
            widths = [w[kind == "v"] for w in block.each_head]
            mask = get(f"blocks.{i}.{kind}", size)
            ids = torch.arange(size)
            channels.append([j[m] for j, m in zip(ids.split(widths), mask.split(widths))] if widths else [])
        heads = [(qk, v) for qk, v, on in zip(*channels, live) if on and len(v)]
        heads.sort(key=lambda head: (-len(head[0]), -len(head[1])))
        blocks.append((i, heads, get(f"blocks.{i}.mlp", block.hidden).nonzero().flatten()))
    return blocks, get("embed", config.dim).nonzero().flatten()


def runs(heads):
    """[(query/key, value width)] -> ((count, query/key width, value width), ...) of equal neighbours."""
    found = []
    for qk, v in heads:
        if found and found[-1][1:] == (qk, v):
            found[-1] = (found[-1][0] + 1, qk, v)
        else:
            found.append((1, qk, v))
    return tuple(found)


def narrow(config, masks, norm="all"):
    """The `SlimConfig` left under `masks`. norm "all" | "kept": the channels of LayerNorm's statistics."""
    if norm not in ("all", "kept"):
        raise ValueError(f"norm={norm!r}: choose 'all' (equal to the masked model) or 'kept' (plain LayerNorms)")
    left, embed = kept(config, masks)
    blocks = tuple(
        replace(config.blocks[i], heads=runs([(len(qk), len(v)) for qk, v in heads]), hidden=len(hidden))
        for i, heads, hidden in left
    )
    dim = len(embed)
    return replace(config, blocks=blocks, dim=dim, norm_dim=config.norm_dim if norm == "all" else max(dim, 1))
