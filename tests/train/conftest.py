"""A toy data set for the tests of training."""

import pytest
import torch

from vitlab.data.datasets import Dataset, Split


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    labels = torch.arange(64) % 4
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8) // 2 + (labels * 30).byte()[:, None, None, None]
    part = Split(images, labels)
    return Dataset(
        name="toy", train=part, val=part, test=part, classes=tuple("abcd"), mean=(0.5,) * 3, std=(0.25,) * 3, key="toy"
    )
