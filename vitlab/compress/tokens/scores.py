"""How much each patch token matters, read off the block that runs anyway.

Every score takes a `View` of one block and gives B P, the higher the more it is worth keeping. Only
"received", "entropy" and "variance" need the whole attention map, computed beside the fused product (N^2 D
multiply-accumulates, B heads N N numbers); the CLS scores need its CLS row alone (N D).
"""

import math

import torch
import torch.nn.functional as F

from vitlab.utils import rng

PRIME = 2**31 - 1


class View:
    """Block `layer` of a `Reducer` as the scores see it, before the tokens `state` go through it.

    query, key: B heads N d; bias: log size of the tokens, B 1 1 N, or None; positions: B P, original patch of each
    token, or None.
    """

    def __init__(self, reducer, layer, state, query, key, bias):
        self.query, self.key, self.bias, self.parts, self.decay = query, key, bias, reducer.parts, reducer.config.ema
        self.prefix, self.read, self.factors = self.parts.prefix, self.parts.read, reducer.factors[layer]
        self.scale, self.previous = self.parts.model.blocks[layer].attn.scale, state.score
        self.positions = None if state.positions is None else state.positions[:, self.prefix :]

    def attention(self, query):
        """Probabilities B heads M N of the given query rows, in float32."""
        logits = (query * self.scale) @ self.key.transpose(-2, -1)
        return (logits if self.bias is None else logits + self.bias).float().softmax(-1)

    def given(self):
        """Attention that what the head reads gives to each patch, a head: B heads P.

        That is the CLS row (mean with the distillation row), or for a mean-pooled head the attention received.
        """
        if not self.read:
            return self.received()
        return self.attention(self.query[:, :, : self.read]).mean(2)[..., self.prefix :]

    def patch_map(self):
        """Attention of the patches to the patches, B heads P P."""
        return self.attention(self.query[:, :, self.prefix :])[..., self.prefix :]

    def received(self):
        """Mean attention each patch receives from all other patches, a head: B heads P."""
        full = self.patch_map()
        others = max(full.shape[-1] - 1, 1)
        return (full.sum(2) - full.diagonal(dim1=-2, dim2=-1)) / others

    def patch_keys(self):
        """Unit key of each patch, the mean over heads (the metric of ToMe): B P d."""
        return F.normalize(self.key[:, :, self.prefix :].mean(1), dim=-1)


def _normalised(scores):
    # each head counts the same, however sharp it is
    return (scores / scores.amax(-1, keepdim=True).clamp_min(1e-12)).mean(1)


def _averaged(view, now):
    # over the blocks so far
    return now if view.previous is None else view.decay * view.previous + (1 - view.decay) * now


def _entropy(view):
    """Minus the entropy of the patch's own row: one that looks somewhere in particular is kept."""
    rows = view.attention(view.query[:, :, view.prefix :])
    return (rows * rows.clamp_min(1e-12).log()).sum(-1).mean(1)


def random_factors(seed, layers):
    """Four coefficients a block for the random control."""
    draw = rng.generator(seed, "token control")
    return tuple(map(tuple, torch.randint(1, PRIME, (layers, 4), generator=draw).tolist()))


def _random(view):
    """The control: a fixed random order of the patches, a block and seed, by a random cubic over a prime field."""
    value = torch.full_like(view.positions, view.factors[0])
    for factor in view.factors[1:]:
        value = (value * (view.positions + 1) + factor) % PRIME
    return value.float() / PRIME


def _grid(view):
    """An order whose every beginning is spread evenly over the grid (Bayer's ordered dither): the control."""
    side = view.parts.grid
    row, column, value = view.positions // side, view.positions % side, torch.zeros_like(view.positions)
    levels = max(side - 1, 1).bit_length()
    for level in range(levels):
        r, c = row // 2**level % 2, column // 2**level % 2
        value = value * 4 + (r + c) % 2 * 2 + r
    # the last bit of a tie-free order: larger is better, and 1 / 4^levels is one step
    return 1 - value.float() / 4**levels


SCORES = {
    "cls": lambda view: view.given().mean(1),
    "cls-ema": lambda view: _averaged(view, view.given().mean(1)),
    "cls-normalised": lambda view: _normalised(view.given()),
    "received": lambda view: view.received().mean(1),
    "received-ema": lambda view: _averaged(view, view.received().mean(1)),
    "received-normalised": lambda view: _normalised(view.received()),
    "entropy": _entropy,
    # over the patches that look, of the attention a patch receives: relevant to some
    "variance": lambda view: view.patch_map().var(2, correction=0).mean(1),
    "random": _random,
    "grid": _grid,
}
SIGNED = ("entropy",)  # no weights: below zero
POSITIONED = ("random", "grid")


def entropy(view):
    """Entropy of what the head reads attending to the patches, B, in [0, 1]: 1 is an even gaze."""
    given = view.given().mean(1)
    given = given / given.sum(-1, keepdim=True)
    return -(given * given.clamp_min(1e-12).log()).sum(-1) / math.log(given.shape[-1])
