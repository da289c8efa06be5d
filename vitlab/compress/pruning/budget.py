"""From scores to masks under a budget: a ratio of units, multiply-accumulates, or measured latency."""

import torch

from vitlab.compress.budget import BudgetImpossible, bisect, demand
from vitlab.compress.pruning.latency import timed
from vitlab.compress.pruning.shape import KINDS, head_index, kind_of, narrow, sizes
from vitlab.utils.checks import is_number

SCOPES = ("global", "layer", "kind")
ROUNDED = ("qk", "v", "mlp", "embed")  # heads and blocks are counted, not rounded


def select(config, scores, *, ratio=None, macs=None, latency=None, meter=None, scope="global", multiple=8,
           uniform=False, least=0.0, per_mac=False):  # fmt: skip
    """Masks ({structure: bool tensor}) that keep the best-scored units within one budget.

    config: a ViTConfig, see `structured.shape_of`; scores: {structure: tensor}, larger = keep (`criteria.score`).
    Give one of: ratio (share of the units removed, in (0, 1)), macs (of one image, absolute), latency (ms, by
    `meter(ViTConfig) -> ms`; default `timed`).
    scope: units are ranked "global"ly, per "layer" (structure), or per "kind" of structure over all
    layers (isomorphic pruning, Fang et al. 2024). per_mac: scores are divided by what a unit costs.
    multiple: widths (a head's query/key and value channels, MLP, embedding) become its nearest multiple.
    uniform: all heads left in a block get equal widths. least: share of every structure that stays whatever its
    scores.

    Raises BudgetImpossible (a ValueError) for a budget that is missed at the smallest model these kinds allow,
    ValueError for a ratio that removes nothing, a budget that the model keeps to as it is, scores that are not finite,
    and options that are not known.
    """
    given = {k: v for k, v in {"ratio": ratio, "macs": macs, "latency": latency}.items() if v is not None}
    if len(given) != 1:
        raise ValueError(f"one of ratio, macs, latency is needed; given: {', '.join(given) or 'none'}")
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r}: choose one of {', '.join(SCOPES)}")
    if not 0 <= least <= 1 or multiple < 1:
        raise ValueError(f"least={least}, multiple={multiple}: a share in [0, 1] and a number of at least 1 are needed")
    known = sizes(config, [k for k in KINDS if not (k == "qk" and config.qk_norm)])
    for name, score in scores.items():
        if known.get(name) != len(score):
            raise ValueError(f"score {name!r} of {len(score)} units: the model has {known}")
        if broken := int((~score.isfinite()).sum()):
            raise ValueError(f"score {name!r}: {broken} of {len(score)} are not finite (are the images, the weights?)")
    scores = {k: s.detach().float().cpu() / (unit_macs(config, k) if per_mac else 1.0) for k, s in scores.items()}
    ranking = _Ranking(config, scores, scope, multiple, uniform, least)
    if ratio is not None:
        return ranking.at_ratio(ratio)
    cost = (lambda c: c.macs()) if macs is not None else (meter or timed)
    return ranking.within(cost, *given.popitem())


