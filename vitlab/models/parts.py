"""What a ViT is made of: stems, softmax attention, MLP, block."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class PatchStem(nn.Module):
    """Non-overlapping patches, one linear layer: images B C H W -> tokens B N D (row-major over the grid)."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.dim, config.patch_size, stride=config.patch_size)
        fan_in = self.proj.weight[0].numel()
        nn.init.trunc_normal_(self.proj.weight, std=math.sqrt(1 / fan_in))
        nn.init.zeros_(self.proj.bias)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)

    @staticmethod
    def fan_in(config):
        """Inputs of one channel of the last layer, `proj`."""
        return config.patch_size**2 * config.in_chans

    @classmethod
    def macs(cls, config):
        return config.grid**2 * cls.fan_in(config) * config.dim


class ConvStem(nn.Module):
    """Overlapping 3x3 convolutions with BatchNorm and GELU (Xiao et al. 2021, "Early convolutions help").

    The first layer keeps the resolution, then one layer of stride 2 for each factor 2 of the patch size, with
    the width doubling up to `dim`; a 1x1 convolution ends it. images B C H W -> tokens B N D.
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

    @classmethod
    def fan_in(cls, config):
        """Inputs of one channel of the last layer, `proj`."""
        return cls.plan(config)[-1][0]

    @staticmethod
    def plan(config):
        """[(output channels, stride)] of the 3x3 layers."""
        halvings = int(math.log2(config.patch_size))
        widths = [max(8, config.dim // 2 ** (halvings - i)) for i in range(halvings + 1)]
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


def attend(q, k, v, *, mask=None, dropout=0.0, scale=None):
    """softmax(q k^T scale + mask) v, heads apart: query, key, value B heads N width -> B heads N width.

    PyTorch's fused attention, except for training on a CPU in bfloat16: its backward pass there took 67 ms for
    B=128, 4 heads, 64 tokens, width 32 on one core with AMX, against 9 ms written out.
    """
    device = q.device.type
    half = torch.bfloat16 in (q.dtype, torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device))
    if not (device == "cpu" and half and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    scores = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-2, -1)
    return F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout) @ v


class Attention(nn.Module):
    """Multi-head softmax attention (Vaswani et al. 2017, eq. 1), packed qkv, fused by PyTorch's SDPA.

    tokens B N D -> B N D. The scale is head_dim ** -0.5.
    """

    def __init__(self, dim, heads, *, config, **unknown):
        super().__init__()
        if unknown:
            raise ValueError(f"softmax attention takes no options; given: {', '.join(unknown)}")
        self.heads, self.head_dim = heads, dim // heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def split(self, x):
        """tokens B N D -> query, key, value, each B heads N head_dim."""
        b, n, _ = x.shape
        return self.qkv(x).view(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x):
        q, k, v = self.split(x)
        x = attend(q, k, v, dropout=self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).flatten(2))

    def map(self, x):
        """The attention probabilities, B heads N N, computed beside the fused product for inspection."""
        q, k, _ = self.split(x)
        return (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(dim=-1)


class Mlp(nn.Module):
    """Two linear layers with GELU; tokens B N D -> B N D.

    With `config.mlp == "conv"` a residual depthwise 3x3 convolution over the patch grid stands between
    them (DHVT, Lu et al. 2022; LocalViT), which gives the model its sense of neighbourhood. Prefix tokens
    pass it by.
    """

    def __init__(self, config):
        super().__init__()
        self.grid, self.prefix = config.grid, config.prefix_tokens
        self.fc1 = nn.Linear(config.dim, config.mlp_dim)
        self.conv = None
        if config.mlp == "conv":
            self.conv = nn.Conv2d(config.mlp_dim, config.mlp_dim, 3, padding=1, groups=config.mlp_dim)
        self.act = nn.GELU()
        self.drop = nn.Dropout(config.dropout)
        self.fc2 = nn.Linear(config.mlp_dim, config.dim)

    def local(self, x):
        """tokens B N H -> B N H: the depthwise convolution over the patches."""
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        # B n H seen as channels-last images: no copy
        image = patches.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        mixed = patches + self.conv(image).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([prefix, mixed], dim=1) if self.prefix else mixed

    def forward(self, x):
        x = self.fc1(x)
        if self.conv is not None:
            x = self.local(x)
        return self.drop(self.fc2(self.drop(self.act(x))))


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
    """Pre-norm transformer block: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, config, attention, *, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attn = attention(config.dim, config.heads, config=config, **dict(config.attention_args))
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.drop = nn.Dropout(config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.drop(self.attn(self.norm1(x))))
        return x + self.drop_path(self.mlp(self.norm2(x)))
