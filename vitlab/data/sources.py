"""Where images come from: the bundled set, CIFAR and Tiny ImageNet, read whole into uint8 tensors."""

import hashlib
import io
import json
import os
import re
import socket
import zipfile
import zlib
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitlab.data.folders import DatasetMissing, Plan, Source, decode, demand_all, folder_plan
from vitlab.utils.files import atomic, digest

ZIP = "tiny-imagenet-200.zip"
ZIP_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
ZIP_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
ZIP_SIZE = 64  # pixels a side of its images
# what a zip file with a bit flipped, cut short or encrypted may end in
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)
TIMEOUT = 20  # seconds without a byte before a download is given up
# SHA-256 of the sorted SHA-256 sums of (pixels, label) of all images: of the set, whatever its order
CIFAR_SUMS = {
    "cifar10/train": "af69a6c12769f03b01e344d02658e1f92ce393706a0b01ae8dbe72966c5f7c33",
    "cifar10/test": "5ccaadab91eb2ff51c6a444c87ec70a1de453c139db6bb4a8a8c1c6de36bee70",
    "cifar100/train": "b01173833cc76e4c37e026eff89b354ac7a6bc6cfe73cbb7afbf9e55ad5786fd",
    "cifar100/test": "c8c275ad7be0681405b706809159b8b00729bbba7a8082b2bc9bd720c67fd446",
}


def plan(name, root, size=None):
    """The Plan for the data set `name` (all but "tiny") under the folder `root`; else a ValueError."""
    if name in ("cifar10", "cifar100"):
        return Plan(name, digest(CIFAR_SUMS), lambda on_error: cifar(name, root))
    if name == "tiny-imagenet":
        path = root / ZIP
        facts = path.stat() if path.exists() else None
        return Plan(name, facts and digest([facts.st_size, facts.st_mtime_ns]), partial(tiny_imagenet, path))
    if name.startswith("folder:") and name != "folder:":
        return folder_plan(Path(name.removeprefix("folder:")).expanduser(), size or 64)
    raise ValueError(f"unknown data set {name!r}: allowed are cifar10, cifar100, tiny, tiny-imagenet and folder:PATH")


def home():
    """The folder for data where nothing else is said: $VITLAB_DATA, else ~/.cache/vitlab."""
    return Path(os.environ.get("VITLAB_DATA") or "~/.cache/vitlab").expanduser()


def tiny():
    """The bundled images of CIFAR-10 (see assets/README.md); ValueError if their pixels are damaged."""
    assets = resources.files("vitlab.data") / "assets"
    about = json.loads((assets / "tiny.json").read_text())
    with Image.open(io.BytesIO((assets / "tiny.webp").read_bytes())) as mosaic:
        grid = np.asarray(mosaic.convert("RGB"))
    tiles = grid.reshape(-1, 32, about["columns"], 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)  # N H W C
    splits = {}
    for part, said in about["splits"].items():
        pixels, tiles = np.split(tiles, [len(said["labels"])])
        if hashlib.sha256(pixels.tobytes()).hexdigest() != said["sha256"]:
            raise ValueError(f"the bundled data set's {part} pixels are damaged: install the package again")
        splits[part] = _tensors(pixels, said["labels"])
    return Source(splits, _official_classes("cifar10"))


def cifar(name, root):
    """CIFAR-10 or -100 (Krizhevsky 2009) from root/<name>.npz, else the official files, else downloaded.

    The npz holds x_train, x_test (uint8 N 32 32 3) and y_train, y_test. ValueError unless its pixels and labels have
    the recorded sums, since JPEG copies circulate that cost 2-3 points of accuracy; torchvision checks the official
    files. CIFAR-10 keeps its order; CIFAR-100 is put in the order of its images' SHA-256, because its copies come in
    different ones. DatasetMissing if it is nowhere and the download fails.
    """
    path = root / f"{name}.npz"
    parts = _from_npz(name, path) if path.exists() else _from_torchvision(name, root, path)
    if name == "cifar100":
        parts = {part: _by_hash(*arrays) for part, arrays in parts.items()}
    return Source({part: _tensors(*arrays) for part, arrays in parts.items()}, _official_classes(name))


def _from_npz(name, path):
    try:
        with np.load(path, allow_pickle=False) as data:
            parts = {part: (data[f"x_{part}"], data[f"y_{part}"].ravel()) for part in ("train", "test")}
    except (KeyError, MemoryError, ValueError, *DAMAGED) as error:
        raise ValueError(f"{path} cannot be read as npz with x_train, y_train, x_test, y_test: {error}") from error
    for part, (pixels, labels) in parts.items():
        right = pixels.dtype == np.uint8 and pixels.shape == (len(labels), 32, 32, 3)
        if not right or _set_sum(pixels, labels) != CIFAR_SUMS[f"{name}/{part}"]:
            raise ValueError(
                f"{path}: x_{part} ({pixels.dtype} {pixels.shape}) and y_{part} are not pixels and labels of the "
                f"official {name} (SHA-256 of the set of images). JPEG or resized copies are refused: use the official "
                f"python files, or remove this file to have them downloaded"
            )
    return parts


