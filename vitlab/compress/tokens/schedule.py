"""How many tokens are left after each block, and what that costs: closed forms, no tensors."""

import math

from vitlab.utils.checks import is_number

RULES = ("published", "exact")
SCHEDULES = ("power", "constant", "once")
ROW_SCORES = ("cls", "cls-ema", "cls-normalised")


def schedule(n, layers, r_max=0.6, alpha=2.0, rule="published", *, kind="power", prefix=1, protect=()):
    """Tokens left after each of `layers` blocks, prefix tokens (CLS, ...) counted: a list of ints.

    n: tokens that enter the first block, `prefix` of them never removed, nor is the last patch; the blocks in
    `protect` (numbers, negative ones from the end) remove nothing. Block l (from 0), by kind:
    "power": keeps the share 1 - r_max * ((l + 1) / layers) ** alpha of the patches that are left, rounded down.
    "constant": removes r_max * (n - prefix) patches, as ToMe does (Bolya et al. 2023; fractions of a patch add up).
    "once": removes r_max * (n - prefix) patches in the first block that is not in `protect`, and none in another: what
        choosing costs in time is paid once.

    The rule says where a count acts; the numbers are the same for both:
    "published": after the block, so block l still computes with the count of block l - 1.
    "exact": inside the block, between attention and MLP (as in EViT and ToMe). The attention of block l has the keys of
        count l - 1; its MLP (and, where tokens are dropped, its queries and projection too) has count l.
    """
    for name, value, allowed in (("rule", rule, RULES), ("schedule", kind, SCHEDULES)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(allowed)}")
    if not (is_number(r_max) and 0 <= r_max < 1):
        raise ValueError(f"r_max={r_max!r}: the share removed must be in [0, 1)")
    if not (is_number(alpha) and alpha > 0):
        raise ValueError(f"alpha={alpha!r}: a finite number above 0 is needed")
    if layers < 1 or prefix < 0 or n <= prefix:
        raise ValueError(f"n={n}, layers={layers}, prefix={prefix}: at least a block and a patch are needed")
    if wrong := [p for p in protect if not -layers <= p < layers]:
        raise ValueError(f"protect={wrong}: a model of {layers} blocks has blocks {-layers} to {layers - 1}")
    acting = [layer for layer in range(layers) if layer not in {p % layers for p in protect}]
    if kind == "once":
        acting = acting[:1]
    patches, counts = n - prefix, []
    for layer in range(layers):
        if layer in acting:
            left = {"power": patches * (1 - r_max * ((layer + 1) / layers) ** alpha),
                    "constant": (n - prefix) * (1 - r_max * (layer + 1)), "once": patches * (1 - r_max)}[kind]
            # the tolerance keeps a product such as 0.7 * 10 from being rounded down to 6
            patches = min(patches, max(1, math.floor(left + 1e-9)))
        counts.append(prefix + patches)
    return counts


def check_counts(counts, n, layers, prefix):
    """`counts` as a tuple of ints, or ValueError saying what is wrong with it."""
    counts = tuple(int(c) for c in counts)
    if len(counts) != layers:
        raise ValueError(f"counts has {len(counts)} entries; the model has {layers} blocks")
    for before, after in zip((n, *counts), counts):
        if not prefix < after <= before:
            raise ValueError(f"counts={list(counts)}: each must be at most the one before (the model has {n} tokens) "
                             f"and more than the {prefix} tokens that always stay")  # fmt: skip
    return counts


def bipartite_rounds(patches, left):
    """[(sources, destinations, merged)] of the rounds that bring `patches` down to `left`, each by half at most."""
    rounds = []
    while patches > left:
        sources = patches // 2
        merged = min(patches - left, sources)
        rounds.append((sources, patches - sources, merged))
        patches -= merged
    return rounds


def macs(config, tokens):
    """Multiply-accumulates of one image: a ViT of `config` with its tokens reduced by `tokens` (TokenConfig).

    A block that a tokens enter and m leave, P = a - prefix patches, D channels, Q query (or key) and V value channels
    over the heads, X = heads * width of a head, H MLP channels:

        attention   a D (2 Q + V) + q (2 X a + V D)     q = a queries; m where tokens are dropped inside the block
        MLP         2 t D H (3 with a GLU)              t = m tokens; a under the rule "published"
        pooled-last a D (Q + V) + read (Q D + 2 X a + V D + 2 D H)    the last block, for the rows that the head reads
        score       read a X of the CLS rows (mean-pooled, and for scores of the whole map: P a X); none for "merge" and
                    "size-priced", nor where nothing is removed
        matching    P^2 / 4 a round of pairs, times X / heads by key, D by input
        convolution 9 H over the whole grid of patches, however many are left (pooled-last: none)
    """
    blocks, n, prefix, dim = config.shapes, config.tokens, config.prefix_tokens, config.dim
    layers = config.mlp_layers
    read = 1 + config.distilled if config.pool == "cls" else 0
    counts = tokens.counts_for(n, len(blocks), prefix)
    # whether a block that removes nothing runs as it is, on fewer tokens too
    plain = not tokens.sized(read) and config.mlp != "conv"
    total, before, exact = config.macs(), n, tokens.rule == "exact"
    for layer, (shape, after) in enumerate(zip(blocks, counts)):
        inputs, products = shape.qk + shape.v, config.products(shape)
        across = 2 * len(shape.each_head) * shape.width  # heads are filled up to one width where tokens move
        total -= _block(dim, shape, layers, n, n, n, products)
        if tokens.pooled_last and read and layer == len(blocks) - 1:
            total += before * dim * inputs + read * (dim * (inputs + layers * shape.hidden) + before * across)
            total -= 9 * config.grid**2 * shape.hidden * (config.mlp == "conv")
        elif after == before:
            as_it_is = plain or before == n
            total += _block(dim, shape, layers, before, before, before, products if as_it_is else across)
        else:
            drops = exact and tokens.action == "drop"
            total += _block(dim, shape, layers, before, after if drops else before, after if exact else before, across)
            total += _score(tokens, before, prefix, read, shape)
            if not tokens.scored:
                pairs = bipartite_rounds(before - prefix, after - prefix)
                width = dim if tokens.likeness == "input" else shape.width
                total += width * sum(sources * others for sources, others, _ in pairs)
        before = after
    return total


def _block(dim, shape, layers, keys, queries, late, products):
    attention = keys * dim * (2 * shape.qk + shape.v) + queries * (keys * products + shape.v * dim)
    return attention + layers * late * dim * shape.hidden


def _score(tokens, before, prefix, read, shape):
    if not tokens.scored or tokens.score in ("random", "grid"):
        return 0
    rows = read if tokens.score in ROW_SCORES and read else before - prefix
    return rows * before * len(shape.each_head) * shape.width
