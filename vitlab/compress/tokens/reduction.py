"""Token reduction for any ViT: `reduce_tokens(model, ...)` runs a given model on fewer and fewer tokens.

Which tokens go is decided for each image by itself, their number per block is fixed (`schedule`), so that a
prediction never depends on its batch-mates and the model compiles, exports and is captured in a CUDA graph.
"""

import dataclasses
from dataclasses import dataclass

from torch import nn

from vitlab.compress.tokens import schedule as schedules
from vitlab.compress.tokens.adapter import Adapter
from vitlab.compress.tokens.merge import ACTIONS, FORMER, MERGES, METRICS
from vitlab.compress.tokens.reducer import Reducer
from vitlab.compress.tokens.scores import SCORES, SIGNED
from vitlab.models.checkpoint import Wrapper, as_dataclass, register
from vitlab.utils.checks import is_number


@dataclass(frozen=True, kw_only=True)
class TokenConfig:
    """How tokens are reduced, as plain data.

    r_max, alpha, schedule ("power"; ToMe's "constant" number a block; "once", all in one block), rule, protect: of
    `schedule.schedule`; or `counts`, the tokens after each block, outright.
    score: one of `scores.SCORES` ("cls" is the attention of what the head reads; in a mean-pooled model that
    is the attention received). ema: weight of the past in the "-ema" scores.
    action: "drop"; "fuse" (EViT's one extra token); "merge" (ToMe); "size-priced": the study's own, a norm-preserving
    merge of what is alike in the block's normalised input, priced by size ** power (see `merge.bipartite`; read as
    "ward" too, which it was called before, though it is Ward's criterion at power 1 only).
    metric: what has to be alike, "key" (mean over heads, ToMe) or "input" (the block's normalised input);
    lengths: merged tokens keep the mean length of their parts. None for both: as the action says above.
    pooled_last: the last block computes only the class tokens that the head reads (same output; mean-pooled
    models read every token and gain nothing). seed: of the random control.
    """

    r_max: float = 0.6
    alpha: float = 2.0
    schedule: str = "power"
    score: str = "cls"
    action: str = "drop"
    rule: str = "exact"
    counts: tuple | None = None
    protect: tuple = ()
    power: float = 0.5
    metric: str | None = None
    lengths: bool | None = None
    ema: float = 0.5
    pooled_last: bool = False
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "action", FORMER.get(self.action, self.action))
        for name, value in (("protect", self.protect), ("counts", self.counts)):
            if value is not None and not (isinstance(value, (list, tuple)) and all(map(is_number, value))):
                raise ValueError(f"{name}={value!r}: numbers, one a block, are needed, in a tuple or a list")
            object.__setattr__(self, name, value if value is None else tuple(map(int, value)))
        schedules.schedule(2, 1, self.r_max, self.alpha, self.rule, kind=self.schedule)  # refuses what none can have
        for name, allowed in (("score", SCORES), ("action", ACTIONS), ("metric", (None, *METRICS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(str, allowed))}")
        if self.action == "fuse" and self.score in SIGNED:
            raise ValueError(f"action='fuse' weighs tokens by score; {self.score!r} is not positive")
        if not (is_number(self.ema) and 0 <= self.ema < 1):
            raise ValueError(f"ema={self.ema!r}: a number in [0, 1) is needed")
        if not (is_number(self.power) and self.power >= 0):
            raise ValueError(f"power={self.power!r}: a number of at least 0 is needed")

    @property
    def scored(self):
        """Whether the score decides anything."""
        return self.action not in MERGES

    @property
    def likeness(self):
        """What has to be alike for two tokens to be joined: "key" or "input"."""
        return self.metric or ("input" if self.action == "size-priced" else "key")

    @property
    def keeps_lengths(self):
        return self.action == "size-priced" if self.lengths is None else self.lengths

    def counts_for(self, n, depth, prefix):
        """The tokens after each block of a model with n tokens, `prefix` of them before the patches."""
        if self.counts is not None:
            return schedules.check_counts(self.counts, n, depth, prefix)
        return tuple(schedules.schedule(n, depth, self.r_max, self.alpha, self.rule, kind=self.schedule, prefix=prefix,
                                        protect=self.protect))  # fmt: skip

    def sized(self, read):
        """Whether sizes are kept account of. read: class tokens that the head reads (0: the mean, counted by size)."""
        return self.action in MERGES or (self.action == "fuse" and not read)


@register("reduced")
@dataclass(frozen=True, kw_only=True)
class ReducedConfig(Wrapper):
    """A ViT of the config `base` that runs on fewer tokens, as `tokens` (a TokenConfig) says."""

    base: object
    tokens: TokenConfig = TokenConfig()

    def __post_init__(self):
        object.__setattr__(self, "tokens", as_dataclass(TokenConfig, self.tokens))

    def build(self):
        """A TokenViT of this shape with new weights."""
        return TokenViT(self.base.build(), self.tokens)

    def macs(self):
        """Multiply-accumulates of one image, in closed form; see `schedule.macs`."""
        return schedules.macs(self.base, self.tokens)


class TokenViT(nn.Module):
    """A ViT on fewer tokens that shares all it has, under the same names, with `plain`. active: False runs that one."""

    def __init__(self, model, config):
        super().__init__()
        if isinstance(model, TokenViT):
            model = model.plain
        self.adapter = Adapter(model)
        model = self.adapter.model  # of timm's model, ours with the same parameters
        # the very same dictionaries: names, devices and dtypes stay common whoever changes them
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self.active, self.training = True, model.training
        self.reduce_by(config)

    @property
    def plain(self):
        """The model inside, without reduction."""
        return self.adapter.model

    @property
    def config(self):
        return ReducedConfig(base=self.plain.config, tokens=self.token_config)

    @property
    def tokens(self):
        """Tokens after each block, prefix tokens counted."""
        return self.reducer.counts

    def reduce_by(self, config=None, **changes):
        """Take another configuration from now on, or change the present one (counts=..., r_max=...).

        A compiled model is compiled again for it; dynamo stops after eight versions (`torch.compiler.reset()`).
        """
        config = dataclasses.replace(config or self.token_config, **changes)
        self.reducer, self.token_config = Reducer(self.adapter, config), config
        return self

    def train(self, mode=True):
        self.plain.training = mode
        return super().train(mode)

    def forward(self, images, intermediates=False):
        """images B C H W -> logits B K; with `intermediates=True` also what each block leaves, lists of one a block.

        {"tokens": B N D; "size": B N patches that each stands for, or None: all 1; "kept": B P original positions
        (row-major from 0; -1 for a fused token); "owners": B n, the row of `kept` that each original patch is in (the
        number of rows: dropped)}.
        """
        if self.plain.training != self.training:  # set on the modules one by one, not by train()
            self.plain.training = self.training
        if not self.active:
            return self.plain(images, intermediates=True) if intermediates else self.plain(images)
        seen = {"tokens": [], "size": [], "kept": [], "owners": []} if intermediates else None
        logits = self.reducer.finish(self.reducer.start(images, intermediates), 0, seen)
        return (logits, seen) if intermediates else logits

    def macs(self):
        return self.config.macs() if self.active else self.plain.config.macs()


def reduce_tokens(model, config=None, **options):
    """`model` on fewer tokens: a `TokenViT` around our ViT, or a timm VisionTransformer as ours, sharing its weights.

    config: a TokenConfig; options: its fields, which change `config` if both are given. ValueError names what the model
    has that is not handled, or the option that is wrong.

        small = reduce_tokens(model, r_max=0.6, alpha=1.5, action="merge")
        logits = small(images); small.tokens; small.macs()
    """
    config = dataclasses.replace(config, **options) if config else TokenConfig(**options)
    return TokenViT(model, config)
