"""From scores to masks: what is removed, how much of it, and what it costs."""

import pytest
import torch

from vitlab.compress.pruning.budget import select, timed
from vitlab.compress.pruning.criteria import score
from vitlab.compress.pruning.shape import narrow, sizes
from vitlab.compress.pruning.structured import shape_of
from vitlab.models.vit import ViT, ViTConfig

from .cases import ours


def test_a_head_ratio_removes_that_many_heads():
    config = shape_of(ViT(ViTConfig(dim=96, heads=12, depth=2, image_size=16)))
    scores = {f"blocks.{i}.heads": torch.rand(12) for i in range(2)}
    for gone in range(1, 12):
        for scope in ("layer", "global"):
            left = narrow(config, select(config, scores, ratio=gone / 12, scope=scope))
            heads = [len(b.each_head) for b in left.shapes]
            assert sum(heads) == 24 - 2 * gone
            assert scope != "layer" or heads == [12 - gone] * 2
    with pytest.raises(ValueError, match="removes nothing"):
        select(config, scores, ratio=0.01)


def test_widths_are_multiples_and_heads_even_when_asked():
    model = ViT(ViTConfig(dim=192, heads=3, depth=2, mlp_dim=384, image_size=16))
    scores = score(model, "random", kinds=("qk", "v", "mlp", "embed"))
    for ratio in (0.1, 0.4, 0.7):
        left = narrow(shape_of(model), select(shape_of(model), scores, ratio=ratio))
        widths = [w for b in left.shapes for head in b.each_head for w in head]
        assert all(w % 8 == 0 for w in [*widths, left.dim, *(b.hidden for b in left.shapes)])
        even = narrow(shape_of(model), select(shape_of(model), scores, ratio=ratio, uniform=True))
        assert all(len(b.heads) == 1 and b.heads[0][1] == b.heads[0][2] for b in even.shapes)


def test_budgets_are_met_and_tight():
    model = ours("cls")
    shape = shape_of(model)
    scores = score(model, "magnitude", kinds=("qk", "v", "mlp"))
    for scope in ("global", "layer"):
        for share in (0.9, 0.6):
            for per_mac in (False, True):
                target = int(share * shape.macs())
                masks = select(shape, scores, macs=target, multiple=1, scope=scope, per_mac=per_mac)
                left = narrow(shape, masks).macs()
                assert left <= target and (scope == "layer" or left > 0.97 * target)
    meter = lambda config: sum(b.qk + b.v + b.hidden for b in config.shapes) / 100  # noqa: E731
    masks = select(shape, scores, latency=2.0, meter=meter, multiple=1)
    assert 1.9 < meter(narrow(shape, masks)) <= 2.0
    assert timed(narrow(shape, masks), batch=2, seconds=0.01) > 0


def test_global_ranking_removes_the_lowest():
    shape = shape_of(ours("cls"))
    scores = {n: torch.rand(k) for n, k in sizes(shape, ("mlp",)).items()}
    masks = select(shape, scores, ratio=0.25, multiple=1)
    kept = torch.cat([scores[n][masks[n]] for n in scores])
    gone = torch.cat([scores[n][~masks[n]] for n in scores])
    assert len(gone) == 30 and gone.max() < kept.min()


def test_even_widths_keep_the_best_channels():
    config = shape_of(ours("cls"))
    scores = {"blocks.0.v": torch.arange(24.0), "blocks.0.qk": torch.arange(24.0)}
    masks = select(config, scores, ratio=0.5, multiple=1, uniform=True)
    # the 12 highest of 24 are head 1's upper half and all of head 2: mean width of the heads left is 6
    assert torch.equal(masks["blocks.0.v"].view(3, 8).sum(1), torch.tensor([0, 6, 6]))
    assert masks["blocks.0.v"].view(3, 8)[1, 2:].all()
