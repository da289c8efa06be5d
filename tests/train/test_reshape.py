"""Stopping within an epoch, and hooks that take parts of the model away: all of it resumes bit for bit."""

import dataclasses

import pytest
import torch
from torch import nn

from vitlab.models.vit import ViT, ViTConfig
from vitlab.train.loop import Recipe, cross_entropy, fit
from vitlab.train.resume import carry_state
from vitlab.utils import rng

CONFIG = ViTConfig(image_size=16, patch_size=8, num_classes=4, dim=16, depth=2, heads=2, dropout=0.1, stem="conv")
RECIPE = Recipe(epochs=3, batch=16, lr=1e-2, mixup=0.5, ema=0.9, augment="crop(2)+flip")


class Stop:
    """Cross-entropy that fails at one of its calls."""

    def __init__(self, at=None):
        self.left = at

    def __call__(self, model, batch):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return cross_entropy(model, batch)


class HalveMlp:
    """Before epoch 1 every second hidden channel of the first block's MLP goes."""

    def __init__(self):
        self.done = False

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]

    def __call__(self, epoch, model, history):
        if epoch != 1:
            return None
        self.done = True
        return self.restore(model)

    def restore(self, model):
        return self.cut(model) if self.done else None

    @staticmethod
    def cut(model):
        axes = {"blocks.0.mlp.fc1.weight": 0, "blocks.0.mlp.fc1.bias": 0, "blocks.0.mlp.fc2.weight": 1}

        def carry(name, tensor):
            return tensor.unflatten(axes[name], (-1, 2)).select(axes[name] + 1, 0) if name in axes else tensor

        for name in axes:
            module, _, leaf = name.rpartition(".")
            module = model.get_submodule(module)
            setattr(module, leaf, nn.Parameter(carry(name, getattr(module, leaf).detach()).clone()))
        return carry


def trained(data, recipe, at=None, hooks=(), **options):
    rng.seed_all(1)
    model = ViT(CONFIG)
    history = fit(model, data, recipe, log=None, objective=Stop(at), on_epoch=hooks, save_every=0, **options)
    return model, history


def same(one, two):
    assert one.state_dict().keys() == two.state_dict().keys()
    return all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def told(history):
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in history.rows]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("hook", [None, HalveMlp])
@pytest.mark.parametrize("at", [2, 6, 11])
def test_stopped_within_an_epoch_a_run_ends_bit_identical(data, tmp_path, optimizer, hook, at):
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, rest_lr=1e-2 if optimizer == "muon" else None)
    hooks = lambda: [hook()] if hook else []  # noqa: E731
    whole, history = trained(data, recipe, hooks=hooks())
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        trained(data, recipe, at, hooks=hooks(), checkpoint=path, save_within=0)
    torch.rand(3)
    steps = 0

    def counted(model, batch):
        nonlocal steps
        steps += 1
        return cross_entropy(model, batch)

    rng.seed_all(1)
    again = ViT(CONFIG)
    resumed = fit(again, data, recipe, log=None, objective=counted, on_epoch=hooks(), checkpoint=path, save_every=0)
    assert steps == 12 - at, "what was done before the stop is not done again"
    assert same(whole, again) and told(history) == told(resumed)


def test_a_loss_that_is_not_finite_is_never_saved_within_an_epoch(data, tmp_path):
    def broken(model, batch):
        loss, logs = cross_entropy(model, batch)
        return loss * float("nan"), logs

    path = tmp_path / "run.safetensors"
    with pytest.raises(RuntimeError, match="the loss became nan"):
        fit(ViT(CONFIG), data, RECIPE, log=None, objective=broken, checkpoint=path, save_within=0)
    assert not path.exists()


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "muon"])
def test_what_is_left_keeps_its_moments(optimizer):
    rest = 1e-2 if optimizer == "muon" else None
    model, recipe = ViT(CONFIG), dataclasses.replace(RECIPE, optimizer=optimizer, rest_lr=rest)
    old = recipe.build_optimizer(model, cross_entropy, "cpu")
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    old.step()
    before = dict(model.named_parameters())
    carry = HalveMlp.cut(model)
    after = dict(model.named_parameters())
    new = recipe.build_optimizer(model, cross_entropy, "cpu")
    carry_state(old, before, new, after, carry)
    assert before["blocks.0.mlp.fc1.weight"].shape[0] == 2 * after["blocks.0.mlp.fc1.weight"].shape[0]
    for name, parameter in after.items():
        found, was = new.state[parameter], old.state[before[name]]
        assert found and found.keys() == was.keys()
        for slot, value in found.items():
            if torch.is_tensor(value):
                assert torch.equal(value, carry(name, was[slot]) if value.ndim else was[slot]), (name, slot)
