"""The small model against the original with hooks."""

import pytest
import torch
from torch import nn

from vitlab.compress.pruning.budget import select
from vitlab.compress.pruning.criteria import score
from vitlab.compress.pruning.gates import L1, GatedViT
from vitlab.compress.pruning.shape import prunable, sizes
from vitlab.compress.pruning.structured import masked, prune, shape_of, slim
from vitlab.data.datasets import load
from vitlab.models import checkpoint
from vitlab.models.vit import ViT, ViTConfig
from vitlab.train.loop import Batch
from vitlab.utils import rng

from .cases import TINY, build, every_model, images, ours, random_masks, reference, timms


@every_model()
@pytest.mark.parametrize("seed", [0, 1])
def test_slim_equals_masked_equals_hooks(source, name, seed):
    model = build(source, name)
    masks = random_masks(model, seed, drop_block=seed == 1)
    expected = reference(model, masks, images())
    assert (expected - model(images())).abs().max() > 1e-2  # the masks matter
    assert torch.allclose(masked(model, masks)(images()), expected, atol=1e-5)
    small = slim(model, masks)
    assert torch.allclose(small(images()), expected, atol=1e-5)
    assert len(small.blocks) == 3 - seed
    assert len({w for b in small.config.shapes for w in b.each_head}) > 1  # uneven heads
    assert any(not b.heads for b in small.config.shapes) and any(not b.hidden for b in small.config.shapes)
    counted = sum(p.numel() for p in small.parameters())
    assert counted == small.config.parameters()


def test_everything_pruned_leaves_biases_and_head():
    model = ours("cls")
    masks = {n: torch.zeros(k) for n, k in sizes(shape_of(model), ("v", "mlp")).items()}
    small = slim(model, masks)
    assert torch.allclose(small(images()), reference(model, masks, images()), atol=1e-5)
    nothing = slim(model, {f"blocks.{i}.block": torch.zeros(1) for i in range(3)})
    assert len(nothing.blocks) == 0 and nothing(images()).shape == (4, 10)
    with pytest.raises(ValueError, match="at least 1 embedding channel"):
        slim(model, {"embed": torch.zeros(24)})


def test_prune_is_score_select_and_slim_in_one_call():
    model, batches = ours("cls"), [(images(), torch.arange(4))]
    target = int(0.6 * shape_of(model).macs())
    small = prune(model, batches, macs=target, multiple=4)
    masks = select(shape_of(model), score(model, "taylor", data=batches), macs=target, multiple=4, uniform=True)
    assert small.config.macs() <= target and torch.equal(small(images()), slim(model, masks)(images()))


def test_prune_takes_a_data_set():
    tiny = load("tiny")
    config = ViTConfig(image_size=16, patch_size=8, dim=16, depth=1, heads=2)
    small = prune(ViT(config), tiny, ratio=0.5, images=32, multiple=1)
    assert small.config.macs() < config.macs() and small(images()).shape == (4, 10)


def test_heads_of_a_block_are_of_one_width_unless_asked_otherwise():
    model, batches = ours("cls"), [(images(), torch.arange(4))]
    half = shape_of(model).macs() // 2
    small = prune(model, batches, macs=half, multiple=1)
    assert all(len(b.heads) == 1 and b.heads[0][1] == b.heads[0][2] for b in small.config.shapes)
    assert any(len(b.heads) > 1 for b in prune(model, batches, macs=half, multiple=1, uniform=False).config.shapes)


def test_a_budget_that_cuts_nothing_and_scores_that_say_nothing_are_refused():
    model = ours("cls")
    whole = shape_of(model).macs()
    for budget in (whole, 2 * whole):
        with pytest.raises(ValueError, match=rf"macs={budget:,.6g}: the model has {whole:,.6g} as it is"):
            prune(model, [(images(), torch.arange(4))], macs=budget)
    with pytest.raises(ValueError, match=r"blocks.0.qk.*24 of 24 are not finite"):
        prune(model, [(images() * torch.nan, torch.arange(4))], macs=whole // 2)


def test_slim_is_pruned_again():
    model = ours("cls")
    once = slim(model, random_masks(model))
    draw = rng.generator(5, "again")
    masks = {k: torch.rand(n, generator=draw) < 0.7 for k, n in sizes(once.config).items() if "block" not in k[-5:]}
    assert torch.allclose(slim(once, masks)(images()), masked(once, masks)(images()), atol=1e-5)


def test_a_pruned_timm_model_runs_saves_and_loads(tmp_path):
    model = timms("plain")
    masks = random_masks(model)
    small = slim(model, masks)
    expected = small(images())  # no head count or width to be mended by hand
    checkpoint.save(small, tmp_path / "slim.safetensors")
    again = checkpoint.load(tmp_path / "slim.safetensors")
    assert again.config == small.config and torch.equal(again(images()), expected)
    gated = GatedViT(model, kinds=("v", "block"), masks=masks)
    checkpoint.save(gated, tmp_path / "gated.safetensors")
    again = checkpoint.load(tmp_path / "gated.safetensors")
    assert again.kinds == ("v", "block") and torch.equal(again(images()), gated(images()))


def test_what_cannot_be_is_refused():
    model = ours("cls")
    shape, scores = shape_of(model), score(model, "random", kinds=("mlp",))
    with pytest.raises(ValueError, match=r"impossible.*mlp"):
        select(shape, scores, macs=1000)
    for wrong in (
        {},
        {"ratio": 0.1, "macs": 5},
        {"ratio": 1.0},
        {"ratio": 0.5, "scope": "all"},
        {"ratio": 0.5, "multiple": 0},
    ):
        with pytest.raises(ValueError):
            select(shape, scores, **wrong)
    with pytest.raises(ValueError, match="choose one of gates"):
        score(model, "luck")
    with pytest.raises(ValueError, match="needs data"):
        score(model, "taylor")
    with pytest.raises(ValueError, match="GatedViT"):
        score(model, "gates")
    with pytest.raises(ValueError, match=r"supported.*v, heads"):
        score(timms("QK-norm"), "random", kinds=("qk",))
    with pytest.raises(ValueError, match="no such structure"):
        slim(model, {"blocks.7.mlp": torch.ones(40)})
    with pytest.raises(ValueError, match="shape"):
        slim(model, {"blocks.0.mlp": torch.ones(39)})
    with pytest.raises(ValueError, match="supported"):
        prunable(nn.Linear(2, 2))

    class Other(type(model.blocks[0].attn)):
        pass

    with pytest.raises(ValueError, match="the attention Other"):
        prunable(ViT(ViTConfig(**TINY), attention=Other))
    timm = pytest.importorskip("timm")
    for odd in ({"pre_norm": True}, {"global_pool": "map"}, {"norm_layer": "rmsnorm"}):
        with pytest.raises(ValueError, match="supported"):
            prunable(timm.models.vision_transformer.VisionTransformer(
                img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=10, **odd
            ))  # fmt: skip


@pytest.mark.gpu
def test_compiled_on_the_gpu():
    model = ours("cls").cuda()
    masks = {k: v.cuda() for k, v in random_masks(model).items()}
    x = images().cuda()
    small = slim(model, masks)
    assert torch.allclose(small(x), masked(model, masks)(x), atol=1e-4)
    gated = GatedViT(model)
    run = torch.compile(gated, dynamic=False)
    assert torch.allclose(run(x), gated(x), atol=1e-3)
    L1()(run, Batch(x, torch.eye(10)[:4].cuda(), torch.arange(4).cuda(), 0))[0].backward()
    assert torch.allclose(torch.compile(small, dynamic=False)(x), small(x), atol=1e-3)
