"""From scores to masks under a budget: a ratio of units, multiply-accumulates, or measured latency."""

import torch

from vitlab.compress.budget import BudgetImpossible, bisect, demand
from vitlab.compress.pruning.shape import KINDS, head_index, kind_of, narrow, sizes
from vitlab.metrics.meters import latency as time_of
from vitlab.utils.checks import is_number
from vitlab.utils.device import example

SCOPES = ("global", "layer")
ROUNDED = ("qk", "v", "mlp", "embed")  # heads and blocks are counted, not rounded


def timed(config, batch=64, device="cpu", seconds=0.2):
    """Median time in ms of a forward pass of `batch` images through a model of this shape, warmed up."""
    model = config.build().eval().to(device)
    images = example(model, (config.in_chans, config.image_size, config.image_size), batch)
    return 1e3 * time_of(model, images, warmup=3, seconds=seconds).median_s


def select(config, scores, *, ratio=None, macs=None, latency=None, meter=timed, scope="global", multiple=8,
           uniform=False, per_mac=False):  # fmt: skip
    """Masks ({structure: bool tensor}) that keep the best-scored units within one budget.

    config: a ViTConfig, see `structured.shape_of`; scores: {structure: tensor}, larger = keep (`criteria.score`).
    Give one of: ratio (share of the units removed, in (0, 1)), macs (of one image, absolute), latency (ms, by
    `meter(ViTConfig) -> ms`).
    scope: units are ranked "global"ly or per "layer" (structure). per_mac: scores are divided by what a unit costs.
    multiple: widths (a head's query/key and value channels, MLP, embedding) become its nearest multiple.
    uniform: all heads left in a block get equal widths.

    Raises BudgetImpossible (a ValueError) for a budget that is missed at the smallest model these kinds allow,
    ValueError for a ratio that removes nothing, a budget that the model keeps to as it is, scores that are not finite,
    and options that are not known.
    """
    given = {k: v for k, v in {"ratio": ratio, "macs": macs, "latency": latency}.items() if v is not None}
    if len(given) != 1:
        raise ValueError(f"one of ratio, macs, latency is needed; given: {', '.join(given) or 'none'}")
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r}: choose one of {', '.join(SCOPES)}")
    if multiple < 1:
        raise ValueError(f"multiple={multiple}: a number of at least 1 is needed")
    known = sizes(config)
    for name, score in scores.items():
        if known.get(name) != len(score):
            raise ValueError(f"score {name!r} of {len(score)} units: the model has {known}")
        if broken := int((~score.isfinite()).sum()):
            raise ValueError(f"score {name!r}: {broken} of {len(score)} are not finite (are the images, the weights?)")
    scores = {k: s.detach().float().cpu() / (unit_macs(config, k) if per_mac else 1.0) for k, s in scores.items()}
    ranking = _Ranking(config, scores, scope, multiple, uniform)
    if ratio is not None:
        return ranking.at_ratio(ratio)
    return ranking.within((lambda c: c.macs()) if macs is not None else meter, *given.popitem())


class _Ranking:
    """Masks for any share removed, all from one ranking."""

    def __init__(self, config, scores, scope, multiple, uniform):
        self.config, self.scores, self.scope = config, scores, scope
        self.multiple, self.uniform = multiple, uniform

    def at_ratio(self, ratio):
        if not (is_number(ratio) and 0 < ratio < 1):
            raise ValueError(f"ratio={ratio!r}: the share of units to remove, in (0, 1)")
        masks = self.masks(ratio)
        if all(m.all() for m in masks.values()):
            units = {k: len(s) for k, s in self.scores.items()}
            raise ValueError(f"ratio={ratio} removes nothing here (widths are rounded to multiples of {self.multiple}; "
                             f"units: {units}); give a larger ratio or multiple=1")  # fmt: skip
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
                f"{name}={budget:,} is impossible: the smallest model that pruning {', '.join(kinds)} allows has "
                f"{smallest:,.6g} (multiple={self.multiple}); the unpruned one has {whole:,.6g}. "
                f"Prune more kinds ({', '.join(KINDS)}) or allow more", smallest
            )
        steps = 18 if name == "macs" else 8  # a measurement costs more than a formula
        return self.masks(bisect(lambda ratio: cost(narrow(self.config, self.masks(ratio))), budget, 0.0, 1.0, steps))

    def masks(self, ratio):
        """Masks with the share `ratio` removed within each scope, then rounded."""
        found = {}
        for names in [list(self.scores)] if self.scope == "global" else [[name] for name in self.scores]:
            flat = torch.cat([self.scores[n] for n in names])
            keep = torch.ones(len(flat), dtype=torch.bool)
            keep[flat.argsort(stable=True)[: int(ratio * len(flat) + 0.5)]] = False
            found |= dict(zip(names, keep.split([len(self.scores[n]) for n in names])))
        found = {name: self.rounded(name, mask) for name, mask in found.items()}
        if "embed" in found and not found["embed"].any():
            found["embed"] = best(self.scores["embed"], min(self.multiple, self.config.dim))
        return self.with_uniform_heads(found) if self.uniform else found

    def rounded(self, name, mask):
        kind, score = kind_of(name), self.scores[name]
        if kind not in ROUNDED:
            return best(score, int(mask.sum()))
        # a head that is left needs a query/key channel only if it had one; one without values is no head
        least = self.multiple if kind == "qk" else 0
        return self.cut(name, [self.width(max(int(m.sum()), min(least, len(m)))) for m in self.parts(name, mask)])

    def parts(self, name, units):
        """A structure's units (a flat tensor), head by head for channels of heads."""
        kind = kind_of(name)
        if kind in ("mlp", "embed"):
            return [units]
        return units.split([w[kind == "v"] for w in self.config.shapes[int(name.split(".")[1])].each_head])

    def cut(self, name, widths):
        """The mask of the best units of each part, so many, or all that there are."""
        return torch.cat([best(s, min(width, len(s))) for s, width in zip(self.parts(name, self.scores[name]), widths)])

    def width(self, count):
        """The multiple nearest to `count`."""
        return int(count / self.multiple + 0.5) * self.multiple

    def with_uniform_heads(self, masks):
        """Equal query/key and value widths of the heads left in a block: the rounded mean of their counts."""
        for i, block in enumerate(self.config.shapes):
            names = [n for n in (f"blocks.{i}.qk", f"blocks.{i}.v") if n in masks]
            live = masks.get(f"blocks.{i}.heads", torch.ones(len(block.each_head), dtype=torch.bool)).clone()
            if f"blocks.{i}.v" in names:
                live &= torch.tensor([bool(part.any()) for part in self.parts(f"blocks.{i}.v", masks[f"blocks.{i}.v"])])
            if not names or not live.any():
                continue
            on = [live[head_index(block, kind_of(n))] for n in names]
            mean = sum((masks[n] & o).sum() for n, o in zip(names, on)) / (len(names) * live.sum())
            width = max(self.width(mean.item()), self.multiple)
            masks |= {name: self.cut(name, (width * live).tolist()) for name in names}
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
