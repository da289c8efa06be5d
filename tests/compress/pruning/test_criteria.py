"""Scores against their definitions."""

import pytest
import torch
from torch import nn

from vitlab.compress.pruning.budget import select
from vitlab.compress.pruning.criteria import score
from vitlab.compress.pruning.shape import KINDS
from vitlab.compress.pruning.structured import shape_of, slim

from .cases import images, ours, reference


def loss_change(model, masks, data):
    x, y = data[0]
    with torch.no_grad():
        full = nn.functional.cross_entropy(model(x), y)
        return (nn.functional.cross_entropy(reference(model, masks, x), y) - full).item()


def test_taylor_is_the_first_order_change_and_fisher_its_square():
    model = ours("cls")
    data = [(images(6), torch.arange(6))]
    taylor = score(model, "taylor", kinds=("mlp", "v", "heads", "block"), data=data)
    # scaled down by a little, the unit changes the loss by that much times its score
    for name, unit in [("blocks.0.mlp", 3), ("blocks.1.v", 5), ("blocks.2.heads", 1), ("blocks.1.block", 0)]:
        masks = {name: torch.ones(len(taylor[name]))}
        masks[name][unit] = 1 - 1e-2
        assert abs(loss_change(model, masks, data)) == pytest.approx(
            1e-2 * taylor[name][unit].item(), rel=0.1, abs=2e-5
        )
    single = [
        score(model, "taylor", kinds=("mlp",), data=[(data[0][0][i : i + 1], data[0][1][i : i + 1])])
        for i in range(6)
    ]
    fisher = score(model, "fisher", kinds=("mlp",), data=data)
    expected = torch.stack([s["blocks.0.mlp"].double() ** 2 for s in single]).mean(0) / 2
    assert torch.allclose(fisher["blocks.0.mlp"].double(), expected, rtol=1e-4)


def test_other_criteria():
    model = ours("cls")
    magnitude = score(model, "magnitude", kinds=("mlp", "embed", "heads"))
    w1, w2 = model.blocks[0].mlp.fc1.weight.double(), model.blocks[0].mlp.fc2.weight.double()
    norm = (w1.square().sum(1) + w2.square().sum(0)).sqrt()
    assert torch.allclose(magnitude["blocks.0.mlp"].double(), norm / norm.mean(), rtol=1e-5)
    median = score(model, "geometric-median", kinds=("mlp",))["blocks.0.mlp"]
    rows = torch.cat([w1, w2.T], 1)
    far = torch.stack([(rows - r).norm(dim=1).sum() for r in rows])
    assert torch.allclose(median.double(), far / far.mean(), rtol=1e-4)
    assert torch.equal(*(score(model, "random", seed=3)["blocks.0.v"] for _ in range(2)))
    assert not torch.equal(*(score(model, "random", seed=s)["blocks.0.v"] for s in (3, 4)))
    blocks = score(model, "magnitude", kinds=("block",))
    gone = select(shape_of(model), blocks, ratio=1 / 3)
    assert len(slim(model, gone).blocks) == 2
    for kind in KINDS:
        assert all(s.isfinite().all() for s in score(model, "magnitude", kinds=(kind,)).values())
