"""The physically smaller model: a plain ViT whose widths differ from block to block and head to head.

It stands for any ViT that can be pruned here (ours and timm's, see `sources.as_slim`), at full width or less,
so that gates, scores and budgets are written once. Parameters are named as in timm's `VisionTransformer`.
"""

import json

import torch
import torch.nn.functional as F
from torch import nn

from vitlab.compress.shape import SlimConfig
from vitlab.models.parts import STEMS, DropPath, attend

ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


class PaddedNorm(nn.LayerNorm):
    """LayerNorm of a vector of which `full - dim` channels, all zero, are not stored.

    With r = dim / full, and mean m and variance s of the stored channels: the whole has mean r m and variance
    r s + r (1 - r) m^2.
    """

    def __init__(self, dim, full, eps):
        super().__init__(dim, eps=eps)
        self.full = full

    def forward(self, x):
        r = x.shape[-1] / self.full
        var, mean = torch.var_mean(x.float(), dim=-1, correction=0, keepdim=True)
        spread = torch.rsqrt(r * var + r * (1 - r) * mean.square() + self.eps)
        return (x - r * mean) * spread * self.weight + self.bias


def _norm(config):
    if config.dim == config.norm_dim:
        return nn.LayerNorm(config.dim, eps=config.norm_eps)
    return PaddedNorm(config.dim, config.norm_dim, config.norm_eps)


def _linear(inputs, outputs, bias=True):
    layer = nn.Linear(max(inputs, 1), outputs, bias)
    if not inputs:  # a branch pruned to nothing keeps its bias; torch warns when it initialises no weights
        layer.in_features, layer.weight = 0, nn.Parameter(torch.empty(outputs, 0))
    return layer


