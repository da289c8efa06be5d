"""The ways to attend of notebook 03 against dense attention, and what its pictures claim against gradients."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from vitlab.models.favit import FaViT, FaViTConfig
from vitlab.study import favit, plots

SIDE, WINDOW = 8, 4
CONFIG = FaViTConfig(image_size=SIDE, stem=(1, 1), dims=(32,), depths=(1,), heads=(1,), mlp_ratios=(1,),
                     reductions=(2,), window=WINDOW, samples=None)  # fmt: skip


def tokens(heads=2, width=6):
    torch.manual_seed(0)
    return torch.randn(3, 1, heads, SIDE**2, width, dtype=torch.float64)


def test_exact_ways_equal_fused_attention():
    q, k, v = tokens()
    for name, way in favit.ways(SIDE**2, window=SIDE, keys=SIDE, samples=SIDE**2, top=SIDE**2).items():
        # one window, unthinned keys, every query in full: all of them are plain attention
        torch.testing.assert_close(way(q, k, v), sdpa(q, k, v), msg=lambda text, name=name: f"{name}: {text}")


def test_thinned_keys_are_means_of_cells():
    _, k, _ = tokens()
    cells = k.view(1, 2, 4, 2, 4, 2, 6).mean((3, 5)).flatten(2, 3)
    torch.testing.assert_close(favit.thin(k, 4), cells)


def test_as_published_the_rest_gets_zeros():
    q, k, v = tokens()
    out = favit.published_probsparse(q, favit.thin(k, 4), favit.thin(v, 4), top=5, samples=3)
    live = (out != 0).any(-1).sum(-1)
    assert (live == 5).all()


def test_published_gathering_takes_more_memory_than_the_keys_it_saves():
    """A copy of 25 keys of 8 channels a query against 49 logits a query: 25 * 8 / 49, the claims' factor of 4."""
    rows = {r["arm"]: r["peak_mb"] for r in favit.costs([28], width=8, seconds=0.0) if r["pass"] == "forward"}
    extra = rows[favit.PUBLISHED] / rows[favit.THINNED]
    # the table and its softmax are held at once, which halves what the factor says
    assert 0.4 * 25 * 8 / 49 < extra < 1.5 * 25 * 8 / 49
    assert rows[favit.FUSED] < rows[favit.TABLE] / 4


@pytest.mark.parametrize("team", ["local", "dilated"])
@pytest.mark.parametrize("query", [(0, 0), (5, 2)])
def test_what_a_team_sees_is_where_its_gradient_reaches(team, query):
    torch.manual_seed(0)
    attention = FaViT(CONFIG).eval().stages[0][0].attn
    x = torch.randn(1, SIDE, SIDE, CONFIG.dims[0])
    own = attention.parts(x)[team][1].detach().requires_grad_()
    queries = attention.parts(x)[team][0].detach()
    attention.teams[attention.names.index(team)](queries, own)[0, query[0], query[1]].sum().backward()
    assert torch.equal(own.grad[0].abs().sum(-1) > 0, favit.sees(CONFIG, 0, query)[team])


def test_figures_are_drawn():
    torch.manual_seed(0)
    config = FaViTConfig(image_size=32, stem=(3, 2), dims=(16, 32), depths=(1, 1), heads=(1, 2), mlp_ratios=(1, 1),
                         reductions=(2, 1), window=4, samples=4)  # fmt: skip
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    _, seen = FaViT(config).eval()(images.float() / 255, intermediates=True)
    sheet = favit.chosen_queries(images, seen["chosen"], config.sides)
    assert len(sheet.axes) == 3 * 2
    trip = favit.journey(images[0], [g.detach() for g in (seen["stem"], *seen["stages"])], config)
    titles = [ax.get_title() for ax in trip.axes]
    assert {"stem: 256 tokens", "stage 2: 64 tokens", "local: 16 of 256", "dilated: 16 of 256"} <= set(titles)
    rows = favit.costs([14, 28], width=8, seconds=0.0)
    assert {r["n"] for r in rows} == {196, 784} and all(math.isfinite(r["ms"]) for r in rows)
    assert len(plots.scaling(rows).axes) == 4


def test_places_picked_again_and_again_are_told_from_places_by_chance():
    always = torch.arange(8).expand(50, 2, 8)
    assert favit.same_places(always, 64) == pytest.approx(64 / 8)
    chance = torch.rand(2000, 2, 64, generator=torch.Generator().manual_seed(0)).topk(8).indices
    assert favit.same_places(chance, 64) == pytest.approx(1, abs=0.02)
