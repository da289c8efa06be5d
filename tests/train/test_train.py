"""The training loop: resumption bit for bit, schedules and losses against closed forms, failures that help."""

import contextlib
import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from train_cases import CONFIG, RECIPE, same, trained

from vitlab.data import datasets
from vitlab.models.vit import ViT, ViTConfig
from vitlab.train import loop as train
from vitlab.train.loop import cross_entropy, fit
from vitlab.train.recipe import Recipe, is_undecayed
from vitlab.utils import rng


def test_the_same_seed_gives_the_same_model_and_another_seed_another(data):
    one, first = trained(data)
    two, _ = trained(data)
    three, _ = trained(data, dataclasses.replace(RECIPE, seed=1))
    assert same(one, two) and not same(one, three)
    assert [row["epoch"] for row in first.rows] == [1, 2, 3]
    assert not one.training


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "muon"])
def test_stopped_after_any_epoch_a_run_ends_bit_identical(data, tmp_path, optimizer):
    rest = {"rest_lr": 1e-3} if optimizer == "muon" else {}
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, lr=1e-2, **rest)
    whole, history = trained(data, recipe)

    def stop(epoch, *_):
        if epoch == 2:
            raise KeyboardInterrupt

    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        trained(data, recipe, checkpoint=path, save_every=0, on_epoch=[stop])
    random.random(), torch.rand(3)  # what happens between the parts must not matter
    again, resumed = trained(data, recipe, checkpoint=path, save_every=0)
    assert resumed.resumed == 2
    assert same(whole, again)
    timing = ("seconds", "images_per_s")
    plain = [{k: v for k, v in row.items() if k not in timing} for row in history.rows]
    assert plain == [{k: v for k, v in row.items() if k not in timing} for row in resumed.rows]


# a line of files on stdin starts a run in a process of its own, and its number is told; the imports are made once
KILLED = """
import os, sys, torch
torch.set_num_threads(1)
from vitlab.utils import rng
from vitlab.data.datasets import load
from vitlab.models.vit import ViT, ViTConfig
from vitlab.train.recipe import Recipe
from vitlab.train.loop import fit
from safetensors.torch import save_file
data = load("tiny")
for line in sys.stdin:
    if child := os.fork():
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    state, end = line.split()
    rng.seed_all(3)
    model = ViT(ViTConfig(patch_size=16, dim=16, depth=1, heads=2, dropout=0.1))
    fit(model, data, Recipe(epochs=6, batch=100, mixup=0.2, ema=0.9), checkpoint=state, save_every=0, log=None)
    save_file(model.state_dict(), end)
    os._exit(0)
"""


def test_killed_at_random_moments_a_run_ends_bit_identical(tmp_path):
    draw, kills, pipe = random.Random(0), 0, subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", KILLED], stdin=pipe, stdout=pipe, text=True) as runs:

        def run(name, seconds=None):
            """The exit code of a run that is killed after so many seconds, if it takes so long."""
            print(tmp_path / name, tmp_path / f"{name}.end", file=runs.stdin, flush=True)
            number = int(runs.stdout.readline())
            if seconds is not None:
                time.sleep(seconds)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            return int(runs.stdout.readline())

        assert run("whole") == 0
        for _ in range(4):
            kills += run("part", draw.uniform(0.05, 0.8)) == -signal.SIGKILL
        assert kills >= 2
        assert run("part") == 0
        runs.stdin.close()
    whole, part = load_file(tmp_path / "whole.end"), load_file(tmp_path / "part.end")
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    assert [p.name for p in tmp_path.glob("*.part")] == [] or kills  # leftovers of a kill are never read


def half(model, batch):
    loss, logs = cross_entropy(model, batch)
    return loss / 2, logs


