"""How the cost of an attention layer grows with the number of tokens: operations, time, memory.

`sweep` meters attention layers of one width on square patch grids against each other; `slope` and `crossing` read a
growth and a break-even point off such a series.
"""

import math
import statistics
from functools import partial

import torch

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


def layer(side, *, dim, heads, attention="softmax", attention_args=()):
    """(an attention layer for tokens B n D, its MACs for one image) on n = side^2, as in a mean-pooled ViT."""
    config = ViTConfig(image_size=side, patch_size=1, dim=dim, heads=heads, depth=1, pool="mean", qkv_bias=False,
                       attention=attention, attention_args=attention_args)  # fmt: skip
    made = attention_class(attention)(dim, heads, config=config, **dict(config.attention_args))
    # softmax: the projections and the two attention products
    return made, made.macs() if hasattr(made, "macs") else 4 * side**2 * dim**2 + 2 * side**4 * dim


def layer_macs(side, **shape):
    """Closed-form multiply-accumulates of such a layer; nothing is computed."""
    with torch.device("meta"):
        return layer(side, **shape)[1]


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


def macs_crossover(attention, attention_args=(), *, sides=range(4, 129), **wide):
    """The fewest tokens (a square grid) from which a layer needs fewer operations than softmax, None beyond sides."""
    this = {"attention": attention, "attention_args": attention_args}
    return next((s * s for s in sides if layer_macs(s, **this, **wide) < layer_macs(s, **wide)), None)


def metered(functions, inputs, *, seconds, dtype=None, skip=()):
    """Rows (dicts) of time and memory of {name: module or function} of the `inputs`, tensors B ... n d, in turns.

    A row holds arm, pass ("training" has the gradients of inputs and weights), n, images, ms (an image), ms_q25,
    ms_q75, peak_mb (an image, what the pass allocates; 1 MB is 1e6 bytes). skip: pairs (arm, pass) to leave out.
    Modules are put into the mode of the pass: top-k attention reads its blocks another way than it learns them.
    """
    rows, device, (images, *_, n, _) = [], inputs[0].device, inputs[0].shape
    for kind in PASSES:
        for module in (f for f in functions.values() if isinstance(f, torch.nn.Module)):
            module.train(kind == "training")
        calls = {name: training_step(f, *inputs, inputs=True) if kind == "training" else partial(f, *inputs)
                 for name, f in functions.items() if (name, kind) not in skip}  # fmt: skip
        timed = compare(calls, device=device, dtype=dtype, warmup=1, seconds=seconds, min_runs=3) if calls else {}
        for name, time in timed.items():
            memory = peak_memory(calls[name], None, device=device, dtype=dtype).activations
            seconds_of = {"ms": time.median_s, "ms_q25": time.q25_s, "ms_q75": time.q75_s}
            rows.append({"arm": name, "pass": kind, "n": n, "images": images, "peak_mb": memory / 1e6 / images}
                        | {key: value * 1e3 / images for key, value in seconds_of.items()})  # fmt: skip
    return rows


def sweep(arms, sides, *, dim, heads, tokens=None, seconds=0.1, limit=60.0, device="cpu", dtype=None, log=print):
    """`metered` rows of one attention layer at each grid side, with its side and macs.

    arms: {name: (attention, attention_args)}. tokens: images x n, about the same at every n (default 2^18 on
    CUDA, 2^11 elsewhere; at least one image). seconds: for each reading. An arm and pass whose next size
    would take more than `limit` seconds is left out from there on.
    """
    device, rows, skip = torch.device(device), [], set()
    tokens = tokens or (2**18 if device.type == "cuda" else 2**11)
    for side in sides:
        n = side * side
        made = {name: layer(side, dim=dim, heads=heads, attention=a, attention_args=k)
                for name, (a, k) in arms.items()}  # fmt: skip
        generator = torch.Generator().manual_seed(n)
        x = torch.randn(max(1, tokens // n), n, dim, generator=generator).to(device)
        layers = {name: attend.to(device) for name, (attend, _) in made.items()}
        for row in metered(layers, [x], seconds=seconds, dtype=dtype, skip=skip):
            name, kind = row["arm"], row["pass"]
            rows.append(row | {"side": side, "macs": made[name][1]})
            # four times the tokens cost at most sixteen times as much; five calls are made of it
            if 5 * 16 * row["ms"] * row["images"] > 1e3 * limit:
                skip.add((name, kind))
                log(f"{name}, {kind}: n above {n} is left out (it would take too long here)")
    return rows


def _series(rows, column):
    """{pass: {arm: {n: its value}}}, without what was not measured."""
    found = {kind: {r["arm"]: {} for r in rows} for kind in PASSES}
    for r in rows:
        if r[column]:
            found[r["pass"]][r["arm"]][r["n"]] = r[column]
    return found


def growth(rows, column="ms"):
    """{pass: {arm: exponent of n in `column`, or None}} over the upper half of the sizes of each series."""
    return {kind: {arm: slope(values.items()) for arm, values in series.items()}
            for kind, series in _series(rows, column).items()}  # fmt: skip


def crossovers(rows, column="ms"):
    """{pass: {arm: the n from which it stays below softmax, or None where it does not within the sizes}}."""
    found = _series(rows, column)
    for kind, series in found.items():
        base = series.pop("softmax", {})
        found[kind] = {arm: crossing([(n, v / base[n]) for n, v in values.items() if n in base])
                       for arm, values in series.items()}  # fmt: skip
    return found
