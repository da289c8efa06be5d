"""The bundled set, CIFAR and Tiny ImageNet: read whole, checked, or missed with a word on how to get them."""

import hashlib
import http.server
import io
import json
import pickle
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import REAL, needs_cifar10, needs_cifar100, noise, rows
from PIL import Image

from vitlab.data import datasets as data
from vitlab.data import sources
from vitlab.data.datasets import DatasetMissing, load


def test_tiny_is_balanced_and_whole():
    tiny = load("tiny")
    for split, each in ((tiny.train, 200), (tiny.val, 50), (tiny.test, 50)):
        assert Counter(split.labels.tolist()) == dict.fromkeys(range(10), each)
        assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (3, 32, 32)
    assert len(set(rows(torch.cat([tiny.train.images, tiny.val.images, tiny.test.images])))) == 3000
    assert tiny.classes[3] == "cat" and tiny.num_classes == 10 and tiny.image_size == 32
    assert sum(p.stat().st_size for p in (Path(data.__file__).parent / "assets").iterdir()) < 6e6
    assert "2,000 train" in repr(tiny) and tiny.describe() == repr(tiny)
    assert load("tiny", val=7, seed=5).key == tiny.key  # its validation split is fixed


@needs_cifar10
def test_tiny_is_what_its_origin_says():
    about = json.loads((Path(data.__file__).parent / "assets" / "tiny.json").read_text())["splits"]
    tiny = load("tiny")
    with np.load(REAL / "cifar10.npz") as official:
        for part, source in (("train", "train"), ("val", "train"), ("test", "test")):
            index, split = about[part]["indices"], getattr(tiny, part)
            assert np.array_equal(official[f"x_{source}"][index].transpose(0, 3, 1, 2), split.images.numpy())
            assert np.array_equal(official[f"y_{source}"][index], split.labels.numpy())
    assert not set(about["train"]["indices"]) & set(about["val"]["indices"])


def test_damaged_tiny_is_refused(monkeypatch):
    real = sources.hashlib.sha256
    monkeypatch.setattr(sources.hashlib, "sha256", lambda b=b"": real(b[:-1]))
    with pytest.raises(ValueError, match="damaged"):
        sources.tiny()


def test_official_files_and_npz_are_the_same(mini_cifar, tmp_path):
    official, arrays = mini_cifar
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "cifar10.npz", **arrays)
    one, two = load("cifar10", root=official, val=30), load("cifar10", root=tmp_path / "npz", val=30)
    assert one.key == two.key and one.classes == two.classes and one.classes[9] == "truck"
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(one, part).images, getattr(two, part).images)
        assert torch.equal(getattr(one, part).labels, getattr(two, part).labels)
    assert np.array_equal(two.test.images.numpy().transpose(0, 2, 3, 1), arrays["x_test"])


def test_cifar_refuses_other_pixels_labels_and_shapes(mini_cifar, tmp_path):
    _, arrays = mini_cifar
    jpeg = arrays["x_train"].copy()
    for i in range(len(jpeg)):
        file = io.BytesIO()
        Image.fromarray(jpeg[i]).save(file, "JPEG", quality=95)
        jpeg[i] = np.asarray(Image.open(file))
    for change, words in (
        ({"x_train": jpeg}, r"x_train \(uint8 \(300, 32, 32, 3\)\) and y_train.*JPEG"),
        ({"y_test": arrays["y_test"][::-1]}, "x_test .* and y_test"),
        ({"x_test": arrays["x_test"].astype(np.float32)}, "float32"),
        ({"x_train": arrays["x_train"][:, ::2]}, r"uint8 \(300, 16, 32, 3\)"),
    ):
        np.savez(tmp_path / "cifar10.npz", **arrays | change)
        with pytest.raises(ValueError, match=words):
            load("cifar10", root=tmp_path, val=30)
    for content in (b"", b"PK\3\4 not a zip", pickle.dumps(arrays)):
        (tmp_path / "cifar10.npz").write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as npz"):
            load("cifar10", root=tmp_path)


def test_order_of_an_npz_does_not_matter_to_the_sum(mini_cifar, tmp_path):
    _, arrays = mini_cifar
    order = np.random.default_rng(0).permutation(300)
    shuffled = arrays | {"x_train": arrays["x_train"][order], "y_train": arrays["y_train"][order]}
    np.savez(tmp_path / "cifar10.npz", **shuffled)
    found = load("cifar10", root=tmp_path, val=0)
    assert np.array_equal(found.train.labels, shuffled["y_train"])
    a, b = (sources._by_hash(c["x_train"], c["y_train"]) for c in (arrays, shuffled))
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


@pytest.mark.alone
@needs_cifar10
@pytest.mark.timeout(60)
def test_real_cifar10_opens_within_a_second():
    load("cifar10", root=REAL)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        cifar = load("cifar10", root=REAL)
        times.append(time.perf_counter() - start)
    assert min(times) < 1
    assert Counter(cifar.val.labels.tolist()) == dict.fromkeys(range(10), 500)
    whole = load("cifar10", root=REAL, val=0)  # mean and std as widely published
    assert np.allclose(whole.mean, (0.49139968, 0.48215841, 0.44653091), atol=1e-7)
    assert np.allclose(whole.std, (0.24703223, 0.24348513, 0.26158784), atol=1e-7)
    assert whole.train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]  # the official order


