"""The actions against slow loops over images and tokens, in float64."""

import pytest
import torch
import torch.nn.functional as F

from vitlab.compress.tokens import merge
from vitlab.compress.tokens.reduction import reduce_tokens
from vitlab.models.vit import ViT, ViTConfig


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def sets(plan, row, tokens):
    """{output row: {input rows}} of one image."""
    source = plan.source(tokens)[row].tolist()
    found = {}
    for token, target in enumerate(source[:-1]):
        found.setdefault(target, set()).add(token)
    return found


def test_drop_keeps_the_best_in_order():
    score = draw(3, 9)
    plan = merge.plans("drop", 4, 1, score=score)[0]
    x = draw(3, 10, 5, seed=1)
    for i in range(3):
        best = sorted(score[i].argsort(descending=True)[:4].tolist())
        torch.testing.assert_close(plan(x)[i], x[i, [0] + [p + 1 for p in best]])


def test_fuse_is_the_score_weighted_mean_of_the_rest():
    score, x = draw(3, 9), draw(3, 10, 5, seed=1)
    out = merge.fuse(score, 4, prefix=1)(x)
    assert out.shape == (3, 5, 5)
    for i in range(3):
        order = score[i].argsort(descending=True)
        rest = order[3:]
        expected = (score[i][rest, None] * x[i][rest + 1]).sum(0) / score[i][rest].sum()
        torch.testing.assert_close(out[i, -1], expected)
        torch.testing.assert_close(out[i, 1:-1], x[i][order[:3].sort().values + 1])


@pytest.mark.parametrize("patches", [8, 9])
def test_bipartite_takes_the_cheapest_edges(patches):
    keys = F.normalize(draw(2, patches, 4) - 0.5, dim=-1)
    plan = merge.bipartite(keys, 3, 1, None)
    for i in range(2):
        edges = []
        for a in range(1, patches, 2):
            b = max(range(0, patches, 2), key=lambda q: (keys[i, a] @ keys[i, q]).item())
            edges.append(((1 - keys[i, a] @ keys[i, b]).item(), a, b))
        joined = {}
        for _, a, b in sorted(edges)[:3]:
            joined.setdefault(b, {b}).add(a)
        found = {frozenset(s) for s in sets(plan, i, patches + 1).values()}
        expected = {frozenset(p + 1 for p in joined.get(q, {q})) for q in range(0, patches, 2)}
        expected |= {frozenset({a + 1}) for _, a, _ in sorted(edges)[3:]} | {frozenset({0})}
        assert found == expected


def test_ward_takes_the_edges_that_add_the_least_variance():
    """Power 1, by hand: each source's cheapest edge by Ward's criterion, the cheapest of those taken."""
    keys, size = F.normalize(draw(3, 10, 4) - 0.5, dim=-1), (draw(3, 11, seed=2) * 6).floor() + 1
    plan = merge.bipartite(keys, 3, 1, size, power=1.0)
    for i in range(3):
        count = size[i, 1:]
        variance = lambda a, b: (keys[i, a] - keys[i, b]).square().sum() * count[a] * count[b] / (count[a] + count[b])  # noqa: B023, E731
        edges = []
        for a in range(1, 10, 2):
            b = min(range(0, 10, 2), key=lambda q: variance(a, q).item())
            edges.append((variance(a, b).item(), a, b))
        joined = {q: {q + 1} for q in range(0, 10, 2)}
        for _, a, b in sorted(edges)[:3]:
            joined[b].add(a + 1)
        expected = {frozenset(s) for s in joined.values()} | {frozenset({a + 1}) for _, a, _ in sorted(edges)[3:]}
        assert {frozenset(s) for s in sets(plan, i, 11).values()} == expected | {frozenset({0})}


