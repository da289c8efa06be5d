"""Scores against the explicit attention map."""

import torch
from vits import BASE, pictures, small

from vitlab.compress.tokens.reduction import reduce_tokens


def by_hand(model, images):
    """Scores of block 0 from the explicit attention map, in float64."""
    _, seen = model(images, intermediates=True)
    full = seen["attention"][0].double()  # B heads N N
    prefix = model.config.prefix_tokens
    inner = full[:, :, prefix:, prefix:]
    others = inner * (1 - torch.eye(inner.shape[-1], dtype=torch.double))
    rows = full[:, :, prefix:]
    cls = full[:, :, 0, prefix:]
    return {
        "cls": cls.mean(1), "received": others.sum(2).mean(1) / (inner.shape[-1] - 1),
        "entropy": (rows * rows.log()).sum(-1).mean(1), "variance": inner.var(2, correction=0).mean(1),
        "cls-normalised": (cls / cls.amax(-1, keepdim=True)).mean(1), "cls-ema": cls.mean(1),
    }  # fmt: skip


def test_the_kept_positions_are_the_top_k_of_the_stated_score():
    model, images = small(), pictures(4)
    different = 0
    for score, values in by_hand(model, images).items():
        reduced = reduce_tokens(model, score=score, counts=(20, 20, 20, 20))
        _, seen = reduced(images, intermediates=True)
        expected = values.argsort(1, descending=True)[:, :19].sort(1).values
        assert torch.equal(seen["kept"][0], expected), score
        different += not torch.equal(expected[0], expected[1])
    assert different  # each image loses its own positions
    mean = small(**BASE)
    reduced = reduce_tokens(mean, score="cls", counts=(20,) * 4)
    _, seen = reduced(images, intermediates=True)
    expected = by_hand(mean, images)["received"].argsort(1, descending=True)[:, :20].sort(1).values
    assert torch.equal(seen["kept"][0], expected)


def test_a_second_choice_is_made_among_the_survivors_and_averages_over_blocks():
    model, images = small(), pictures(2)
    reduced = reduce_tokens(model, score="cls-ema", ema=0.75, counts=(30, 10, 10, 10), rule="published")
    _, seen = reduced(images, intermediates=True)
    first, block = by_hand(model, images)["cls"], model.blocks[1]
    now = block.attn.map(block.norm1(seen["tokens"][0])).double()[:, :, 0, 1:].mean(1)
    both = 0.75 * first.gather(1, seen["kept"][0]) + 0.25 * now
    expected = seen["kept"][0].gather(1, both.argsort(1, descending=True)[:, :9].sort(1).values)
    assert torch.equal(seen["kept"][1], expected)


def test_controls_are_fixed_by_their_seed_and_the_grid_is_even():
    model, images = small(), pictures(2)
    def kept(**options):
        reduced = reduce_tokens(model, **({"counts": (17,) * 4} | options))
        return reduced(images, intermediates=True)[1]["kept"][0]
    one = kept(score="random", seed=1)
    assert torch.equal(one, kept(score="random", seed=1)) and not torch.equal(one, kept(score="random", seed=2))
    grid = kept(score="grid")[0]  # 16 of 64: one in each 2x2 cell
    assert len({(int(p) // 8 // 2, int(p) % 8 // 2) for p in grid}) == 16
