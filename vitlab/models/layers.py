"""What a ViT is made of beside its attention: stems, norms, MLP, block."""

import math

import torch
from torch import nn

from vitlab.models.attention import linear

ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


class PatchStem(nn.Module):
    """Non-overlapping patches, one linear layer: images B C H W -> tokens B N D (row-major over the grid)."""

    def __init__(self, config):
        super().__init__()
        side = config.patch_size
        # CLIP's stem, which a norm follows, has no bias
        self.proj = nn.Conv2d(config.in_chans, config.dim, side, stride=side, bias=not config.pre_norm)
        fan_in = self.proj.weight[0].numel()
        nn.init.trunc_normal_(self.proj.weight, std=math.sqrt(1 / fan_in))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)

    @staticmethod
    def macs(config):
        return config.grid**2 * config.patch_size**2 * config.in_chans * config.dim


class ConvStem(nn.Module):
    """Overlapping 3x3 convolutions with BatchNorm and GELU (Xiao et al. 2021, "Early convolutions help").

    The first layer keeps the resolution, then one layer of stride 2 for each factor 2 of the patch size, with
    the width doubling up to `stem_width`; a 1x1 convolution to `dim` ends it. images B C H W -> tokens B N D.
    """

    def __init__(self, config):
        super().__init__()
        layers, width = [], config.in_chans
        for out, stride in self.plan(config):
            layers += self.layer(width, out, stride)
            width = out
        self.layers = nn.Sequential(*layers)
        self.proj = nn.Conv2d(width, config.dim, 1)
        nn.init.trunc_normal_(self.proj.weight, std=math.sqrt(1 / width))
        nn.init.zeros_(self.proj.bias)

    @staticmethod
    def layer(width, out, stride):
        conv = nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        return [conv, nn.BatchNorm2d(out), nn.GELU()]

    @staticmethod
    def plan(config):
        """[(output channels, stride)] of the 3x3 layers."""
        halvings = int(math.log2(config.patch_size))
        widths = [max(8, config.stem_width // 2 ** (halvings - i)) for i in range(halvings + 1)]
        return [(w, 1 if i == 0 else 2) for i, w in enumerate(widths)]

    def forward(self, images):
        # channels last: a third faster on a CPU, and the tokens then need no copy
        images = images.contiguous(memory_format=torch.channels_last)
        return self.proj(self.layers(images)).flatten(2).transpose(1, 2)

    @classmethod
    def macs(cls, config):
        total, side, width = 0, config.image_size, config.in_chans
        for out, stride in cls.plan(config):
            side //= stride
            total += side**2 * 9 * width * out
            width = out
        return total + side**2 * width * config.dim


class Residual(nn.Sequential):
    """x + f(x), f being the layers one after the other."""

    def forward(self, x):
        return x + super().forward(x)


class ResidualStem(ConvStem):
    """The conv stem with a residual 3x3 layer (He et al. 2016) after each halving of the image.

    For dim 128 and patches of 4: 3x3 to 24 channels, 3x3/2 to 64, residual 3x3, 3x3/2 to 128, residual 3x3, 1x1.
    """

    @staticmethod
    def layer(width, out, stride):
        layers = ConvStem.layer(width, out, stride)
        return [Residual(*layers)] if (width, stride) == (out, 1) else layers

    @staticmethod
    def plan(config):
        first, *halvings = ConvStem.plan(config)
        # a narrower first layer: at full resolution, where channels are dear
        layers = [(max(8, 3 * first[0] // 4), 1)]
        for out, _ in halvings:
            layers += [(out, 2), (out, 1)]
        return layers


STEMS = {"patch": PatchStem, "conv": ConvStem, "residual": ResidualStem}


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


def norm(config):
    """The LayerNorm of a config's tokens."""
    if config.norm_dim is None:
        return nn.LayerNorm(config.dim, eps=config.norm_eps)
    return PaddedNorm(config.dim, config.norm_dim, config.norm_eps)


class LayerScale(nn.Module):
    """A learned factor per channel at the end of a branch (Touvron et al. 2021, CaiT)."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x):
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear layers around an activation; tokens B N D -> B N D.

    With `config.mlp == "conv"` a residual depthwise 3x3 convolution over the patch grid stands between
    them (DHVT, Lu et al. 2022; LocalViT), which gives the model its sense of neighbourhood. Prefix tokens
    pass it by. With "glu" (Shazeer 2020) the first layer is twice as wide, and its activated first half is multiplied
    into the second; with "glu_last" the second is activated. hidden: its channels.
    """

    def __init__(self, config, hidden):
        super().__init__()
        self.hidden, self.grid, self.prefix, self.kind = hidden, config.grid, config.prefix_tokens, config.mlp
        self.gated = self.kind.startswith("glu")
        if hidden:
            self.fc1 = nn.Linear(config.dim, hidden * (1 + self.gated), bias=config.proj_bias)
        self.conv = None
        if hidden and config.mlp == "conv":
            self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = ACTIVATIONS[config.act]()
        self.drop = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(hidden, eps=config.norm_eps) if config.mlp_norm and hidden else None
        self.fc2 = linear(hidden, config.dim, config.proj_bias)

    def local(self, x):
        """tokens B N H -> B N H: the depthwise convolution over the patches."""
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        # B n H seen as channels-last images: no copy
        image = patches.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        mixed = patches + self.conv(image).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([prefix, mixed], dim=1) if self.prefix else mixed

    def forward(self, x, mix=None):
        """mix: hidden tokens -> hidden tokens, in place of the convolution over the whole grid."""
        if not self.hidden:
            return self.drop(self.fc2(x[..., :0]))
        x = self.fc1(x)
        if self.conv is not None:
            x = self.local(x) if mix is None else mix(x)
        x = self.drop(self._gated(x) if self.gated else self.act(x))
        return self.drop(self.fc2(x if self.norm is None else self.norm(x)))

    def _gated(self, x):
        first, second = x.chunk(2, dim=-1)
        return self.act(first) * second if self.kind == "glu" else first * self.act(second)


class DropPath(nn.Module):
    """Stochastic depth per image (Huang et al. 2016): the branch is dropped whole, the rest scaled up."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or not self.rate:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    """Pre-norm transformer block: x + attn(norm1(x)), then x + mlp(norm2(x)).

    index: which of the config's blocks it is; a branch without channels has no norm either.
    """

    def __init__(self, config, attention, index):
        super().__init__()
        shape = config.shapes[index]
        self.norm1 = norm(config) if shape.heads else nn.Identity()
        self.attn = attention(config.dim, config.heads, config=config, **config.arguments(index))
        self.ls1 = LayerScale(config.dim) if config.layer_scale else None
        self.norm2 = norm(config) if shape.hidden else nn.Identity()
        self.mlp = Mlp(config, shape.hidden)
        self.ls2 = LayerScale(config.dim) if config.layer_scale else None
        self.drop = nn.Dropout(config.dropout)
        self.drop_path = DropPath(shape.drop_path)

    def forward(self, x):
        x = x + self.attended(self.attn(self.norm1(x)))
        return x + self.mixed(self.mlp(self.norm2(x)))

    def attended(self, x):
        """What attention gives -> what is added to the tokens."""
        x = self.drop(x)
        return self.drop_path(x if self.ls1 is None else self.ls1(x))

    def mixed(self, x):
        """What the MLP gives -> what is added to the tokens; linear, token by token."""
        return self.drop_path(x if self.ls2 is None else self.ls2(x))
