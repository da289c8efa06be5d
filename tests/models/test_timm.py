"""timm's models as ours: the same outputs, shared weights, or a refusal by name; and any of them by its config."""

import copy

import pytest
import timm
import torch
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer

from vitlab.models import checkpoint
from vitlab.models.timm import TimmConfig, as_vit, from_timm
from vitlab.models.vit import ViT, ViTConfig

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
KINDS = {
    "plain": {},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "mean of all with a CLS token": {"global_pool": "avg", "pool_include_prefix": True},
    "mean of patches beside a CLS token": {"global_pool": "avg"},
    "mean without a CLS token": {"global_pool": "avg", "class_token": False},
    "mean after the norm": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "norm of the CLS token alone": {"fc_norm": True},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "registers with positions": {"reg_tokens": 2},
    "LayerScale": {"init_values": 0.1},
    "QK-norm": {"qk_norm": True},
    "norm before the blocks": {"pre_norm": True},
    "attention norm": {"scale_attn_norm": True},
    "MLP norm": {"scale_mlp_norm": True},
    "no positions": {"pos_embed": "none"},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "ReLU": {"act_layer": "relu"},
    "SwiGLU, packed": {"mlp_layer": SwiGLUPacked},
    "GLU, its gate last": {"mlp_layer": GluMlp, "act_layer": "silu"},
    "all dropouts": {"drop_rate": 0.1, "pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1,
                     "drop_path_rate": 0.2},
    "all at once": {"reg_tokens": 1, "init_values": 0.3, "qk_norm": True, "scale_attn_norm": True, "pre_norm": True,
                    "global_pool": "avg", "drop_path_rate": 0.1},
}  # fmt: skip


def made(distilled=False, **options):
    torch.manual_seed(0)
    model = (VisionTransformerDistilled if distilled else VisionTransformer)(**SIZES | options)
    with torch.no_grad():  # timm starts biases and some tokens at zero: make every weight count
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images(n=3):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", KINDS)
def test_timm_weights_give_timm_outputs(name):
    theirs = made(**KINDS[name])
    ours = from_timm(theirs)
    assert not ours.training and isinstance(ours, ViT)
    torch.testing.assert_close(ours(images()), theirs(images()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(images(), intermediates=True)[0], ours(images()))
    names = [n.replace("fc_norm.", "norm.") for n in theirs.state_dict()]
    assert sorted(ours.state_dict()) == sorted(names)
    assert ours.config.parameters() == sum(p.numel() for p in theirs.parameters())
    assert checkpoint.from_dict(checkpoint.to_dict(ours.config)) == ours.config


@pytest.mark.parametrize("name", ["plain", "mean of patches beside a CLS token", "SwiGLU, packed", "all at once"])
def test_closed_form_macs_are_those_counted_on_timms_model(name):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    theirs = made(**KINDS[name])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        theirs(images(1))
    assert from_timm(theirs).config.macs() == counter.get_total_flops() // 2


def test_weights_are_shared_or_copied_and_stay_frozen():
    theirs = made(init_values=0.1)
    theirs.patch_embed.requires_grad_(False)
    shared, copied = from_timm(theirs), from_timm(theirs, share=False)
    assert all(p is q for p, q in zip(shared.parameters(), theirs.parameters()))
    assert not shared.patch_embed.proj.weight.requires_grad and not copied.patch_embed.proj.weight.requires_grad
    before = copied(images())
    optimiser = torch.optim.SGD([p for p in shared.parameters() if p.requires_grad], lr=0.1)
    shared.train()(images()).square().sum().backward()
    optimiser.step()
    torch.testing.assert_close(shared.eval()(images()), theirs(images()), atol=1e-5, rtol=1e-5)
    assert torch.equal(copied(images()), before) and not torch.allclose(shared(images()), before, atol=1e-3)
    moved = from_timm(made().double())
    assert moved(images().double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"global_pool": "map"}, "attention pooling"),
        ({"global_pool": "max"}, "global_pool='max'"),
        ({"patch_drop_rate": 0.5}, "patch dropout"),
        ({"attn_layer": "diff"}, "attention other than timm's Attention"),
        ({"block_fn": ParallelScalingBlock}, "blocks of type ParallelScalingBlock"),
        ({"block_fn": ResPostBlock}, "blocks of type ResPostBlock"),
        ({"dynamic_img_size": True}, "dynamic image sizes"),
        ({"img_size": (32, 16)}, "not square"),
        ({"norm_layer": "rmsnorm"}, "norms other than LayerNorm"),
        ({"final_norm": False}, "no last norm"),
        ({"mlp_layer": SwiGLU, "act_layer": "silu"}, "MLPs of type SwiGLU"),
        ({"act_layer": "hard_swish"}, "the activation Hard"),
        ({"num_classes": 0}, "no classifier"),
        ({"embed_norm_layer": "layernorm"}, "a stem other than PatchEmbed"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        from_timm(made(**options))


def test_other_classes_are_refused_by_name():
    class Mine(VisionTransformer):
        pass

    with pytest.raises(ValueError, match="timm's Mine"):
        from_timm(Mine(**SIZES))
    with pytest.raises(ValueError, match="timm's ResNet"):
        as_vit(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match="Linear is neither"):
        as_vit(torch.nn.Linear(2, 2))
    mine = ViT(ViTConfig(dim=32, depth=1, heads=2))
    assert as_vit(mine) is mine


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"])
def test_registered_models_convert(name):
    theirs = timm.create_model(name, img_size=64, depth=3, num_classes=7).eval()
    torch.testing.assert_close(
        from_timm(theirs)(torch.ones(1, 3, 64, 64)), theirs(torch.ones(1, 3, 64, 64)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "options"), [("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}), ("resnet10t", {"in_chans": 1})]
)
def test_any_timm_model_is_a_config_is_saved_and_loaded(name, options, tmp_path):
    config = TimmConfig(name=name, num_classes=4, options=options)
    assert config == checkpoint.from_dict(checkpoint.to_dict(config))
    model = config.build().eval()
    assert model.config == config
    x = torch.randn(2, config.in_chans, config.image_size, config.image_size)
    checkpoint.save(model, tmp_path / "m.safetensors", about={"by": "timm"})
    again = checkpoint.load(tmp_path / "m.safetensors")
    assert type(again) is type(model) and torch.equal(again(x), model(x)) and model(x).shape == (2, 4)
    assert config.macs() > 0 and copy.deepcopy(again).config == config
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_225.*vit_tiny_patch16_224"):
        TimmConfig(name="vit_tiny_patch16_225")
