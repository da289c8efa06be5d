"""Softmax attention, and which attention a config's name stands for."""

import importlib

import torch
import torch.nn.functional as F
from torch import nn

from vitlab.models.shape import BlockShape


def attend(q, k, v, *, mask=None, dropout=0.0, scale=None):
    """softmax(q k^T scale + mask) v, heads apart: query, key, value B heads N width -> B heads N width.

    PyTorch's fused attention, except for training on a CPU in bfloat16, where its backward pass is several times
    slower than the products written out.
    """
    device = q.device.type
    half = torch.bfloat16 in (q.dtype, torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device))
    if not (device == "cpu" and half and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    scores = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-2, -1)
    return F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout) @ v


class Attention(nn.Module):
    """Multi-head softmax attention (Vaswani et al. 2017, eq. 1), packed qkv, fused by PyTorch's SDPA. B N D -> B N D.

    shape: heads of other widths than dim / heads, which may be unequal (BlockShape). One SDPA does all heads where they
    are of one width or are filled up to it (`BlockShape.padded`): fused kernels want queries and values of equal
    width, and zeros change no product. Else one SDPA does each run of equal heads.
    Rows of `qkv`: the queries of all heads, then the keys, then the values; timm's layout. The scale is the shape's,
    by default head_dim ** -0.5.
    """

    def __init__(self, dim, heads, *, config, shape=None, **unknown):
        super().__init__()
        if unknown:
            raise ValueError(f"softmax attention takes no options; given: {', '.join(unknown)}")
        shape = shape or BlockShape.uniform(dim, heads)
        self.runs, self.scale, self.dropout = shape.heads, shape.scale, config.attention_dropout
        self.heads, self.width, self.even = len(shape.each_head), shape.width, shape.even
        self.sizes, self.widths = (shape.qk, shape.qk, shape.v), shape.widths
        # the norms of queries and keys are over widths that are not filled up
        self.fused = shape.even or bool(shape.padded and not config.qk_norm)
        self.qk_norm = config.qk_norm and self.heads > 0
        if self.heads:
            self.qkv = nn.Linear(dim, sum(self.sizes), bias=config.qkv_bias)
        if self.qk_norm:
            self.q_norm = nn.LayerNorm(self.runs[0][1], eps=config.norm_eps)
            self.k_norm = nn.LayerNorm(self.runs[0][1], eps=config.norm_eps)
        self.norm = nn.LayerNorm(shape.v, eps=config.norm_eps) if config.attention_norm else None
        self.proj = linear(shape.v, dim, config.proj_bias)

    def forward(self, x):
        if not self.heads:
            return self.proj(x[..., :0])
        if not self.fused:
            return self.project(self._run_by_run(x))
        return self.project(self.joined(self.attend(*self.split(x)).transpose(1, 2)))

    def split(self, x, rows=None):
        """tokens B N D -> query (of the first `rows` tokens; None: of all), key, value, each B heads N width.

        Heads that are narrower than the widest are filled up with zeros.
        """
        if rows is None:
            qkv = self.qkv(x) if self.even else self._filled(self.qkv(x), self.widths)
            b, n = x.shape[:2]
            # taken apart before they are turned: their gradients are then put together without another copy
            q, k, v = (part.transpose(1, 2) for part in qkv.view(b, n, 3, self.heads, self.width).unbind(2))
        else:
            queries, weight, bias = self.sizes[0], self.qkv.weight, self.qkv.bias
            bias = (None, None) if bias is None else (bias[:queries], bias[queries:])
            q = self._filled(F.linear(x[:, :rows], weight[:queries], bias[0]), self.widths[: self.heads])
            both = self._filled(F.linear(x, weight[queries:], bias[1]), self.widths[self.heads :])
            q = q.unflatten(2, (self.heads, self.width)).transpose(1, 2)
            k, v = both.unflatten(2, (2, self.heads, self.width)).permute(2, 0, 3, 1, 4).unbind(0)
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm else (q, k, v)

    def attend(self, q, k, v):
        if not q.shape[-1]:  # all logits 0: every token attends to all alike
            return v.mean(dim=2, keepdim=True).expand_as(v)
        return attend(q, k, v, dropout=self.dropout if self.training else 0.0, scale=self.scale)

    def joined(self, mixed):
        """Values of (filled-up) heads, B N heads width -> the channels that there are, B N V."""
        values = self.widths[-self.heads :]
        if self.even or set(values) == {self.width}:
            return mixed.flatten(2)
        return torch.cat([mixed[:, :, i, :width] for i, width in enumerate(values)], dim=-1)

    def project(self, mixed):
        """What all heads give, B N V -> B N D."""
        return self.proj(mixed if self.norm is None else self.norm(mixed))

    def map(self, x):
        """The attention probabilities, B heads N N, computed beside the fused product; None without heads."""
        if not self.heads:
            return None
        q, k, _ = self.split(x)
        return (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)

    def _filled(self, flat, widths):
        """Channels of heads of these widths, one after the other (B N C), each filled up to `width` with zeros."""
        if all(width == self.width for width in widths):
            return flat
        zeros, filled = flat.new_zeros(1).expand(*flat.shape[:-1], self.width), []
        for part in flat.split(widths, dim=-1):
            filled += [part, zeros[..., part.shape[-1] :]]
        return torch.cat(filled, dim=-1)

    def _run_by_run(self, x):
        """tokens B N D -> what all heads give, B N V: one product for each run of equal heads."""
        widths = [[count * w[i] for count, *w in self.runs] for i in (0, 0, 1)]
        parts = zip(*(p.split(w, dim=-1) for p, w in zip(self.qkv(x).split(self.sizes, dim=-1), widths)))
        mixed = []
        for (count, qk, v), run in zip(self.runs, parts):
            q, k, val = (t.unflatten(-1, (count, w)).transpose(1, 2) for t, w in zip(run, (qk, qk, v)))
            q, k = (self.q_norm(q), self.k_norm(k)) if self.qk_norm else (q, k)
            mixed.append(self.attend(q, k, val).transpose(1, 2).flatten(2))
        return torch.cat(mixed, dim=-1)


def linear(inputs, outputs, bias=True):
    """nn.Linear, also of no inputs at all."""
    layer = nn.Linear(max(inputs, 1), outputs, bias)
    if not inputs:  # a branch pruned to nothing keeps its bias; torch warns when it initialises no weights
        layer.in_features, layer.weight = 0, nn.Parameter(torch.empty(outputs, 0))
    return layer


ATTENTIONS = {"softmax": Attention}  # name in a config -> class; the modules below add theirs
PROVIDERS = dict.fromkeys(("linear", "ripple", "hydra"), "vitlab.models.linear") | {"topk": "vitlab.models.sparse"}


def attention_class(name):
    """The attention class of that name; the module that provides it is imported when it is first asked for."""
    if name not in ATTENTIONS and name in PROVIDERS:
        importlib.import_module(PROVIDERS[name])
    if name not in ATTENTIONS:
        raise ValueError(f"attention={name!r}: choose one of {', '.join({**ATTENTIONS, **PROVIDERS})}")
    return ATTENTIONS[name]