class _Ranking:
    """Masks for any share removed, all from one ranking."""

    def __init__(self, config, scores, scope, multiple, uniform, least):
        self.config, self.scores, self.scope = config, scores, scope
        self.multiple, self.uniform, self.least = multiple, uniform, least

    def at_ratio(self, ratio):
        if not (is_number(ratio) and 0 < ratio < 1):
            raise ValueError(f"ratio={ratio!r}: the share of units to remove, in (0, 1)")
        masks = self.masks(ratio)
        if all(m.all() for m in masks.values()):
            units = {k: len(s) for k, s in self.scores.items()}
            raise ValueError(
                f"ratio={ratio} removes nothing here (widths are rounded to multiples of {self.multiple}; "
                f"at least {self.least:.0%} stays; units: {units}); give a larger ratio or multiple=1"
            )
        return masks

    def within(self, cost, name, budget):
        """The smallest share removed whose cost is within the budget, found by bisection."""
        demand(name, budget)
        smallest, whole = cost(narrow(self.config, self.masks(1.0))), cost(self.config)
        if budget >= whole:
            raise ValueError(f"{name}={budget:,.6g}: the model has {whole:,.6g} as it is, so that nothing would go; "
                             f"half of it is {whole / 2:,.6g}")  # fmt: skip
        if smallest > budget:
            kinds = sorted({kind_of(k) for k in self.scores})
            raise BudgetImpossible(
                f"{name}={budget:,} is impossible: the smallest model that pruning {', '.join(kinds)} "
                f"allows has {smallest:,.6g} (least={self.least}, multiple={self.multiple}); "
                f"the unpruned one has {whole:,.6g}. Prune more kinds ({', '.join(KINDS)}) or allow more", smallest
            )
        steps = 18 if name == "macs" else 8  # a measurement costs more than a formula
        return self.masks(bisect(lambda ratio: cost(narrow(self.config, self.masks(ratio))), budget, 0.0, 1.0, steps))

    def masks(self, ratio):
        """Masks with the share `ratio` removed within each scope, then rounded."""
        groups = {}
        for name in self.scores:
            group = {"global": "", "layer": name, "kind": kind_of(name)}[self.scope]
            groups.setdefault(group, []).append(name)
        found = {}
        for names in groups.values():
            flat = torch.cat([self.scores[n] for n in names])
            keep = torch.ones(len(flat), dtype=torch.bool)
            keep[flat.argsort(stable=True)[: int(ratio * len(flat) + 0.5)]] = False
            found |= dict(zip(names, keep.split([len(self.scores[n]) for n in names])))
        for name, mask in found.items():
            found[name] = self.rounded(name, mask)
        if "embed" in found and not found["embed"].any():
            found["embed"] = best(self.scores["embed"], min(self.multiple, self.config.dim))
        return self.with_uniform_heads(found) if self.uniform else found

    def rounded(self, name, mask):
        kind, score = kind_of(name), self.scores[name]
        if kind not in ROUNDED:
            return best(score, max(int(mask.sum()), -int(-self.least * len(mask) // 1)))
        if kind in ("mlp", "embed"):
            return best(score, self.width(int(mask.sum()), len(mask)))
        widths = [w[kind == "v"] for w in self.config.shapes[int(name.split(".")[1])].each_head]
        # a head that is left needs a query/key channel only if it had one; one without values is no head
        floor = 1 if kind == "qk" else 0
        parts = zip(score.split(widths), mask.split(widths))
        return torch.cat([best(s, self.width(max(int(m.sum()), floor and min(self.multiple, len(m))), len(m)))
                          for s, m in parts])  # fmt: skip

    def width(self, count, full):
        """The multiple nearest to `count`, at most `full` and at least the share `least` of it."""
        nearest = int(count / self.multiple + 0.5) * self.multiple
        floor = -int(-self.least * full // self.multiple) * self.multiple
        return min(full, max(nearest, floor))

    def with_uniform_heads(self, masks):
        """Equal query/key and value widths of the heads left in a block: the rounded mean of their counts."""
        for i, block in enumerate(self.config.shapes):
            names = [n for n in (f"blocks.{i}.qk", f"blocks.{i}.v") if n in masks]
            live = masks.get(f"blocks.{i}.heads", torch.ones(len(block.each_head), dtype=torch.bool)).clone()
            if f"blocks.{i}.v" in names:
                index = head_index(block, "v")
                live &= torch.zeros(len(live)).index_add_(0, index, masks[f"blocks.{i}.v"].float()) > 0
            if not names or not live.any():
                continue
            on = [live[head_index(block, kind_of(n))] for n in names]
            mean = sum((masks[n] & o).sum() for n, o in zip(names, on)) / (len(names) * live.sum())
            width = max(self.width(mean.item(), 10**9), self.multiple)
            for name in names:
                widths = [w[kind_of(name) == "v"] for w in block.each_head]
                masks[name] = torch.cat([best(s, min(width, len(s)) * bool(a))
                                         for s, a in zip(self.scores[name].split(widths), live)])  # fmt: skip
        return masks


def best(scores, count):
    """Bool mask of the `count` largest scores."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[:count]] = True
    return mask


def unit_macs(config, name):
    """Multiply-accumulates that removing one unit of a structure saves (heads: the mean over them)."""
    units = sizes(config, [kind_of(name)])[name]
    mask = torch.zeros(units)
    if kind_of(name) in ROUNDED:
        mask[1:] = 1
    return (config.macs() - narrow(config, {name: mask}).macs()) / max(units - int(mask.sum()), 1)
