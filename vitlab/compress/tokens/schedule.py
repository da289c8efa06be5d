"""How many tokens are left after each block, and what that costs: closed forms, no tensors."""

import dataclasses
import math

RULES = ("published", "exact")
FULL_MAP_SCORES = ("received", "received-ema", "received-normalised", "entropy", "variance")
ROW_SCORES = ("cls", "cls-ema", "cls-normalised", "value")


def schedule(n, layers, r_max=0.6, alpha=2.0, rule="published", *, prefix=1, minimum=1, protect=()):
    """Tokens left after each of `layers` blocks, prefix tokens (CLS, ...) counted: a list of ints.

    n: tokens that enter the first block, `prefix` of them never removed. Block l (from 0) keeps the share
    1 - r_max * ((l + 1) / layers) ** alpha of the patches that are left, rounded down, and never fewer than
    `minimum`; the blocks in `protect` (numbers, negative ones from the end) remove nothing.

    The rule says where a count acts; the numbers are the same for both:
    "published": after the block, so block l still computes with the count of block l - 1 and the last
        count saves nothing.
    "exact": inside the block it is counted for, between attention and MLP (as in EViT and ToMe). The
        attention of block l has the keys of count l - 1; its MLP (and, where tokens are dropped, its queries and
        projection too) has count l. Nothing is removed after the last block's MLP.
    """
    _check(n, layers, r_max, alpha, rule, prefix, minimum)
    shielded = protected(protect, layers)
    patches, counts = n - prefix, []
    for layer in range(layers):
        if layer not in shielded:
            share = 1 - r_max * ((layer + 1) / layers) ** alpha
            # the tolerance keeps a product such as 0.7 * 10 from being rounded down to 6
            patches = min(patches, max(minimum, math.floor(patches * share + 1e-9)))
        counts.append(prefix + patches)
    return counts


def protected(protect, layers):
    """The set of block numbers (from 0) that `protect` names."""
    wrong = [p for p in protect if not -layers <= p < layers]
    if wrong:
        raise ValueError(f"protect={wrong}: a model of {layers} blocks has blocks {-layers} to {layers - 1}")
    return {p % layers for p in protect}


def _check(n, layers, r_max, alpha, rule, prefix, minimum):
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: choose one of {', '.join(RULES)}")
    if not 0 <= r_max < 1:
        raise ValueError(f"r_max={r_max}: the share removed in the last block must be in [0, 1)")
    if not alpha > 0 or not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha}: a finite number above 0 is needed")
    if layers < 1 or prefix < 0 or n <= prefix:
        raise ValueError(f"n={n}, layers={layers}, prefix={prefix}: at least a block and a patch are needed")
    if minimum < 1:
        raise ValueError(f"minimum={minimum}: at least 1 patch must stay")


def check_counts(counts, n, layers, prefix):
    """`counts` as a tuple of ints, or ValueError saying what is wrong with it."""
    counts = tuple(int(c) for c in counts)
    if len(counts) != layers:
        raise ValueError(f"counts has {len(counts)} entries; the model has {layers} blocks")
    for before, after in zip((n, *counts), counts):
        if not prefix < after <= before:
            raise ValueError(
                f"counts={list(counts)}: each must be at most the one before (the model has {n} tokens) and "
                f"more than the {prefix} tokens that always stay"
            )
    return counts


def bipartite_rounds(patches, left):
    """[(sources, destinations, merged)] of the bipartite rounds that bring `patches` down to `left`.

    One round can remove at most half of the tokens, so a steep step takes several.
    """
    rounds = []
    while patches > left:
        sources = patches // 2
        merged = min(patches - left, sources)
        rounds.append((sources, patches - sources, merged))
        patches -= merged
    return rounds


