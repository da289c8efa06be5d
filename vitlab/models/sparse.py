"""Sparse attention for the one ViT: every query reads its k best keys; heads with a gate each.

Which keys is learned: while training they are drawn by Gumbel noise on their scores, the forward pass is hard, and the
backward pass is that of a relaxed mask. In eval mode there is no noise. What has no gate and reads all keys is
softmax attention. Taking heads away and the schedules are `vitlab.compress.sparsify`'s.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vitlab.models.attention import ATTENTIONS, Attention, attend

SCORES = ("attention", "learned")
GATES = ("none", "l1", "hard-concrete")
PIECE = 2**17  # elements of a table worked on at a time on a CPU: they stay in a core's cache
STRETCH, BETA = (-0.1, 1.1), 2 / 3  # of the hard-concrete distribution (Louizos et al. 2018, section 4)


class TopKAttention(Attention):
    """Softmax attention over the k best keys of each query, renormalised; tokens B N D -> B N D.

    k: keys a query reads, the prefix tokens among them: a number of tokens (all, where there are fewer), or a share
    of them in (0, 1]; 1.0 is softmax attention. score: what ranks the keys: the "attention" logits themselves, or
    "learned": q * w . k with a vector w a head, at the start the same. block: keys are chosen in runs of that many
    tokens for runs of as many queries, by the product of their means (mean-pooled models); in eval mode only they are
    read, whereas single keys are masked in the whole table. gate: a factor on each head's output: "none", "l1" (a
    plain number) or "hard-concrete" (in [0, 1], and drawn while training). tau: temperature of the relaxation.
    """

    def __init__(self, dim, heads, *, config, shape=None, k=1.0, score="attention", block=1, gate="none", tau=0.5,
                 **unknown):  # fmt: skip
        if unknown:
            raise ValueError(f"top-k attention takes no options {', '.join(unknown)}")
        if config.attention_dropout:
            raise ValueError(f"attention_dropout={config.attention_dropout}: top-k attention has no dropout")
        super().__init__(dim, heads, config=config, shape=shape)
        if self.heads and not self.even:
            raise ValueError(f"heads of unequal widths {self.widths}: top-k attention has whole heads of one width")
        for name, value, allowed in (("score", score, SCORES), ("gate", gate, GATES)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(allowed)}")
        self.tokens, self.prefix, self.block = config.tokens, config.prefix_tokens, block
        self.gated = gate
        if not isinstance(block, int) or block < 1 or (block > 1 and (self.prefix or self.tokens % block)):
            raise ValueError(f"block={block!r}: a divisor of the {self.tokens} tokens of a mean-pooled model is needed")
        if not tau > 0:
            raise ValueError(f"tau={tau!r}: a temperature above 0 is needed")
        self.tau = tau
        self.k = self.target = self.keys(k)
        learned = score == "learned"
        self.rank = nn.Parameter(torch.full((self.heads * self.width,), self.scale)) if learned else None
        start = {"none": None, "l1": 1.0, "hard-concrete": 1.0}[gate]
        self.gate = None if start is None else nn.Parameter(torch.full((self.heads,), start))

    def keys(self, k):
        """k as a number of keys: whole blocks, at least one of them beside the prefix tokens."""
        share = isinstance(k, float)
        if isinstance(k, bool) or not isinstance(k, (int, float)) or not (0 < k <= 1 if share else k >= 1):
            raise ValueError(f"k={k!r}: a whole number of at least 1, or a share in (0, 1], is needed")
        blocks = round(k * self.tokens / self.block) if share else k // self.block
        return min(max(blocks, 1 + self.prefix) * self.block, self.tokens)

    # ------------------------------------------------------------------------------------------ which keys

    def scores(self, q, k, logits):
        """What ranks the keys of each query, B heads N N; noisy while training, infinite for prefix tokens."""
        if self.block > 1:
            scores = self.means(q) * self.scale @ self.means(k).mT
        elif self.rank is not None:
            scores = q * self.rank.to(q.dtype).view(self.heads, 1, -1) @ k.mT
        else:
            scores = logits
        scores = gumbel(scores).add_(scores) if self.training else scores.clone()
        if self.block > 1:
            return scores.repeat_interleave(self.block, -1).repeat_interleave(self.block, -2)
        scores.detach()[..., : self.prefix] = torch.inf  # chosen anyway: no gradient is lost
        return scores

    def means(self, x):
        """B heads N width -> the mean of each block of tokens, B heads N/block width."""
        return x.unflatten(2, (-1, self.block)).mean(dim=3)

    def weights(self, q, k):
        """The attention weights, B heads N N: zero but for k keys a query, rows sum to 1."""
        logits = q * self.scale @ k.mT
        if self.k >= self.tokens:
            return logits.float().softmax(dim=-1)
        scores = self.scores(q, k, logits)
        if self.training:
            return top_k_softmax(logits, scores, self.k, self.tau)
        least = scores.topk(self.k, sorted=False).values.amin(dim=-1, keepdim=True)
        return logits.float().masked_fill(scores < least, -torch.inf).softmax(dim=-1)

    # ------------------------------------------------------------------------------------------ the layer

    def attend(self, q, k, v):
        """B heads N width each -> B heads N width, times the gates."""
        mixed = self.mixed(q, k, v)
        return mixed if self.gate is None else mixed * self.open(self.training).to(mixed.dtype)[:, None, None]

    def mixed(self, q, k, v):
        if self.k >= self.tokens:
            return attend(q, k, v, scale=self.scale)
        if not self.training and self.block > 1:
            return self.attend_blocks(q, k, v)
        return self.weights(q, k).to(v.dtype) @ v

    def attend_blocks(self, q, k, v):
        """The queries of a block read the keys of its chosen blocks; no table of all pairs: N k instead of N^2."""
        scores = self.means(q) @ self.means(k).mT  # B h n n over the n blocks
        chosen = scores.topk(self.k // self.block, sorted=False).indices
        q, *both = (x.unflatten(2, (-1, self.block)) for x in (q, k, v))  # B h n block width
        at = chosen.flatten(2)[..., None, None].expand(-1, -1, -1, *q.shape[3:])
        k, v = (x.gather(2, at).unflatten(2, chosen.shape[2:]).flatten(3, 4) for x in both)  # B h n k width
        mixed = F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v)), scale=self.scale)
        return mixed.view(q.shape).flatten(2, 3)

    def map(self, x):
        """The attention weights that are used in eval mode, B heads N N; None without heads."""
        if not self.heads:
            return None
        training, self.training = self.training, False
        q, k, _ = self.split(x)
        weights = self.weights(q, k)
        self.training = training
        return weights

    # ------------------------------------------------------------------------------------------ gates

    def open(self, noise=False):
        """The gates, one a head; hard-concrete ones are drawn with `noise`, else at their median."""
        if self.gated != "hard-concrete":
            return self.gate
        logit, (low, high) = self.gate, STRETCH
        if noise:
            logit = logit + torch.rand_like(logit).clamp(1e-6, 1 - 1e-6).logit()
        return ((logit / BETA).sigmoid() * (high - low) + low).clamp(0, 1)

    def penalty(self):
        """What a penalty on heads adds up (0-d): |gate|, or the probability that a hard-concrete gate is not zero
        (Louizos et al. 2018, eq. 12). ValueError without gates."""
        if self.gate is None:
            raise ValueError(f"gate='none': a penalty on heads needs gates; choose {' or '.join(GATES[1:])}")
        if self.gated != "hard-concrete":
            return self.gate.abs().sum()
        low, high = STRETCH
        return (self.gate - BETA * torch.tensor(-low / high).log()).sigmoid().sum()

    def macs(self, tokens=None):
        """Closed-form multiply-accumulates of one image in eval mode: projections, scores, the two products."""
        n, width = tokens or self.tokens, self.heads * self.width
        total = n * (self.qkv.weight.numel() + self.proj.weight.numel()) if self.heads else 0
        if self.k >= self.tokens:
            return total + 2 * n * n * width
        if self.block > 1:
            return total + (n // self.block) ** 2 * width + 2 * n * self.k * width
        return total + (2 if self.rank is None else 3) * n * n * width


# ---------------------------------------------------------------------------------------------- the relaxation


def gumbel(like):
    """Standard Gumbel noise: the top k of scores plus noise are k draws without replacement (Plackett-Luce)."""
    return torch.rand_like(like, dtype=_exact(like)).log_().neg_().log_().neg_()


def level(scores, k, tau, start, steps=6):
    """lambda (... 1) with sum over the last axis of sigmoid((scores - lambda) / tau) = k: Newton's method from `start`.

    A good start is the middle between the k-th largest score and the next: there it is for a small tau.
    """
    return _relaxed(scores, k, tau, start, steps)[0]


def _relaxed(scores, k, tau, start, steps=6):
    """(lambda, the relaxed mask that sums to k), see `level`."""
    scaled, lam = scores / tau, start / tau
    soft = torch.sub(scaled, lam).sigmoid_()
    for _ in range(steps):
        total = soft.sum(dim=-1, keepdim=True)
        off = total - k
        if off.is_cpu and off.abs().max() < 3e-4 * k:
            break
        slope = total - torch.linalg.vector_norm(soft, dim=-1, keepdim=True).square()
        lam = lam + (off / slope.clamp_min(1e-6)).clamp(-2, 2)
        torch.sub(scaled, lam, out=soft).sigmoid_()
    return lam * tau, soft


class _TopKSoftmax(torch.autograd.Function):
    """See `top_k_softmax`; tables are worked on piece by piece and made again in the backward pass."""

    @staticmethod
    def forward(ctx, logits, scores, k, tau):
        ctx.k, ctx.tau = k, tau
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        total, least, after = (logits.new_empty(logits[..., 0].numel(), 1, dtype=_exact(logits)) for _ in range(3))
        for i, logit, score, weight in _pieces(logits, scores, out):
            after[i], least[i] = _edge(score, k)
            kept = torch.ge(score, least[i], out=torch.empty_like(score)).sub_(1).mul_(1e30).add_(logit)
            shares = kept.softmax(dim=-1)
            total[i] = kept.amax(dim=-1, keepdim=True) - shares.amax(dim=-1, keepdim=True).log()
            weight.copy_(shares)
        ctx.save_for_backward(logits, scores, total, least, after)
        return out

    @staticmethod
    def backward(ctx, grad):
        logits, scores, total, least, after = ctx.saved_tensors
        to_logits, to_scores = (
            torch.empty_like(table, memory_format=torch.contiguous_format) for table in (logits, scores)
        )
        for i, logit, score, back, to_logit, to_score in _pieces(logits, scores, grad, to_logits, to_scores):
            # in place, and products with sums in one: a piece is to be read from memory once
            mask = torch.ge(score, least[i], out=torch.empty_like(score))
            ratio = logit.to(total.dtype, copy=True).sub_(total[i]).exp_()  # what each key weighs, or would if chosen
            to_mask = back.to(total.dtype, copy=True)
            to_mask.sub_(torch.linalg.vecdot(ratio * mask, to_mask)[:, None]).mul_(ratio)
            to_logit.copy_(mask.mul_(to_mask))
            _, soft = _relaxed(score, ctx.k, ctx.tau, (after[i] + least[i]) / 2)
            slope = soft.addcmul_(soft, soft, value=-1)
            share = torch.linalg.vecdot(slope, to_mask) / slope.sum(dim=-1).clamp_min(1e-12)
            torch.mul(slope.div_(ctx.tau), to_mask.sub_(share[:, None]), out=to_score)
        return to_logits, to_scores, None, None


def _exact(table):
    """The type that a table is worked on in: at least float32."""
    return torch.promote_types(table.dtype, torch.float32)


def _edge(scores, k):
    """(the largest score that is not chosen, the smallest that is) of each row, ... 1."""
    if scores.is_cpu:  # numpy sorts whole rows in an eighth of the time in which torch finds the best
        at = scores.shape[-1] - k
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1)[..., at - 1 : at + 1]).split(1, dim=-1)
    return scores.topk(k + 1, sorted=False).values.topk(2, largest=False).values.split(1, dim=-1)


def _pieces(*tables):
    """(slice, and that of each table) over the rows of tables of one shape; one piece on a GPU."""
    rows = [table.reshape(-1, table.shape[-1]) for table in tables]
    step = len(rows[0]) if rows[0].is_cuda else max(1, PIECE // rows[0].shape[1])
    for i in range(0, len(rows[0]), step):
        yield slice(i, i + step), *(table[i : i + step] for table in rows)


@torch.compiler.disable
def top_k_softmax(logits, scores, k, tau):
    """w = p m / sum(p m) with p = softmax(logits) and m the mask of the k largest scores, over the last axis.

    The gradient is straight-through: forward m is hard (0 or 1; ties are all kept), backward it is
    m = sigmoid((scores - lambda) / tau), lambda such that m sums to k, its dependence on the scores included.
    Multiplying after the softmax, and not adding -inf before it, gives the keys that were left out a gradient too.
    logits, scores: ... N, float; k < N; infinite scores are always chosen.
    """
    return _TopKSoftmax.apply(logits, scores, k, tau)


ATTENTIONS.update(topk=TopKAttention)
