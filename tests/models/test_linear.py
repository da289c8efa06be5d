"""Ripple, Hydra and plain linear attention in the ViT, against slow formulas and published counts."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitlab.models.linear import HydraAttention, LinearAttention, RippleAttention, depthwise, kernel_choice, strided
from vitlab.models.vit import ViT, ViTConfig

PUBLISHED = {"num_classes": 100, "dim": 384, "depth": 12, "heads": 6, "qkv_bias": False}
# attention -> options, parameters, MACs of this design, parameters (M) and GMac as published
MODELS = {
    "softmax": ({}, 21_363_172, 1_420_343_808, 21.36, 1.423),
    "ripple": ({"stages": 3}, 21_667_300, 1_476_266_496, 21.67, 1.487),
    "hydra": ({"branches": 4}, 33_970_660, 2_391_221_760, 33.97, 2.583),
}
SMALL = {"image_size": 16, "patch_size": 2, "dim": 24, "depth": 1, "heads": 3}


def counted(model, config):
    side = config.image_size
    # the fused softmax kernel of the CPU is not counted
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() // 2


def build(kind, **options):
    changes = {k: options.pop(k) for k in list(options) if k in ViTConfig.__dataclass_fields__}
    torch.manual_seed(0)
    config = ViTConfig(**SMALL | changes, attention=kind, attention_args=options)
    return ViT(config).blocks[0].attn, config


def tokens(config, batch=2, seed=1):
    return torch.randn(batch, config.tokens, config.dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_published_counts(name):
    """Parameters agree with the published figure to its last digit; MACs miss it by the shares given here.

    Ripple -0.7 %, where the baseline's own figure misses by 0.2 %; Hydra -7.4 %: the state of the shared keys and
    values is built once here, not once a branch.
    """
    options, parameters, macs, published_parameters, published_macs = MODELS[name]
    config = ViTConfig(**PUBLISHED, attention=name, attention_args=options)
    with torch.device("meta"):
        model = ViT(config)
        assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(parameters / 1e6, 2) == published_parameters
    assert counted(model.to_empty(device="cpu").eval(), config) == macs
    share = {"softmax": -0.0019, "ripple": -0.0072, "hydra": -0.0742}[name]
    assert macs / 1e9 / published_macs - 1 == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("linear", {}), ("linear", {"phi": "elu"})]
    + [("ripple", {"stages": s}) for s in (1, 2, 3, 4)]
    + [("hydra", {"branches": r}) for r in (1, 2, 8)],
)
def test_closed_macs_are_the_counted_ones(kind, options, pool):
    config = ViTConfig(**SMALL, pool=pool, attention=kind, attention_args=options)
    model, plain = ViT(config), ViTConfig(**SMALL, pool=pool)
    n, d = config.tokens, config.dim
    rest = plain.macs() - config.depth * (4 * n * d * d + 2 * n * n * d)
    assert counted(model, config) == rest + sum(b.attn.macs() for b in model.blocks)


@pytest.mark.parametrize("kind", ["linear", "ripple", "hydra"])
def test_cost_grows_with_the_tokens(kind):
    macs = [build(kind, image_size=side)[0].macs() / side**2 for side in (32, 64, 128)]
    assert max(macs) / min(macs) < 1.05
    n = [(s // 2) ** 2 for s in (32, 128)]
    softmax = [(4 * t * 24**2 + 2 * t * t * 24) / t for t in n]
    assert softmax[1] / softmax[0] > 4


@pytest.mark.parametrize("phi", ["relu", "elu", "softmax"])
def test_linear_attention_is_its_map_times_the_values(phi):
    attn, config = build("linear", phi=phi)
    x = tokens(config)
    weights = attn.map(x)
    values = attn.qkv(x)[..., 2 * config.dim :].unflatten(-1, (3, 8)).transpose(1, 2)
    torch.testing.assert_close(attn(x), attn.proj((weights @ values).transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-4)
    assert (weights >= 0).all() and weights.sum(-1).max() <= 1.00001


@pytest.mark.parametrize("grid", [8, 7, 5, 1])
def test_expansion_starts_as_bilinear(grid):
    """What the coarsest grid expands to is PyTorch's own bilinear upsampling (but for the last odd row)."""
    attn, _ = build("ripple", stages=1, image_size=2 * grid, pool="mean")
    coarse = (grid + 1) // 2
    values = torch.randn(1, 24, coarse, coarse)
    levels = [torch.zeros(1, 48, grid, grid), torch.cat([torch.zeros_like(values), values], dim=1)]
    found, side = attn.expanded(levels), 2 * coarse - 1
    assert found.shape == (1, 24, grid, grid)
    wanted = F.interpolate(values, size=(side, side), mode="bilinear", align_corners=True)
    torch.testing.assert_close(found[..., :side, :side], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_halving_and_doubling_are_the_convolutions_of_stride_two(side):
    """On grids of one or two cells, too, where only the weights that meet the image are used: values and gradients."""
    torch.manual_seed(0)
    fine, weight, bias = torch.randn(2, 6, side, side), torch.randn(6, 1, 3, 3), torch.randn(6)
    coarse = torch.randn(2, 6, (side + 1) // 2, (side + 1) // 2)
    options = {"stride": 2, "padding": 1, "groups": 6}
    ways = [(F.conv2d, options, (fine, weight, bias)),
            (F.conv_transpose2d, options | {"output_padding": 1 - side % 2}, (coarse, weight))]  # fmt: skip
    for convolve, options, inputs in ways:
        inputs = [x.double().requires_grad_() for x in inputs]
        found, wanted = strided(convolve, *inputs, fine=side), convolve(*inputs, **options)
        torch.testing.assert_close(found, wanted)
        grad = torch.randn_like(wanted)
        both = (torch.autograd.grad(y, inputs, grad) for y in (found, wanted))
        torch.testing.assert_close(*both)


def test_pooling_averages_and_keeps_keys_with_their_values():
    attn, config = build("ripple", stages=2, pool="mean", image_size=32)
    qkv = torch.ones(1, config.tokens, 3, 3, 8)
    qkv[:, :, 2] = 5
    pooled = attn.pooled(attn.levels(qkv)).unflatten(1, (-1,))
    assert pooled.shape == (1, 8 * 8 + 4 * 4, 2, 3, 8)
    inner = pooled[:, : 8 * 8].unflatten(1, (8, 8))[:, 1:, 1:]  # borders see the zero padding
    torch.testing.assert_close(inner[:, :, :, 0], torch.ones_like(inner[:, :, :, 0]))
    torch.testing.assert_close(inner[:, :, :, 1], torch.full_like(inner[:, :, :, 1], 5))


@pytest.mark.parametrize("kind", ["ripple", "hydra"])
def test_prefix_tokens_stay_out_of_the_grid(kind):
    attn, config = build(kind)
    x = tokens(config)
    other = x.clone()
    other[:, 0] += 1
    a, b = attn.packed(x), attn.packed(other)
    if kind == "ripple":
        for one, two in zip(attn.levels(a), attn.levels(b)):
            assert torch.equal(one, two)
    assert torch.equal(attn.image(a), attn.image(b))
    # ... but they are keys: every token notices
    assert ((attn(x) - attn(other)).abs().amax(dim=-1) > 0).all()


def test_ripple_against_attention_over_all_levels():
    """The same numbers from a quadratic product over tokens and pooled cells."""
    attn, config = build("ripple", stages=3, eps=1e-9)
    x = tokens(config)
    q, k, v = attn.packed(x).unbind(2)  # B N heads d
    keys, values, image = [k], [v], torch.cat([k.flatten(2), v.flatten(2)], -1)[:, 1:].transpose(1, 2)
    image = image.unflatten(-1, (8, 8))
    pyramid = [image[:, 24:]]
    for pool in attn.pools:
        image = torch.cat([pool(half) for half in image.chunk(2, dim=1)], dim=1)
        rows = image.flatten(2).transpose(1, 2).unflatten(-1, (2, 3, 8))
        keys, values = [*keys, rows[:, :, 0]], [*values, rows[:, :, 1]]
        pyramid.append(image[:, 24:])
    phi = lambda t: torch.cat([t.relu(), (-t).relu()], -1)  # noqa: E731
    weights = torch.einsum("bnhf,bmhf->bhnm", phi(q), phi(torch.cat(keys, 1)))
    y = torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), torch.cat(values, 1)).flatten(2)
    up = pyramid[3]
    for i in (2, 1, 0):
        up = attn.expands[i](up, output_size=pyramid[i].shape[-2:])
        up = up + pyramid[i] if i else up
    grid = (up + attn.local(pyramid[0])).flatten(2).transpose(1, 2)
    y = torch.cat([y[:, :1], y[:, 1:] + grid], dim=1)
    torch.testing.assert_close(attn(x), attn.proj(y), atol=1e-4, rtol=1e-4)
    rows = attn.map(x).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-5, rtol=0)


