"""Data: against Pillow and torchvision by hand, and against everything that can be wrong with files."""

import hashlib
import http.server
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets as tv

from vitlab.data import datasets as data
from vitlab.data import folders as pictures
from vitlab.data import sources
from vitlab.data.datasets import DatasetMissing, batches, load

REAL = Path(os.environ.get("VITLAB_DATA", "/nowhere"))
needs_cifar10 = pytest.mark.skipif(
    not (REAL / "cifar10.npz").exists(), reason="VITLAB_DATA has no cifar10.npz"
)
needs_cifar100 = pytest.mark.skipif(
    not (REAL / "cifar100.npz").exists(), reason="VITLAB_DATA has no cifar100.npz"
)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No test sees the user's own data or the network."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("VITLAB_DATA", raising=False)
    nobody = "http://127.0.0.1:9/nothing"  # refused at once
    monkeypatch.setenv("VITLAB_TINY_IMAGENET_URL", nobody)
    for kind in (tv.CIFAR10, tv.CIFAR100):
        monkeypatch.setattr(kind, "url", nobody)


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


# ---- the bundled set


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


def test_mean_and_std_are_exact():
    tiny = load("tiny")
    pixels = tiny.train.images.double() / 255
    assert torch.allclose(torch.tensor(tiny.mean, dtype=torch.float64), pixels.mean((0, 2, 3)), atol=1e-12)
    expected = pixels.std((0, 2, 3), unbiased=False)
    assert torch.allclose(torch.tensor(tiny.std, dtype=torch.float64), expected, atol=1e-12)


@pytest.mark.parametrize("size", [16, 48])
def test_size_scales_as_pillow_does(size):
    small, tiny = load("tiny", size=size), load("tiny")
    assert small.image_size == size and small.key != tiny.key and load("tiny", size=32).key == tiny.key
    for i in (0, 777):
        image = Image.fromarray(tiny.train.images[i].permute(1, 2, 0).numpy())
        expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(small.train.images[i].permute(1, 2, 0).numpy() - expected).max() <= 1


def test_damaged_tiny_is_refused(monkeypatch):
    real = sources.hashlib.sha256
    monkeypatch.setattr(sources.hashlib, "sha256", lambda b=b"": real(b[:-1]))
    with pytest.raises(ValueError, match="damaged"):
        sources.tiny()


# ---- batches and subsets


