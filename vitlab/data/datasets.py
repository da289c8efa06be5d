"""Data sets as uint8 tensors on the device: loading, caching, splits and batches."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vitlab.data import sources
from vitlab.data.sources import DatasetMissing, Source
from vitlab.utils.files import digest
from vitlab.utils.rng import generator as stream
from vitlab.utils.tensors import load_tensors, save_tensors

__all__ = ["Dataset", "DatasetMissing", "Split", "batches", "load"]
VERSION = 1  # of the cache files; raise it when decoding or their layout changes
PARTS = ("train", "val", "test")


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Images and their classes: `images` uint8 N C H W, `labels` int64 N."""

    images: Tensor
    labels: Tensor

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, n):
        """The first `n` images (or all, if fewer), as evenly over the classes as can be, in their order."""
        labels = self.labels.cpu()
        by_class = torch.argsort(labels, stable=True)
        first = torch.searchsorted(labels[by_class], labels[by_class])  # where each one's class begins
        rank = torch.empty_like(labels)
        rank[by_class] = torch.arange(len(labels)) - first
        chosen = torch.argsort(rank, stable=True)[:n].sort().values.to(self.labels.device)
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Three splits and what is known of them.

    `mean` and `std` are those of the pixels of `train` in [0, 1], one a channel, exact (a constant channel's
    std reads 1, so that it can be divided by). `key` is a short hash of the pixels, labels and split.
    `skipped` counts broken images left out.
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    key: str
    skipped: int = 0

    @property
    def num_classes(self):
        return len(self.classes)

    @property
    def image_size(self):
        """Height, and width, in pixels."""
        return self.train.images.shape[-1]

    def to(self, device):
        """The same data on `device`."""
        return dataclasses.replace(self, **{part: getattr(self, part).to(device) for part in PARTS})

    def with_train(self, images):
        """The same data with the first `images` training images (as `Split.take`); a key and a name of its own."""
        train = self.train.take(images)
        return dataclasses.replace(self, train=train, name=f"{self.name}, {len(train):,} images",
                                   key=digest([self.key, "train", len(train)]))  # fmt: skip

    def describe(self):
        """One line: name, sizes, shape, classes, key."""
        counts = ", ".join(f"{len(getattr(self, part)):,} {part}" for part in PARTS)
        shape = "x".join(map(str, self.train.images.shape[1:]))
        skipped = f", {self.skipped:,} broken images skipped" if self.skipped else ""
        return f"{self.name}: {counts} images of {shape}, {self.num_classes} classes{skipped}, key {self.key}"

    __repr__ = describe


def load(name, *, root=None, device="cpu", val=5000, seed=0, size=None, on_error="raise"):
    """Load a data set as uint8 tensors on `device`.

    name      "cifar10", "cifar100", "tiny-imagenet", "tiny" (3,000 images of CIFAR-10, bundled) or
              "folder:PATH": PATH/{train,val,test}/CLASS/image or PATH/CLASS/image, any sizes and kinds of
              image. The official validation images of Tiny ImageNet are the `test` here, since its own test
              set has no labels.
    root      folder with the data and their cache (root/cache); default $VITLAB_DATA, else ~/.cache/vitlab.
    val       size of the validation split that is cut out of the training set, class by class in proportion,
              drawn from `seed`; 0 leaves `val` empty. It is not applied where the data come with their own, as
              "tiny" and folders with a val folder do. In a folder's images a count above a fifth of the training
              set means a tenth of it.
    size      height and width in pixels to scale to (bicubic, antialiased); default: as they are, 64 for
              folders (short side to 64, then the centre).
    on_error  "raise" stops at a broken image and names it; "skip" leaves it out and counts it in `.skipped`.

    A folder without a test folder gives a tenth of its training images, the same for every `seed`.
    Raises DatasetMissing (a FileNotFoundError) with where it looked and how to get the data; ValueError for
    arguments or files that are wrong.
    """
    _check(name, val, size, on_error)
    root = Path(root or sources.home()).expanduser()
    if size == sources.NATIVE.get(name):
        size = None
    if name == "tiny":
        source, about = _prepared(_resized(sources.tiny(), size))
    else:  # images of a folder are decoded at their size, those of the others are scaled
        scaled = None if name.startswith("folder:") else size
        source, about = _opened(sources.plan(name, root, size), root, on_error, scaled)
    splits, sums, cut = _split(source, about["sums"], name, val, seed)
    sums = sums.sum(0).tolist()  # C [sum, sum of squares]
    count = len(splits["train"]) * splits["train"].images[0, 0].numel()
    std = [math.sqrt(count * square - total**2) / count / 255 for total, square in sums]
    return Dataset(
        name=name,
        **splits,
        classes=source.classes,
        mean=tuple(total / count / 255 for total, _ in sums),
        std=tuple(s or 1.0 for s in std),
        key=digest([name.split(":")[0], about["content"], cut]),
        skipped=source.skipped,
    ).to(device)


