"""Over shapes, ratios, schedules and batch sizes: what has to hold whatever is drawn, said without the code's help."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import vitlab
from vitlab.compress.tokens.merge import ACTIONS
from vitlab.compress.tokens.schedule import RULES, SCHEDULES, schedule
from vitlab.compress.tokens.scores import SCORES, SIGNED
from vitlab.data.augment import Augment, mix
from vitlab.data.datasets import Split, batches
from vitlab.utils import rng

FEW = settings(deadline=None, max_examples=25, derandomize=True)
MANY = settings(deadline=None, max_examples=150, derandomize=True)
SHARES = st.floats(0, 0.95)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@st.composite
def models(draw, **fixed):
    """A small ViT with weights that are far from their start, in eval mode."""
    heads = draw(st.sampled_from([1, 2, 3]))
    options = {
        "image_size": 4 * draw(st.integers(2, 4)), "patch_size": 4, "dim": 8 * heads, "depth": draw(st.integers(1, 3)),
        "heads": heads, "mlp_dim": draw(st.sampled_from([8, 24])), "pool": draw(st.sampled_from(["cls", "mean"])),
        "mlp": draw(st.sampled_from(["plain", "conv"])), "num_classes": draw(st.integers(2, 6)),
    } | fixed  # fmt: skip
    torch.manual_seed(draw(st.integers(0, 99)))
    model = vitlab.ViTConfig(**options).build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images_for(model, count):
    return torch.randn(count, 3, *[model.config.image_size] * 2)


# ------------------------------------------------------------------------------------------- tokens

@MANY
@given(n=st.integers(2, 400), layers=st.integers(1, 24), r_max=st.floats(0, 0.999), alpha=st.floats(0.01, 10),
       rule=st.sampled_from(RULES), kind=st.sampled_from(SCHEDULES), more=st.floats(0, 0.999))  # fmt: skip
def test_a_schedule_falls_keeps_a_patch_and_falls_lower_with_a_larger_share(n, layers, r_max, alpha, rule, kind, more):
    counts = schedule(n, layers, r_max, alpha, rule, kind=kind)
    assert len(counts) == layers and all(2 <= b <= a for a, b in zip([n, *counts], counts))
    lower = schedule(n, layers, max(r_max, more), alpha, rule, kind=kind)
    assert all(b <= a for a, b in zip(counts, lower))
    assert schedule(n, layers, 0.0, alpha, rule, kind=kind) == [n] * layers


@FEW
@given(model=models(), action=st.sampled_from(ACTIONS), score=st.sampled_from(list(SCORES)), r_max=SHARES,
       alpha=st.floats(0.3, 3), rule=st.sampled_from(RULES), count=st.integers(1, 5))  # fmt: skip
def test_every_patch_is_accounted_for_and_images_stay_apart(model, action, score, r_max, alpha, rule, count):
    assume(not (action == "fuse" and score in SIGNED))
    reduced = vitlab.reduce_tokens(model, r_max=r_max, alpha=alpha, action=action, score=score, rule=rule)
    images, patches = images_for(model, count), (model.config.image_size // 4) ** 2
    with torch.no_grad():
        logits, seen = reduced(images, intermediates=True)
        alone = torch.cat([reduced(image) for image in images.split(1)])
        order = torch.randperm(count)
        turned = reduced(images[order])
    torch.testing.assert_close(alone, logits, **CLOSE)
    torch.testing.assert_close(turned, logits[order], **CLOSE)
    prefix = int(model.config.pool == "cls")
    for layer, tokens in enumerate(seen["tokens"]):
        kept, owners, size = (seen[name][layer] for name in ("kept", "owners", "size"))
        rows = tokens.shape[1] - prefix
        assert rows + prefix == reduced.tokens[layer] == prefix + kept.shape[1]
        for one, owner in zip(kept.tolist(), owners.tolist()):
            real = [p for p in one if p >= 0]
            assert len(set(real)) == len(real) and set(real) <= set(range(patches))
            assert len(owner) == patches and set(range(rows)) <= set(owner) <= set(range(rows + 1))
            assert action == "drop" or max(owner) < rows
            assert all(owner[p] == row for row, p in enumerate(one) if p >= 0)
        if size is not None and action != "drop":
            owned = torch.nn.functional.one_hot(owners, rows).sum(1)
            torch.testing.assert_close(size[:, prefix:], owned.to(size.dtype))


# ------------------------------------------------------------------------------------------- pruning

@FEW
@given(model=models(dim=24, heads=3, mlp_dim=32), ratio=st.floats(0.1, 0.8), more=st.floats(0, 0.1),
       uniform=st.booleans(), count=st.integers(1, 4))  # fmt: skip
def test_pruning_makes_a_model_smaller_and_the_more_the_larger_its_ratio(model, ratio, more, uniform, count):
    images, options = images_for(model, count), {"criterion": "magnitude", "uniform": uniform, "multiple": 1}
    small = vitlab.prune(model, ratio=ratio, **options)
    fewer = vitlab.prune(model, ratio=min(ratio + more, 0.85), **options)
    whole = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in small.parameters()) < whole and small.config.macs() < model.config.macs()
    assert fewer.config.macs() <= small.config.macs()
    assert small(images).shape == model(images).shape and small(images).isfinite().all()
    assert small.config.build().state_dict().keys() == small.state_dict().keys()


@FEW
@given(model=models(dim=24, heads=3, mlp_dim=32, mlp="plain"), dead=st.integers(1, 15), seed=st.integers(0, 99))
def test_hidden_units_that_do_nothing_are_those_that_go(model, dead, seed):
    draw, images = torch.Generator().manual_seed(seed), images_for(model, 3)
    with torch.no_grad():
        for block in model.blocks:
            rows = torch.randperm(32, generator=draw)[:dead]
            for weight in (block.mlp.fc1.weight, block.mlp.fc1.bias):
                weight[rows] = 0
            block.mlp.fc2.weight[:, rows] = 0
        small = vitlab.prune(model, criterion="magnitude", kinds=("mlp",), ratio=dead / 32 * 0.99, multiple=1)
        torch.testing.assert_close(small(images), model(images), **CLOSE)


# ----------------------------------------------------------------------------------------- attention

@FEW
@given(model=models(mlp="plain"), attention=st.sampled_from(["softmax", "linear"]), count=st.integers(1, 3),
       n=st.integers(1, 40), ratio=st.none() | st.floats(0.2, 0.7))  # fmt: skip
def test_attention_knows_no_order_and_softmax_is_the_textbooks(model, attention, count, n, ratio):
    model = vitlab.ViTConfig(**{f.name: getattr(model.config, f.name) for f in dataclasses.fields(model.config)}
                             | {"attention": attention}).build().eval()  # fmt: skip
    if ratio and attention == "softmax" and model.config.dim > 8:
        model = vitlab.prune(model, criterion="random", kinds=("qk", "v"), ratio=ratio, uniform=False, multiple=1)
    layer, x, order = model.blocks[0].attn, torch.randn(count, n, model.config.dim), torch.randperm(n)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[:, order], layer(x[:, order]), **CLOSE)
        if attention != "softmax":
            return
        q, k, v = layer.qkv(x).double().numpy(), None, None
        sizes = [w for w in layer.widths]
        parts = np.split(q, np.cumsum(sizes)[:-1], axis=-1)
        heads, mixed = len(sizes) // 3, []
        for q, k, v in zip(parts[:heads], parts[heads : 2 * heads], parts[2 * heads :]):
            scores = np.exp(q @ k.transpose(0, 2, 1) * layer.scale)
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v)
        by_hand = layer.proj(torch.from_numpy(np.concatenate(mixed, -1)).float())
        torch.testing.assert_close(layer(x), by_hand, **CLOSE)


# -------------------------------------------------------------------------------------- augmentation

OPERATIONS = ["crop(1)", "crop(3)", "rrc", "flip", "trivial", "randaugment(2,9)", "jitter(0.4,0.4,0.4)", "erase(0.5)"]


@FEW
@given(names=st.lists(st.sampled_from(OPERATIONS), unique_by=lambda n: n[:4], max_size=4), count=st.integers(1, 9),
       height=st.integers(5, 24), width=st.integers(5, 24), seed=st.integers(0, 9))  # fmt: skip
def test_augmentation_keeps_shape_and_type_and_repeats_itself(names, count, height, width, seed):
    images = torch.randint(256, (count, 3, height, width), dtype=torch.uint8)
    given, augment = images.clone(), Augment("+".join(names), mean=(0.5,) * 3)
    one, two = (augment(images, rng.generator(seed, "x")) for _ in range(2))
    assert torch.equal(one, two) and one.shape == images.shape and one.dtype == images.dtype
    assert torch.equal(given, images), "what it is given stays"


@FEW
@given(count=st.integers(1, 8), size=st.integers(4, 12), padding=st.integers(0, 3), seed=st.integers(0, 99))
def test_crops_and_flips_are_windows_and_mirrors_of_their_own_image(count, size, padding, seed):
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    made = Augment(f"crop({padding})+flip")(images, rng.generator(seed, "x")).numpy()
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2), mode="reflect")
    for image, found in zip(padded, made):
        windows = [image[:, i : i + size, j : j + size] for i in range(2 * padding + 1) for j in range(2 * padding + 1)]
        assert any(np.array_equal(found, w) or np.array_equal(found, w[:, :, ::-1]) for w in windows)


@MANY
@given(count=st.integers(1, 8), side=st.integers(2, 9), classes=st.integers(2, 7), mixup=st.sampled_from([0.0, 0.2, 2]),
       cutmix=st.sampled_from([0.0, 1.0]), smoothing=st.floats(0, 1), seed=st.integers(0, 99))  # fmt: skip
def test_mixed_targets_are_shares_and_pixels_lie_between(count, side, classes, mixup, cutmix, smoothing, seed):
    labels = torch.randint(classes, (count,))
    images = labels.view(-1, 1, 1, 1).float().expand(count, 3, side, side).contiguous()  # each of its label's value
    mixed, targets = mix(images, labels, classes, rng.generator(seed, "x"), mixup, cutmix, smoothing)
    assert targets.min() >= 0 and targets.sum(1).numpy() == pytest.approx(np.ones(count), abs=1e-5)
    assert images.min() <= mixed.min() and mixed.max() <= images.max()
    # the mean pixel and the mean class are the same mixture
    plain = (targets - smoothing / classes) / max(1 - smoothing, 1e-9)
    if smoothing < 0.9:
        assert mixed.mean((1, 2, 3)).numpy() == pytest.approx((plain @ torch.arange(classes).float()).numpy(), abs=1e-3)


@MANY
@given(count=st.integers(1, 50), size=st.integers(1, 60), drop=st.booleans(), seed=st.none() | st.integers(0, 9))
def test_batches_show_every_image_once(count, size, drop, seed):
    split = Split(torch.arange(count).view(-1, 1, 1, 1).to(torch.uint8), torch.arange(count))
    generator = None if seed is None else rng.generator(seed, "x")
    found = list(batches(split, size, generator=generator, drop_last=drop))
    labels = torch.cat([torch.zeros(0, dtype=torch.int64), *(b for _, b in found)]).tolist()
    assert all(torch.equal(a.flatten().long(), b) for a, b in found)
    assert len(set(labels)) == len(labels) == (count // size * size if drop else count)
    assert seed is not None or labels == sorted(labels)
