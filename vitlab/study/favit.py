"""What the study of factorised attention needs beside `Study`: the cost of ways to attend, and its pictures."""

import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from vitlab.models.factorized import gridded, probsparse, ungridded
from vitlab.study.complexity import metered
from vitlab.study.plots import WIDTH, faded, pictures

TABLE, FUSED, THINNED = "every pair, as a table", "every pair, fused (SDPA)", "thinned keys"
PROBSPARSE, PUBLISHED = "ProbSparse", "thinned keys + ProbSparse as published"
WINDOWS, DILATED = "windows", "dilated windows"


def table_attention(query, key, value):
    """Softmax attention with the whole N x M table in memory; B h N d."""
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value


def thin(x, keys):
    """B h N d on a square grid -> B h keys^2 d, each the mean of a cell of the grid."""
    side, (b, h, _, d) = math.isqrt(x.shape[2]), x.shape
    image = x.transpose(2, 3).reshape(b, h * d, side, side)
    return F.adaptive_avg_pool2d(image, keys).view(b, h, d, keys**2).transpose(2, 3)


def published_probsparse(query, key, value, *, top, samples):
    """ProbSparse as the project codes it: every query gathers sampled keys of its own, the rest get zeros."""
    count = key.shape[2]
    drawn = torch.randint(count, (query.shape[2], samples), generator=torch.Generator().manual_seed(0))
    gathered = key[:, :, drawn.to(key.device)]  # B h N samples d: this is what costs
    logits = (query[:, :, :, None] @ gathered.mT).squeeze(-2)
    rows = (logits.amax(-1) - logits.mean(-1)).topk(top, dim=-1).indices[..., None].expand(-1, -1, -1, query.shape[-1])
    return torch.zeros_like(query).scatter(2, rows, table_attention(query.gather(2, rows), key, value))


def windowed(query, key, value, *, window, dilated):
    """Softmax attention of windows of a square grid; B h N d -> B h N d."""
    b, h, n, d = query.shape
    grids = (x.transpose(1, 2).reshape(b, math.isqrt(n), -1, h * d) for x in (query, key, value))
    groups = (gridded(g, window, h, dilated=dilated) for g in grids)
    out = ungridded(F.scaled_dot_product_attention(*groups), math.isqrt(n), dilated=dilated)
    return out.flatten(1, 2).unflatten(-1, (h, d)).transpose(1, 2)


def ways(n, *, window=7, keys=7, samples=25, top=5.0):
    """{name: function(query, key, value)} of ways for n tokens (a square grid of whole windows) to attend.

    keys: side of the thinned keys; samples: keys that judge a query, `top` ln n queries attend in full. In plain
    ProbSparse (Informer) keys are not thinned and `top` ln n of them are sampled.
    """
    u = min(n, max(1, int(top * math.log(n))))
    return {
        TABLE: table_attention,
        FUSED: F.scaled_dot_product_attention,
        PROBSPARSE: lambda q, k, v: probsparse(q, k, v, top=u, samples=u)[0],
        THINNED: lambda q, k, v: table_attention(q, thin(k, keys), thin(v, keys)),
        PUBLISHED: lambda q, k, v: published_probsparse(q, thin(k, keys), thin(v, keys), top=u, samples=samples),
        WINDOWS: lambda q, k, v: windowed(q, k, v, window=window, dilated=False),
        DILATED: lambda q, k, v: windowed(q, k, v, window=window, dilated=True),
    }


def costs(sides, *, width=64, heads=1, seconds=0.1, device="cpu", **options):
    """`complexity.metered` rows of all `ways` (which take the options), of one image at each grid side."""
    rows = []
    for side in sides:
        generator = torch.Generator().manual_seed(side)
        tokens = torch.randn(3, 1, heads, side**2, width // heads, generator=generator).to(device)
        rows += metered(ways(side**2, **options), tokens, seconds=seconds)
    return rows


def tint(image, there):
    """uint8 C H W `faded` where cells of a grid (bool, side x side) are gone; enlarged if it has fewer pixels."""
    scale = -(-4 * there.shape[-1] // image.shape[-1])
    return faded(image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[None], there[None])[0]


def main_direction(grid):
    """Grid H W C -> H W: the tokens along the direction in which they differ most (first principal component)."""
    flat = grid.flatten(0, 1) - grid.flatten(0, 1).mean(0)
    return (flat @ torch.linalg.svd(flat, full_matrices=False).Vh[0]).unflatten(0, grid.shape[:2])


def sees(config, stage, query):
    """{team: bool side x side}: the tokens whose values a query (row, column) of that stage can take in one block."""
    side, window = config.sides[stage], config.windows(stage)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    step = side // window
    found = {}
    for team in config.team_widths(stage):
        if team == "local":
            found[team] = (row // window == query[0] // window) & (column // window == query[1] // window)
        elif team == "dilated":
            found[team] = (row % step == query[0] % step) & (column % step == query[1] % step)
        else:
            found[team] = torch.ones(side, side, dtype=torch.bool)
    return found


def journey(image, grids, config):
    """An image (uint8 C H W), the tokens of stem and stages (grids 1 H W C), what the teams of a middle query see."""
    figure, axes = plt.subplots(2, len(grids) + 1, figsize=(WIDTH * 1.2, WIDTH * 2.5 / (len(grids) + 1)))
    axes[0][0].imshow(image.permute(1, 2, 0))
    axes[0][0].set_title("image", fontsize=8)
    for ax, grid, name in zip(axes[0][1:], grids, ["stem", *(f"stage {i + 1}" for i in range(len(grids) - 1))]):
        ax.imshow(main_direction(grid[0].float().cpu()), cmap="cividis")
        ax.set_title(f"{name}: {grid[0].shape[0] ** 2:,} tokens", fontsize=8)
    middle = (config.sides[0] // 2,) * 2
    views = sees(config, 0, middle)
    for ax in axes[1]:
        ax.set_axis_off()
    for ax, (team, there) in zip(axes[1], views.items()):
        ax.imshow(tint(image, there).permute(1, 2, 0))
        ax.plot(*[(m + 0.5) * ax.images[0].get_array().shape[1] / config.sides[0] - 0.5 for m in middle], "r+")
        ax.set_title(f"{team}: {int(there.sum()):,} of {there.numel():,}", fontsize=8)
    for ax in axes[0]:
        ax.set_xticks([])
        ax.set_yticks([])
    return figure


def same_places(chosen, count):
    """How many picked places (B h u, of `count`) two images share, over what chance would give; mean over the heads.

    1 where the image alone decides, count / u where the places are always the same ones.
    """
    there = torch.zeros(*chosen.shape[:2], count).scatter_(2, chosen.cpu(), 1.0)
    often = there.mean(0)  # h N: how often a place is picked
    pairs = (len(there) * often.square() - often) / (len(there) - 1)  # picked in two different images
    return float(pairs.sum(-1).mean() * count / chosen.shape[-1] ** 2)


def chosen_queries(images, chosen, sides):
    """uint8 images N C H W and, under each, the queries that any head picks by ProbSparse in each stage."""
    sheet, rows = [*images], ["image"]
    for side, picked in ((side, picked.cpu()) for side, picked in zip(sides, chosen) if picked is not None):
        there = torch.zeros(len(images), side * side, dtype=torch.bool).scatter_(1, picked.flatten(1), True)
        sheet += [tint(image, mask.view(side, side)) for image, mask in zip(images, there)]
        rows.append(f"stage {len(rows)}\n{there.sum(1).float().mean():.0f} of {side * side:,}")
    return pictures(sheet, rows, columns=len(images), size=WIDTH / len(images))