class SlimAttention(nn.Module):
    """Softmax attention of heads of unequal widths. B N D -> B N D.

    One SDPA does all heads where they are filled up to one width (`SlimConfig.padded`): fused kernels want queries
    and values of equal width, and zeros change no product. Else one SDPA does each run of equal heads.
    Rows of `qkv`: the queries of all heads, then the keys, then the values; with equal widths timm's layout.
    """

    def __init__(self, config, block):
        super().__init__()
        self.runs, self.scale, self.dropout = block.heads, block.scale, config.attention_dropout
        self.heads, self.sizes = len(block.each_head), (block.qk, block.qk, block.v)
        self.padded, self.width = config.padded(block), block.width
        self.widths = [head[i] for i in (0, 0, 1) for head in block.each_head]  # of all queries, keys, values
        if self.heads:
            self.qkv = nn.Linear(config.dim, 2 * block.qk + block.v, bias=config.qkv_bias)
        if self.heads and config.qk_norm:
            self.q_norm = nn.LayerNorm(self.runs[0][1], eps=config.norm_eps)
            self.k_norm = nn.LayerNorm(self.runs[0][1], eps=config.norm_eps)
        self.qk_norm = self.heads > 0 and config.qk_norm
        self.proj = _linear(block.v, config.dim, config.proj_bias)

    def split(self, x):
        """tokens B N D -> [(query, key, value) of a run], each B count N width."""
        parts = self.qkv(x).split(self.sizes, dim=-1)
        widths = [[count * w[i] for count, *w in self.runs] for i in (0, 0, 1)]
        parts = zip(*(p.split(w, dim=-1) for p, w in zip(parts, widths)))
        found = []
        for (count, qk, v), run in zip(self.runs, parts):
            q, k, val = (t.unflatten(-1, (count, w)).transpose(1, 2) for t, w in zip(run, (qk, qk, v)))
            found.append((self.q_norm(q), self.k_norm(k), val) if self.qk_norm else (q, k, val))
        return found

    def attend(self, q, k, v):
        if not q.shape[-1]:  # all logits 0: every token attends to all alike
            return v.mean(dim=2, keepdim=True).expand_as(v)
        rate = self.dropout if self.training else 0.0
        return attend(q, k, v, dropout=rate, scale=self.scale)

    def forward(self, x):
        if not self.heads:
            return self.proj(x[..., :0])
        if self.padded:
            return self.proj(self.kept(self.attend(*self.filled(x)).transpose(1, 2)))
        mixed = [self.attend(*run).transpose(1, 2).flatten(2) for run in self.split(x)]
        return self.proj(mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=-1))

    def fill(self, flat, widths):
        """Channels of heads of these widths, one after the other (B N C) -> B N heads width, filled up with zeros."""
        if set(widths) == {self.width}:
            return flat.unflatten(-1, (len(widths), self.width))
        zeros, filled = flat.new_zeros(1).expand(*flat.shape[:-1], self.width), []
        for part in flat.split(widths, dim=-1):
            filled += [part, zeros[..., part.shape[-1] :]]
        return torch.cat(filled, dim=-1).unflatten(-1, (len(widths), self.width))

    def filled(self, x, rows=None):
        """tokens B N D -> query (of the first `rows` tokens; None: of all), key, value, each B heads N width."""
        if rows is None:
            qkv = self.fill(self.qkv(x), self.widths).unflatten(2, (3, self.heads)).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
        else:
            queries, weight, bias = self.sizes[0], self.qkv.weight, self.qkv.bias
            bias = (None, None) if bias is None else (bias[:queries], bias[queries:])
            q = self.fill(F.linear(x[:, :rows], weight[:queries], bias[0]), self.widths[: self.heads]).transpose(1, 2)
            both = self.fill(F.linear(x, weight[queries:], bias[1]), self.widths[self.heads :])
            k, v = both.unflatten(2, (2, self.heads)).permute(2, 0, 3, 1, 4).unbind(0)
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm else (q, k, v)

    def kept(self, mixed):
        """Values of filled-up heads, B N heads width -> the channels that there are, B N V."""
        values = self.widths[-self.heads :]
        if set(values) == {self.width}:
            return mixed.flatten(2)
        return torch.cat([mixed[:, :, i, :width] for i, width in enumerate(values)], dim=-1)

    def map(self, x):
        """The attention probabilities, B heads N N; None without heads."""
        if not self.heads:
            return None
        return torch.cat([(q @ k.transpose(-2, -1) * self.scale).softmax(-1) for q, k, _ in self.split(x)], 1)


class SlimMlp(nn.Module):
    """Two linear layers around an activation, with the depthwise convolution of `parts.Mlp` if configured."""

    def __init__(self, config, hidden):
        super().__init__()
        self.hidden, self.grid, self.prefix, self.conv = hidden, config.grid, config.prefix_tokens, None
        if hidden:
            self.fc1 = nn.Linear(config.dim, hidden, bias=config.proj_bias)
        if hidden and config.mlp == "conv":
            self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act, self.drop = ACTIVATIONS[config.act](), nn.Dropout(config.dropout)
        self.fc2 = _linear(hidden, config.dim, config.proj_bias)

    def local(self, x):
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        image = patches.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        mixed = patches + self.conv(image).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([prefix, mixed], dim=1) if self.prefix else mixed

    def forward(self, x):
        if not self.hidden:
            return self.drop(self.fc2(x[..., :0]))
        x = self.fc1(x)
        x = x if self.conv is None else self.local(x)
        return self.drop(self.fc2(self.drop(self.act(x))))