def test_lengths_are_kept_and_the_direction_is_the_mean():
    keys, size = F.normalize(draw(2, 9, 4, seed=3) - 0.5, dim=-1), draw(2, 10, seed=2) + 1
    x = draw(2, 10, 5, seed=1) - 0.5
    (kept,) = merge.plans("size-priced", 5, 1, keys=keys, size=size, lengths=True)
    (plain,) = merge.plans("size-priced", 5, 1, keys=keys, size=size)
    torch.testing.assert_close(F.normalize(kept(x), dim=-1), F.normalize(plain(x), dim=-1))
    mean_length = plain(x.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(kept(x).norm(dim=-1, keepdim=True), mean_length)
    assert (plain(x).norm(dim=-1) <= mean_length[..., 0] + 1e-12).all()


def test_the_size_priced_merge_matches_on_the_normalised_input():
    """One block by hand: the pairs that the normalised input gives, and sizes that the next block attends by."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(dim=24, depth=2, heads=2, image_size=16)).eval().double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.double)
    with torch.no_grad():
        reduced = reduce_tokens(model, action="size-priced", counts=(12, 12))
        _, seen = reduced(images, intermediates=True)
        normed = F.normalize(model.blocks[0].norm1(model.embed(images))[:, 1:], dim=-1)
        plan = merge.bipartite(normed, 5, 1, None)
        ones = torch.ones(2, 17, dtype=torch.double)
        torch.testing.assert_close(seen["size"][0], plan.total(ones), check_dtype=False)
        tome = reduce_tokens(model, action="size-priced", metric="key", lengths=False, power=0, counts=(12, 9))
        torch.testing.assert_close(tome(images), reduce_tokens(model, action="merge", counts=(12, 9))(images))


@pytest.mark.parametrize("action", merge.ACTIONS)
def test_sizes_and_weights_add_up(action):
    score, keys, size = draw(2, 16), F.normalize(draw(2, 16, 4) - 0.5, dim=-1), draw(2, 17, seed=2) + 1
    x = torch.ones(2, 17, 3, dtype=torch.double)
    for plan in merge.plans(action, 3, 1, score=score, keys=keys, size=size):
        x, before, size = plan(x), size, plan.total(size)
        if action != "drop":
            torch.testing.assert_close(size.sum(1), before.sum(1))
    assert x.shape == (2, 4, 3)
    torch.testing.assert_close(x, torch.ones_like(x))  # every row is a mean


def reference_tome(model, images, counts):
    """ToMe written down image by image, token by token, in float64, with explicit proportional attention."""
    outs = []
    for image in images.double():
        x = model.embed(image[None])[0]
        size = torch.ones(len(x), dtype=torch.double)
        for block, count in zip(model.blocks, counts):
            q, k, v = (t[0] for t in block.attn.split(block.norm1(x)[None]))
            logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5 + size.log()
            x = x + block.attn.proj((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
            keys = F.normalize(k.mean(0), dim=-1)
            sources, others = list(range(2, len(x), 2)), list(range(1, len(x), 2))
            edges = []
            for a in sources:
                b = max(others, key=lambda o: (keys[a] @ keys[o]).item())
                edges.append(((keys[a] @ keys[b]).item(), a, b))
            merged = {a: b for _, a, b in sorted(edges, reverse=True)[: len(x) - count]}
            x, size = x.clone() * size[:, None], size.clone()
            for a, b in merged.items():
                x[b], size[b] = x[b] + x[a], size[b] + size[a]
            rows = [0] + [a for a in sources if a not in merged] + others
            x, size = x[rows] / size[rows, None], size[rows]
            x = x + block.mlp(block.norm2(x[None]))[0]
        outs.append(model.classify(model.pool(x[None])))
    return torch.cat(outs)


def test_merge_is_tome():
    torch.manual_seed(0)
    model = ViT(ViTConfig(dim=24, depth=3, heads=2, image_size=16)).eval().double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.double)
    with torch.no_grad():
        found = reduce_tokens(model, action="merge", counts=(14, 10, 7))(images)
        torch.testing.assert_close(found, reference_tome(model, images, (14, 10, 7)))


def test_merged_tokens_go_back_to_the_grid_for_the_convolution():
    """Identical patches merged: the model with the local MLP cannot tell, wherever the grid is uniform."""
    torch.manual_seed(0)
    config = ViTConfig(dim=24, depth=2, heads=2, image_size=16, pool="mean", mlp="conv", pos="none")
    model = ViT(config).eval().double()
    for block in model.blocks:  # no border effects: only the centre tap, which merging leaves alone
        weight = torch.zeros_like(block.mlp.conv.weight)
        weight[:, :, 1, 1] = block.mlp.conv.weight[:, :, 1, 1]
        block.mlp.conv.weight.data.copy_(weight)
    images = torch.ones(2, 3, 16, 16, dtype=torch.double) * draw(2, 3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(reduce_tokens(model, action="merge", counts=(10, 4))(images), model(images))
        torch.testing.assert_close(reduce_tokens(model, action="size-priced", counts=(10, 4))(images), model(images))


def test_dropped_patches_are_holes_in_the_grid():
    torch.manual_seed(0)
    config = ViTConfig(dim=8, depth=2, heads=2, image_size=16, pool="mean", mlp="conv")
    model, images = ViT(config).eval().double(), torch.randn(2, 3, 16, 16, dtype=torch.double)
    reduced = reduce_tokens(model, counts=(7, 7))
    with torch.no_grad():
        _, seen = reduced(images, intermediates=True)
        state = reduced.reducer.start(images, record=True)
        half, _ = reduced.reducer._attend(0, state)
        block = model.blocks[0]
        for i in range(2):
            at = seen["kept"][0][i]
            grid = torch.zeros(16, config.mlp_dim, dtype=torch.double)
            grid[at] = block.mlp.fc1(block.norm2(half.x[i]))
            local = block.mlp.conv(grid.T.reshape(1, -1, 4, 4)).flatten(2)[0].T
            hidden = block.mlp.act(grid[at] + local[at])
            torch.testing.assert_close(seen["tokens"][0][i], half.x[i] + block.mlp.fc2(hidden))