def test_hydra_branches_share_keys_and_values():
    """Each branch is a plain linear attention of its own queries; fusion and neighbourhood come after."""
    attn, config = build("hydra", branches=3)
    x = tokens(config)
    qkv = attn.packed(x)
    assert qkv.shape[2] == 5
    outs = attn.attend(qkv)
    for r in range(3):
        alone = attn.attend(qkv[:, :, [r, 3, 4]])[:, :, 0]
        torch.testing.assert_close(outs[:, :, r], alone, atol=1e-5, rtol=1e-4)
    image = qkv[:, 1:, 4].flatten(2).transpose(1, 2).unflatten(-1, (8, 8))
    branches = []
    for r in range(3):
        conv = F.conv2d(image, attn.local.weight[r::3], attn.local.bias[r::3], padding=1, groups=24)
        own = outs[:, :, r].flatten(2)
        branches.append(torch.cat([own[:, :1], own[:, 1:] + conv.flatten(2).transpose(1, 2)], dim=1))
    wanted = attn.proj(F.gelu(attn.fuse(attn.norm(torch.cat(branches, dim=-1)))))
    torch.testing.assert_close(attn(x), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("branches", [1, 4])
def test_views_branch_by_branch_are_one_grouped_convolution(branches):
    attn, _ = build("hydra", branches=branches)
    torch.nn.init.normal_(attn.local.bias)
    image = torch.randn(2, 24, 8, 8, generator=torch.Generator().manual_seed(3))
    grouped = attn.local(image).unflatten(1, (24, branches)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(attn.views(image), grouped, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("convolve, options", [(F.conv2d, {"stride": 2}), (F.conv_transpose2d, {"stride": 2})])
def test_depthwise_is_exact_under_autocast(convolve, options):
    """In bfloat16 but for the last rounding: PyTorch's own bfloat16 convolution has its weights rounded, too."""
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(3, 16, 8, 8, generator=draw).bfloat16().requires_grad_()
    weight = torch.randn(16, 1, 3, 3, generator=draw).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise(convolve, x, weight, padding=1, **options)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = convolve(*wide, padding=1, groups=16, **options)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), wanted, atol=1e-6, rtol=2**-8)
    pull = torch.randn(y.shape, generator=draw).bfloat16()
    y.backward(pull)
    wanted.backward(pull.double())
    torch.testing.assert_close(weight.grad.double(), wide[1].grad, atol=1e-5, rtol=1e-5)


def test_the_softmax_control_trains_in_bfloat16_like_softmax_attention(monkeypatch):
    """On a CPU its products are written out, as the fused function's backward pass is slow there."""
    attention, config = build("ripple", product="softmax")
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    with torch.autocast("cpu", torch.bfloat16):
        attention(tokens(config)).sum().backward()
    assert attention.qkv.weight.grad.abs().sum() > 0


def test_the_softmax_control_differs_in_the_product_alone():
    """Of plain linear attention nothing but softmax is left; the others keep their convolutions, keys and branches."""
    soft, config = build("linear", product="softmax")
    x = tokens(config)
    plain, _ = build("softmax")
    plain.load_state_dict(soft.state_dict())
    torch.testing.assert_close(soft(x), plain(x), atol=1e-5, rtol=1e-4)
    for kind, options in (("ripple", {"stages": 2}), ("hydra", {"branches": 3})):
        (one, config), (other, _) = build(kind, **options), build(kind, product="softmax", **options)
        assert {k: v.shape for k, v in one.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
        assert not torch.allclose(one(x), other(x), atol=1e-3) and other.map(x).shape == one.map(x).shape
        rows = other.map(x).sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-5, rtol=0)
        shape = dict(**SMALL, attention=kind, attention_args=options | {"product": "softmax"})
        assert counted(ViT(ViTConfig(**shape)), config) == ViTConfig(**shape).macs()
    attn, _ = build("hydra", branches=3, product="softmax")
    qkv = attn.packed(x)
    for r in range(3):
        alone = attn.attend(qkv[:, :, [r, 3, 4]])[:, :, 0]
        torch.testing.assert_close(attn.attend(qkv)[:, :, r], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "ripple", "hydra"])