def _from_torchvision(name, root, npz):
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    # which downloads only what is not there, or is there with other checksums
    fetch = lambda: [kind(root, train=train, download=True) for train in (True, False)]  # noqa: E731
    sets = _downloaded(name, fetch, kind.url, (npz, root / kind.base_folder, root / kind.filename))
    return {part: (found.data, np.asarray(found.targets)) for part, found in zip(("train", "test"), sets)}


def _set_sum(pixels, labels):
    pairs = (h + int(k).to_bytes(8, "little", signed=True) for h, k in zip(_hashes(pixels), labels))
    return hashlib.sha256(b"".join(sorted(pairs))).hexdigest()


def _by_hash(pixels, labels):
    order = sorted(range(len(labels)), key=list(zip(_hashes(pixels), labels.tolist())).__getitem__)
    return pixels[order], labels[order]


def tiny_imagenet(path, on_error="raise"):
    """Tiny ImageNet (Stanford CS231n, 200 classes, 64 x 64) from its zip at `path`, else downloaded to there.

    Read straight from the zip, nothing is extracted. The official validation images, which have labels, are
    our "test". Classes are the sorted WordNet ids, as ImageFolder has them, under their first name in
    words.txt. DatasetMissing if it is not there and the download fails; ValueError for another layout.
    """
    if not path.exists():
        _downloaded("tiny-imagenet", partial(_download_zip, path), f"{ZIP_URL} (MD5 {ZIP_MD5})", [path])
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGED as error:
        raise ValueError(f"{path} is not a whole zip file ({error}): remove it to have it downloaded again") from error
    with archive:
        top = path.stem + "/"
        read = lambda name: archive.read(top + name)  # noqa: E731
        try:
            ids = sorted(read("wnids.txt").decode().split())
            number = {wnid: k for k, wnid in enumerate(ids)}
            words = dict(_rows(read("words.txt")))
            marks = [(f"val/images/{image}", number[wnid]) for image, wnid in _rows(read("val/val_annotations.txt"))]
        except DAMAGED as error:
            raise ValueError(f"{path} is damaged ({error}): remove it to have it downloaded again") from error
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is not laid out as Tiny ImageNet: {error!r}") from error
        found = (re.fullmatch(r"(train/(\w+)/images/[^/]+\.JPEG)", n.removeprefix(top)) for n in archive.namelist())
        items = {"train": sorted((m[1], number[m[2]]) for m in found if m and m[2] in number), "test": marks}
        for part in items:
            demand_all([k for _, k in items[part]], ids, f"{path}, {part}")
        splits, skipped = decode(read, items, ZIP_SIZE, on_error, "tiny-imagenet")
    first = [words.get(wnid, wnid).split(",")[0].strip() for wnid in ids]
    classes = tuple(w if first.count(w) == 1 else f"{w} ({wnid})" for w, wnid in zip(first, ids))
    return Source(splits, classes, skipped)


def _rows(data):
    """The first two tab-separated fields of each line."""
    return [line.split("\t")[:2] for line in data.decode().splitlines() if line.strip()]


def _download_zip(path):
    from torchvision.datasets.utils import download_url

    with atomic(path) as part:
        download_url(ZIP_URL, part.parent, part.name, ZIP_MD5)


def _downloaded(name, fetch, url, looked):
    """What `fetch` gives; DatasetMissing, with the paths that were looked for, where it fails."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        return fetch()
    except Exception as error:
        places = "\n".join(f"  {path}" for path in looked)
        raise DatasetMissing(
            f"data set {name!r} is not there. Looked for\n{places}\n"
            f"Two ways to get it: put the file there (another folder: root=... or VITLAB_DATA); or let it be "
            f"downloaded from {url} to\n{looked[0].parent}, which failed just now: {type(error).__name__}: {error}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _tensors(pixels, labels):
    """uint8 N H W C and labels -> contiguous uint8 N C H W and int64 N."""
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return images, torch.as_tensor(np.asarray(labels, np.int64))


def _hashes(pixels):
    return [hashlib.sha256(image).digest() for image in np.ascontiguousarray(pixels)]


def _official_classes(name):
    return tuple(json.loads((resources.files("vitlab.data") / "assets" / "classes.json").read_text())[name])
