"""Pruning: the small model against the original with hooks, against closed formulas and torch-pruning."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from vitlab import counts, rng
from vitlab.compress import structured as S
from vitlab.compress.budget import _Plan
from vitlab.models import vit
from vitlab.models.vit import ViT, ViTConfig
from vitlab.recipe import Recipe
from vitlab.train import Batch, cross_entropy

TINY = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 3, "heads": 3, "mlp_dim": 40}
OURS = {
    "cls": {},
    "mean": {"pool": "mean", "pool_norm": "after", "pos": "none", "qkv_bias": False},
    "distilled": {"distilled": True},
    "hidden head": {"head_hidden": 16, "dropout": 0.1},
    "conv stem, conv MLP": {"stem": "conv", "mlp": "conv", "pool": "mean"},
    "residual stem": {"stem": "residual", "mlp": "conv", "pool": "mean"},
    "conv MLP, CLS": {"mlp": "conv"},
}
TIMM = {
    "plain": {},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "layer scale": {"init_values": 0.3},
    "mean": {"global_pool": "avg", "class_token": False, "qkv_bias": False},
    "mean beside CLS": {"global_pool": "avg", "fc_norm": False},
    "tanh GELU, no bias": {"act_layer": "gelu_tanh", "proj_bias": False, "pos_embed": "none"},
}
QK_NORM = {"QK-norm": {"qk_norm": True, "init_values": 0.5, "reg_tokens": 1}}


def shake(model):
    """Weights far from their initial values, so that every bias and norm has something to say."""
    draw = rng.generator(0, "shake")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.2)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.add_(torch.randn(b.shape, generator=draw) * 0.2)
    return model.eval()


def ours(name):
    torch.manual_seed(0)
    return shake(ViT(ViTConfig(**TINY | OURS[name])))


def timms(name):
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 1.7}
    if name == "distilled":
        deit = pytest.importorskip("timm.models.deit")
        return shake(deit.VisionTransformerDistilled(**sizes, num_classes=10))
    return shake(timm.VisionTransformer(**sizes, num_classes=10, **(TIMM | QK_NORM)[name]))


def images(n=4, side=16):
    return torch.randn(n, 3, side, side, generator=rng.generator(1, "images"))


def random_masks(model, seed=0, drop_block=False):
    """Masks over all kinds, heads of different widths, an attention and an MLP without any unit."""
    config, draw = S.shape_of(model), rng.generator(seed, "masks")
    kinds = [k for k in S.KINDS if k != "block" and not (k == "qk" and config.qk_norm)]
    masks = {k: torch.rand(n, generator=draw) < 0.6 for k, n in S.sizes(config, kinds).items()}
    masks["blocks.1.heads"][:] = True
    if "blocks.1.qk" in masks:
        masks["blocks.1.qk"][8:16] = False  # a head that averages
    masks["blocks.0.mlp"][:] = False
    masks["blocks.2.v"][:] = False
    if drop_block:
        masks["blocks.1.block"] = torch.zeros(1, dtype=torch.bool)
    return masks


def reference(model, masks, x):
    """The masked model by hooks and zeroed weights in a copy of the original: no code of the package."""
    model = copy.deepcopy(model)
    times = lambda m: lambda _module, _inputs, out: out * m.to(out.dtype)  # noqa: E731
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            get = lambda kind, n, i=i: masks.get(f"blocks.{i}.{kind}", torch.ones(n)).float()  # noqa: E731
            width = block.attn.proj.in_features
            heads = get("heads", 3).repeat_interleave(width // 3)
            rows = torch.cat([get("qk", width), get("qk", width), get("v", width) * heads])
            block.attn.qkv.weight.mul_(rows[:, None])
            if block.attn.qkv.bias is not None:
                block.attn.qkv.bias.mul_(rows)
            block.mlp.act.register_forward_hook(times(get("mlp", block.mlp.fc1.out_features)))
            for writer in (block.attn.proj, block.mlp.fc2):
                writer.register_forward_hook(times(get("block", 1)))
        if "embed" in masks:
            m = masks["embed"].float()
            for name, module in model.named_modules():
                last = name.rpartition(".")[2]
                if (
                    last in ("norm1", "norm2", "patch_embed")
                    or name in ("norm", "fc_norm")
                    or name.endswith((".attn.proj", ".mlp.fc2"))
                ):
                    module.register_forward_hook(times(m))
            for p in ("cls_token", "dist_token", "reg_token", "pos_embed"):
                if getattr(model, p, None) is not None:
                    getattr(model, p).mul_(m)
        return model(x)


def every_model():
    names = [("ours", n) for n in OURS] + [("timm", n) for n in [*TIMM, "distilled", *QK_NORM]]
    return pytest.mark.parametrize("source, name", names)


def build(source, name):
    return ours(name) if source == "ours" else timms(name)


@every_model()
def test_full_width_slim_is_the_model(source, name):
    model = build(source, name)
    full = S.as_slim(model)
    assert torch.allclose(full(images()), model(images()), atol=1e-5)
    trainable = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in full.parameters()) == trainable
    stem = sum(p.numel() for p in full.patch_embed.parameters()) - sum(
        p.numel() for p in full.patch_embed.proj.parameters()
    )
    assert full.config.parameters() + stem == trainable


@every_model()
@pytest.mark.parametrize("seed", [0, 1])
def test_slim_equals_masked_equals_hooks(source, name, seed):
    model = build(source, name)
    masks = random_masks(model, seed, drop_block=seed == 1)
    expected = reference(model, masks, images())
    assert (expected - model(images())).abs().max() > 1e-2  # the masks matter
    assert torch.allclose(S.masked(model, masks)(images()), expected, atol=1e-5)
    small = S.slim(model, masks)
    assert torch.allclose(small(images()), expected, atol=1e-5)
    assert len(small.blocks) == 3 - seed
    assert len({w for b in small.config.blocks for w in b.each_head}) > 1  # uneven heads
    assert any(not b.heads for b in small.config.blocks) and any(not b.hidden for b in small.config.blocks)
    counted = sum(p.numel() for n, p in small.named_parameters() if ".layers." not in n)
    assert counted == small.config.parameters()


def test_trained_gates_are_folded():
    model = ours("conv MLP, CLS")
    gated = S.GatedViT(model, kinds=S.KINDS)
    draw = rng.generator(0, "gates")
    with torch.no_grad():
        for gate in gated.gates.values():
            gate.copy_(torch.randn(gate.shape, generator=draw))
        gated.gates["blocks_0_mlp"][:7] = 0
    masks = random_masks(model)
    expected = S.masked(gated, masks)(images())
    small = S.slim(gated, masks)
    assert torch.allclose(small(images()), expected, atol=2e-5, rtol=1e-5)
    assert torch.allclose(S.slim(gated)(images()), gated(images()), atol=2e-5, rtol=1e-5)
    assert S.slim(gated).config.blocks[0].hidden == 33
    assert not [n for n, _ in small.named_parameters() if "gate" in n]


def test_everything_pruned_leaves_biases_and_head():
    model = ours("cls")
    masks = {n: torch.zeros(k) for n, k in S.sizes(S.shape_of(model), ("v", "mlp")).items()}
    small = S.slim(model, masks)
    assert torch.allclose(small(images()), reference(model, masks, images()), atol=1e-5)
    nothing = S.slim(model, {f"blocks.{i}.block": torch.zeros(1) for i in range(3)})
    assert len(nothing.blocks) == 0 and nothing(images()).shape == (4, 10)
    with pytest.raises(ValueError, match="at least 1 embedding channel"):
        S.slim(model, {"embed": torch.zeros(24)})


def test_slim_is_pruned_again():
    model = ours("cls")
    once = S.slim(model, random_masks(model))
    draw = rng.generator(5, "again")
    masks = {k: torch.rand(n, generator=draw) < 0.7 for k, n in S.sizes(once.config).items() if "block" not in k[-5:]}
    assert torch.allclose(S.slim(once, masks)(images()), S.masked(once, masks)(images()), atol=1e-5)


def test_costs_follow_the_closed_formulas():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    for source, name in [
        ("ours", "cls"),
        ("ours", "conv stem, conv MLP"),
        ("ours", "residual stem"),
        ("ours", "hidden head"),
        ("timm", "plain"),
    ]:
        model = build(source, name)
        if source == "ours":
            assert S.shape_of(model).macs() == vit.macs(model.config)
        small = S.slim(model, random_masks(model))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            small(images(1))
        assert counter.get_total_flops() == 2 * small.config.macs()
    # by hand: one head of 8 of 24 value and query/key channels gone, 10 MLP channels gone
    config = S.shape_of(ours("cls"))
    left = S.narrow(config, {"blocks.0.heads": torch.tensor([1, 0, 1]), "blocks.1.mlp": torch.arange(40) >= 10})
    assert config.macs() - left.macs() == 17 * 24 * 4 * 8 + 2 * 17 * 17 * 8 + 2 * 17 * 24 * 10
    assert config.parameters() - left.parameters() == 3 * 8 * 25 + 8 * 24 + 10 * 49


def test_published_shape():
    config = ViTConfig(dim=512, depth=6, heads=8, mlp_dim=512, qkv_bias=False, head_hidden=512, dropout=0.1)
    shape = S.shape_of(ViT(config))
    assert shape.parameters() == 9_786_378
    masks = S.select(shape, S.score(ViT(config), "random"), ratio=0.4)
    left = S.narrow(shape, masks)
    kept = sum(b.qk + b.v + b.hidden for b in left.blocks)
    assert kept / (6 * 3 * 512) == pytest.approx(0.6, abs=0.02)
    assert all(w % 8 == 0 for b in left.blocks for head in b.each_head for w in head)


# traps of the best-known library


def test_a_head_ratio_removes_that_many_heads():
    config = S.shape_of(ViT(ViTConfig(dim=96, heads=12, depth=2, image_size=16)))
    scores = {f"blocks.{i}.heads": torch.rand(12) for i in range(2)}
    for gone in range(1, 12):
        for scope in ("layer", "global", "kind"):
            left = S.narrow(config, S.select(config, scores, ratio=gone / 12, scope=scope))
            heads = [len(b.each_head) for b in left.blocks]
            assert sum(heads) == 24 - 2 * gone
            assert scope != "layer" or heads == [12 - gone] * 2
    with pytest.raises(ValueError, match="removes nothing"):
        S.select(config, scores, ratio=0.01)


@pytest.mark.parametrize(
    ("heads", "padded"),
    [(((2, 8, 8),), 0), (((2, 8, 16),), 16), (((1, 16, 8), (2, 8, 8)), 16), (((1, 0, 8), (1, 8, 8)), 8),
     (((1, 64, 64), (7, 8, 8)), 0)],
)  # fmt: skip
def test_heads_filled_up_to_one_width_equal_heads_one_by_one(heads, padded):
    whole = S.shape_of(ViT(ViTConfig(image_size=8, dim=32, depth=1, heads=2)))
    block = dataclasses.replace(whole.blocks[0], heads=heads)
    config = dataclasses.replace(whole, blocks=(block,))
    assert config.padded(block) == padded and dataclasses.replace(config, qk_norm=True).padded(block) == 0
    torch.manual_seed(0)
    attention = S.SlimViT(config).blocks[0].attn.double().eval()
    x = torch.randn(2, 5, config.dim, dtype=torch.float64)
    q, k, v = attention.qkv(x).split((block.qk, block.qk, block.v), dim=-1)
    outs, start = [], [0, 0]
    for width, values in block.each_head:
        mine, of_v = slice(start[0], start[0] + width), slice(start[1], start[1] + values)
        weights = (q[..., mine] @ k[..., mine].transpose(1, 2) * block.scale).softmax(-1)
        outs.append(weights @ v[..., of_v])
        start = [start[0] + width, start[1] + values]
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(outs, -1)))
    assert counts.macs(S.SlimViT(config), (3, 8, 8)) == config.macs()


def test_widths_are_multiples_and_heads_even_when_asked():
    model = ViT(ViTConfig(dim=192, heads=3, depth=2, mlp_dim=384, image_size=16))
    scores = S.score(model, "random", kinds=("qk", "v", "mlp", "embed"))
    for ratio in (0.1, 0.4, 0.7):
        left = S.narrow(S.shape_of(model), S.select(S.shape_of(model), scores, ratio=ratio))
        widths = [w for b in left.blocks for head in b.each_head for w in head]
        assert all(w % 8 == 0 for w in [*widths, left.dim, *(b.hidden for b in left.blocks)])
        even = S.narrow(S.shape_of(model), S.select(S.shape_of(model), scores, ratio=ratio, even=True))
        assert all(len(b.heads) == 1 and b.heads[0][1] == b.heads[0][2] for b in even.blocks)


def test_a_pruned_timm_model_runs_saves_and_loads(tmp_path):
    model = timms("plain")
    masks = random_masks(model)
    small = S.slim(model, masks)
    expected = small(images())  # no head count or width to be mended by hand
    S.save(small, tmp_path / "slim.safetensors")
    again = S.load(tmp_path / "slim.safetensors")
    assert again.config == small.config and torch.equal(again(images()), expected)
    gated = S.GatedViT(model, kinds=("v", "block"), masks=masks)
    S.save_gated(gated, tmp_path / "gated.safetensors")
    again = S.load_gated(tmp_path / "gated.safetensors")
    assert again.kinds == ("v", "block") and torch.equal(again(images()), gated(images()))
    with pytest.raises(ValueError, match="does not hold a gated model"):
        S.load_gated(tmp_path / "slim.safetensors")


def test_scale_stays_in_the_fused_and_in_the_written_out_product():
    model = ours("cls")
    masks = {f"blocks.{i}.qk": torch.arange(24) % 8 < 3 for i in range(3)}
    small = S.slim(model, masks)
    assert {b.attn.scale for b in small.blocks} == {8**-0.5}
    attn, x = small.blocks[0].attn, torch.randn(2, 17, 24)
    ((q, k, v),) = attn.split(x)
    written = ((q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert q.shape[-1] == 3
    assert torch.allclose(attn(x), attn.proj(written), atol=1e-5)
    assert torch.allclose(attn.map(x) @ torch.eye(17), (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1), atol=1e-5)


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
    masks = {n: torch.ones(k) for n, k in S.sizes(S.shape_of(model), ("qk", "v", "mlp")).items()}
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
    small = S.slim(model, masks)
    assert torch.allclose(small(images()), pruned(images()), atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in pruned.parameters())
    assert small.config.parameters() < S.shape_of(model).parameters()


# budgets, criteria, refusals


def test_budgets_are_met_and_tight():
    model = ours("cls")
    shape = S.shape_of(model)
    scores = S.score(model, "magnitude", kinds=("qk", "v", "mlp"))
    for scope in ("global", "layer", "kind"):
        for share in (0.9, 0.6):
            for per_mac in (False, True):
                target = int(share * shape.macs())
                masks = S.select(shape, scores, macs=target, multiple=1, scope=scope, per_mac=per_mac)
                left = S.narrow(shape, masks).macs()
                assert left <= target and (scope == "layer" or left > 0.97 * target)
    meter = lambda config: sum(b.qk + b.v + b.hidden for b in config.blocks) / 100  # noqa: E731
    masks = S.select(shape, scores, latency=2.0, meter=meter, multiple=1)
    assert 1.9 < meter(S.narrow(shape, masks)) <= 2.0


def test_latency_table_adds_up_what_was_measured():
    from vitlab.compress.shape import SlimConfig

    shape = S.shape_of(ours("cls"))
    cost = lambda c: 1.0 + sum(0.5 + b.qk / 10 + b.v / 10 + b.hidden / 50 for b in c.blocks)  # noqa: E731
    table = S.LatencyTable(shape, points=3, measure=cost)
    assert isinstance(shape, SlimConfig) and table(shape) == pytest.approx(cost(shape))
    left = S.narrow(shape, random_masks(ours("cls")))
    assert table(left) == pytest.approx(cost(left))
    assert S.timed(left, batch=2, repeats=2) > 0


def test_global_ranking_removes_the_lowest():
    shape = S.shape_of(ours("cls"))
    scores = {n: torch.rand(k) for n, k in S.sizes(shape, ("mlp",)).items()}
    masks = S.select(shape, scores, ratio=0.25, multiple=1)
    kept = torch.cat([scores[n][masks[n]] for n in scores])
    gone = torch.cat([scores[n][~masks[n]] for n in scores])
    assert len(gone) == 30 and gone.max() < kept.min()
    most = S.select(shape, scores, ratio=0.6, multiple=8, scope="layer", least=0.7)
    assert all(int(m.sum()) == 32 for m in most.values())  # 0.7 * 40 up to the next multiple
    with pytest.raises(ValueError, match="removes nothing"):
        S.select(shape, scores, ratio=0.25, multiple=8, scope="layer", least=0.9)


def loss_change(model, masks, data):
    x, y = data[0]
    with torch.no_grad():
        full = nn.functional.cross_entropy(model(x), y)
        return (nn.functional.cross_entropy(reference(model, masks, x), y) - full).item()


def test_taylor_is_the_first_order_change_and_fisher_its_square():
    model = ours("cls")
    data = [(images(6), torch.arange(6))]
    taylor = S.score(model, "taylor", kinds=("mlp", "v", "heads", "block"), data=data)
    # scaled down by a little, the unit changes the loss by that much times its score
    for name, unit in [("blocks.0.mlp", 3), ("blocks.1.v", 5), ("blocks.2.heads", 1), ("blocks.1.block", 0)]:
        masks = {name: torch.ones(len(taylor[name]))}
        masks[name][unit] = 1 - 1e-2
        assert abs(loss_change(model, masks, data)) == pytest.approx(
            1e-2 * taylor[name][unit].item(), rel=0.1, abs=2e-5
        )
    single = [
        S.score(model, "taylor", kinds=("mlp",), data=[(data[0][0][i : i + 1], data[0][1][i : i + 1])])
        for i in range(6)
    ]
    fisher = S.score(model, "fisher", kinds=("mlp",), data=data)
    expected = torch.stack([s["blocks.0.mlp"].double() ** 2 for s in single]).mean(0) / 2
    assert torch.allclose(fisher["blocks.0.mlp"].double(), expected, rtol=1e-4)


def test_other_criteria():
    model = ours("cls")
    magnitude = S.score(model, "magnitude", kinds=("mlp", "embed", "heads"))
    w1, w2 = model.blocks[0].mlp.fc1.weight.double(), model.blocks[0].mlp.fc2.weight.double()
    norm = (w1.square().sum(1) + w2.square().sum(0)).sqrt()
    assert torch.allclose(magnitude["blocks.0.mlp"].double(), norm / norm.mean(), rtol=1e-5)
    median = S.score(model, "geometric-median", kinds=("mlp",))["blocks.0.mlp"]
    rows = torch.cat([w1, w2.T], 1)
    far = torch.stack([(rows - r).norm(dim=1).sum() for r in rows])
    assert torch.allclose(median.double(), far / far.mean(), rtol=1e-4)
    assert torch.equal(*(S.score(model, "random", seed=3)["blocks.0.v"] for _ in range(2)))
    assert not torch.equal(*(S.score(model, "random", seed=s)["blocks.0.v"] for s in (3, 4)))
    blocks = S.score(model, "similarity", kinds=("block",), data=[(images(), torch.zeros(4))])
    _, seen = model(images(), intermediates=True)
    same = nn.functional.cosine_similarity(seen["embed"], seen["tokens"][0], dim=-1).mean()
    assert blocks["blocks.0.block"].item() == pytest.approx(1 - same.item(), abs=1e-5)
    gone = S.select(S.shape_of(model), blocks, ratio=1 / 3)
    assert len(S.slim(model, gone).blocks) == 2
    for kind in S.KINDS:
        assert all(s.isfinite().all() for s in S.score(model, "magnitude", kinds=(kind,)).values())


def test_what_cannot_be_is_refused():
    model = ours("cls")
    shape, scores = S.shape_of(model), S.score(model, "random", kinds=("mlp",))
    with pytest.raises(ValueError, match=r"impossible.*mlp"):
        S.select(shape, scores, macs=1000)
    for wrong in (
        {},
        {"ratio": 0.1, "macs": 5},
        {"ratio": 1.0},
        {"ratio": 0.5, "scope": "all"},
        {"ratio": 0.5, "least": 2},
    ):
        with pytest.raises(ValueError):
            S.select(shape, scores, **wrong)
    with pytest.raises(ValueError, match="choose one of gates"):
        S.score(model, "luck")
    with pytest.raises(ValueError, match="needs data"):
        S.score(model, "taylor")
    with pytest.raises(ValueError, match="GatedViT"):
        S.score(model, "gates")
    with pytest.raises(ValueError, match=r"supported.*v, heads"):
        S.score(timms("QK-norm"), "random", kinds=("qk",))
    with pytest.raises(ValueError, match="no such structure"):
        S.slim(model, {"blocks.7.mlp": torch.ones(40)})
    with pytest.raises(ValueError, match="shape"):
        S.slim(model, {"blocks.0.mlp": torch.ones(39)})
    with pytest.raises(ValueError, match="supported"):
        S.as_slim(nn.Linear(2, 2))

    class Other(type(model.blocks[0].attn)):
        pass

    with pytest.raises(ValueError, match="the attention Other"):
        S.as_slim(ViT(ViTConfig(**TINY), attention=Other))
    timm = pytest.importorskip("timm")
    for odd in ({"pre_norm": True}, {"global_pool": "map"}, {"norm_layer": "rmsnorm"}):
        with pytest.raises(ValueError, match="supported"):
            S.as_slim(timm.models.vision_transformer.VisionTransformer(
                img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=10, **odd
            ))  # fmt: skip


# training


def test_l1_gives_gates_its_subgradient_and_score_reads_them():
    gated = S.GatedViT(ours("hidden head")).train()
    with torch.no_grad():
        gated.gates["blocks_0_v"][:5] = -0.5
    torch.manual_seed(0)
    batch = Batch(images(), torch.eye(10)[:4], torch.arange(4), 0)
    grads = []
    for objective in (cross_entropy, S.L1(1e-2)):
        torch.manual_seed(0)  # the same dropout
        gated.zero_grad()
        objective(gated, batch)[0].backward()
        grads.append(gated.gates["blocks_0_v"].grad.clone())
    assert torch.allclose(grads[1] - grads[0], 1e-2 * gated.gates["blocks_0_v"].detach().sign(), atol=1e-6)
    assert all(p.grad is not None for n, p in gated.named_parameters())
    assert torch.equal(S.score(gated, "gates")["blocks.0.v"], gated.gates["blocks_0_v"].detach().abs())


def test_prune_and_recover_reaches_its_budget(tmp_path):
    from vitlab.data import Dataset, Split

    draw = rng.generator(0, "data")
    labels = torch.arange(64) % 10
    pixels = torch.randint(0, 256, (64, 3, 16, 16), generator=draw, dtype=torch.uint8)
    split = Split(pixels, labels)
    fields = {f.name for f in dataclasses.fields(Dataset)}
    given = {"name": "noise", "train": split, "val": split, "test": split, "classes": tuple("abcdefghij"),
             "mean": (0.5,) * 3, "std": (0.25,) * 3, "key": "noise"}  # fmt: skip
    data = Dataset(**{k: v for k, v in given.items() if k in fields})
    model = ViT(ViTConfig(**TINY))
    target = int(0.6 * S.shape_of(model).macs())
    recipe = Recipe(epochs=1, batch=32, augment="", lr=1e-4)
    results = [
        S.prune_and_recover(model, data, recipe, macs=target, rounds=2, multiple=4, images=16, log=None,
                            checkpoint=tmp_path / "run")
        for _ in range(2)
    ]  # fmt: skip
    (small, rows), (again, _) = results
    assert small.config.macs() <= target and len(rows) == 2 and rows[0]["macs"] > rows[1]["macs"]
    assert not small.training and small.config == again.config
    assert torch.equal(small(images()), again(images()))  # the second call found both rounds finished
    assert len(list(tmp_path.glob("run-round*.safetensors"))) == 2


def test_slim_trains_compiled_shapes_and_modes():
    model = ours("distilled").train()
    small = S.slim(model, random_masks(model))
    assert small.training and isinstance(small(images()), tuple)
    logits, seen = small.eval()(images(), intermediates=True)
    assert torch.equal(logits, small(images()))
    assert len(seen["tokens"]) == 3 and seen["attention"][2] is None
    shares = seen["attention"][1].sum(-1)
    assert torch.allclose(shares, torch.ones_like(shares), atol=1e-5)


@pytest.mark.gpu
def test_compiled_on_the_gpu():
    model = ours("cls").cuda()
    masks = {k: v.cuda() for k, v in random_masks(model).items()}
    x = images().cuda()
    small = S.slim(model, masks)
    assert torch.allclose(small(x), S.masked(model, masks)(x), atol=1e-4)
    gated = S.GatedViT(model)
    run = torch.compile(gated, dynamic=False)
    assert torch.allclose(run(x), gated(x), atol=1e-3)
    S.L1()(run, Batch(x, torch.eye(10)[:4].cuda(), torch.arange(4).cuda(), 0))[0].backward()
    assert torch.allclose(torch.compile(small, dynamic=False)(x), small(x), atol=1e-3)


def test_even_widths_keep_the_best_channels():
    config = S.shape_of(ours("cls"))
    scores = {"blocks.0.v": torch.arange(24.0), "blocks.0.qk": torch.arange(24.0)}
    masks = _Plan(config, scores, "global", 1, True, 0.0).masks(0.5)
    # the 12 highest of 24 are head 1's upper half and all of head 2: mean width of the heads left is 6
    assert torch.equal(masks["blocks.0.v"].view(3, 8).sum(1), torch.tensor([0, 6, 6]))
    assert masks["blocks.0.v"].view(3, 8)[1, 2:].all()