class LayerScale(nn.Module):
    """A learned factor per channel at the end of a branch (Touvron et al. 2021, CaiT)."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block; a branch without channels has no norm either."""

    def __init__(self, config, block):
        super().__init__()
        scaled = config.layer_scale
        self.norm1 = _norm(config) if block.heads else nn.Identity()
        self.attn = SlimAttention(config, block)
        self.ls1 = LayerScale(config.dim) if scaled else nn.Identity()
        self.norm2 = _norm(config) if block.hidden else nn.Identity()
        self.mlp = SlimMlp(config, block.hidden)
        self.ls2 = LayerScale(config.dim) if scaled else nn.Identity()
        self.drop, self.drop_path = nn.Dropout(config.dropout), DropPath(block.drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.ls1(self.drop(self.attn(self.norm1(x)))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class SlimViT(nn.Module):
    """A plain pre-norm ViT of the shape `config`; used like `models.vit.ViT`."""

    def __init__(self, config):
        super().__init__()
        self.config, dim = config, config.dim
        self.patch_embed = STEMS[config.stem](config.stem_config)
        proj = self.patch_embed.proj
        if dim != config.stem_dim:
            self.patch_embed.proj = nn.Conv2d(proj.in_channels, dim, proj.kernel_size, stride=proj.stride)
        token = lambda n: nn.Parameter(torch.zeros(1, n, dim)) if n else None  # noqa: E731
        self.cls_token, self.dist_token = token(int(config.cls_token)), token(int(config.distilled))
        self.reg_token = token(config.registers)
        self.pos_embed = token({"all": config.tokens, "patches": config.grid**2, "none": 0}[config.pos])
        self.pos_drop = nn.Dropout(config.pos_dropout)
        self.blocks = nn.ModuleList(Block(config, block) for block in config.blocks)
        self.norm = _norm(config)
        self.head_drop = nn.Dropout(0.0 if config.head_hidden else config.head_dropout)
        self.head = self._head()
        self.head_dist = self._head() if config.distilled else None

    def _head(self):
        dim, hidden, classes = self.config.dim, self.config.head_hidden, self.config.num_classes
        if hidden is None:
            return nn.Linear(dim, classes)
        drop = nn.Dropout(self.config.head_dropout)
        return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), drop, nn.Linear(hidden, classes))

    def embed(self, images):
        """images B C H W -> tokens B N D."""
        x = self.patch_embed(images)
        if self.config.pos == "patches":
            x = x + self.pos_embed
        prefix = [t for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        x = torch.cat([*(t.expand(len(x), -1, -1) for t in prefix), x], dim=1) if prefix else x
        return self.pos_drop(x + self.pos_embed if self.config.pos == "all" else x)

    def pool(self, x):
        """tokens B N D -> what the head reads, B D (distilled: B 2 D)."""
        if self.config.pool == "mean":
            x = x[:, self.config.prefix_tokens :]
            return self.norm(x).mean(1) if self.config.pool_norm == "before" else self.norm(x.mean(1))
        return self.norm(x[:, : 1 + self.config.distilled]).squeeze(1)

    def classify(self, pooled):
        """Pooled features -> logits B K; a distilled model in training: (logits, distillation logits)."""
        pooled = self.head_drop(pooled)
        if not self.config.distilled:
            return self.head(pooled)
        both = self.head(pooled[:, 0]), self.head_dist(pooled[:, 1])
        return both if self.training else (both[0] + both[1]) / 2

    def forward(self, images, intermediates=False):
        """images B C H W -> logits B K; with `intermediates` also the dict that `ViT.forward` gives."""
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


def write(path, kind, config, state):
    """Weights and configuration in one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    from vitlab.files import atomic, plain

    tensors = {k: v.detach().contiguous().cpu().clone() for k, v in state.items()}
    with atomic(path) as part:
        save_file(tensors, part, {"format": f"vitlab-{kind}-1", "config": json.dumps(plain(config))})


def read(path, kind):
    """(configuration as plain data, tensors) of a file that `write` wrote."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta = file.metadata() or {}
        if meta.get("format") != f"vitlab-{kind}-1":
            raise ValueError(f"{path} does not hold a {kind} model of vitlab (its format: {meta.get('format')})")
        return json.loads(meta["config"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def save(model, path):
    """Write a `SlimViT` (its weights and its configuration; no code) to a safetensors file."""
    write(path, "slim", model.config, model.state_dict())


def load(path, device="cpu"):
    """The SlimViT that `save` wrote, in eval mode, float32."""
    config, state = read(path, "slim")
    model = SlimViT(SlimConfig(**config))
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval().to(device)
