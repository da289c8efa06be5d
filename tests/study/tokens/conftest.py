import pytest
import torch

from vitlab.data import datasets
from vitlab.models.vit import ViT, ViTConfig
from vitlab.study.tokens.evaluation import Evaluator


@pytest.fixture(scope="session")
def tiny():
    return datasets.load("tiny")


@pytest.fixture(scope="session", params=["cls", "mean"])
def evaluator(request, tiny):
    torch.manual_seed(0)
    model = ViT(ViTConfig(image_size=32, patch_size=8, dim=32, depth=3, heads=2, mlp_dim=64, pool=request.param))
    return Evaluator(model.eval(), tiny, 40)


@pytest.fixture(scope="session")
def calibration(evaluator, tiny):
    return Evaluator(evaluator.plain, tiny, 8, split="train")
