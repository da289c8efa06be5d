"""Sparse training: penalties on gated heads, heads taken away while training goes on, k by a schedule.

    fit(model, data, recipe, objective=HeadPenalty(1e-3), on_epoch=[Progressive(until=6, heads={4: 12})])

for a ViT with `attention="topk"` (`vitlab.models.sparse`), which stays one, with `blocks` of fewer heads.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass, field

import torch

from vitlab.compress.pruning.gates import L1
from vitlab.compress.pruning.shape import narrow
from vitlab.compress.pruning.structured import sliced
from vitlab.models.sparse import TopKAttention
from vitlab.utils.checks import is_number

CURVES = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "cubic": lambda x: 1 - (1 - x) ** 3,  # Zhu & Gupta 2017, eq. 1: fast while there is much to spare
}


class HeadPenalty(L1):
    """Objective: `base` + weight * what the gated heads of a ViT add up to (see `TopKAttention.penalty`)."""

    @staticmethod
    def penalty(model):
        return sum(attn.penalty() for attn in attentions(model))


def attentions(model):
    """The top-k attention of every block; ValueError for a model without."""
    found = [block.attn for block in model.blocks]
    if not all(isinstance(attn, TopKAttention) for attn in found):
        raise ValueError(f"attention={model.config.attention!r}: a model with attention='topk' is needed")
    return found


@torch.no_grad()
def importance(model):
    """The gates of every block's heads as they are in eval mode: [tensor of heads a block], without gates ones."""
    return [torch.ones(a.heads) if a.gate is None else a.open(noise=False).abs().cpu() for a in attentions(model)]


def best_heads(model, *, count=None, threshold=None):
    """[mask of heads a block] of the `count` heads with the largest gates, or of those with gates above `threshold`."""
    gates = importance(model)
    flat = torch.cat(gates)
    if (count is None) == (threshold is None):
        raise ValueError(f"count={count}, threshold={threshold}: one of the two is needed")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= len(flat)):
        raise ValueError(f"count={count!r}: a number of heads from 0 to the {len(flat)} that there are is needed")
    if threshold is not None and not 0 <= threshold < math.inf:
        raise ValueError(f"threshold={threshold!r}: a finite number of at least 0 is needed")
    chosen = flat > threshold if count is None else torch.zeros(len(flat)).index_fill(0, flat.topk(count).indices, 1)
    return chosen.bool().split([len(g) for g in gates])


@torch.no_grad()
def silenced(model, kept):
    """A copy of `model` in which, in eval mode, gates of heads that are not `kept` ([mask a block]) are exactly 0."""
    copied = copy.deepcopy(model)
    for attn, mask in zip(attentions(copied), kept):
        # so small a logit lies where the hard-concrete gate is clamped to 0
        attn.gate.masked_fill_(~mask.to(attn.gate.device), -20.0 if attn.gated == "hard-concrete" else 0.0)
    return copied


@torch.no_grad()
def remove_heads(model, kept):
    """Take the heads that are not `kept` ([mask a block]) out of `model`, in place, as if their gates were 0.

    Returns carry(name, tensor), which takes the same part of a tensor shaped like that parameter (see `fit`).
    """
    config, device = model.config, next(model.parameters()).device
    masks = {f"blocks.{i}.heads": mask for i, mask in enumerate(kept) if len(mask)}
    small = narrow(config, masks).build().to(device)

    def cut(state):
        return sliced(state, config, masks)

    small.load_state_dict(cut(model.state_dict()))
    for parameter in small.blocks.parameters():
        parameter.requires_grad_(parameter.numel() > 0)  # not every optimiser takes an empty matrix
    model.blocks, model.config = small.blocks.train(model.training), small.config
    like = model.norm.weight
    return lambda name, tensor: cut({"norm.weight": like, name: tensor})[name]


@torch.no_grad()
def folded(model):
    """A copy of `model` with the same eval outputs and no gates: heads at 0 removed, the others' multiplied in.

    With all keys read by all queries it is a plain softmax ViT.
    """
    copied = model.config.build().to(next(model.parameters()).device)
    copied.load_state_dict(model.state_dict())
    remove_heads(copied, best_heads(copied, threshold=0.0))
    state = {k: v for k, v in copied.state_dict().items() if not k.endswith("attn.gate")}
    for i, attn in enumerate(attentions(copied)):
        if attn.heads and attn.gate is not None:
            state[f"blocks.{i}.attn.proj.weight"] *= attn.open(noise=False).repeat_interleave(attn.width)
    dense = all(a.target >= a.tokens and a.rank is None for a in attentions(copied))
    options = {k: v for k, v in copied.config.attention_args if k != "gate" and not dense}
    kind = {"attention": "softmax" if dense else "topk", "attention_args": options}
    plain = dataclasses.replace(copied.config, **kind).build().to(next(model.parameters()).device)
    plain.load_state_dict(state)
    return plain.train(model.training)


