"""Models of every supported form with shaken weights, masks, and the masked model by hooks alone."""

import copy

import pytest
import torch

from vitlab.compress.pruning.shape import KINDS, sizes
from vitlab.compress.pruning.structured import shape_of
from vitlab.models.vit import ViT, ViTConfig
from vitlab.utils import rng

TINY = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 3, "heads": 3, "mlp_dim": 40}
OURS = {
    "cls": {},
    "mean": {"pool": "mean", "pool_norm": "after", "pos": "none", "qkv_bias": False},
    "distilled": {"distilled": True},
    "hidden head": {"head_hidden": 16, "dropout": 0.1},
    "conv stem, conv MLP": {"stem": "conv", "mlp": "conv", "pool": "mean"},
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
    config, draw = shape_of(model), rng.generator(seed, "masks")
    kinds = [k for k in KINDS if k != "block" and not (k == "qk" and config.qk_norm)]
    masks = {k: torch.rand(n, generator=draw) < 0.6 for k, n in sizes(config, kinds).items()}
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
