"""Images on disk and in memory that the tests of data share."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REAL = Path(os.environ.get("VITLAB_DATA", "/nowhere"))

needs_cifar10 = pytest.mark.skipif(
    not (REAL / "cifar10.npz").exists(), reason="VITLAB_DATA has no cifar10.npz"
)

needs_cifar100 = pytest.mark.skipif(
    not (REAL / "cifar100.npz").exists(), reason="VITLAB_DATA has no cifar100.npz"
)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def pets(folder, counts, size=(40, 40), seed=0):
    """A folder of PNG images of noise, `counts` {class: number}."""
    for k, (name, count) in enumerate(counts.items()):
        for i in range(count):
            save(folder / name / f"{i:03}.png", noise(seed + 1000 * k + i, *size, 3))
    return folder


def rows(images):
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]
