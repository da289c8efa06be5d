"""How long a ViT takes on any number of tokens in each block, added up from blocks timed on this machine."""

import dataclasses

from vitlab.compress.tokens.reducer import Reducer
from vitlab.compress.tokens.reduction import TokenConfig, keep
from vitlab.compress.tokens.schedule import check_counts
from vitlab.metrics.meters import latency
from vitlab.utils.device import running


class TokenLatency:
    """Latency (ms) of `model` on `images` (normalised, B C H W: a batch as it will be served) for any counts.

    `meter(counts)`, the tokens after each block, adds up the embedding, every block and the head. Each is timed when it
    is first asked for, on real tokens, and then remembered, so that thousands of counts cost a few hundred short
    timings. Operations do not tell this: joining tokens takes time and hardly any operations, and kernels like some
    numbers of tokens better than others.

    config and options: as in `keep` (action, score, ...), without counts. dtype: of autocast. seconds: of each timing.
    timer: f(callable without argument) -> ms, instead of this machine's clock.
    `timed` holds what was measured: {(tokens before, tokens after, kind of block): ms}.
    """

    def __init__(self, model, images, config=None, *, dtype=None, seconds=0.04, timer=None, **options):
        self.config = dataclasses.replace(config or TokenConfig(), **options, counts=None)
        self.parts = keep(model, self.config, r_max=0.0).anatomy
        self.model, self.images, self.dtype, self.timed = self.parts.model, images, dtype, {}
        clock = {"device": images.device, "dtype": dtype, "seconds": seconds, "warmup": 1, "min_runs": 5}
        # the lower quartile: a busy neighbour only ever slows a run down, and a search finds the lucky timings
        self.timer = timer or (lambda run: 1e3 * latency(run, **clock).q25_s)
        shapes = [tuple(p.shape for p in block.parameters()) for block in self.model.blocks]
        self.kinds = [shapes.index(shape) for shape in shapes]  # blocks of one shape take the same time

    def __call__(self, counts):
        """ms of a batch that leaves `counts` tokens after each block; ValueError where counts cannot be."""
        parts = self.parts
        before = parts.prefix + parts.patches
        counts = check_counts(counts, before, parts.depth, parts.prefix)
        with running([self.model], self.images.device, self.dtype):
            total = self._once("embedding", lambda: self._reducer(counts).start(self.images))
            for layer, after in enumerate(counts):
                total += self._block(layer, before, after)
                before = after
        return total

    def _once(self, key, run):
        if key not in self.timed:
            self.timed[key] = self.timer(run)
        return self.timed[key]

    def _reducer(self, counts):
        return Reducer(self.parts, self.config, tuple(counts))

    def _block(self, layer, before, after):
        """ms of the block `layer`, with the head if it is the last."""
        last = layer == self.parts.depth - 1
        reducer = self._reducer([before] * layer + [after] * (self.parts.depth - layer))
        key = before, after, ("last" if last else self.kinds[layer], reducer.actions[layer])
        if key in self.timed:
            return self.timed[key]
        # tokens as they come: all that are to go before this block go in the first one
        state = reducer.start(self.images)
        for earlier in range(layer):
            state = reducer.block(earlier, state)
        run = (lambda: reducer.finish(state, layer)) if last else (lambda: reducer.block(layer, state))
        return self._once(key, run)
