"""Attention rollout and maps against known cases."""

import pytest
import torch

from vitlab.models.attention_maps import attention_maps, rollout, to_grid
from vitlab.models.vit import ViT, ViTConfig


def test_rollout_of_uniform_and_identical_attention_is_known():
    uniform = torch.full((1, 2, 4, 4), 0.25)
    expected = 0.5 * torch.eye(4) + 0.125  # one block: half residual, half 1 / 4
    torch.testing.assert_close(rollout([uniform])[0], expected)
    torch.testing.assert_close(rollout([uniform, uniform])[0], expected @ expected)
    stay = torch.eye(4).expand(1, 3, 4, 4)
    torch.testing.assert_close(rollout([stay] * 5)[0], torch.eye(4))
    with pytest.raises(ValueError, match="every block"):
        rollout([uniform, None])


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_looks_gives_grids_of_the_right_patches(pool):
    config = ViTConfig(image_size=16, patch_size=4, dim=16, depth=2, heads=2, pool=pool)
    maps = attention_maps(ViT(config), torch.randn(3, 3, 16, 16))
    for grid in maps.values():
        assert grid.shape == (3, 4, 4)
        assert grid.amin((1, 2)).eq(0).all() and torch.allclose(grid.amax((1, 2)), torch.ones(3))
    attention = torch.zeros(1, 17, 17) if pool == "cls" else torch.zeros(1, 16, 16)
    attention[:, 0 if pool == "cls" else slice(None), 6 if pool == "cls" else 5] = 1  # patch 5: row 1, column 1
    assert to_grid(attention, config)[0].nonzero().tolist() == [[1, 1]]