def test_a_checkpoint_of_another_run_or_a_broken_one_is_refused(data, tmp_path):
    path = tmp_path / "run.safetensors"
    trained(data, checkpoint=path)
    with pytest.raises(ValueError, match="belongs to another run"):
        trained(data, dataclasses.replace(RECIPE, lr=5e-4), checkpoint=path)
    with pytest.raises(ValueError, match="belongs to another run"):  # as many images, others
        trained(dataclasses.replace(data, key="others"), checkpoint=path)
    with pytest.raises(ValueError, match="belongs to another run"):
        trained(data, checkpoint=path, objective=half)
    with pytest.raises(ValueError, match="belongs to another run"):  # the same tensors, used otherwise
        trained(data, config=dataclasses.replace(CONFIG, heads=CONFIG.heads * 2), checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        trained(data, checkpoint=path)


def test_one_step_is_adamw_on_the_soft_cross_entropy(data):
    """A whole epoch of one step, without augmentation, against torch's own pieces in plain sight."""
    recipe = Recipe(epochs=1, batch=64, augment="", lr=1e-2, weight_decay=0.1, schedule="constant", smoothing=0.2)
    config = dataclasses.replace(CONFIG, dropout=0.0, drop_path=0.0, num_classes=4)
    rng.seed_all(1)
    model = ViT(config)
    rng.seed_all(1)
    by_hand = ViT(config)
    fit(model, data, recipe, log=None)
    groups = [
        {"params": [p for n, p in by_hand.named_parameters() if p.ndim > 1 and "pos" not in n and "token" not in n]},
        {"params": [p for n, p in by_hand.named_parameters() if p.ndim <= 1 or "pos" in n or "token" in n],
         "weight_decay": 0.0},
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    images = (data.train.images.float() / 255 - 0.5) / 0.25
    F.cross_entropy(by_hand(images), data.train.labels, label_smoothing=0.2).backward()
    optimizer.step()
    for ours, theirs in zip(model.parameters(), by_hand.parameters()):
        # a first step of Adam has the size of the rate, whatever the gradient: where that is near zero, rounding shows
        clear = theirs.grad.abs() > 1e-6
        torch.testing.assert_close(ours[clear], theirs[clear], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_averaged_weights_are_what_the_model_ends_with(data):
    seen = []
    recipe = dataclasses.replace(RECIPE, ema=0.5, epochs=1, batch=32)
    original = train._Run.step

    def step(self, *args):
        out = original(self, *args)
        seen.append((self.model.head.bias.detach().clone(), self.ema.get_decay(args[0] * self.steps + args[1])))
        return out

    train._Run.step = step
    try:
        model, _ = trained(data, recipe)
    finally:
        train._Run.step = original
    average = torch.zeros(4)
    for value, decay in seen:
        average = decay * average + (1 - decay) * value
    assert len(seen) == 2 and 0 <= seen[1][1] <= 0.5
    torch.testing.assert_close(model.head.bias.detach(), average)


def test_learning_rate_follows_warmup_and_cosine():
    recipe = Recipe(epochs=10, lr=2.0, min_lr=0.2, warmup=2)
    assert recipe.lr_at(0, 50) == pytest.approx(2.0 / 100)
    assert recipe.lr_at(1, 50) == pytest.approx(2.0 * 51 / 100)
    assert recipe.lr_at(2, 50) == pytest.approx(2.0)
    assert recipe.lr_at(6, 50) == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 2)) / 2)
    assert recipe.lr_at(10, 50) == pytest.approx(0.2)
    assert Recipe(lr=1.0, schedule="constant").lr_at(7.3, 9) == 1.0


def test_weight_decay_spares_biases_norms_tokens_and_positions():
    model = ViT(dataclasses.replace(CONFIG, distilled=True, stem="conv"))
    free = {n for n, p in model.named_parameters() if is_undecayed(n, p)}
    assert {"cls_token", "dist_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.bias"} <= free
    assert {n for n, _ in model.named_parameters()} - free == {
        n for n, p in model.named_parameters() if n.endswith("weight") and p.ndim > 1
    }
    optimizer = Recipe(weight_decay=0.3).build_optimizer(model, cross_entropy, "cpu")
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_a_small_model_learns_the_bundled_images_far_beyond_chance():
    found = datasets.load("tiny")
    rng.seed_all(0)
    model = ViT(ViTConfig(patch_size=8, dim=48, depth=2, heads=3))
    history = fit(model, found, Recipe(epochs=6, batch=64, lr=2e-3, warmup=1), log=None)
    assert history["val_accuracy"][-1] > 25  # chance is 10
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer='lion': choose one of adamw, adam, sgd"),
        ({"epochs": 0}, "epochs=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"smoothing": 1.0}, "smoothing=1.0"),
        ({"augment": "crop(4)+sparkle"}, "sparkle"),
    ],
)
def test_impossible_recipes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


@pytest.mark.gpu
def test_training_on_cuda_in_bfloat16_and_compiled_learns_and_resumes(tmp_path):
    found = datasets.load("tiny", device="cuda")
    rng.seed_all(0)
    model = ViT(ViTConfig(patch_size=4, dim=64, depth=3, heads=2, stem="conv", mlp="conv", pool="mean")).cuda()
    recipe = Recipe(epochs=6, batch=200, lr=2e-3, warmup=1, ema=0.9, augment="crop(4)+flip+trivial")
    history = fit(model, found, recipe, checkpoint=tmp_path / "run", save_every=0, log=None)
    assert history["val_accuracy"][-1] > 25
    again = ViT(model.config).cuda()
    assert fit(again, found, recipe, checkpoint=tmp_path / "run", log=None).resumed == 6
    assert same(model, again)
