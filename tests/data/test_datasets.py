"""Loading, splits, batches and arguments."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from data_cases import rows

from vitlab.data import datasets as data
from vitlab.data.datasets import batches, load


def test_mean_and_std_are_exact():
    tiny = load("tiny")
    pixels = tiny.train.images.double() / 255
    assert torch.allclose(torch.tensor(tiny.mean, dtype=torch.float64), pixels.mean((0, 2, 3)), atol=1e-12)
    expected = pixels.std((0, 2, 3), unbiased=False)
    assert torch.allclose(torch.tensor(tiny.std, dtype=torch.float64), expected, atol=1e-12)


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
    with pytest.raises(RuntimeError, match="generator"):
        batches(tiny.train, 8, generator=torch.Generator())


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
        ({"size": 16}, "of a folder's images"),
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


def test_fewer_training_images_are_other_data():
    """Their own key and name, so that no arm or row of the whole is taken for one of the part; nothing else changes."""
    whole = load("tiny")
    part = whole.with_train(100)
    assert len(part.train) == 100 and part.name == "tiny, 100 images"
    assert torch.bincount(part.train.labels).tolist() == [10] * 10
    assert len({whole.key, part.key, whole.with_train(200).key}) == 3 and whole.with_train(100).key == part.key
    assert part.test is whole.test and part.val is whole.val and part.mean == whole.mean
