"""Folders of image files of every kind and size."""

from collections import Counter

import numpy as np
import pytest
import torch
from data_cases import noise, pets, rows, save
from PIL import Image
from torchvision import datasets as tv

from vitlab.data import folders as pictures
from vitlab.data.datasets import DatasetMissing, load


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
    folders = [tmp_path / "a" / kind for kind in ("grey", "kinds")]
    for folder in folders:
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
        image.save(folders[name[0] < "8"] / name, **options)
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
    save(tmp_path / "a" / "y" / "large.jpg", large, quality=95)
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
    assert [len(load(name, root=tmp_path, val=v).val) for v in (18, 19, 0)] == [18, 9, 0]
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
        found = load(f"folder:{folder}", root=tmp_path, on_error="skip", val=2)
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
    with pytest.raises(ValueError, match=r"too few class folders \(none\)"):
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
