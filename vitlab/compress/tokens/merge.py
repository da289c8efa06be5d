"""What becomes of the tokens that are removed: dropped, fused into one, or merged into one that stays.

A `Plan` maps B N D tokens to B K D ones, for each image its own way, with static shapes and without a look at the data
from the host, so that it compiles and is captured in a CUDA graph.
"""

from dataclasses import dataclass, replace

import torch

from vitlab.compress.tokens.schedule import bipartite_rounds

ACTIONS = ("drop", "fuse", "merge", "size-priced")
FORMER = {"ward": "size-priced"}  # in older checkpoints; it is Ward's criterion at power 1 only
MERGES = ("merge", "size-priced")  # they go by likeness alone; the others by score
METRICS = ("key", "input")  # what has to be alike for two tokens to be joined


def flat(index, n):
    """Rows `index` (B K) of B sequences of `n` tokens, as rows of the B n tokens one after the other: (B K)."""
    if len(index) > 1:  # a single image, the quickest of all, is spared four operations
        index = index + torch.arange(len(index), device=index.device)[:, None] * n
    return index.flatten()


def take(x, index):
    """Rows `index` (B K) of x (B N or B N D)."""
    # many times quicker than gather over an index expanded to B K D: whole rows are copied
    return x.flatten(0, 1).index_select(0, flat(index, x.shape[1])).unflatten(0, index.shape)


def add_rows(base, index, source):
    """base (B K or B K D) with `source` (B R (D)) added to its rows `index` (B R)."""
    added = base.flatten(0, 1).index_add(0, flat(index, base.shape[1]), source.flatten(0, 1))
    return added.unflatten(0, base.shape[:2])


@dataclass(frozen=True)
class Plan:
    """Which tokens stay and where the others go.

    stay: B S, rows of the input that stay, prefix first. gone: B R, the others. target: B R, the output row each of
    them joins, or None if they are dropped. mass: B N, what each token counts in the mean of its row (None: the same).
    fused: the output has one more row, at its end, made of the gone ones alone. lengths: a joined row keeps the mean
    length of its tokens, where a plain mean is shorter (Kim et al. 2024, "Token fusion").
    """

    stay: torch.Tensor
    gone: torch.Tensor
    target: torch.Tensor | None = None
    mass: torch.Tensor | None = None
    fused: bool = False
    lengths: bool = False

    def __call__(self, x):
        """B N D -> B K D: the mean of each row's tokens."""
        return self.join(x)[0]

    def join(self, x):
        """B N D -> (B K D: the mean of each row's tokens, mass B K of each row or None if they are dropped).

        A token that joins moves the mean of its row towards itself, by its share of the row's mass.
        """
        if self.target is None:
            return take(x, self.stay), None
        stay, gone, target = flat(self.stay, x.shape[1]), flat(self.gone, x.shape[1]), flat(self.target, self.rows)
        mass = x.new_ones(x.shape[:2], dtype=torch.float32) if self.mass is None else self.mass
        mass_gone, x_gone = (values.flatten(0, 1).index_select(0, gone) for values in (mass, x))
        total = self._filled(mass.flatten().index_select(0, stay)).index_add(0, target, mass_gone)
        share = mass_gone / total.index_select(0, target)
        wide = torch.promote_types(x.dtype, share.dtype)
        kept = self._filled(x.flatten(0, 1).index_select(0, stay)).to(wide)
        joined = kept.index_select(0, target)
        mean = kept.index_add(0, target, (x_gone - joined) * share[:, None])
        if self.lengths:
            length = _length(kept).index_add(0, target, (_length(x_gone) - _length(joined)) * share)
            mean = mean * (length / _length(mean).clamp_min(1e-6))[:, None]
        return mean.to(x.dtype).unflatten(0, (-1, self.rows)), total.unflatten(0, (-1, self.rows))

    def _filled(self, kept):
        """What stays, (B S) or (B S) D, with zeros for the fused rows: (B K) or (B K) D."""
        if not self.fused:
            return kept
        kept = kept.unflatten(0, self.stay.shape)
        return torch.cat([kept, kept.new_zeros(len(kept), 1, *kept.shape[2:])], dim=1).flatten(0, 1)

    def total(self, x):
        """B N -> B K: the sum over each row's tokens (sizes)."""
        kept = take(x, self.stay)
        if self.target is None:
            return kept
        kept = self._filled(kept.flatten()).unflatten(0, (-1, self.rows))
        return add_rows(kept, self.target, take(x, self.gone))

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
        return torch.cat([kept, kept.new_full((len(kept), 1), -1)], dim=1) if self.fused else kept


