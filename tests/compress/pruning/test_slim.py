"""The plain ViT of uneven widths: its attention, and other models as one at full width."""

import dataclasses

import pytest
import torch

from vitlab.compress.pruning.shape import prunable
from vitlab.compress.pruning.structured import shape_of, slim
from vitlab.metrics import counts
from vitlab.models.vit import ViT, ViTConfig

from .cases import build, every_model, images, ours, random_masks


@every_model()
def test_full_width_slim_is_the_model(source, name):
    model = build(source, name)
    full = prunable(model)
    assert torch.allclose(full(images()), model(images()), atol=1e-5)
    trainable = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in full.parameters()) == trainable
    assert full.config.parameters() == trainable


@pytest.mark.parametrize(
    ("heads", "padded"),
    [(((2, 8, 8),), 0), (((2, 8, 16),), 16), (((1, 16, 8), (2, 8, 8)), 16), (((1, 0, 8), (1, 8, 8)), 8),
     (((1, 64, 64), (7, 8, 8)), 0)],
)  # fmt: skip
def test_heads_filled_up_to_one_width_equal_heads_one_by_one(heads, padded):
    whole = shape_of(ViT(ViTConfig(image_size=8, dim=32, depth=1, heads=2)))
    block = dataclasses.replace(whole.shapes[0], heads=heads)
    config = dataclasses.replace(whole, blocks=(block,))
    own = sum(qk + v for qk, v in block.each_head if qk)
    assert block.padded == padded and config.products(block) == (2 * padded * len(block.each_head) or own)
    assert dataclasses.replace(config, qk_norm=True).products(block) == own
    torch.manual_seed(0)
    attention = config.build().blocks[0].attn.double().eval()
    x = torch.randn(2, 5, config.dim, dtype=torch.float64)
    q, k, v = attention.qkv(x).split((block.qk, block.qk, block.v), dim=-1)
    outs, start = [], [0, 0]
    for width, values in block.each_head:
        mine, of_v = slice(start[0], start[0] + width), slice(start[1], start[1] + values)
        weights = (q[..., mine] @ k[..., mine].transpose(1, 2) * block.scale).softmax(-1)
        outs.append(weights @ v[..., of_v])
        start = [start[0] + width, start[1] + values]
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(outs, -1)))
    assert counts.macs(config.build(), (3, 8, 8)) == config.macs()


def test_scale_stays_in_the_fused_and_in_the_written_out_product():
    model = ours("cls")
    masks = {f"blocks.{i}.qk": torch.arange(24) % 8 < 3 for i in range(3)}
    small = slim(model, masks)
    assert {b.attn.scale for b in small.blocks} == {8**-0.5}
    attn, x = small.blocks[0].attn, torch.randn(2, 17, 24)
    q, k, v = attn.split(x)
    written = ((q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert q[..., :3].any() and not q[..., 3:].any()  # filled up with zeros
    assert torch.allclose(attn(x), attn.proj(written), atol=1e-5)
    assert torch.allclose(attn.map(x) @ torch.eye(17), (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1), atol=1e-5)


def test_slim_trains_compiled_shapes_and_modes():
    model = ours("distilled").train()
    small = slim(model, random_masks(model))
    assert small.training and isinstance(small(images()), tuple)
    logits, seen = small.eval()(images(), intermediates=True)
    assert torch.equal(logits, small(images()))
    assert len(seen["tokens"]) == 3 and seen["attention"][2] is None
    shares = seen["attention"][1].sum(-1)
    assert torch.allclose(shares, torch.ones_like(shares), atol=1e-5)
