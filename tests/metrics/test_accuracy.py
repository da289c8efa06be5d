"""Accuracy, calibration and their errors against figures worked out one image at a time."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from metrics_cases import PIXELS, linear_model, random_split, small_timm

from vitlab.metrics.measure import accuracy, score
from vitlab.metrics.statistics import unpacked


def by_hand(outputs, labels, classes, bins=15):
    """Every figure of Accuracy, one image at a time, in NumPy."""
    top1 = top5 = loss = 0.0
    confusion = np.zeros((classes, classes), int)
    binned = [[] for _ in range(bins)]
    for row, label in zip(outputs.astype(np.float64), labels):
        chances = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        guess = int(row.argmax())
        top1 += guess == label
        top5 += label in np.argsort(-row)[:5]
        loss -= np.log(chances[label])
        confusion[label, guess] += 1
        which = next(m for m in range(bins) if m / bins < chances[guess] <= (m + 1) / bins or m == bins - 1)
        binned[which].append((guess == label, chances[guess]))
    n = len(labels)
    ece = sum(len(b) / n * abs(np.subtract(*np.mean(b, axis=0))) for b in binned if b)
    return 100 * top1 / n, 100 * top5 / n, loss / n, ece, confusion


@pytest.mark.parametrize("classes", [3, 5, 10])
def test_accuracy_equals_figures_worked_out_by_hand(classes):
    split, model = random_split(301, classes), linear_model(classes, scale=3.0).train()
    found = accuracy(model, split, **PIXELS, num_classes=classes, batch_size=64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in PIXELS.values())
    with torch.no_grad():
        outputs = model[2](((split.images / 255 - mean) / std).flatten(1)).numpy()
    top1, top5, loss, ece, confusion = by_hand(outputs, split.labels.numpy(), classes)
    assert found.top1 == pytest.approx(top1)
    assert found.top5 == (pytest.approx(top5) if classes >= 5 else None)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.ece == pytest.approx(ece, rel=1e-4)
    assert found.confusion == confusion.tolist()
    assert found.per_class == pytest.approx(tuple(100 * confusion.diagonal() / confusion.sum(1)))
    assert found.n == 301
    assert unpacked(found.right, 301).tolist() == (outputs.argmax(1) == split.labels.numpy()).tolist()
    for n in (300 - 8, 320):
        with pytest.raises(ValueError, match=f"do not tell of {n} images"):
            unpacked(found.right, n)
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_ece_of_known_confidences():
    # two images at 0.9 (one right), two at 0.6 (both right): 1/2 |0.5 - 0.9| + 1/2 |1 - 0.6| = 0.4
    outputs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]).log()
    found = score(outputs, torch.tensor([0, 1, 0, 0]), 2)
    assert found.ece == pytest.approx(0.4)
    assert found.top1 == 75
    assert found.confusion == [[3, 0], [1, 0]]
    assert found.per_class == (100.0, 0.0)


def test_a_class_without_images_has_no_accuracy():
    assert score(torch.eye(3), torch.tensor([0, 1, 1]), 3).per_class == (100.0, 50.0, None)


def test_accuracy_puts_back_every_modules_mode_and_leaves_no_trace():
    model = linear_model(4).train()
    model[2].eval()
    accuracy(model, random_split(20, 4), **PIXELS, num_classes=4)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert all(p.grad is None for p in model.parameters())


def test_accuracy_of_a_distilled_model_that_gives_a_pair_in_training():
    model = small_timm("deit_tiny_distilled_patch16_224", img_size=16, patch_size=8, num_classes=7, depth=1)
    model.set_distilled_training(True)
    model.train()
    found = accuracy(model, random_split(9, 7, size=16), **PIXELS, num_classes=7)
    assert found.n == 9 and model.training


def test_accuracy_resizes():
    model = linear_model(3, size=12)
    split = random_split(10, 3)
    with pytest.raises(RuntimeError):
        accuracy(model, split, **PIXELS, num_classes=3)
    assert accuracy(model, split, **PIXELS, num_classes=3, size=12).n == 10


@pytest.mark.parametrize(
    ("outputs", "labels", "says"),
    [
        (torch.zeros(2, 4), [0, 1], "gives \\(2, 4\\) for 2 images of 3 classes"),
        (torch.tensor([[0, float("nan"), 1]] * 2), [0, 1], "not finite for 2 of 2"),
        (torch.zeros(2, 3), [0, 3], "from 0 to 3"),
    ],
)
def test_bad_outputs_are_refused(outputs, labels, says):
    with pytest.raises(ValueError, match=says):
        score(outputs, torch.tensor(labels), 3)