def test_every_parameter_learns_and_compiles(kind):
    torch.manual_seed(0)
    config = ViTConfig(**SMALL, attention=kind, pool="mean")
    model = ViT(config)
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    F.cross_entropy(model(images), labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images)
    torch.testing.assert_close(half.float(), model(images), atol=5e-2, rtol=5e-2)


def test_intermediates_and_choice():
    for kind in ("linear", "ripple", "hydra"):
        model = ViT(ViTConfig(**SMALL, attention=kind)).eval()
        _, seen = model(torch.randn(1, 3, 16, 16), intermediates=True)
        assert seen["attention"][0].shape == (1, 3, 65, 65)
        assert kernel_choice(model) == "plain PyTorch (the device is cpu, head_dim=8 is not one of 16, 32, 64, 128)"
    assert kernel_choice(ViT(ViTConfig(**SMALL))).startswith("no linear attention")


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (RippleAttention, {"stages": 5}, "choose 1, 2, 3 or 4"),
        (HydraAttention, {"branches": 0}, "from 1 to 8"),
        (LinearAttention, {"phi": "gelu"}, "relu, elu, softmax"),
        (LinearAttention, {"kernels": "fast"}, "auto, off"),
        (LinearAttention, {"eps": 0.0}, "eps=0.0: a finite number above 0"),
        (LinearAttention, {"stages": 2}, "stages"),
    ],
)
def test_bad_options_are_named(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(24, 3, config=ViTConfig(**SMALL), **options)
    with pytest.raises(ValueError, match="no probabilities to drop"):
        cls(24, 3, config=ViTConfig(**SMALL, attention_dropout=0.1))
