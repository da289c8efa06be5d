"""Closed formulas of operations and parameters, against counters and by hand."""

import pytest
import torch

from vitlab.compress.pruning.budget import select
from vitlab.compress.pruning.criteria import score
from vitlab.compress.pruning.shape import narrow
from vitlab.compress.pruning.structured import shape_of, slim
from vitlab.models.vit import ViT, ViTConfig

from .cases import build, images, ours, random_masks


def test_costs_follow_the_closed_formulas():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    for source, name in [
        ("ours", "cls"),
        ("ours", "conv stem, conv MLP"),
        ("ours", "hidden head"),
        ("timm", "plain"),
    ]:
        model = build(source, name)
        if source == "ours":
            assert shape_of(model).macs() == model.config.macs()
        small = slim(model, random_masks(model))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            small(images(1))
        assert counter.get_total_flops() == 2 * small.config.macs()
    # by hand: one head of 8 of 24 value and query/key channels gone, 10 MLP channels gone
    config = shape_of(ours("cls"))
    left = narrow(config, {"blocks.0.heads": torch.tensor([1, 0, 1]), "blocks.1.mlp": torch.arange(40) >= 10})
    assert config.macs() - left.macs() == 17 * 24 * 4 * 8 + 2 * 17 * 17 * 8 + 2 * 17 * 24 * 10
    assert config.parameters() - left.parameters() == 3 * 8 * 25 + 8 * 24 + 10 * 49


def test_published_shape():
    config = ViTConfig(dim=512, depth=6, heads=8, mlp_dim=512, qkv_bias=False, head_hidden=512, dropout=0.1)
    shape = shape_of(ViT(config))
    assert shape.parameters() == 9_786_378
    masks = select(shape, score(ViT(config), "random"), ratio=0.4)
    left = narrow(shape, masks)
    kept = sum(b.qk + b.v + b.hidden for b in left.shapes)
    assert kept / (6 * 3 * 512) == pytest.approx(0.6, abs=0.02)
    assert all(w % 8 == 0 for b in left.shapes for head in b.each_head for w in head)
