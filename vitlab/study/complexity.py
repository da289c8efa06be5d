"""How the cost of an attention layer grows with the number of tokens: operations, time, memory.

`layers` builds attention layers of one width for square patch grids, `sweep` meters them against each other,
`slope` and `crossing` read a growth and a break-even point off such a series.
"""

import math
import statistics
from functools import partial

import torch
from torch import nn

from vitlab.metrics.meters import compare, peak_memory, training_step
from vitlab.models.vit import ViTConfig, attention_class

PASSES = ("forward", "training")
DIVERGES = 0.05  # how far a growth may be from a whole power and still be called one


def slope(points):
    """Slope of log y against log x over the upper half of `points` [(x, y)]; None below two of them."""
    points = sorted((math.log(x), math.log(y)) for x, y in points)
    points = points[len(points) // 2 :] if len(points) > 3 else points
    return statistics.linear_regression(*zip(*points)).slope if len(points) > 1 else None


def crossing(ratios):
    """The x from which a ratio stays below 1, by a straight line in log-log between `ratios` [(x, ratio)].

    None where it is not below 1 at the last x (or there is none), the first x where it always is.
    """
    points = sorted((math.log(x), math.log(ratio)) for x, ratio in ratios)
    if not points or points[-1][1] >= 0:
        return None
    last = max((i for i, (_, ratio) in enumerate(points) if ratio >= 0), default=None)
    if last is None:
        return round(math.exp(points[0][0]))
    (x0, y0), (x1, y1) = points[last], points[last + 1]
    return round(math.exp(x0 + (x1 - x0) * y0 / (y0 - y1)))


class Layer(nn.Module):
    """One attention layer on tokens B n D, the way a block of a mean-pooled ViT runs it."""

    def __init__(self, side, *, dim, heads, attention="softmax", attention_args=(), qkv_bias=False):
        super().__init__()
        self.config = ViTConfig(image_size=side, patch_size=1, dim=dim, heads=heads, depth=1, pool="mean",
                                qkv_bias=qkv_bias, attention=attention, attention_args=attention_args)  # fmt: skip
        self.attn = attention_class(attention)(dim, heads, config=self.config, **dict(self.config.attention_args))

    def forward(self, x):
        return self.attn(x)


def layer_macs(side, *, dim, heads, attention="softmax", attention_args=()):
    """Closed-form multiply-accumulates of one layer on side^2 tokens of one image; nothing is computed."""
    with torch.device("meta"):
        layer = Layer(side, dim=dim, heads=heads, attention=attention, attention_args=attention_args).attn
    # softmax: the projections and the two attention products
    return layer.macs() if hasattr(layer, "macs") else 4 * side**2 * dim**2 + 2 * side**4 * dim


def order(attention, attention_args=(), *, dim=384, heads=6, side=512):
    """("O(n)" or "O(n^2)", the exponent behind it): how its operations grow from side^2 tokens to 4 side^2.

    The default grid is large enough that projections no longer hide a quadratic term. ValueError where the
    growth is no whole power.
    """
    given = {"dim": dim, "heads": heads, "attention": attention, "attention_args": attention_args}
    growth = math.log(layer_macs(2 * side, **given) / layer_macs(side, **given)) / math.log(4)
    power = round(growth)
    if abs(growth - power) > DIVERGES or power not in (1, 2):
        raise ValueError(f"{attention}: operations grow as n^{growth:.2f}, which is neither O(n) nor O(n^2)")
    return ("O(n)" if power == 1 else "O(n^2)"), growth


def sweep(arms, sides, *, dim, heads, tokens=None, seconds=0.1, limit=60.0, device="cpu", dtype=None, log=None):
    """Rows (dicts) of time and memory of one attention layer at each grid side, arms in turns.

    arms: {name: (attention, attention_args)}. tokens: images x n, about the same at every n (default 2^18 on
    CUDA, 2^11 elsewhere; at least one image). seconds: for each reading. An arm and pass whose next size
    would take more than `limit` seconds is left out from there on. A row holds arm, pass, n, side, images,
    ms (an image), ms_q25, ms_q75, peak_mb (an image, what the pass allocates; 1 MB is 1e6 bytes), macs.
    """
    device, rows, skip = torch.device(device), [], set()
    for side in sides:
        n = side * side
        images = max(1, (tokens or (2**18 if device.type == "cuda" else 2**11)) // n)
        layers = {name: Layer(side, dim=dim, heads=heads, attention=a, attention_args=k).to(device).eval()
                  for name, (a, k) in arms.items()}  # fmt: skip
        counted = {name: layer_macs(side, dim=dim, heads=heads, attention=a, attention_args=k)
                   for name, (a, k) in arms.items()}  # fmt: skip
        x = torch.randn(images, n, dim, generator=torch.Generator().manual_seed(n)).to(device)
        for kind in PASSES:
            mine = {name: training_step(layer, x, inputs=True) if kind == "training" else partial(layer, x)
                    for name, layer in layers.items() if (name, kind) not in skip}  # fmt: skip
            if not mine:
                continue
            timed = compare(mine, device=device, dtype=dtype, warmup=1, seconds=seconds, min_runs=3)
            for name, time in timed.items():
                memory = peak_memory(mine[name], None, device=device, dtype=dtype)
                rows.append({"arm": name, "pass": kind, "n": n, "side": side, "images": images,
                             "ms": time.median_s * 1e3 / images, "ms_q25": time.q25_s * 1e3 / images,
                             "ms_q75": time.q75_s * 1e3 / images, "peak_mb": memory.activations / 1e6 / images,
                             "macs": counted[name]})  # fmt: skip
                # four times the tokens cost at most sixteen times as much; five calls are made of it
                if time.median_s * 5 * 16 > limit:
                    skip.add((name, kind))
                    if log:
                        log(f"{name}, {kind}: n above {n} is left out (it would take too long here)")
    return rows


def growth(rows, column="ms"):
    """{pass: {arm: exponent of n in `column`, or None}} over the upper half of the sizes of each series."""
    found = {}
    for kind in PASSES:
        for arm in dict.fromkeys(r["arm"] for r in rows):
            mine = [(r["n"], r[column]) for r in rows if r["arm"] == arm and r["pass"] == kind and r[column]]
            found.setdefault(kind, {})[arm] = slope(mine)
    return found


def crossovers(rows, against="softmax", column="ms"):
    """{pass: {arm: the n from which it stays below `against`, or None where it does not within the sizes}}."""
    found = {}
    for kind in PASSES:
        series = {}
        for r in rows:
            if r["pass"] == kind:
                series.setdefault(r["arm"], {})[r["n"]] = r[column]
        base = series.pop(against, {})
        found[kind] = {arm: crossing([(n, v / base[n]) for n, v in values.items() if base.get(n) and v])
                       for arm, values in series.items()}  # fmt: skip
    return found


def macs_crossover(attention, attention_args=(), *, dim, heads, sides=range(4, 129)):
    """The fewest tokens (a square grid) from which a layer needs fewer operations than softmax, None beyond sides."""
    given = {"dim": dim, "heads": heads}
    for side in sides:
        if layer_macs(side, attention=attention, attention_args=attention_args, **given) < layer_macs(side, **given):
            return side * side
    return None
