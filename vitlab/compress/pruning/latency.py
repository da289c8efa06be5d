"""How long a model of a given shape takes: timed directly, or added up from a table measured once."""

import bisect
from dataclasses import replace

from vitlab.metrics.meters import latency
from vitlab.models.shape import BlockShape
from vitlab.utils.device import example


def timed(config, batch=64, device="cpu", dtype=None, seconds=0.2):
    """Median time in ms of a forward pass of `batch` images through a model of this shape, warmed up."""
    model = config.build().eval().to(device)
    images = example(model, (config.in_chans, config.image_size, config.image_size), batch)
    return 1e3 * latency(model, images, dtype=dtype, warmup=3, seconds=seconds).median_s


class LatencyTable:
    """Latency (ms) of any pruned shape of `config`: stem and head, plus each block's attention and MLP.

    A few widths of each are measured once (`measure(config) -> ms`, default `timed`) and interpolated
    linearly between, so that a search over shapes is quick and repeatable. `table(shape)` -> ms.
    `rows` holds what was measured: {"attention" | "mlp": [(channels, ms a block)]}.
    """

    def __init__(self, config, points=5, copies=4, measure=timed):
        first = config.shapes[0]
        self.base = measure(replace(config, blocks=()))
        heads, width = len(first.each_head), first.each_head[0][0]

        def per_block(block):
            return max(0.0, (measure(replace(config, blocks=(block,) * copies)) - self.base) / copies)

        steps = [i / (points - 1) for i in range(points)]
        empty = BlockShape(heads=(), hidden=0, scale=first.scale)
        nothing = per_block(empty)
        self.rows = {"attention": [(0, nothing)], "mlp": [(0, 0.0)]}
        for w in sorted({max(1, round(width * s)) for s in steps if s}):
            shape = replace(empty, heads=((heads, width, width),) if config.qk_norm else ((heads, w, w),))
            self.rows["attention"].append((2 * heads * w, per_block(shape)))
        for h in sorted({max(1, round(first.hidden * s)) for s in steps if s}):
            self.rows["mlp"].append((h, max(0.0, per_block(replace(empty, hidden=h)) - nothing)))

    def __call__(self, config):
        """Milliseconds of a model of this shape."""
        total = self.base
        for block in config.shapes:
            total += _between(self.rows["attention"], block.qk + block.v) + _between(self.rows["mlp"], block.hidden)
        return total


def _between(rows, x):
    """Linear interpolation in [(x, y)], sorted by x; beyond the last the last slope goes on."""
    xs = [row[0] for row in rows]
    i = min(max(bisect.bisect_right(xs, x), 1), len(rows) - 1)
    (x0, y0), (x1, y1) = rows[i - 1], rows[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
