"""What becomes of the tokens that are removed: dropped, fused into one, or merged into one that stays.

An action turns scores and keys into `Plan`s; a plan maps B N D tokens to B K D ones, for each image its own
way, with static shapes and without a look at the data from the host, so that it compiles and is captured in
a CUDA graph.
"""

from dataclasses import dataclass

import torch

from vitlab.compress.schedule import bipartite_rounds

ACTIONS = ("drop", "fuse", "merge", "nearest", "edge")
MERGES = ("merge", "nearest", "edge")


def take(x, index):
    """Rows `index` (B K) of x (B N or B N D)."""
    b, n = x.shape[:2]
    rows = (index + torch.arange(b, device=x.device)[:, None] * n).flatten()
    # many times quicker than gather over an index expanded to B K D: whole rows are copied
    return x.flatten(0, 1).index_select(0, rows).unflatten(0, (b, index.shape[1]))


def add_rows(base, index, source):
    """base (B K or B K D) with `source` (B R (D)) added to its rows `index` (B R)."""
    b, k = base.shape[:2]
    rows = (index + torch.arange(b, device=base.device)[:, None] * k).flatten()
    return base.flatten(0, 1).index_add(0, rows, source.flatten(0, 1)).unflatten(0, (b, k))


@dataclass(frozen=True)
class Plan:
    """Which tokens stay and where the others go.

    stay: B S, rows of the input that stay, prefix first. gone: B R, the others. target: B R, the output row
    each of them joins, or None if they are dropped. weight: B N, share of each token in the row it ends in
    (they sum to 1 over a row), or None where nothing is joined. fused: the output has one more row, at its
    end, made of the gone ones alone.
    """

    stay: torch.Tensor
    gone: torch.Tensor
    target: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    fused: bool = False

    def __call__(self, x):
        """B N D -> B K D: the weighted mean of each row's tokens."""
        if self.target is None:
            return take(x, self.stay)
        weight = self.weight.to(x.dtype)[..., None] if x.ndim == 3 else self.weight.to(x.dtype)
        return self._join(x * weight)

    def total(self, x):
        """B N -> B K: the sum over each row's tokens (sizes)."""
        return take(x, self.stay) if self.target is None else self._join(x)

    def _join(self, x):
        base = take(x, self.stay)
        if self.fused:
            base = torch.cat([base, torch.zeros_like(x[:, :1])], dim=1)
        return add_rows(base, self.target, take(x, self.gone))

    @property
    def rows(self):
        """Tokens in the output."""
        return self.stay.shape[1] + self.fused

    def source(self, tokens):
        """B (tokens + 1): the output row of each input row; `rows` for a dropped one and the last entry."""
        b = len(self.stay)
        found = self.stay.new_full((b, tokens + 1), self.rows)
        order = torch.arange(self.stay.shape[1], device=found.device).expand(b, -1)
        found = found.scatter(1, self.stay, order)
        return found if self.target is None else found.scatter(1, self.gone, self.target)

    def positions(self, positions):
        """Original patch of each output patch; -1 for the fused one. positions: B N with the prefix rows."""
        kept = take(positions, self.stay)
        return torch.cat([kept, torch.full_like(kept[:, :1], -1)], dim=1) if self.fused else kept


def split_by(score, keep, prefix):
    """(stay, gone): the prefix and the `keep` best patches, and the others; rows of the whole sequence."""
    patches = score.shape[1]
    # in order of position: topk's own order is not the same everywhere, and matching goes by order
    best = score.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values
    # the complement without a look at the data: mark the best, then take the unmarked ones
    marked = torch.zeros_like(score).scatter(1, best, -1.0)
    rest = marked.topk(patches - keep, dim=1, sorted=False).indices
    return with_prefix(best + prefix, prefix), rest + prefix


def with_prefix(rows, prefix):
    """The rows of the prefix tokens before `rows` (B K)."""
    if not prefix:
        return rows
    first = torch.arange(prefix, device=rows.device).expand(len(rows), -1)
    return torch.cat([first, rows], dim=1)


def drop(score, keep, prefix):
    """Forget the lowest-scored patches: B P -> a plan with `keep` of them."""
    return Plan(*split_by(score, keep, prefix))


