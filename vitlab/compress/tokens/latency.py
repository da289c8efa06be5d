"""How long a ViT takes on any number of tokens in each block, added up from blocks timed on this machine."""

import dataclasses
import functools

from vitlab.compress.tokens.reducer import Reducer
from vitlab.compress.tokens.reduction import TokenConfig, reduce_tokens
from vitlab.metrics.meters import latency
from vitlab.utils.device import running


class TokenLatency:
    """Latency (ms) of `model` on `images` (normalised, B C H W: a batch as it will be served) for any counts.

    `meter(counts)`, the tokens after each block, adds up the embedding, every block and the head, each timed on real
    tokens once, so that thousands of counts cost a few hundred short timings. Operations do not tell this: joining
    tokens takes time and hardly any operations, and kernels like some numbers of tokens better than others.

    config and options: as in `reduce_tokens` (action, score, ...), without counts. dtype: of autocast. seconds: of each
    timing. timer: f(callable without argument) -> ms, instead of this machine's clock.
    `timed` holds what was measured: {(tokens before, tokens after, kind of block): ms}.
    """

    def __init__(self, model, images, config=None, *, dtype=None, seconds=0.04, timer=None, **options):
        self.config = dataclasses.replace(config or TokenConfig(), **options, counts=None)
        self.parts = reduce_tokens(model, self.config, r_max=0.0).adapter
        self.images, self.dtype, self.timed = images, dtype, {}
        clock = {"device": images.device, "dtype": dtype, "seconds": seconds, "warmup": 1, "min_runs": 5}
        # the lower quartile: a busy neighbour only ever slows a run down, and a search finds the lucky timings
        self.timer = timer or (lambda run: 1e3 * latency(run, **clock).q25_s)
        shapes = [tuple(p.shape for p in block.parameters()) for block in self.parts.model.blocks]
        self.kinds = [shapes.index(shape) for shape in shapes]  # blocks of one shape take the same time

    def __call__(self, counts):
        """ms of a batch that leaves `counts` tokens after each block; ValueError where counts cannot be."""
        reducer, before = self._reducer(counts), self.parts.prefix + self.parts.patches
        with running([self.parts.model], self.images.device, self.dtype):
            total = self._once("embedding", lambda: lambda: reducer.start(self.images))
            for layer, after in enumerate(reducer.counts):
                last = layer == self.parts.depth - 1
                key = before, after, "last" if last else self.kinds[layer]
                total += self._once(key, functools.partial(self._block, layer, before, after))
                before = after
        return total

    def _once(self, key, make):
        """ms of what `make()` gives, a callable without argument, the first time that it is asked for."""
        if key not in self.timed:
            self.timed[key] = self.timer(make())
        return self.timed[key]

    def _reducer(self, counts):
        return Reducer(self.parts, dataclasses.replace(self.config, counts=tuple(counts)))

    def _block(self, layer, before, after):
        """A run of the block `layer`, with the head if it is the last."""
        # tokens as they come: all that are to go before this block go in the first one
        reducer = self._reducer([before] * layer + [after] * (self.parts.depth - layer))
        state = reducer.start(self.images)
        for earlier in range(layer):
            state = reducer.block(earlier, state)
        finish = reducer.finish if layer == self.parts.depth - 1 else lambda state, layer: reducer.block(layer, state)
        return lambda: finish(state, layer)
