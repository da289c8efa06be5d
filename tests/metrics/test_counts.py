"""Parameters, bytes and operations against formulas, however a model is written."""

import pytest
import safetensors.torch
import timm
import torch
from metrics_cases import small_timm, vit_macs
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

from vitlab.metrics import measure
from vitlab.metrics.measure import macs, macs_by_module, ptflops_macs


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight
        self.c = nn.Linear(8, 3).requires_grad_(False)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def test_parameters_and_size_count_shared_tensors_once(tmp_path):
    model = Tied()
    assert measure.parameters(model) == 64 + 27
    safetensors.torch.save_model(model, tmp_path / "whole.safetensors")
    size = (tmp_path / "whole.safetensors").stat().st_size
    assert abs(measure.size_bytes(model) - size) <= 32  # save_model notes the second name
    assert measure.size_bytes(model) == measure.size_bytes(Tied().bfloat16())


class Plain(nn.Module):
    """A transformer block's attention, by hand or fused."""

    def __init__(self, fused):
        super().__init__()
        self.fused, self.qkv, self.proj = fused, nn.Linear(96, 288), nn.Linear(96, 96)

    def forward(self, images):
        x = images.flatten(2).transpose(1, 2).repeat(1, 1, 32)  # B 64 96
        q, k, v = self.qkv(x).view(-1, 64, 3, 4, 24).permute(2, 0, 3, 1, 4)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q @ k.transpose(-2, -1) * 24**-0.5).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [False, True])
def test_macs_of_attention_however_written(fused):
    assert macs(Plain(fused), (3, 8, 8)) == 64 * 96 * 288 + 2 * 64 * 64 * 96 + 64 * 96 * 96


def test_macs_of_timms_vit_and_of_torchvisions_with_its_opaque_fast_path():
    from torchvision.models import VisionTransformer

    expected = vit_macs(65, 96, 3, 384, 10, stem=64 * 3 * 4 * 4 * 96)
    model = small_timm(img_size=32, embed_dim=96, depth=3, num_classes=10)
    assert model.blocks[0].attn.fused_attn
    model.train()
    assert macs(model, (3, 32, 32)) == pytest.approx(expected, rel=1e-3)
    assert model.training
    theirs = VisionTransformer(32, 4, 3, 3, 96, 384, num_classes=10)
    assert macs(theirs, (3, 32, 32)) == pytest.approx(expected, rel=1e-3)


def test_macs_of_our_vit_with_a_conv_stem():
    from vitlab.models.vit import ViT, ViTConfig

    model = ViT(ViTConfig(image_size=32, patch_size=4, dim=48, depth=2, heads=3, mlp_dim=96, num_classes=10))
    assert macs(model, (3, 32, 32)) == vit_macs(model.config.tokens, 48, 2, 96, 10, stem=64 * 48 * 48)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.Conv2d(16, 32, 3, 1, 1, groups=4, bias=False),
        nn.Conv2d(32, 32, 5, 1, 2, groups=32, bias=False), nn.Conv2d(32, 8, 1, bias=False),
    )  # fmt: skip


def test_macs_of_convolutions_equal_the_formula_and_ptflops():
    pixels = 16 * 16
    layers = [pixels * 27 * 16, pixels * 4 * 9 * 32, pixels * 25 * 32, pixels * 32 * 8]
    found = macs_by_module(conv_net(), (3, 32, 32))
    assert found == {"": sum(layers), **{str(i): layer for i, layer in enumerate(layers)}}
    assert ptflops_macs(conv_net(), (3, 32, 32)) == (sum(layers), "")


def test_macs_of_a_known_conv_net_agree_with_ptflops():
    model = timm.create_model("resnet18", num_classes=10)
    theirs, _ = ptflops_macs(model, (3, 64, 64))  # it adds norms and activations to the products
    assert macs(model, (3, 64, 64)) == pytest.approx(theirs, rel=0.015)


def test_macs_by_module_add_up():
    model = small_timm(img_size=16, embed_dim=48, depth=2, num_classes=5)
    found = macs_by_module(model, (3, 16, 16))
    blocks = [found[f"blocks.{i}"] for i in range(2)]
    assert found["blocks"] == sum(blocks)
    assert found[""] == found["blocks"] + found["patch_embed"] + found["head"]
    linears = sum(found[f"blocks.0.attn.{part}"] for part in ("qkv", "proj"))
    assert found["blocks.0.attn"] == linears + 2 * 17 * 17 * 48  # the products belong to no layer


def test_macs_of_products_that_torch_counts_as_nothing():
    class Products(nn.Module):
        def forward(self, x):
            matrix, vector = x[0, 0], x[0, 0, 0]  # 6 6, 6
            torch.addmv(vector, matrix, vector)
            torch.addbmm(matrix, x[0], x[0])
            return matrix @ vector, vector @ vector

    assert macs(Products(), (3, 6, 6)) == 36 + 3 * 216 + 36 + 6


@pytest.fixture(scope="module")
def custom():
    @torch.library.custom_op("vitlab_test::pairs", mutates_args=())
    def pairs(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bchw,bcvw->bhv", x, x)

    return torch.ops.vitlab_test.pairs


def test_macs_of_a_custom_operation_need_its_formula(custom):
    class Pairs(nn.Module):
        def forward(self, x):
            return custom(x)

    with pytest.warns(UserWarning, match="vitlab_test.pairs"):
        assert macs(Pairs(), (3, 4, 5)) == 0
    register_flop_formula(custom)(lambda shape, *, out_shape=None, **_: 2 * 3 * 4 * 4 * 5)
    try:
        assert macs(Pairs(), (3, 4, 5)) == 3 * 4 * 4 * 5
    finally:
        del flop_registry[custom]


def test_macs_look_inside_a_compiled_model():
    model = conv_net()
    assert macs(torch.compile(model, backend="eager"), (3, 8, 8)) == macs(model, (3, 8, 8))
    model.compile(backend="eager")
    assert macs(model, (3, 8, 8)) == macs(conv_net(), (3, 8, 8))


def test_ptflops_leaves_the_model_alone_and_fails_quietly(capfd):
    model = conv_net().train()
    before, linear = dict(vars(model)), F.linear
    assert ptflops_macs(model, (3, 8, 8))[0] > 0
    found, why = ptflops_macs(model, (1, 8, 8))
    assert found is None and "expected input" in why
    assert vars(model) == before and model.training and F.linear is linear
    assert capfd.readouterr() == ("", "")
