#!/usr/bin/env python3
"""Make the bundled data set `tiny` from CIFAR-10, and the lists of official class names.

    python tools/make_tiny.py DATA      # DATA holds cifar10.npz and cifar100.npz (x_train, y_train, x_test,
    y_test)

Per class, in the official order: the first 200 images of the training set are `train`, the next 50 are `val`,
the first 50 of the test set are `test`. Nothing is drawn at random, so that running this again writes the
same files.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).parent.parent / "vitlab" / "data" / "assets"
SIDE, COLUMNS = 32, 60
PARTS = {
    "train": ("train", 0, 200),
    "val": ("train", 200, 250),
    "test": ("test", 0, 50),
}  # official set, from, to


def chosen(labels, start, stop):
    """Indices of the images start..stop of each class, in the official order."""
    return np.sort(np.concatenate([np.flatnonzero(labels == k)[start:stop] for k in np.unique(labels)]))


def main(folder):
    with np.load(folder / "cifar10.npz", allow_pickle=False) as data:
        official = {key: data[key] for key in ("x_train", "y_train", "x_test", "y_test", "classes")}
    with np.load(folder / "cifar100.npz", allow_pickle=False) as data:
        names = {"cifar10": official["classes"].tolist(), "cifar100": data["classes"].tolist()}
    images, splits = [], {}
    for part, (source, start, stop) in PARTS.items():
        index = chosen(official[f"y_{source}"], start, stop)
        pixels = np.ascontiguousarray(official[f"x_{source}"][index])  # N H W C
        images.append(pixels)
        splits[part] = {
            "official": source,
            "sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
            "labels": official[f"y_{source}"][index].tolist(),
            "indices": index.tolist(),
        }
    tiles = np.concatenate(images)
    grid = tiles.reshape(-1, COLUMNS, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4)
    mosaic = Image.fromarray(grid.reshape(-1, COLUMNS * SIDE, 3))
    mosaic.save(ASSETS / "tiny.webp", lossless=True, quality=100, method=6)
    (ASSETS / "tiny.json").write_text(json.dumps({"columns": COLUMNS, "splits": splits}) + "\n")
    (ASSETS / "classes.json").write_text(json.dumps(names, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