def block_macs(before, after, *, dim, mlp_dim, heads, prefix, read, rule="exact", action="drop", score="cls",
               metric="key", lean=False, conv_patches=0, late_norm=False, qk=None, v=None, width=None,
               products=None):  # fmt: skip
    """Multiply-accumulates of one image in one block that `before` tokens enter and `after` leave.

    With a = before, m = after, D = dim, H = mlp_dim, d = D / heads, P = a - prefix (patches):

        no reduction        4 a D^2 + 2 a^2 D + 2 a D H
        published           the same, plus the score and the matching
        exact, drop         3 a D^2 + 2 m a D + m D^2 + 2 m D H      (only survivors are queries)
        exact, fuse, merge  4 a D^2 + 2 a^2 D + 2 m D H
        lean, CLS           2 a D^2 + read (D^2 + 2 a D + D^2 + 2 D H)   (`read` rows are all the head reads)
        lean, late norm     without (m - 1) D H: the mean is taken before the MLP's second layer
        score               read a D (CLS rows; in a mean-pooled model, and for the scores of the full map,
                            P a D), a D ("query"), P^2 d ("redundancy"), else 0
        matching            P^2 / 4 d a round (pairs), (a - m) (m - prefix) d ("nearest"), else 0;
                            D in place of d where the metric is "input"
        depthwise 3x3       9 n H over the whole grid of n patches, however many are left (lean CLS: none)

    A slim block has qk query (and key) and v value channels in all its heads (default D), each head filled up to
    `width` (default D / heads), and `products` channels in the two products of tokens (default 2 width heads).
    """
    hidden, qk, v = mlp_dim, qk or dim, v or dim
    width = width or dim // heads
    across = heads * width
    products = products or 2 * across
    if lean and read:
        return before * dim * (qk + v) + read * (dim * (qk + v) + before * products + 2 * dim * hidden)
    extra = 0
    if after < before:
        extra = _score_macs(before, across, width, prefix, read, score, action)
        extra += _matching_macs(before, after, dim if metric == "input" else width, prefix, action)
    inside = rule == "exact"
    queries = after if inside and action == "drop" else before
    late = after if inside else before
    total = before * dim * (2 * qk + v) + queries * (dim * v + before * products) + 2 * late * dim * hidden
    if lean and late_norm:
        total -= (late - 1) * dim * hidden
    return total + extra + 9 * conv_patches * hidden


def _score_macs(tokens, dim, width, prefix, read, score, action):
    patches = tokens - prefix
    if action in ("merge", "ward"):  # matching alone
        return 0
    if score in FULL_MAP_SCORES or (score in ROW_SCORES and not read):
        return patches * tokens * dim
    return {"query": tokens * dim, "redundancy": patches**2 * width}.get(
        score, read * tokens * dim if score in ROW_SCORES else 0
    )


def _matching_macs(before, after, width, prefix, action):
    if action in ("merge", "edge", "ward"):
        rounds = bipartite_rounds(before - prefix, after - prefix)
        return sum(sources * others for sources, others, _ in rounds) * width
    return (before - after) * (after - prefix) * width if action == "nearest" else 0


def macs(model):
    """Closed-form multiply-accumulates of one image through a `TokenViT` around our ViT or SlimViT, all counted."""
    from vitlab.compress.pruning.shape import SlimConfig

    parts, reduction = model.anatomy, model.token_config
    config = getattr(model.plain, "config", None)
    if config is None:
        raise ValueError("the closed form is for vitlab's ViT; a timm model is counted by measuring it")
    slim = isinstance(config, SlimConfig)
    if not model.active:
        return config.macs()
    if slim:
        total = dataclasses.replace(config, blocks=()).macs()
    else:  # what is not in the blocks: the same configuration without its blocks' terms
        total = 2 * dataclasses.replace(config, depth=1).macs() - dataclasses.replace(config, depth=2).macs()
    before = whole = parts.prefix + parts.patches
    last, changed = parts.depth - 1, model.reducer.sized or model.reducer.local
    for layer, after in enumerate(model.tokens):
        lean = reduction.lean and layer == last and (
            parts.read or reduction.rule == "exact" or after == before)  # fmt: skip
        total += block_macs(
            before, after, dim=config.dim, prefix=parts.prefix, read=parts.read, rule=reduction.rule,
            action=model.reducer.actions[layer], score=reduction.score, metric=model.reducer.metric, lean=lean,
            late_norm=parts.late_norm, conv_patches=parts.patches if config.mlp == "conv" else 0,
            **(_slim(config, layer, before == after and not lean and (before == whole or not changed)) if slim else
               {"mlp_dim": config.mlp_dim, "heads": config.heads}),
        )  # fmt: skip
        before = after
    return total


def _slim(config, layer, as_it_is):
    """Widths of a block of a SlimViT; as_it_is: run by the model itself, which need not fill its heads up."""
    block = config.blocks[layer]
    return {"mlp_dim": block.hidden, "heads": len(block.each_head), "qk": block.qk, "v": block.v, "width": block.width,
            "products": config.products(block) if as_it_is else None}  # fmt: skip
