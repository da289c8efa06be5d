"""Images a second through the training pipeline: vitlab on one core against torchvision in a DataLoader.

    python bench/data.py [--dataset tiny|cifar10] [--batch 128] [--seconds 5] [--json FILE]

Ours shuffles, augments and normalises whole batches in this process on one thread. The baseline does the same
with torchvision.transforms.v2, image by image, in a DataLoader of two worker processes of one thread each,
started and warmed up before the clock runs and never waiting for the end of an epoch; once on uint8 tensors
and once on PIL images. All are measured in turns, several times; the ratio is of the medians, against the
faster of the two baselines.
"""

import argparse
import os
import platform
import statistics
import time

import PIL
import torch
import torchvision
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from vitlab.data.augment import Augment, normalize
from vitlab.data.datasets import batches, load
from vitlab.utils import files, rng

ROUNDS = 3
WORKERS = 2
EXTRA = {"": None, "+randaugment(2,9)": v2.RandAugment, "+trivial": v2.TrivialAugmentWide}


class Pictures(TorchDataset):
    """What a user of torchvision would write: one image, transformed, and its label."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


def torchvision_loader(data, batch, extra, pil, workers=WORKERS):
    """An iterator without end of batches from `workers` processes, on PIL images or on uint8 tensors."""
    size, split = data.image_size, data.train
    steps = [v2.RandomCrop(size, padding=4, padding_mode="reflect"), v2.RandomHorizontalFlip()]
    steps += [extra()] if extra else []
    steps += [v2.ToImage()] if pil else []
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
    images = [v2.functional.to_pil_image(x) for x in split.images] if pil else split.images
    pictures = Pictures(images, split.labels.tolist(), v2.Compose(steps))
    endless = RandomSampler(pictures, replacement=True, num_samples=10**9)
    loader = DataLoader(
        pictures, batch_size=batch, sampler=endless, num_workers=workers, persistent_workers=workers > 0
    )
    return iter(loader)


def vitlab_loader(data, batch, spec):
    """An iterator without end of batches made in this process."""
    augment = Augment(spec, mean=data.mean)
    shuffle, draw = rng.generator(0, "shuffle"), rng.generator(0, "augment")
    while True:
        for images, labels in batches(data.train, batch, generator=shuffle, drop_last=True):
            yield normalize(augment(images, draw), data.mean, data.std), labels


def rate(loader, seconds):
    """Images a second over `seconds`."""
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        count += len(next(loader)[0])
    return count / passed


def warmed(loader, batches_ahead=20):
    """The loader, past the start of its workers and what they had fetched ahead."""
    for _ in range(batches_ahead):
        next(loader)
    return loader


def compare(data, batch, seconds, extra, transform):
    """One row: the medians and ranges of ours and of both baselines, and the ratio."""
    spec = "crop(4)+flip" + extra
    makers = {
        "vitlab": lambda: vitlab_loader(data, batch, spec),
        "torchvision tensor": lambda: torchvision_loader(data, batch, transform, pil=False),
        "torchvision PIL": lambda: torchvision_loader(data, batch, transform, pil=True),
    }
    rates = {name: [] for name in makers}
    for _ in range(ROUNDS):
        for name, make in makers.items():
            # made anew each time, so that no other's workers are running or hold batches ready
            loader = warmed(make())
            rates[name].append(rate(loader, seconds / ROUNDS))
            del loader
    median = {name: statistics.median(found) for name, found in rates.items()}
    best = max(median["torchvision tensor"], median["torchvision PIL"])
    return {"spec": spec, "images_per_s": median, "rounds": rates, "ratio": median["vitlab"] / best}


def conditions(data, batch):
    return {
        "data": data.name,
        "images": len(data.train),
        "image_size": data.image_size,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "workers": WORKERS,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="tiny", help="a data set of vitlab.data.load")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5.0, help="measured for each loader, warm-up aside")
    parser.add_argument("--json", help="also write the conditions and rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load(options.dataset)
    if not 0 < options.batch <= len(data.train):
        parser.error(f"--batch must be 1 to {len(data.train)}, the training images of {data.name}")
    about = conditions(data, options.batch)
    print("; ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items()))
    title = f"images/s (median of {ROUNDS})"
    print(f"{title:34}{'vitlab':>10}{'tv tensor':>11}{'tv PIL':>9}{'ratio':>8}")
    rows = []
    for extra, transform in EXTRA.items():
        row = compare(data, options.batch, options.seconds, extra, transform)
        ours, tensor, pil = row["images_per_s"].values()
        print(f"{row['spec']:34}{ours:10,.0f}{tensor:11,.0f}{pil:9,.0f}{row['ratio']:7.1f}x", flush=True)
        rows.append(row)
    if options.json:
        files.write_json(options.json, {"conditions": about, "rows": rows})


if __name__ == "__main__":
    main()