def _length(x):
    """Length of each token, B N, in at least float32."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def split_by(score, keep, prefix):
    """(stay, gone): the prefix and the `keep` best patches, and the others; rows of the whole sequence."""
    ranked = score.topk(score.shape[1], dim=1).indices + prefix
    # in order of position: topk's own order is not the same everywhere, and matching goes by order
    return with_prefix(prefix, ranked[:, :keep].sort(dim=1).values), ranked[:, keep:]


def with_prefix(prefix, *rows):
    """The rows of the prefix tokens before all of `rows`, each B K."""
    if prefix:
        rows = torch.arange(prefix, device=rows[0].device).expand(len(rows[0]), -1), *rows
    return torch.cat(rows, dim=1)


def fuse(score, keep, prefix):
    """EViT (Liang et al. 2022, eq. 3): the lowest-scored become one token, their mean weighted by score.

    The fused token is one of the `keep`.
    """
    stay, gone = split_by(score, keep - 1, prefix)
    b, tokens = len(score), prefix + score.shape[1]
    # relative to their mean, so that a sharp gaze does not leave sums near zero
    share = take(score, gone - prefix).clamp_min(1e-12)
    share = share / share.mean(1, keepdim=True)
    mass = torch.ones(b, tokens, device=score.device, dtype=share.dtype).scatter(1, gone, share)
    return Plan(stay, gone, torch.full_like(gone, stay.shape[1]), mass, fused=True)


def bipartite(keys, merged, prefix, size, power=0.0):
    """One round of bipartite soft matching (ToMe, Bolya et al. 2023, section 3), with priced edges.

    Every other patch is a source, the rest are destinations; each source has one edge, to its cheapest
    destination; the `merged` cheapest edges are taken. An edge costs 1 - cosine, as in ToMe, times (2 a b / (a + b)) **
    power for tokens that stand for a and b patches, so that what stands for much already is not merged further for
    little. Only at power 1 is that Ward's criterion (1963), a b / (a + b) * distance^2, the growth of the variance
    within clusters. keys: unit vectors B P d; size: B N or None (all 1).
    """
    b, patches, _ = keys.shape
    # destinations are the even patches, so that there are never fewer of them than sources
    worth = (keys[:, 1::2] @ keys[:, 0::2].transpose(1, 2)).float()  # B sources destinations
    if size is not None and power:
        half = 0.5 / size
        # 2 a b / (a + b) is 1 / (1 / 2a + 1 / 2b)
        worth = (worth - 1) * (half[:, prefix + 1 :: 2, None] + half[:, None, prefix::2]) ** -power
    best, partner = worth.max(-1)
    sources = best.shape[1]
    ranked = best.topk(sources, dim=1).indices
    chosen, unmerged = ranked[:, :merged], ranked[:, merged:].sort(dim=1).values
    even = torch.arange(prefix, prefix + patches, 2, device=keys.device).expand(b, -1)
    stay = with_prefix(prefix, unmerged * 2 + (1 + prefix), even)
    target = torch.gather(partner, 1, chosen) + (prefix + sources - merged)
    return Plan(stay, chosen * 2 + (1 + prefix), target, size)


def plans(action, keep, prefix, *, score=None, keys=None, size=None, power=0.5, lengths=False):
    """The plans, in order, that bring the patches down to `keep`: one, or several bipartite rounds.

    score: B P (None for "merge", "size-priced"); keys: unit vectors B P d (None for "drop", "fuse"); size: B N or None.
    """
    if action == "drop":
        return [Plan(*split_by(score, keep, prefix))]
    if action == "fuse":
        return [fuse(score, keep, prefix)]
    found = []
    for _, _, merged in bipartite_rounds(keys.shape[1], keep):
        plan = bipartite(keys, merged, prefix, size, power if action == "size-priced" else 0.0)
        found.append(replace(plan, lengths=lengths))
        if plan.rows == prefix + keep:
            break
        # the next round sees the merged tokens: their mean key, their size summed
        padded = torch.cat([keys.new_zeros(len(keys), prefix, keys.shape[2]), keys], dim=1)
        # not plan(padded): torch.compile of torch 2.11 cannot call an object that it has seen being made
        keys = torch.nn.functional.normalize(plan.join(padded)[0][:, prefix:], dim=-1)
        size = plan.total(padded.new_ones(padded.shape[:2], dtype=torch.float32) if size is None else size)
    return found
