"""Image files of any kind -> uint8 tensors of one size; folders of them as a data set."""

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vitlab.utils.files import digest

KINDS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# told by their content; Pillow opens other formats, too, one of them (EPS) by running another program
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
ALIASES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


class DatasetMissing(FileNotFoundError):
    """A data set that is not on this machine and could not be downloaded."""


@dataclass(frozen=True, eq=False)
class Source:
    """A data set as its makers split it: {"train" and perhaps "val", "test": (uint8 N 3 H W, int64 N)}."""

    splits: dict[str, tuple[Tensor, Tensor]]
    classes: tuple[str, ...]
    skipped: int = 0


class Plan(NamedTuple):
    """How to get a source, and its cache's name and stamp: with another it is out of date, but for None any will do."""

    stem: str
    stamp: str | None
    read: Callable[[str], Source]  # read(on_error)


def folder_plan(path, size):
    """The Plan for a folder of class folders, or of train, val and test folders of those, `size` square."""
    if not path.is_dir():
        raise DatasetMissing(f"folder:{path}: there is no folder {path.absolute()}")
    parts = {part: path / n for part, names in ALIASES.items() for n in names[::-1] if (path / n).is_dir()}
    if parts and "train" not in parts:
        raise ValueError(f"folder:{path} has {', '.join(p.name for p in parts.values())} but no train folder")
    items, classes = {}, None
    for part, folder in (parts or {"train": path}).items():
        items[part], names = listing(folder)
        if names != (classes or names):
            odd = sorted(set(names) ^ set(classes))
            raise ValueError(f"folder:{path}: {folder.name} and train have different classes: {', '.join(odd[:10])}")
        classes = names
    stats = [(name, os.stat(name)) for part in items for name, _ in items[part]]
    stamp = digest([[[name[len(str(path)) :], s.st_size, s.st_mtime_ns] for name, s in stats], classes, size])
    stem = f"folder-{re.sub(r'[^A-Za-z0-9_-]+', '-', path.name)}-{digest(str(path.resolve()), 8)}-{size}"

    def read(on_error):
        splits, skipped = decode(lambda name: Path(name).read_bytes(), items, size, on_error, path.name)
        for part, (_, labels) in splits.items():
            demand_all(labels.tolist(), classes, f"{path}, {part} (after skipping broken images)")
        return Source(splits, tuple(classes), skipped)

    return Plan(stem, stamp, read)


def listing(folder):
    """([(path, label)], class names) in torchvision ImageFolder's order, without what is hidden."""
    # not by ImageFolder itself: importing torchvision takes longer than opening the cache
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    if len(classes) < 2:
        raise ValueError(f"{folder} has too few class folders ({', '.join(classes) or 'none'}): two are needed")
    items = []
    for label, name in enumerate(classes):
        for top, _, files in sorted(os.walk(folder / name, followlinks=True)):
            paths = (os.path.join(top, file) for file in sorted(files) if file.lower().endswith(KINDS))
            items += [(path, label) for path in paths if not re.search(r"[\\/]\.", path[len(str(folder)) :])]
    demand_all([k for _, k in items], classes, f"{folder} (images end in {' '.join(KINDS)})")
    return items, classes


def demand_all(labels, classes, where):
    """ValueError naming the classes without an image."""
    missing = sorted(set(range(len(classes))).difference(labels))
    if missing:
        raise ValueError(f"{where}: no images in class {', '.join(str(classes[k]) for k in missing[:10])}")


def decode(read, items, size, on_error, title):
    """Decode {split: [(name, label)]} in threads -> ({split: (uint8 N 3 S S, int64 N)}, number skipped).

    A file that is no whole image ends it with a ValueError that names it, or is left out (on_error="skip").
    """
    count, splits = sum(map(len, items.values())), {}
    if count > 2000:
        print(f"{title}: reading {count:,} images (once; then from the cache)", flush=True)

    def work(item):
        try:
            return picture(read(item[0]), size)
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many kinds for broken files
            if on_error == "skip":
                return None
            why = "of no known kind" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(
                f"{title}: {item[0]} cannot be read as an image: {why} "
                f"(on_error='skip', or --skip-broken, leaves such files out)"
            ) from error

    with ThreadPool(min(16, os.cpu_count() or 1)) as pool:
        for part, named in items.items():
            images, labels = np.empty((len(named), 3, size, size), np.uint8), []
            for image, (_, label) in zip(pool.imap(work, named, 64), named):
                if image is not None:
                    images[len(labels)] = image
                    labels.append(label)
            splits[part] = torch.from_numpy(images[: len(labels)]), torch.tensor(labels, dtype=torch.int64)
    if skipped := count - sum(len(labels) for _, labels in splits.values()):
        print(f"{title}: {skipped:,} of {count:,} images could not be read and were skipped", flush=True)
    return splits, skipped


def picture(data, size):
    """The bytes of an image file -> uint8 3 `size` `size`, RGB.

    Turned as its EXIF says; transparent parts lie on white; 16-bit grey is scaled to 8 bits; of several
    frames the first. The short side is scaled to `size` (bicubic, antialiased) and the centre is cut out.
    ValueError for more pixels than Pillow takes without a warning: a small file could fill the memory.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS:,}")
        image.draft(None, (2 * size, 2 * size))  # decodes a far larger JPEG at a fraction, much faster
        image = _rgb(ImageOps.exif_transpose(image))
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def _rgb(image):
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        grey = np.rint(np.clip(np.asarray(image), 0, 65535) / 257).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