def fuse(score, keep, prefix):
    """EViT (Liang et al. 2022, eq. 3): the lowest-scored become one token, their mean weighted by score.

    The fused token is one of the `keep`.
    """
    stay, gone = split_by(score, keep - 1, prefix)
    b, tokens = len(score), prefix + score.shape[1]
    share = take(score, gone - prefix).clamp_min(1e-12)
    share = share / share.sum(1, keepdim=True)
    weight = torch.ones(b, tokens, device=score.device, dtype=share.dtype).scatter(1, gone, share)
    return Plan(stay, gone, torch.full_like(gone, stay.shape[1]), weight, fused=True)


def _weights(size, stay, gone, target, like):
    """Share of each token in its row: its size over the row's (the size-weighted mean of ToMe)."""
    size = like.new_ones(like.shape) if size is None else size
    plan = Plan(stay, gone, target)
    sums = plan.total(size)
    return size / torch.gather(sums, 1, plan.source(like.shape[1])[:, :-1])


def nearest(score, keys, keep, prefix, size):
    """Each of the lowest-scored patches joins the kept patch with the most similar key (cosine).

    keys: unit keys B P d.
    """
    stay, gone = split_by(score, keep, prefix)
    cosine = take(keys, gone - prefix) @ take(keys, stay[:, prefix:] - prefix).transpose(1, 2)
    target = cosine.argmax(-1) + prefix
    like = with_prefix(score, 0).new_zeros(len(score), prefix + score.shape[1])
    return Plan(stay, gone, target, _weights(size, stay, gone, target, like))


def bipartite(keys, merged, prefix, size, importance=None, power=0.0):
    """One round of bipartite soft matching (ToMe, Bolya et al. 2023, section 3), with priced edges.

    Every other patch is a source, the rest are destinations; each source has one edge, to the destination
    with the most similar key; the `merged` cheapest edges are taken. An edge costs
    (1 - cosine) * importance ** power: power 0 is ToMe, a large power merges the least important first
    wherever they fit. keys: unit keys B P d; importance: B P, positive, or None.
    """
    b, patches, _ = keys.shape
    # destinations are the even patches, so that there are never fewer of them than sources
    cosine = keys[:, 1::2] @ keys[:, 0::2].transpose(1, 2)  # B sources destinations
    best, partner = cosine.float().max(-1)
    if importance is None or power == 0:
        order = best
    else:
        relative = importance[:, 1::2] / importance.mean(1, keepdim=True)
        order = -(1 - best) * relative.clamp_min(1e-12) ** power
    sources = order.shape[1]
    chosen = order.topk(merged, dim=1, sorted=False).indices
    marked = torch.zeros_like(order).scatter(1, chosen, -1.0)
    unmerged = marked.topk(sources - merged, dim=1, sorted=False).indices.sort(dim=1).values
    even = torch.arange(0, patches, 2, device=keys.device).expand(b, -1)
    stay = with_prefix(torch.cat([unmerged * 2 + 1, even], dim=1) + prefix, prefix)
    gone, target = chosen * 2 + 1 + prefix, torch.gather(partner, 1, chosen) + prefix + sources - merged
    like = best.new_zeros(b, prefix + patches)
    return Plan(stay, gone, target, _weights(size, stay, gone, target, like))


def plans(action, keep, prefix, *, score=None, keys=None, size=None, power=0.5):
    """The plans, in order, that bring the patches down to `keep`: one, or several bipartite rounds.

    score: B P (None for "merge"); keys: unit keys B P d (None for "drop" and "fuse"); size: B N or None.
    """
    if action == "drop":
        return [drop(score, keep, prefix)]
    if action == "fuse":
        return [fuse(score, keep, prefix)]
    if action == "nearest":
        return [nearest(score, keys, keep, prefix, size)]
    found = []
    importance = score if action == "edge" else None
    for _, _, merged in bipartite_rounds(keys.shape[1], keep):
        plan = bipartite(keys, merged, prefix, size, importance, power)
        found.append(plan)
        # the next round sees the merged tokens: their mean key, their importance and size summed
        padded = torch.cat([keys.new_zeros(len(keys), prefix, keys.shape[2]), keys], dim=1)
        keys = torch.nn.functional.normalize(plan(padded)[:, prefix:], dim=-1)
        if importance is not None:
            padded = torch.cat([importance.new_zeros(len(keys), prefix), importance], dim=1)
            importance = plan.total(padded)[:, prefix:]
        size = plan.total(torch.ones_like(plan.weight) if size is None else size)
    return found
