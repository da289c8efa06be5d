"""Factorised attention: the channels are split among three teams, each of which looks at the image in its own way.

The global team sees the whole image through ProbSparse attention (Zhou et al. 2021, "Informer", eq. 3-4), the local
one its own window, the dilated one a grid of tokens spread over the image. Tokens come and go as a grid, B H W C.
`config` below is a `FaViTConfig`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def sparsity(query, key, scale):
    """M (Informer, eq. 4 with the maximum): max over the keys minus their mean, of the scaled logits.

    query B h N d, key B h S d -> B h N. High where a query has something to look at, low where it attends to all alike.
    """
    logits = query @ key.mT * scale  # B h N S: S sampled keys, not N
    return logits.amax(-1) - logits.mean(-1)


def sampled_keys(count, samples, training, device):
    """Indices of the keys that judge the queries: drawn anew in training, evenly spread in eval; all if None."""
    if samples is None or samples >= count:
        return torch.arange(count, device=device)
    if training:
        return torch.randperm(count, device=device)[:samples]
    return (torch.arange(samples, device=device) * count + count // 2) // samples


def probsparse(query, key, value, *, top, samples=None, training=False):
    """ProbSparse attention (Informer, eq. 3): the `top` queries with the highest `sparsity` attend in full, the rest
    get the mean of the values. query B h N d, key and value B h M d -> (B h N d, chosen queries B h top).

    At most N x samples and top x M logits exist at once.
    """
    scale = query.shape[-1] ** -0.5
    judges = sampled_keys(key.shape[2], samples, training, key.device)
    with torch.no_grad():  # which queries are chosen has no gradient
        chosen = sparsity(query, key[:, :, judges], scale).topk(top, dim=-1).indices
    rows = chosen[..., None].expand(-1, -1, -1, query.shape[-1])
    attended = F.scaled_dot_product_attention(query.gather(2, rows), key, value, scale=scale)
    lazy = value.mean(2, keepdim=True).expand(-1, -1, query.shape[2], -1)
    return lazy.scatter(2, rows, attended.to(lazy.dtype)), chosen


def gridded(x, window, heads, *, dilated):
    """Grid B H W C -> groups of window^2 tokens, (B groups) heads window^2 d.

    Local: the groups are windows. Dilated: a group's tokens stand H / window rows and W / window columns apart, so
    that it spans the whole image.
    """
    b, h, w, c = x.shape
    if dilated:
        x = x.view(b, window, h // window, window, w // window, c).permute(0, 2, 4, 1, 3, 5)
    else:
        x = x.view(b, h // window, window, w // window, window, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, window * window, heads, c // heads).transpose(1, 2)


def ungridded(x, side, *, dilated):
    """The inverse of `gridded` for a square grid: (B groups) heads window^2 d -> B side side C."""
    window = math.isqrt(x.shape[2])
    x = x.transpose(1, 2).reshape(-1, side // window, side // window, window, window, x.shape[1] * x.shape[3])
    order = (0, 3, 1, 4, 2, 5) if dilated else (0, 1, 3, 2, 4, 5)
    return x.permute(order).reshape(-1, side, side, x.shape[-1])


def window_attention(query, key, value, *, window, heads, dilated=False):
    """Softmax attention within windows, or within dilated grids; grids B H W C -> B H W C."""
    groups = (gridded(x, window, heads, dilated=dilated) for x in (query, key, value))
    return ungridded(F.scaled_dot_product_attention(*groups), query.shape[1], dilated=dilated)


class GlobalTeam(nn.Module):
    """The team that sees the whole image: ProbSparse (or full) attention to thinned-out keys and values."""

    def __init__(self, config, stage, width):
        super().__init__()
        self.heads, dim, reduction = config.heads[stage], width * config.heads[stage], config.reductions[stage]
        self.top, self.samples = config.top_queries(stage), config.samples
        self.full = config.global_attention == "full"
        self.reduce = self.norm = nn.Identity()
        if reduction > 1:  # depthwise, so that it costs next to nothing
            self.reduce = nn.Conv2d(dim, dim, reduction, stride=reduction, groups=dim)
            self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.kv = nn.Linear(dim, 2 * dim)

    def split(self, query, x):
        """Grids B H W c -> query B heads N d, key and value B heads M d."""
        thin = self.norm(self.reduce(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).flatten(1, 2)  # B M c
        key, value = self.kv(thin).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return query.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2), key, value

    def attend(self, query, x):
        """(B heads N d, the chosen queries B heads u or None)."""
        query, key, value = self.split(query, x)
        if self.full:
            return F.scaled_dot_product_attention(query, key, value), None
        return probsparse(query, key, value, top=self.top, samples=self.samples, training=self.training)

    def forward(self, query, x):
        return self.attend(query, x)[0].transpose(1, 2).reshape(x.shape)


class NearTeam(nn.Module):
    """A team of windows, local or dilated."""

    def __init__(self, config, stage, width, dilated):
        super().__init__()
        self.heads, self.window, self.dilated = config.heads[stage], config.windows(stage), dilated
        self.kv = nn.Linear(width * self.heads, 2 * width * self.heads)

    def forward(self, query, x):
        key, value = self.kv(x).chunk(2, dim=-1)
        return window_attention(query, key, value, window=self.window, heads=self.heads, dilated=self.dilated)


class FactorizedAttention(nn.Module):
    """Queries from all channels; each team's keys and values from its own; outputs concatenated and mixed."""

    def __init__(self, config, stage):
        super().__init__()
        dim, widths = config.dims[stage], config.team_widths(stage)
        self.splits = [width * config.heads[stage] for width in widths.values()]
        self.query, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.names = tuple(widths)
        # by number: torch.export writes names into source, and "global" is a keyword
        self.teams = nn.ModuleList(
            GlobalTeam(config, stage, width) if team == "global" else NearTeam(config, stage, width, team == "dilated")
            for team, width in widths.items()
        )

    def parts(self, x):
        """{team: (its queries, its channels)}, grids B H W c."""
        pairs = zip(self.query(x).split(self.splits, -1), x.split(self.splits, -1))
        return dict(zip(self.names, pairs))

    def forward(self, x):
        outputs = [team(*pair) for team, pair in zip(self.teams, self.parts(x).values())]
        return self.proj(torch.cat(outputs, dim=-1))

    def chosen(self, x):
        """The queries that ProbSparse picks, B heads u, computed beside the forward pass; None without it."""
        if "global" not in self.names:
            return None
        return self.teams[self.names.index("global")].attend(*self.parts(x)["global"])[1]