@torch.no_grad()
def allocate(model, images, total):
    """(k of each block) with the sum `total` that keeps most of the model's attention on normalised images B C H W.

    Each key goes where it adds most to the mean attention on the kept keys; exact, since the gains fall with k. Every
    block gets one beside the prefix tokens.
    """
    _, seen = model.eval()(images, intermediates=True)
    gains = torch.stack([m.sort(dim=-1, descending=True).values.mean(dim=(0, 1, 2)) for m in seen["attention"]]).cpu()
    least = 1 + model.config.prefix_tokens
    if not least * len(gains) <= total <= gains.numel():
        raise ValueError(f"total={total}: from {least * len(gains)} to {gains.numel()} keys over all blocks are needed")
    gains[:, :least] = torch.inf
    chosen = torch.zeros(gains.numel()).index_fill(0, gains.flatten().topk(total).indices, 1)
    return tuple(chosen.view_as(gains).sum(dim=1).int().tolist())


@dataclass
class Progressive:
    """Hook for `fit`: from dense to sparse while training goes on.

    until: the epoch by which every query reads only the k keys of the config (from all of them before the first; 0:
    at once). curve: of CURVES. tau: temperature of the relaxation at first and from `until` on.
    heads: {epoch: heads left in the whole model} or {epoch: threshold of the gates, a float}: before that epoch the
    others are removed; a model with gates is needed. Each history row but the last gets `heads`: the gate of every head
    of every block as the epoch left it, None where there was none any more; and `kept`: ids of the heads that go on, a
    list a block. Before epoch 0 the hook starts anew, so that one may serve several runs.
    """

    until: int = 0
    curve: str = "cubic"
    tau: tuple = (1.5, 0.3)
    heads: dict = field(default_factory=dict)
    kept: list = field(default_factory=list, init=False)  # ids of the heads left, a list a block
    epoch: int = field(default=0, init=False)

    def __post_init__(self):
        self.heads = {int(k): v for k, v in dict(self.heads).items()}
        if not isinstance(self.until, int) or self.until < 0:
            raise ValueError(f"until={self.until!r}: an epoch, a whole number of at least 0, is needed")
        if self.curve not in CURVES:
            raise ValueError(f"curve={self.curve!r}: choose one of {', '.join(CURVES)}")
        if len(self.tau) != 2 or not all(0 < t < math.inf for t in self.tau):
            raise ValueError(f"tau={self.tau!r}: two temperatures above 0 are needed")
        for epoch, left in self.heads.items():
            if not (is_number(left) and left >= 0) or epoch < 0:
                raise ValueError(f"heads={self.heads}: {{epoch: heads left, or a threshold}} of at least 0 is needed")

    def describe(self):
        return {"until": self.until, "curve": self.curve, "tau": self.tau, "heads": self.heads}

    def state_dict(self):
        return {"kept": self.kept, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.kept, self.epoch = state["kept"], state["epoch"]

    def __call__(self, epoch, model, history):
        self.epoch, carry = epoch, None
        if epoch == 0:
            self.start(model)
        if history.rows:  # before anything is removed: these gates are what the choice is made by
            gates = [dict(zip(ids, values.tolist())) for ids, values in zip(self.kept, importance(model))]
            history.rows[-1]["heads"] = [[of.get(i) for i in range(model.config.heads)] for of in gates]
        if epoch in self.heads:
            left = self.heads[epoch]
            # a threshold may have left fewer than are asked for now
            by = {"threshold": left} if isinstance(left, float) else {"count": min(left, sum(map(len, self.kept)))}
            masks = best_heads(model, **by)
            self.kept = [[i for i, on in zip(ids, mask) if on] for ids, mask in zip(self.kept, masks)]
            carry = remove_heads(model, masks)
        if history.rows:
            history.rows[-1]["kept"] = self.kept
        self.set_k(model)
        return carry

    def start(self, model):
        """All heads are there; ValueError, before anything is trained, where they cannot be taken away as told."""
        found = attentions(model)
        self.kept, total = [list(range(attn.heads)) for attn in found], sum(attn.heads for attn in found)
        if self.heads and any(attn.gate is None for attn in found):
            raise ValueError(f"heads={self.heads}: gate='none' tells no head from another; choose another gate")
        if (most := max((left for left in self.heads.values() if isinstance(left, int)), default=0)) > total:
            raise ValueError(f"heads={self.heads}: {most} heads cannot be left of the {total} that there are")

    def restore(self, model):
        """Make a new `model` what it was when the run was stopped; its weights are still to be read."""
        carry, whole = None, range(model.config.heads)
        if any(len(ids) < len(whole) for ids in self.kept):
            carry = remove_heads(model, [torch.tensor([i in ids for i in whole]) for ids in self.kept])
        self.set_k(model)
        return carry

    def set_k(self, model):
        """Keys and temperature of the present epoch."""
        done = CURVES[self.curve](self.epoch / self.until) if self.epoch < self.until else 1.0
        for attn in attentions(model):
            attn.k = attn.keys(round(attn.tokens + (attn.target - attn.tokens) * done))
            attn.tau = self.tau[0] * (self.tau[1] / self.tau[0]) ** done
