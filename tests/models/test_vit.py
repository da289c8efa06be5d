"""The ViT against timm, closed formulas and the published parameter counts."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vitlab.models import vit
from vitlab.models.attention import Attention
from vitlab.models.shape import BlockShape
from vitlab.models.vit import ViT, ViTConfig
from vitlab.utils.files import identity

SMALL = ViTConfig(image_size=16, patch_size=4, dim=32, depth=2, heads=2)
OURS = dataclasses.replace(SMALL, stem="conv", mlp="conv", pool="mean", mlp_dim=64)
RESIDUAL = dataclasses.replace(OURS, stem="residual")


def count(model, skip=()):
    return sum(p.numel() for n, p in model.named_parameters() if n not in skip)


def build(config):
    with torch.device("meta"):  # shapes only: the large ones need no memory
        return ViT(config)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (ViTConfig(image_size=224, patch_size=16, dim=192, depth=12, heads=3), 5_526_346),
        (ViTConfig(image_size=224, patch_size=16, dim=192, depth=6, heads=6), 2_857_162),
    ],
)
def test_parameters_of_the_dense_models_of_s0_are_exact(config, parameters):
    assert count(build(config)) == parameters


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (ViTConfig(image_size=48, dim=512, depth=8, heads=8), 25.3),  # S3
        (ViTConfig(num_classes=100, dim=384, depth=12, heads=6, qkv_bias=False), 21.36),  # S4
    ],
)
def test_parameters_round_to_the_published_millions(config, millions):
    digits = len(str(millions).split(".")[1])
    assert round(count(build(config)) / 1e6, digits) == millions


@pytest.mark.parametrize(("dim", "depth", "millions"), [(512, 6, 9.75), (256, 4, 1.66)])
def test_parameters_of_s2_as_its_counter_saw_them(dim, depth, millions):
    # the published figure is ptflops', which passes over bare parameters: the token and the positions
    config = ViTConfig(
        dim=dim, depth=depth, heads=dim // 64, mlp_dim=dim, qkv_bias=False, head_hidden=dim, dropout=0.1
    )
    assert round(count(build(config), skip=("cls_token", "pos_embed")) / 1e6, 2) == millions


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    attn = Attention(32, 4, config=SMALL).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    w, b = attn.qkv.weight, attn.qkv.bias
    out = torch.zeros_like(x)
    for image in range(2):
        q, k, v = (F.linear(x[image], w[i * 32 : i * 32 + 32], b[i * 32 : i * 32 + 32]) for i in range(3))
        for head in range(4):
            part = slice(head * 8, head * 8 + 8)
            scores = torch.exp(q[:, part] @ k[:, part].T / 8**0.5)
            out[image, :, part] = scores / scores.sum(1, keepdim=True) @ v[:, part]
    torch.testing.assert_close(attn(x), attn.proj(out))


@pytest.mark.parametrize("config", [SMALL, OURS, dataclasses.replace(SMALL, distilled=True)])
def test_intermediates_do_not_change_the_logits_and_maps_are_the_ones_used(config):
    model = ViT(config).eval()
    images = torch.randn(2, 3, 16, 16)
    logits, seen = model(images, intermediates=True)
    torch.testing.assert_close(logits, model(images))
    assert [t.shape for t in seen["tokens"]] == [(2, config.tokens, 32)] * 2
    normed = model.blocks[0].norm1(seen["embed"])
    attn = model.blocks[0].attn
    by_map = attn.proj((seen["attention"][0] @ attn.split(normed)[2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(by_map, attn(normed), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen["attention"][1].sum(-1), torch.ones(2, 2, config.tokens))


@pytest.mark.parametrize(
    "config",
    [SMALL, OURS, dataclasses.replace(OURS, pool="cls", distilled=True), ViTConfig(head_hidden=40, dim=96),
     RESIDUAL, dataclasses.replace(RESIDUAL, patch_size=2), ViTConfig(image_size=64, patch_size=16, stem="residual")],
)  # fmt: skip
def test_closed_form_macs_equal_the_counted_ones(config):
    model = ViT(config).eval()
    images = torch.randn(1, 3, config.image_size, config.image_size)
    exact = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), exact, FlopCounterMode(display=False) as counter:
        model(images)
    assert counter.get_total_flops() // 2 == config.macs()


def test_the_residual_stem_has_its_layers_and_adds_where_the_shape_stays():
    stem = ViT(dataclasses.replace(RESIDUAL, dim=128, image_size=32)).patch_embed.eval()
    convolutions = [m for m in stem.modules() if isinstance(m, torch.nn.Conv2d)]
    shapes = [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]) for m in convolutions]
    assert shapes == [(3, 24, 3, 1), (24, 64, 3, 2), (64, 64, 3, 1), (64, 128, 3, 2), (128, 128, 3, 1),
                      (128, 128, 1, 1)]  # fmt: skip
    x = images = torch.randn(2, 3, 32, 32)
    for norm in stem.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
    norms = [m for m in stem.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for conv, norm in zip(convolutions, norms):
        out = F.conv2d(x, conv.weight, stride=conv.stride, padding=1)
        mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
        out = F.gelu((out - mean) / (var + norm.eps).sqrt())
        x = x + out if x.shape == out.shape else out
    tokens = F.conv2d(x, convolutions[-1].weight, convolutions[-1].bias).flatten(2).transpose(1, 2)
    torch.testing.assert_close(stem(images), tokens, atol=1e-4, rtol=1e-4)


def test_the_local_mlp_is_a_depthwise_convolution_over_the_grid():
    config = dataclasses.replace(OURS, pool="cls")
    mlp = ViT(config).blocks[0].mlp.double()
    x = torch.randn(2, 17, 64, dtype=torch.float64)
    image = x[:, 1:].transpose(1, 2).reshape(2, 64, 4, 4)
    expected = x.clone()
    padded = F.pad(image, (1, 1, 1, 1))
    for i in range(4):
        for j in range(4):
            window = padded[:, :, i : i + 3, j : j + 3]
            expected[:, 1 + 4 * i + j] += (window * mlp.conv.weight[:, 0]).sum((2, 3)) + mlp.conv.bias
    torch.testing.assert_close(mlp.local(x), expected)


def test_another_attention_class_is_a_constructor_argument():
    class Double(Attention):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    plain, double = ViT(SMALL), ViT(SMALL, attention=Double)
    double.load_state_dict(plain.state_dict())
    x = torch.randn(1, 17, 32)
    torch.testing.assert_close(double.blocks[0].attn(x), 2 * plain.blocks[0].attn(x))


def test_stochastic_depth_drops_whole_branches_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = vit.Block(dataclasses.replace(SMALL, drop_path=0.25), Attention, SMALL.depth - 1).drop_path.train()
    out = drop(torch.ones(20_000, 2, 3)).flatten(1)
    assert ((out == 0).all(1) | (out == 4 / 3).all(1)).all()
    assert abs(out.mean() - 1) < 0.02
    assert (drop.eval()(torch.ones(5, 2, 3)) == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 30, "heads": 4}, "dim=30 is not a multiple of heads=4"),
        ({"patch_size": 5}, "image_size=32 is not a multiple"),
        ({"stem": "residual", "patch_size": 1}, "patch_size=1: the residual stem"),
        ({"stem": "residual", "image_size": 36, "patch_size": 6}, "patch_size=6: the residual stem"),
        ({"pool": "max"}, "pool='max': choose one of cls, mean"),
        ({"stem": "conv", "patch_size": 2, "image_size": 32, "depth": 0}, "depth=0"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"distilled": True, "pool": "mean"}, "distilled=True needs pool='cls'"),
        ({"class_token": False}, "needs the class token"),
        ({"registers": -1}, "registers=-1"),
        ({"norm_dim": 100}, "norm_dim=100 is less than the 192"),
        ({"attention": "linear", "blocks": ()}, "cannot have blocks of their own widths"),
        ({"act": "swish"}, "act='swish': choose one of gelu"),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**options)


def test_unknown_attention_and_wrong_image_sizes_are_named():
    with pytest.raises(ValueError, match="attention='quantum': choose one of softmax"):
        ViT(dataclasses.replace(SMALL, attention="quantum"))
    with pytest.raises(ValueError, match=r"\(3, 32, 32\); this model takes \(3, 16, 16\)"):
        ViT(SMALL)(torch.zeros(1, 3, 32, 32))


def test_what_can_be_said_in_two_ways_is_one_config():
    wordy = dataclasses.replace(
        SMALL, norm_dim=32, stem_dim=32, class_token=True, pos_dropout=0.0, head_dropout=0.0,
        blocks=[{"heads": [[2, 16, 16]], "hidden": 128, "scale": 0.25}] * 2,
    )  # fmt: skip
    assert wordy == SMALL and identity(wordy) == identity(SMALL)
    assert SMALL.shapes == (BlockShape.uniform(32, 2, 128),) * 2
    uneven = dataclasses.replace(SMALL, blocks=(dataclasses.replace(SMALL.shapes[0], hidden=8), SMALL.shapes[1]))
    assert uneven != SMALL and uneven.shapes[0].hidden == 8 and uneven.depth == 2


def test_the_keys_of_models_from_before_stay():
    known = "attention attention_args attention_dropout depth dim distilled drop_path dropout head_hidden heads"
    known += " image_size in_chans mlp mlp_dim norm_eps num_classes patch_size pool pool_norm pos qkv_bias stem"
    assert sorted(identity(SMALL)) == known.split()


@pytest.mark.parametrize("config", [SMALL, OURS, dataclasses.replace(OURS, pool="cls", distilled=True)])
def test_explicit_widths_give_the_uniform_models_outputs(config):
    model = ViT(config).eval()
    blocks = tuple(dataclasses.replace(shape, drop_path=0.5) for shape in config.shapes)  # else they would be dropped
    same = ViT(dataclasses.replace(config, blocks=blocks)).eval()
    assert same.config.blocks and list(same.state_dict()) == list(model.state_dict())
    same.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(same(images), model(images))
    assert same.config.macs() == config.macs() and same.config.parameters() == count(model)