def batches(split, batch_size, *, generator=None, drop_last=False):
    """Iterate over (images uint8 B C H W, labels int64 B), on the split's device, without a sync.

    Shuffled if a `generator` is given, which must be of the split's device; otherwise in order, as views.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: must be at least 1")
    device = split.images.device
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"the generator is on {generator.device}, the images on {device}: make it on theirs")
    return _batches(split, batch_size, generator, drop_last)


def _batches(split, batch_size, generator, drop_last):
    count = len(split)
    device = split.images.device
    order = None if generator is None else torch.randperm(count, generator=generator, device=device)
    for start in range(0, count - batch_size + 1 if drop_last else count, batch_size):
        if order is None:
            yield split.images[start : start + batch_size], split.labels[start : start + batch_size]
        else:
            index = order[start : start + batch_size]
            yield split.images.index_select(0, index), split.labels.index_select(0, index)


def _check(name, val, size, on_error):
    if not isinstance(name, str):
        raise ValueError(f"name={name!r}: text is needed, such as 'cifar10' or 'folder:PATH'")
    if not isinstance(val, int) or isinstance(val, bool) or val < 0:
        raise ValueError(f"val={val!r}: a count of images, 0 or more")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"size={size!r}: pixels, at least 1, or None")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: allowed are 'raise' and 'skip'")


def _split(source, sums, name, val, seed):
    """Cut what is missing from train -> ({part: Split}, sums of train's, what the key depends on)."""
    splits = {part: Split(*tensors) for part, tensors in source.splits.items()}
    train, cut = [*source.splits["train"], sums], {}
    if "test" not in splits:
        cut["test"] = count = max(1, round(len(sums) / 10))
        # not from `seed`: what is tested on must never become training data in another run
        train, taken = _carve(train, count, stream(0, "test split"), f"{name}: test")
        splits["test"] = Split(*taken[:2])
    if "val" not in splits:
        available = len(train[1])
        few = name.startswith("folder:") and val > available / 5
        count = max(1, round(available / 10)) if few else val
        cut |= {"val": count, "seed": seed if count else None}
        train, taken = _carve(train, count, stream(seed, "validation split"), f"{name}: val={val}")
        splits["val"] = Split(*taken[:2])
    return splits | {"train": Split(*train[:2])}, train[2], cut


def _carve(tensors, count, draw, what):
    """Draw `count` rows of (images, labels, ...) -> (the rest, the drawn); the rest overwrites the tensors.

    The last rows move into the gaps, for a copy of all the rest would double the memory and take seconds.
    """
    taken = _drawn(tensors[1], count, draw, what)
    left = len(tensors[1]) - count
    drawn = [t[taken] for t in tensors]
    gaps, tail = taken[taken < left], torch.arange(left, left + count)
    tail = tail[~torch.isin(tail, taken)]
    for t in tensors:
        t[gaps] = t[tail]
    return [t[:left] for t in tensors], drawn


def _drawn(labels, count, draw, what):
    """Indices (ascending) of `count` images drawn in proportion to the classes; one of each class stays."""
    groups = [torch.nonzero(labels == k).flatten() for k in labels.unique()]
    room = [len(group) - 1 for group in groups]
    if count > sum(room):
        raise ValueError(f"{what}: of {len(labels):,} images at most {sum(room):,} can be cut, not {count:,}")
    shares = [divmod(count * len(group), len(labels)) for group in groups]
    sizes = [min(share, most) for (share, _), most in zip(shares, room)]
    while sum(sizes) < count:  # the largest remainders first, then whoever has room
        for k in sorted(range(len(groups)), key=lambda k: -shares[k][1]):
            if sizes[k] < room[k] and sum(sizes) < count:
                sizes[k] += 1
    drawn = [group[torch.randperm(len(group), generator=draw)[:n]] for group, n in zip(groups, sizes)]
    return torch.cat(drawn).sort().values


def _opened(plan, root, on_error, size):
    """_prepared() of a plan's source, scaled to `size`: from a cache that is whole and in date, else anew."""
    file = f"{plan.stem}-{size}.safetensors" if size else f"{plan.stem}.safetensors"
    path = root / "cache" / file
    if found := _read_cache(path, plan.stamp, on_error):
        return found
    source = _resized(_opened(plan, root, on_error, None)[0], size) if size else plan.read(on_error)
    if plan.stamp is None:  # just downloaded
        plan = sources.plan(plan.stem, root)
    prepared = _prepared(source)
    try:
        _write_cache(path, plan.stamp, *prepared)
    except OSError as error:
        print(f"{path} cannot be written ({error}): the data are read anew each time", flush=True)
    return prepared


def _prepared(source):
    """(source, what is worth keeping of it: a hash of all, and the sums of each training image's pixels)."""
    content = hashlib.sha256(json.dumps([source.classes, source.skipped]).encode())
    for part, (images, labels) in sorted(source.splits.items()):
        content.update(f"{part} {tuple(images.shape)}".encode())
        content.update(images.contiguous().numpy())
        content.update(labels.contiguous().numpy())
    chunks = source.splits["train"][0].split(1000)
    sums = [torch.stack([c.sum((2, 3)), c.int().square().sum((2, 3))], 2) for c in chunks]
    return source, {"content": content.hexdigest(), "sums": torch.cat(sums)}  # sums: int64 N C 2


def _resized(source, size):
    """The source scaled to `size`; None leaves it as it is."""
    if size is None:
        return source
    splits = {}
    for part, (images, labels) in source.splits.items():
        chunks = [F.interpolate(c, (size, size), mode="bicubic", antialias=True) for c in images.split(1000)]
        splits[part] = torch.cat(chunks), labels
    return dataclasses.replace(source, splits=splits)


def _write_cache(path, stamp, source, about):
    tensors = {"sums": about["sums"]}
    for part, (images, labels) in source.splits.items():
        tensors |= {f"{part}_images": images, f"{part}_labels": labels}
    facts = {"version": VERSION, "stamp": stamp, "content": about["content"]}
    facts |= {"classes": source.classes, "skipped": source.skipped}
    save_tensors(path, tensors, {"vitlab": json.dumps(facts)})


def _read_cache(path, stamp, on_error):
    """What _prepared gave when the cache was written; None unless it is there, whole and in date."""
    try:
        tensors, said = load_tensors(path)
        facts = json.loads(said["vitlab"])
        if facts["version"] != VERSION or (stamp is not None and facts["stamp"] != stamp):
            return None
        if facts["skipped"] and on_error == "raise":  # the broken images are to be named
            return None
    except (OSError, KeyError, TypeError, ValueError):
        return None
    splits = {p: (tensors[f"{p}_images"], tensors[f"{p}_labels"]) for p in PARTS if f"{p}_images" in tensors}
    source = Source(splits, tuple(facts["classes"]), facts["skipped"])
    return source, {"content": facts["content"], "sums": tensors["sums"]}
