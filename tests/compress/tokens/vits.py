"""Small models and images for the tests of token reduction."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitlab.models.vit import ViT, ViTConfig

BASE = {"mlp": "conv", "stem": "conv", "pool": "mean"}  # the study's own baseline
KINDS = [{}, BASE, {"distilled": True, "mlp": "conv"}, {"pool": "mean", "pool_norm": "after", "mlp": "conv"}]


def small(seed=0, **options):
    torch.manual_seed(seed)
    model = ViT(ViTConfig(**{"dim": 32, "depth": 4, "heads": 2, "mlp_dim": 48, "num_classes": 5} | options))
    for parameter in model.parameters():  # tokens that differ, so that scores do
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def pictures(n=3, seed=1, side=32):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def operations(run, *inputs):
    """Multiply-accumulates of what `run(*inputs)` really does, by torch's counter."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run(*inputs)
    return counter.get_total_flops() / 2