def test_batches_in_order_and_shuffled():
    tiny = load("tiny")
    plain = list(batches(tiny.val, 64))
    assert [len(y) for _, y in plain] == [64] * 7 + [52]
    assert torch.equal(torch.cat([x for x, _ in plain]), tiny.val.images)
    draws = [
        torch.cat([y for _, y in batches(tiny.val, 64, generator=torch.Generator().manual_seed(seed))])
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    shuffled = list(batches(tiny.val, 64, generator=torch.Generator().manual_seed(1), drop_last=True))
    assert [len(y) for _, y in shuffled] == [64] * 7
    label = dict(zip(rows(tiny.val.images), tiny.val.labels.tolist()))
    seen = [(h, k) for x, y in shuffled for h, k in zip(rows(x), y.tolist())]
    assert len(set(seen)) == 448 and all(label[h] == k for h, k in seen)
    assert list(batches(tiny.val.take(5), 64, drop_last=True)) == []
    with pytest.raises(ValueError, match="batch_size 0"):
        batches(tiny.val, 0)


def test_take_is_balanced():
    few = load("tiny").test.take(25)
    assert len(few) == 25 and set(Counter(few.labels.tolist()).values()) == {2, 3}
    assert len(load("tiny").test.take(9999)) == 500


@pytest.mark.gpu
def test_batches_on_cuda_do_not_sync():
    tiny = load("tiny", device="cuda")
    draw = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen = [y for _, y in batches(tiny.train, 128, generator=draw)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert Counter(torch.cat(seen).tolist()) == dict.fromkeys(range(10), 200)
    with pytest.raises(ValueError, match="generator"):
        batches(tiny.train, 8, generator=torch.Generator())


# ---- CIFAR


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
        ({"x_train": jpeg}, "x_train and y_train.*JPEG"),
        ({"y_test": arrays["y_test"][::-1]}, "x_test and y_test"),
        ({"x_test": arrays["x_test"].astype(np.float32)}, "float32"),
        ({"x_train": arrays["x_train"][:, ::2]}, r"not uint8 \(300, 32, 32, 3\)"),
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


# ---- Tiny ImageNet

WNIDS = ["n03", "n01", "n02"]  # wnids.txt is not sorted


@pytest.fixture
def small_zip(tmp_path):
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
        monkeypatch.setenv("VITLAB_TINY_IMAGENET_URL", url)
        monkeypatch.setenv("VITLAB_TINY_IMAGENET_MD5", md5)

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
    assert not [p for p in (tmp_path / "root").rglob("*") if p.is_file()]


def test_unpacked_tiny_imagenet_and_its_faults(small_zip, tmp_path):
    for folder in ("packed", "open"):
        (tmp_path / folder).mkdir()
    (tmp_path / "packed" / "tiny-imagenet-200.zip").write_bytes(small_zip)
    with zipfile.ZipFile(io.BytesIO(small_zip)) as archive:
        archive.extractall(tmp_path / "open")
    assert (
        load("tiny-imagenet", root=tmp_path / "packed", val=3).key
        == load("tiny-imagenet", root=tmp_path / "open", val=3).key
    )
    (tmp_path / "packed" / "tiny-imagenet-200.zip").write_bytes(small_zip[:5000])
    with pytest.raises(ValueError, match="not a whole zip"):
        load("tiny-imagenet", root=tmp_path / "packed", val=3)
    (tmp_path / "open" / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn77\n")
    with pytest.raises(ValueError, match="n77"):
        load("tiny-imagenet", root=tmp_path / "open", val=3)


# ---- folders


def by_hand(image, size):
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).astype(int)


def test_every_kind_of_image(tmp_path):
    rgb = noise(0, 64, 64, 3)
    alpha = np.where(np.arange(64)[:, None] < 32, 0, 255).astype(np.uint8).repeat(64, 1)
    cut_out = np.dstack([rgb, alpha])
    white = np.where(alpha[..., None] == 255, rgb, 255).astype(np.uint8)
    wide = np.random.default_rng(3).integers(0, 65536, (64, 64)).astype(np.uint16)
    palette = Image.fromarray(np.arange(4096).reshape(64, 64).astype(np.uint8) // 16 % 4, "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    colours = np.array([[255, 255, 255], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)  # 0 is transparent
    cmyk = Image.fromarray(rgb).convert("CMYK")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    folder = tmp_path / "a" / "kinds"
    folder.mkdir(parents=True)
    made = {
        "1-rgb.png": (Image.fromarray(rgb), {}, rgb),
        "2-grey.png": (Image.fromarray(rgb[..., 0]), {}, rgb[..., :1].repeat(3, 2)),
        "3-rgba.png": (Image.fromarray(cut_out), {}, white),
        "4-palette.png": (palette, {"transparency": 0}, colours[np.asarray(palette)]),
        "5-cmyk.tiff": (cmyk, {}, np.asarray(cmyk.convert("RGB"))),
        "6-wide.png": (
            Image.fromarray(wide),
            {},
            np.rint(wide / 257).astype(np.uint8)[..., None].repeat(3, 2),
        ),
        "7-turned.png": (Image.fromarray(rgb), {"exif": turned}, np.rot90(rgb, -1)),
        "8-bits.png": (
            Image.fromarray(rgb[..., 0] > 99),
            {},
            np.where(rgb[..., :1] > 99, 255, 0).repeat(3, 2),
        ),
        "9-la.png": (Image.fromarray(cut_out[..., [0, 3]], "LA"), {}, white[..., :1].repeat(3, 2)),
    }
    for name, (image, options, _) in made.items():
        image.save(folder / name, **options)
    for size in (64, 24):
        found = load(f"folder:{tmp_path / 'a'}", root=tmp_path / "root", size=size, val=0)
        # one image is in the test split: find each by its nearest
        images = torch.cat([found.train.images, found.test.images]).permute(0, 2, 3, 1).numpy().astype(int)
        assert len(images) == len(made)
        for name, (_, _, expected) in made.items():
            hand = by_hand(Image.fromarray(np.ascontiguousarray(expected.astype(np.uint8))), size)
            assert np.abs(images - hand).reshape(len(images), -1).max(1).min() == 0, name


def test_sizes_are_scaled_and_cropped_in_the_centre(tmp_path):
    wide = np.zeros((50, 150, 3), np.uint8)
    wide[:, 50:100] = noise(0, 50, 50, 3)
    save(tmp_path / "a" / "x" / "wide.png", wide)
    save(tmp_path / "a" / "x" / "one.png", noise(1, 1, 1, 3))
    large = np.kron(noise(2, 8, 8, 3), np.ones((100, 100, 1), np.uint8))
    save(tmp_path / "a" / "x" / "large.jpg", large, quality=95)
    found = load(f"folder:{tmp_path / 'a'}", root=tmp_path, size=25, val=0)
    images = torch.cat([found.train.images, found.test.images]).permute(0, 2, 3, 1).numpy().astype(int)

    def nearest(expected):
        return np.abs(images - expected).reshape(len(images), -1).mean(1).min()

    whole = Image.fromarray(wide).resize((75, 25), Image.Resampling.BICUBIC)
    assert nearest(np.asarray(whole)[:, 25:50]) == 0
    assert nearest(noise(1, 1, 1, 3).astype(int)) == 0
    assert nearest(by_hand(Image.fromarray(large), 25)) < 3  # JPEG, decoded at a fraction


def test_order_and_labels_are_image_folders(tmp_path):
    assert pictures.KINDS == tv.folder.IMG_EXTENSIONS
    folder = pets(tmp_path / "pets", {"b": 7, "A": 5, "c": 6})
    (folder / ".ipynb_checkpoints").mkdir()
    save(folder / "c" / ".ipynb_checkpoints" / "x.png", noise(0, 4, 4, 3))
    save(folder / "c" / "deep" / "x.png", noise(5, 40, 40, 3))
    (folder / "c" / "notes.txt").write_text("no image")
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "train").symlink_to(folder)
    pets(tmp_path / "split" / "valid", {"A": 1, "b": 2, "c": 3}, seed=5000)
    pets(tmp_path / "split" / "test", {"A": 2, "b": 1, "c": 1}, seed=9000)
    found = load(f"folder:{tmp_path / 'split'}", root=tmp_path, size=40, val=99)
    assert found.classes == ("A", "b", "c") and len(found.val) == 6 and len(found.test) == 4
    (folder / ".ipynb_checkpoints").rmdir()
    reference = [s for s in tv.ImageFolder(str(folder)).samples if "ipynb" not in s[0]]
    assert found.train.labels.tolist() == [k for _, k in reference]
    for (path, _), image in zip(reference, found.train.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), image.permute(1, 2, 0).numpy())


def test_missing_splits_are_cut_class_by_class(tmp_path):
    folder = pets(tmp_path / "pets", {"a": 60, "b": 30, "c": 10}, size=(8, 8))
    name = f"folder:{folder}"
    whole = load(name, root=tmp_path)  # 5,000 is more than a fifth: a tenth
    assert [len(s) for s in (whole.train, whole.val, whole.test)] == [81, 9, 10]
    assert Counter(whole.test.labels.tolist()) == {0: 6, 1: 3, 2: 1}
    assert whole.image_size == 64
    parts = [set(rows(s.images)) for s in (whole.train, whole.val, whole.test)]
    assert len(set.union(*parts)) == 100
    assert [len(load(name, root=tmp_path, val=v).val) for v in (0.2, 18, 19, 0)] == [18, 18, 9, 0]
    other = load(name, root=tmp_path, seed=1)
    assert set(rows(other.test.images)) == parts[2] and set(rows(other.val.images)) != parts[1]
    assert len({whole.key, other.key, load(name, root=tmp_path, val=18).key}) == 3


def test_broken_images_are_named_or_skipped(tmp_path, capsys):
    folder = pets(tmp_path / "pets", {"a": 12, "b": 12})
    whole = (folder / "b" / "003.png").read_bytes()
    (folder / "b" / "003.png").write_bytes(whole[: len(whole) // 2])
    (folder / "a" / "empty.jpg").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a/empty\.jpg cannot be read as an image"):
            load(f"folder:{folder}", root=tmp_path)
        found = load(f"folder:{folder}", root=tmp_path, on_error="skip", val=0.1)
        assert found.skipped == 2 and sum(map(len, (found.train, found.val, found.test))) == 23
        assert "2 broken" in repr(found)
    assert capsys.readouterr().out.count("2 of 25 images") == 1  # the second time from the cache
    for file in (folder / "a").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"after skipping broken images.*class a"):
        load(f"folder:{folder}", root=tmp_path, on_error="skip")


def test_faulty_folders(tmp_path):
    with pytest.raises(DatasetMissing, match="there is no folder"):
        load(f"folder:{tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        load(f"folder:{tmp_path / 'empty'}")
    pets(tmp_path / "one", {"a": 3})
    (tmp_path / "one" / "hollow").mkdir()
    with pytest.raises(ValueError, match="no images in class hollow"):
        load(f"folder:{tmp_path / 'one'}")
    pets(tmp_path / "two" / "train", {"a": 2, "b": 2})
    pets(tmp_path / "two" / "test", {"a": 2, "dog": 2})
    with pytest.raises(ValueError, match="different classes: b, dog"):
        load(f"folder:{tmp_path / 'two'}")
    pets(tmp_path / "three" / "test", {"a": 1})
    with pytest.raises(ValueError, match="no train folder"):
        load(f"folder:{tmp_path / 'three'}")
    pets(tmp_path / "four", {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="at most 0 can be cut"):
        load(f"folder:{tmp_path / 'four'}", root=tmp_path)


# ---- caches


def caches(root):
    return sorted((root / "cache").glob("*.safetensors"))


def test_changed_folders_are_read_again(tmp_path):
    folder = pets(tmp_path / "pets", {"a": 10, "b": 10})
    first = load(f"folder:{folder}", root=tmp_path)
    (stamp,) = [p.stat().st_mtime_ns for p in caches(tmp_path)]
    assert load(f"folder:{folder}", root=tmp_path).key == first.key
    assert [p.stat().st_mtime_ns for p in caches(tmp_path)] == [stamp]
    save(folder / "a" / "000.png", noise(77, 40, 40, 3))
    changed = load(f"folder:{folder}", root=tmp_path)
    save(folder / "a" / "new.png", noise(78, 40, 40, 3))
    more = load(f"folder:{folder}", root=tmp_path)
    assert len({first.key, changed.key, more.key}) == 3 and len(more.train) == len(first.train) + 1
    assert len(caches(tmp_path)) == 1  # the old ones do not pile up


def test_a_damaged_cache_is_never_read(tmp_path):
    folder = pets(tmp_path / "pets", {"a": 10, "b": 10})
    first = load(f"folder:{folder}", root=tmp_path)
    (cache,) = caches(tmp_path)
    whole = cache.read_bytes()
    wrecks = [whole[:cut] for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1)]
    for wreck in [
        *wrecks,
        bytes(len(whole)),
        b"junk" * 999,
        whole.replace(b'\\"version\\": 1', b'\\"version\\": 0'),
    ]:
        assert wreck != whole
        cache.write_bytes(wreck)
        again = load(f"folder:{folder}", root=tmp_path)
        assert again.key == first.key and torch.equal(again.train.images, first.train.images)
        assert cache.read_bytes() == whole


def test_killed_while_the_cache_is_written(tmp_path):
    folder = pets(tmp_path / "pets", {"a": 30, "b": 30}, size=(8, 8))
    script = (
        "import os, signal, sys, vitlab.data.datasets as d\n"
        "def stop(tensors, path, metadata):\n"
        "    save(tensors, path, metadata); os.truncate(path, os.path.getsize(path) // 2)\n"
        "    print('writing', flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        "save, d.save_file = d.save_file, stop\n"
        f"d.load('folder:{folder}', root={str(tmp_path)!r})\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL and "writing" in ended.stdout
    (left,) = (tmp_path / "cache").iterdir()
    assert left.suffix == ".part" and not caches(tmp_path)
    os.utime(left, (0, 0))  # as if long ago
    assert len(load(f"folder:{folder}", root=tmp_path).train) == 49
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_loading_changes_no_cache(mini_cifar):
    root, _ = mini_cifar
    first = load("cifar10", root=root, val=50)
    before = {p: p.read_bytes() for p in caches(root)}
    second = load("cifar10", root=root, val=50)
    second.train.images.zero_()
    second.test.images.zero_()
    assert {p: p.read_bytes() for p in caches(root)} == before
    third = load("cifar10", root=root, val=50)
    assert torch.equal(third.train.images, first.train.images) and third.key == first.key
    small = load("cifar10", root=root, val=50, size=16)
    assert small.image_size == 16 and small.key != first.key and len(caches(root)) == 2
    assert torch.equal(load("cifar10", root=root, val=50, size=16).val.images, small.val.images)


def test_cache_falls_back_to_the_users(tmp_path, monkeypatch):
    folder = pets(tmp_path / "pets", {"a": 10, "b": 10})
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cache").write_text("a file where the folder should be")
    first = load(f"folder:{folder}", root=tmp_path / "root")
    assert len(list((tmp_path / "home" / ".cache" / "vitlab" / "cache").iterdir())) == 1
    monkeypatch.setattr(data, "_write_cache", None)  # not needed again
    assert load(f"folder:{folder}", root=tmp_path / "root").key == first.key


def test_a_full_disk_is_no_failure(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "save_file", full)
    folder = pets(tmp_path / "pets", {"a": 10, "b": 10})
    assert len(load(f"folder:{folder}", root=tmp_path).train) == 16
    assert "No space left" in capsys.readouterr().out and not list((tmp_path / "cache").iterdir())


# ---- splits and arguments


def test_validation_split(mini_cifar):
    root, arrays = mini_cifar
    official = Counter(rows(torch.from_numpy(arrays["x_train"].transpose(0, 3, 1, 2).copy())))
    label = dict(
        zip(rows(torch.from_numpy(arrays["x_train"].transpose(0, 3, 1, 2).copy())), arrays["y_train"])
    )
    for val, seed in ((50, 0), (50, 1), (57, 0), (290, 0), (1, 3)):
        found = load("cifar10", root=root, val=val, seed=seed)
        again = load("cifar10", root=root, val=val, seed=seed)
        assert len(found.val) == val and torch.equal(found.val.images, again.val.images)
        assert torch.equal(found.train.images, again.train.images)
        assert Counter(rows(torch.cat([found.train.images, found.val.images]))) == official
        for split in (found.train, found.val):
            assert [label[h] for h in rows(split.images)] == split.labels.tolist()
        counts = [found.val.labels.eq(k).sum().item() for k in range(10)]
        assert max(counts) - min(counts) <= 1
        pixels = found.train.images.double() / 255
        assert np.allclose(found.mean, pixels.mean((0, 2, 3)), atol=1e-12)
        assert np.allclose(found.std, pixels.std((0, 2, 3), unbiased=False), atol=1e-12)
    one, two = (set(rows(load("cifar10", root=root, val=50, seed=s).val.images)) for s in (0, 1))
    assert one != two
    none = load("cifar10", root=root, val=0)
    assert len(none.val) == 0 and none.val.images.shape == (0, 3, 32, 32) and len(none.train) == 300
    assert none.key == load("cifar10", root=root, val=0, seed=9).key


def test_uneven_classes_are_cut_in_proportion():
    chance = random.Random(0)
    for trial in range(50):
        counts = [chance.randint(1, 30) for _ in range(chance.randint(1, 8))]
        labels = torch.tensor([k for k, n in enumerate(counts) for _ in range(n)])
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(trial))]
        count = chance.randint(0, sum(counts) - len(counts))
        taken = data._drawn(labels, count, torch.Generator().manual_seed(trial), "trial")
        assert len(taken) == count == len(set(taken.tolist()))
        left = Counter(labels.tolist()) - Counter(labels[taken].tolist())
        assert set(left) == set(range(len(counts)))  # one of each class stays
        if min(counts) > 1 and count < len(labels) / 3:  # far from those limits: nearest whole numbers
            shares = [count * n / len(labels) for n in counts]
            assert all(abs(counts[k] - left[k] - share) < 1 for k, share in enumerate(shares))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"val": -1}, "val=-1"),
        ({"val": 1.5}, "val=1.5"),
        ({"val": True}, "val=True"),
        ({"val": 291}, "at most 290"),
        ({"size": 0}, "size=0"),
        ({"on_error": "ignore"}, "'raise' and 'skip'"),
        ({"name": "mnist"}, "cifar10, cifar100, tiny, tiny-imagenet and folder:PATH"),
        ({"name": "folder:"}, "unknown data set"),
    ],
)
def test_bad_arguments(mini_cifar, arguments, words):
    with pytest.raises(ValueError, match=words):
        load(**{"name": "cifar10", "root": mini_cifar[0]} | arguments)


def test_root_and_device(mini_cifar, monkeypatch):
    monkeypatch.setenv("VITLAB_DATA", str(mini_cifar[0]))
    found = load("cifar10", val=10)
    moved = found.to("meta")
    assert moved.train.images.is_meta and moved.val.labels.is_meta and moved.key == found.key
    assert load("cifar10", val=10, device="meta").test.images.is_meta