@needs_cifar100
@pytest.mark.timeout(60)
def test_real_cifar100():
    whole = load("cifar100", root=REAL, val=0)
    assert np.allclose(whole.mean, (0.50707516, 0.48654887, 0.44091784), atol=1e-7)
    assert np.allclose(whole.std, (0.26733429, 0.25643846, 0.27615047), atol=1e-7)
    assert list(whole.classes) == sorted(whole.classes) and whole.num_classes == 100
    assert set(Counter(whole.train.labels.tolist()).values()) == {500}


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny-imagenet"])
def test_missing_data_says_where_and_how(name, tmp_path):
    start = time.perf_counter()
    with pytest.raises(DatasetMissing) as caught:
        load(name, root=tmp_path / "empty")
    text = str(caught.value)
    assert isinstance(caught.value, FileNotFoundError) and time.perf_counter() - start < 10
    assert str(tmp_path / "empty") in text and "VITLAB_DATA" in text and "put the file there" in text
    assert "127.0.0.1:9" in text and "refused" in text


WNIDS = ["n03", "n01", "n02"]  # wnids.txt is not sorted


@pytest.fixture
def small_zip():
    """Bytes of a zip laid out as tiny-imagenet-200.zip: 3 classes of 10 train images, 6 validation images."""

    def jpeg(seed, grey=False):
        file = io.BytesIO()
        Image.fromarray(noise(seed, 64, 64) if grey else noise(seed, 64, 64, 3)).save(file, "JPEG")
        return file.getvalue()

    file, top = io.BytesIO(), "tiny-imagenet-200/"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(top + "wnids.txt", "\n".join(WNIDS) + "\n")
        archive.writestr(
            top + "words.txt", "n00\tthing\nn01\tcrane\nn02\tcrane, tower crane\nn03\tcat, true cat\n"
        )
        for k, wnid in enumerate(WNIDS):
            for i in range(10):
                archive.writestr(f"{top}train/{wnid}/images/{wnid}_{i}.JPEG", jpeg(100 * k + i, grey=i == 3))
            archive.writestr(f"{top}train/{wnid}/{wnid}_boxes.txt", "x")
        marks = [f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t1\t2\t3" for i in range(6)]
        archive.writestr(top + "val/val_annotations.txt", "\n".join(marks) + "\n")
        for i in range(6):
            archive.writestr(f"{top}val/images/val_{i}.JPEG", jpeg(900 + i))
    return file.getvalue()


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """A function that serves a folder on the loopback and points the loader at its tiny-imagenet-200.zip."""
    running = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    def start(content, md5):
        folder = tmp_path / "www"
        folder.mkdir(exist_ok=True)
        (folder / "tiny-imagenet-200.zip").write_bytes(content)
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), lambda *a: Quiet(*a, directory=str(folder))
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        url = f"http://127.0.0.1:{server.server_port}/tiny-imagenet-200.zip"
        monkeypatch.setattr(sources, "ZIP_URL", url)
        monkeypatch.setattr(sources, "ZIP_MD5", md5)

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.mark.network
def test_tiny_imagenet_is_downloaded_checked_and_read(small_zip, serve, tmp_path):
    root = tmp_path / "root"
    serve(small_zip, hashlib.md5(small_zip).hexdigest())
    found = load("tiny-imagenet", root=root, val=6)
    assert [len(s) for s in (found.train, found.val, found.test)] == [24, 6, 6] and found.image_size == 64
    assert found.classes == ("crane (n01)", "crane (n02)", "cat")  # sorted ids; equal names told apart
    assert found.test.labels.tolist() == [2, 0, 1, 2, 0, 1]
    with zipfile.ZipFile(io.BytesIO(small_zip)) as archive:
        for name, image in (
            ("val/images/val_4.JPEG", found.test.images[4]),
            ("train/n02/images/n02_3.JPEG", load("tiny-imagenet", root=root, val=0).train.images[13]),
        ):
            plain = Image.open(io.BytesIO(archive.read(f"tiny-imagenet-200/{name}"))).convert("RGB")
            assert np.array_equal(np.asarray(plain), image.permute(1, 2, 0).numpy())
    assert sorted(p.name for p in root.iterdir()) == ["cache", "tiny-imagenet-200.zip"]
    again = load("tiny-imagenet", root=root, val=6)
    assert again.key == found.key and torch.equal(again.train.images, found.train.images)
    (root / "tiny-imagenet-200.zip").unlink()
    assert load("tiny-imagenet", root=root, val=6).key == found.key  # the cache is enough


@pytest.mark.network
def test_wrong_checksum_is_refused_and_nothing_left(small_zip, serve, tmp_path):
    serve(small_zip, "0" * 32)
    with pytest.raises(DatasetMissing, match="MD5 0000"):
        load("tiny-imagenet", root=tmp_path / "root", val=6)
    assert not [p for p in (tmp_path / "root").rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_faults_of_a_tiny_imagenet(small_zip, tmp_path):
    path = tmp_path / "tiny-imagenet-200.zip"
    path.write_bytes(small_zip[:5000])
    with pytest.raises(ValueError, match="not a whole zip"):
        load("tiny-imagenet", root=tmp_path, val=3)
    listed = "\n".join(WNIDS).encode()  # stored as it is, with a checksum
    for damaged in (small_zip.replace(listed, listed[:-1] + b"x"), small_zip.replace(b"PK\3\4", b"PK\3\5", 1)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            load("tiny-imagenet", root=tmp_path)
    with zipfile.ZipFile(io.BytesIO(small_zip)) as whole, zipfile.ZipFile(path, "w") as other:
        for name in whole.namelist():
            marks = name.endswith("val_annotations.txt")
            other.writestr(name, "val_0.JPEG\tn77\n" if marks else whole.read(name))
    with pytest.raises(ValueError, match="n77"):
        load("tiny-imagenet", root=tmp_path, val=3)
