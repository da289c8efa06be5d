"""Objectives, hooks, budgets and progress: what is passed into a run, and what a person sees of it."""

import dataclasses
import math
import os
import time

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from train_cases import CONFIG, RECIPE, same, trained

from vitlab.models.vit import ViT
from vitlab.train.loop import Batch, BudgetSpent, NotFinite, cross_entropy, fit
from vitlab.utils import rng


def test_a_loss_that_is_not_finite_stops_with_where_and_what_to_try(data, tmp_path):
    path = tmp_path / "run.safetensors"

    def objective(model, batch):
        loss, logs = cross_entropy(model, batch)
        objective.step += 1
        return (loss * math.nan if objective.step == 7 else loss), logs

    objective.step = 0
    with pytest.raises(NotFinite, match=r"nan at epoch 2, step 3 of 4 .*Try a lower lr"):
        trained(data, objective=objective, checkpoint=path, save_every=0)
    # goes on from the end of epoch 1
    _, history = trained(data, objective=objective, checkpoint=path, save_every=0)
    assert history.resumed == 1 and all(math.isfinite(v) for v in history["loss"])


def test_the_time_budget_stops_between_epochs_and_the_next_call_goes_on(data, tmp_path, monkeypatch):
    path, whole = tmp_path / "run.safetensors", trained(data)[0]

    def spend(epoch, *_):
        if epoch == 1:  # while the second epoch runs, the time is up
            monkeypatch.setenv("VITLAB_DEADLINE", str(time.time()))

    with pytest.raises(BudgetSpent, match="after epoch 2"):
        trained(data, checkpoint=path, on_epoch=[spend])
    monkeypatch.delenv("VITLAB_DEADLINE")
    model, history = trained(data, checkpoint=path)
    assert history.resumed == 2 and same(model, whole)


class Projected(nn.Module):
    """An objective with a parameter of its own, as feature distillation has."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, model, batch):
        loss, logs = cross_entropy(model, batch)
        return loss * self.scale.square(), logs | {"scale": self.scale.detach()[0]}


class Counter:
    """A hook with a state, as an adaptive schedule has."""

    def __init__(self):
        self.calls = 0

    def __call__(self, epoch, model, history):
        self.calls += 1
        if epoch == 2 and os.environ.get("VITLAB_TEST_STOP"):
            raise KeyboardInterrupt

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_an_objective_is_trained_and_hooks_are_saved_with_the_run(data, tmp_path, monkeypatch):
    one, first = Projected(), Counter()
    _, history = trained(data, objective=one, on_epoch=[first])
    assert one.scale.item() != 1 and len(history["scale"]) == 3
    path = tmp_path / "run.safetensors"
    monkeypatch.setenv("VITLAB_TEST_STOP", "1")
    with pytest.raises(KeyboardInterrupt):
        trained(data, objective=Projected(), on_epoch=[Counter()], checkpoint=path, save_every=0)
    monkeypatch.delenv("VITLAB_TEST_STOP")
    two, second = Projected(), Counter()
    trained(data, objective=two, on_epoch=[second], checkpoint=path, save_every=0)
    assert torch.equal(one.scale, two.scale)
    assert second.calls == first.calls == 3


def test_a_distilled_model_trains_both_heads(data):
    model = ViT(dataclasses.replace(CONFIG, num_classes=4, distilled=True)).train()
    images = torch.randn(8, 3, 16, 16)
    targets = F.one_hot(torch.arange(8) % 4, 4).float()
    loss, _ = cross_entropy(model, Batch(images, targets, torch.arange(8) % 4, 0))
    loss.backward()
    assert model.head.weight.grad.abs().sum() > 0 and model.head_dist.weight.grad.abs().sum() > 0


def test_tensorboard_gets_every_scalar_once_over_a_resumption(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs, path = tmp_path / "logs", tmp_path / "run.safetensors"

    def stop(epoch, *_):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(data, tensorboard=logs, checkpoint=path, save_every=0, on_epoch=[stop])
    time.sleep(1)  # the files' names start with the second and are read in order: within one, "10" comes before "9"
    _, history = trained(data, tensorboard=logs, checkpoint=path, save_every=0)
    events = EventAccumulator(str(logs)).Reload()
    assert {"loss", "accuracy", "val_accuracy", "val_loss", "lr", "images_per_s"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]
    assert [e.value for e in events.Scalars("val_accuracy")] == pytest.approx(history["val_accuracy"])


def test_a_line_an_epoch_says_what_a_person_wants_to_know(data):
    lines = []
    rng.seed_all(0)
    model = ViT(dataclasses.replace(CONFIG, num_classes=4))
    fit(model, data, dataclasses.replace(RECIPE, epochs=2), log=lines.append, name="toy")
    assert len(lines) == 2
    for word in ("toy epoch 2/2", "loss", "train", "val", "lr", "images/s", "left 0m00s"):
        assert word in lines[1]


def test_a_batch_larger_than_the_data_falls_to_what_fits_with_a_word(data):
    said, large = [], dataclasses.replace(RECIPE, batch=100)
    whole, _ = trained(data, dataclasses.replace(RECIPE, batch=64))
    assert same(trained(data, large)[0], whole)
    fit(whole, data, dataclasses.replace(large, epochs=1), log=said.append)
    assert "batch=100 is larger than the 64 training images" in said[0]


def test_a_timm_model_trains_and_resumes_like_ours(data, tmp_path):
    def build():
        rng.seed_all(0)
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4
        )

    recipe = dataclasses.replace(RECIPE, lr=3e-3, epochs=4)
    whole, part = build(), build()
    history = fit(whole, data, recipe, log=None)
    assert history["val_accuracy"][-1] > 40  # chance is 25; the classes differ in brightness

    def stop(epoch, *_):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(part, data, recipe, log=None, checkpoint=tmp_path / "t", save_every=0, on_epoch=[stop])
    part = build()
    fit(part, data, recipe, log=None, checkpoint=tmp_path / "t", save_every=0)
    assert same(whole, part)


def test_classes_that_cannot_be_learnt_are_refused(data):
    alone = dataclasses.replace(data, classes=("cat",))
    with pytest.raises(ValueError, match=r"toy has one class \(cat\)"):
        trained(alone)
    with pytest.raises(ValueError, match="tells 7 classes apart, toy has 4"):
        fit(ViT(dataclasses.replace(CONFIG, num_classes=7)), data, RECIPE, log=None)
