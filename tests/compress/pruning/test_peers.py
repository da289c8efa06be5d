"""The peer: what torch-pruning keeps, cut out exactly."""

import copy

import pytest
import torch

from vitlab.compress.pruning import peers
from vitlab.compress.pruning.shape import sizes
from vitlab.compress.pruning.structured import shape_of, slim
from vitlab.models.vit import ViT, ViTConfig

from .cases import images, timms


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("whole_heads", [True, False])
def test_torch_prunings_model_is_reproduced(whole_heads):
    tp = pytest.importorskip("torch_pruning")
    model = timms("plain")
    pruned = copy.deepcopy(model)
    for block in pruned.blocks:
        block.attn.fused_attn = False  # the written-out path keeps the scale of the full head
    stay = [
        pruned.patch_embed.proj,
        pruned.head,
        *(b.attn.proj for b in pruned.blocks),
        *(b.mlp.fc2 for b in pruned.blocks),
    ]
    pruner = tp.pruner.BasePruner(
        pruned, images(), importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=stay, num_heads={b.attn.qkv: 3 for b in pruned.blocks}, prune_num_heads=whole_heads,
        head_pruning_ratio=1 / 3, prune_head_dims=not whole_heads,
    )  # fmt: skip
    names = {m: n for n, m in pruned.named_modules()}
    masks = {n: torch.ones(k) for n, k in sizes(shape_of(model), ("qk", "v", "mlp")).items()}
    for group in pruner.step(interactive=True):
        for dep, idxs in group:
            name = names.get(dep.target.module, "")
            outputs = "out" in dep.handler.__name__
            if name.endswith("attn.qkv") and outputs:
                part = torch.ones(72)
                part[idxs] = 0
                q, k, v = part.split(24)
                assert torch.equal(q, k)
                masks[name.replace("attn.qkv", "qk")] *= q
                masks[name.replace("attn.qkv", "v")] *= v
            if name.endswith("mlp.fc1") and outputs:
                masks[name.replace("mlp.fc1", "mlp")][idxs] = 0
        group.prune()
    for block in pruned.blocks:  # what the library leaves to its user
        block.attn.num_heads = pruner.num_heads[block.attn.qkv]
        block.attn.attn_dim = block.attn.qkv.out_features // 3
        block.attn.head_dim = block.attn.attn_dim // block.attn.num_heads
    small = slim(model, masks)
    assert torch.allclose(small(images()), pruned(images()), atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in pruned.parameters())
    assert small.config.parameters() < shape_of(model).parameters()


def plain(seed=0, **options):
    torch.manual_seed(seed)
    options = {"image_size": 16, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 48} | options
    return ViT(ViTConfig(**options)).eval()


def test_torch_pruning_meets_the_budget_and_prefers_large_weights():
    pytest.importorskip("torch_pruning")
    model = plain()
    with torch.no_grad():  # the last MLP channels of a block are next to nothing
        model.blocks[0].mlp.fc1.weight[32:] *= 1e-3
        model.blocks[0].mlp.fc1.bias[32:] *= 1e-3
        model.blocks[0].mlp.fc2.weight[:, 32:] *= 1e-3
    shape = shape_of(model)
    masks = peers.torch_pruning(model, 0.85 * shape.macs(), multiple=4)
    small = slim(model, masks)
    assert 0.7 * shape.macs() < small.config.macs() <= 0.85 * shape.macs()
    assert not masks["blocks.0.mlp"][32:].any() and masks["blocks.1.mlp"].sum() >= masks["blocks.0.mlp"].sum()
    other = peers.torch_pruning(model, 0.85 * shape.macs(), multiple=4, importance="torch-pruning, LAMP")
    assert any(not torch.equal(masks[name], other[name]) for name in masks)
    with pytest.raises(ValueError, match="smallest model"):
        peers.torch_pruning(model, 1000, step=0.2)
