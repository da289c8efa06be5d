"""Data sets as uint8 tensors on the device: loading, caching, splits and batches."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitlab.data import sources
from vitlab.data.sources import DatasetMissing, Source
from vitlab.utils.files import digest, locked
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

    def __getitem__(self, rows):
        return Split(self.images[rows], self.labels[rows])

    def to(self, device):
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, n):
        """The first `n` images (or all, if fewer), as evenly over the classes as can be, in their order."""
        labels = self.labels.cpu()
        by_class = torch.argsort(labels, stable=True)
        first = torch.searchsorted(labels[by_class], labels[by_class])  # where each one's class begins
        rank = torch.empty_like(labels)
        rank[by_class] = torch.arange(len(labels)) - first
        return self[torch.argsort(rank, stable=True)[:n].sort().values.to(self.labels.device)]


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
        name, key = f"{self.name}, {len(train):,} images", digest([self.key, "train", len(train)])
        return dataclasses.replace(self, train=train, name=name, key=key)

    def few(self, images):
        """The same data with at most so many images in each split; a key and a name of its own."""
        return dataclasses.replace(self.with_train(images), val=self.val.take(images), test=self.test.take(images))

    def describe(self):
        """One line: name, sizes, shape, classes, key."""
        counts = ", ".join(f"{len(getattr(self, part)):,} {part}" for part in PARTS)
        shape = "x".join(map(str, self.train.images.shape[1:]))
        skipped = f", {self.skipped:,} broken images skipped" if self.skipped else ""
        return f"{self.name}: {counts} images of {shape}, {self.num_classes} classes{skipped}, key {self.key}"

    __repr__ = describe


def load(name, *, root=None, device="cpu", val=5000, seed=0, size=None, on_error="raise"):
    """Load a data set as uint8 tensors on `device`.

    name      "cifar10", "cifar100", "tiny-imagenet" (whose official validation images are the `test` here, since its
              own have no labels), "tiny" (3,000 images of CIFAR-10, bundled) or "folder:PATH":
              PATH/{train,val,test}/CLASS/image or PATH/CLASS/image, any sizes and kinds of image.
    root      folder with the data and their cache (root/cache); default $VITLAB_DATA, else ~/.cache/vitlab.
    val       size of the validation split that is cut out of the training set, class by class in proportion, drawn
              from `seed`, unless the data come with their own, as "tiny" does; 0 leaves `val` empty. In a folder's
              images a count above a fifth of the training set means a tenth of it.
    size      height and width in pixels of a folder's images (short side to it, then the centre); default 64.
    on_error  "raise" stops at a broken image and names it; "skip" leaves it out and counts it in `.skipped`.

    A folder without a test folder gives a tenth of its training images, the same for every `seed`.
    Raises DatasetMissing (a FileNotFoundError) with where it looked and how to get the data; ValueError for
    arguments or files that are wrong.
    """
    _check(name, val, size, on_error)
    root = Path(root or sources.home()).expanduser()
    source = sources.tiny() if name == "tiny" else _read(sources.plan(name, root, size), root, on_error)
    content = _content(source)
    splits, cut = _split(source, name, val, seed)
    mean, std = _statistics(splits["train"].images)
    key = digest([name.split(":")[0], content, cut])
    found = Dataset(name, **splits, classes=source.classes, mean=mean, std=std, key=key, skipped=source.skipped)
    return found.to(device)


def batches(split, batch_size, *, generator=None, drop_last=False):
    """Iterate over (images uint8 B C H W, labels int64 B), on the split's device, without a sync.

    Shuffled if a `generator` is given, which must be of the split's device; otherwise in order, as views.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: must be at least 1")
    if generator is None:
        found = zip(split.images.split(batch_size), split.labels.split(batch_size))
    else:
        order = torch.randperm(len(split), generator=generator, device=split.images.device).split(batch_size)
        found = ((split.images.index_select(0, rows), split.labels.index_select(0, rows)) for rows in order)
    return itertools.islice(found, len(split) // batch_size if drop_last else math.ceil(len(split) / batch_size))


def _check(name, val, size, on_error):
    if not isinstance(name, str):
        raise ValueError(f"name={name!r}: text is needed, such as 'cifar10' or 'folder:PATH'")
    if not isinstance(val, int) or isinstance(val, bool) or val < 0:
        raise ValueError(f"val={val!r}: a count of images, 0 or more")
    if size is not None and not (isinstance(size, int) and size >= 1 and name.startswith("folder:")):
        raise ValueError(f"size={size!r}: pixels, at least 1, of a folder's images, or None")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: allowed are 'raise' and 'skip'")


def _content(source):
    """A hash of all there is of a source."""
    found = hashlib.sha256(json.dumps([source.classes, source.skipped]).encode())
    for part, (images, labels) in sorted(source.splits.items()):
        found.update(f"{part} {tuple(images.shape)}".encode())
        found.update(images.numpy())
        found.update(labels.numpy())
    return found.hexdigest()


def _statistics(images):
    """(mean, std) of the pixels in [0, 1], a number a channel, from exact sums; a constant channel's std reads 1."""
    count = images[:, 0].numel()
    levels = torch.arange(256)
    pixels = [images[:, channel].flatten().bincount(minlength=256) for channel in range(images.shape[1])]
    sums = [((n * levels).sum().item(), (n * levels**2).sum().item()) for n in pixels]
    std = [math.sqrt(count * square - total**2) / count / 255 for total, square in sums]
    return tuple(total / count / 255 for total, _ in sums), tuple(s or 1.0 for s in std)


def _split(source, name, val, seed):
    """Cut what is missing from train -> ({part: Split}, what the key depends on)."""
    splits, cut = {part: Split(*tensors) for part, tensors in source.splits.items()}, {}
    if "test" not in splits:
        cut["test"] = count = max(1, round(len(splits["train"]) / 10))
        # not from `seed`: what is tested on must never become training data in another run
        splits |= _carve(splits["train"], "test", count, stream(0, "test split"), f"{name}: test")
    if "val" not in splits:
        available = len(splits["train"])
        few = name.startswith("folder:") and val > available / 5
        count = max(1, round(available / 10)) if few else val
        cut |= {"val": count, "seed": seed if count else None}
        splits |= _carve(splits["train"], "val", count, stream(seed, "validation split"), f"{name}: val={val}")
    return splits, cut


def _carve(train, part, count, draw, what):
    """Draw `count` images of train -> {"train": the rest, part: the drawn}; the rest overwrites train's tensors.

    The last rows move into the gaps, for a copy of all the rest would double the memory and take seconds.
    """
    taken = _drawn(train.labels, count, draw, what)
    left = len(train) - count
    drawn, tail = train[taken], torch.arange(left, len(train))
    for tensor in (train.images, train.labels):
        tensor[taken[taken < left]] = tensor[tail[~torch.isin(tail, taken)]]
    return {"train": train[:left], part: drawn}


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


def _read(plan, root, on_error):
    """The source of a plan: from its cache if that is whole and in date, else anew, by one process at a time."""
    path = root / "cache" / f"{plan.stem}.safetensors"
    with contextlib.ExitStack() as stack:
        waited = False
        with contextlib.suppress(OSError):  # a folder that cannot be written to
            if not (found := _cached(plan, path, on_error)):
                waited = stack.enter_context(locked(path.with_suffix(".lock")))
        return found or (waited and _cached(plan, path, on_error)) or _made(plan, root, path, on_error)


def _cached(plan, path, on_error):
    """What the cache holds for the plan; None where it is not there, not whole or out of date."""
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
        tensors, said = load_tensors(path)
        facts = json.loads(said["vitlab"])
        in_date = facts["version"] == VERSION and plan.stamp in (None, facts["stamp"])
        if in_date and not (facts["skipped"] and on_error == "raise"):  # the broken images are to be named
            splits = {p: (tensors[f"{p}_images"], tensors[f"{p}_labels"]) for p in PARTS if f"{p}_images" in tensors}
            return Source(splits, tuple(facts["classes"]), facts["skipped"])
    return None


def _made(plan, root, path, on_error):
    """What the plan reads, kept in the cache."""
    source = plan.read(on_error)
    if plan.stamp is None:  # just downloaded
        plan = sources.plan(plan.stem, root)
    facts = {"version": VERSION, "stamp": plan.stamp, "classes": source.classes, "skipped": source.skipped}
    images = {f"{part}_images": found for part, (found, _) in source.splits.items()}
    labels = {f"{part}_labels": found for part, (_, found) in source.splits.items()}
    try:
        save_tensors(path, images | labels, {"vitlab": json.dumps(facts)})
    except OSError as error:
        print(f"{path} cannot be written ({error}): the data are read anew each time", flush=True)
    return source
