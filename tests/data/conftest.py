"""No test of data sees the user's own files or the network; a small CIFAR on disk."""

import hashlib
import pickle

import numpy as np
import pytest
from data_cases import noise
from torchvision import datasets as tv

from vitlab.data import sources


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No test sees the user's own data or the network."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("VITLAB_DATA", raising=False)
    nobody = "http://127.0.0.1:9/nothing"  # refused at once
    monkeypatch.setattr(sources, "ZIP_URL", nobody)
    for kind in (tv.CIFAR10, tv.CIFAR100):
        monkeypatch.setattr(kind, "url", nobody)


@pytest.fixture
def mini_cifar(tmp_path, monkeypatch):
    """The official CIFAR-10 files with 300 images of noise, and the same as npz; sums of both recorded."""
    pixels, labels = noise(1, 360, 32, 32, 3), np.arange(360) % 10
    official = tmp_path / "official" / "cifar-10-batches-py"
    official.mkdir(parents=True)

    def write(name, content):
        raw = pickle.dumps(content, protocol=2)
        (official / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    def batch(part):
        planes = pixels[part].transpose(0, 3, 1, 2).reshape(-1, 3072)  # red plane, then green, then blue
        return {"data": planes, "labels": labels[part].tolist()}

    lists = [write(f"data_batch_{i + 1}", batch(slice(60 * i, 60 * i + 60))) for i in range(5)]
    monkeypatch.setattr(tv.CIFAR10, "train_list", lists)
    monkeypatch.setattr(tv.CIFAR10, "test_list", [write("test_batch", batch(slice(300, 360)))])
    meta = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(tv.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    for part, cut in (("train", slice(0, 300)), ("test", slice(300, 360))):
        pairs = (
            hashlib.sha256(x).digest() + int(k).to_bytes(8, "little")
            for x, k in zip(pixels[cut], labels[cut])
        )
        monkeypatch.setitem(
            sources.CIFAR_SUMS, f"cifar10/{part}", hashlib.sha256(b"".join(sorted(pairs))).hexdigest()
        )
    arrays = {
        "x_train": pixels[:300],
        "y_train": labels[:300],
        "x_test": pixels[300:],
        "y_test": labels[300:],
    }
    return official.parent, arrays
