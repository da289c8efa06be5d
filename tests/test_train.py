"""The training loop: resumption bit for bit, schedules and losses against closed forms, failures that help."""

import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from vitlab import data as datasets
from vitlab import rng, train
from vitlab.data import Dataset, Split
from vitlab.models.vit import ViT, ViTConfig
from vitlab.recipe import Recipe, is_undecayed
from vitlab.train import Batch, BudgetSpent, NotFinite, cross_entropy, fit

CONFIG = ViTConfig(image_size=16, patch_size=8, dim=16, depth=2, heads=2, dropout=0.1, drop_path=0.2)
RECIPE = Recipe(
    epochs=3, batch=16, warmup=1, smoothing=0.1, mixup=0.5, cutmix=0.5, mix_off=1, clip=1.0, ema=0.9,
    augment="crop(2)+flip",
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    labels = torch.arange(64) % 4
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8) // 2 + (labels * 30).byte()[:, None, None, None]
    part = Split(images, labels)
    return Dataset(
        name="toy", train=part, val=part, test=part, classes=tuple("abcd"), mean=(0.5,) * 3, std=(0.25,) * 3, key="toy"
    )


def trained(data, recipe=RECIPE, config=CONFIG, **options):
    rng.seed_all(1)
    model = ViT(dataclasses.replace(config, num_classes=4))
    return model, fit(model, data, recipe, log=None, **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


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


KILLED = """
import sys, torch
torch.set_num_threads(1)
from vitlab import rng
from vitlab.data import load
from vitlab.models.vit import ViT, ViTConfig
from vitlab.recipe import Recipe
from vitlab.train import fit
from safetensors.torch import save_file
data = load("tiny")
rng.seed_all(3)
model = ViT(ViTConfig(patch_size=16, dim=16, depth=1, heads=2, dropout=0.1))
print("start", flush=True)
fit(model, data, Recipe(epochs=6, batch=100, mixup=0.2, ema=0.9), checkpoint=sys.argv[1], save_every=0)
save_file(model.state_dict(), sys.argv[2])
"""


def test_killed_at_random_moments_a_run_ends_bit_identical(tmp_path):
    command = [sys.executable, "-c", KILLED]
    subprocess.run([*command, tmp_path / "whole", tmp_path / "whole.end"], check=True, stdout=subprocess.DEVNULL)
    draw, kills = random.Random(0), 0
    for _ in range(4):
        process = subprocess.Popen(
            [*command, tmp_path / "part", tmp_path / "part.end"], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(draw.uniform(0.05, 0.8))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    subprocess.run([*command, tmp_path / "part", tmp_path / "part.end"], check=True, stdout=subprocess.DEVNULL)
    whole, part = load_file(tmp_path / "whole.end"), load_file(tmp_path / "part.end")
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    assert [p.name for p in tmp_path.glob("*.part")] == [] or kills  # leftovers of a kill are never read


def test_a_checkpoint_of_another_run_or_a_broken_one_is_refused(data, tmp_path):
    path = tmp_path / "run.safetensors"
    trained(data, checkpoint=path)
    with pytest.raises(ValueError, match="belongs to another run"):
        trained(data, dataclasses.replace(RECIPE, lr=5e-4), checkpoint=path)
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
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


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


MUON = Recipe(optimizer="muon", lr=0.02, rest_lr=3e-3, momentum=0.9, weight_decay=0.1)
FAMILY = dataclasses.replace(CONFIG, stem="residual", mlp="conv", distilled=True, num_classes=4)


def routed(model, recipe=MUON, objective=cross_entropy):
    """{parameter's name: (rule, weight decay)} as it came about in one step."""
    optimizer = recipe.build_optimizer(model, objective, "cpu")
    names = {p: n for n, p in model.named_parameters()}
    for p in names:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    optimizer.step()
    found = [
        (names[p], ("muon" if "momentum_buffer" in optimizer.state[p] else "rest", group["weight_decay"]))
        for group in optimizer.param_groups for p in group["params"]
    ]  # fmt: skip
    assert len(found) == len({name for name, _ in found}) == len(names), "each parameter is in one group"
    return dict(found)


def test_muon_takes_the_hidden_matrices_and_convolutions_and_leaves_the_rest():
    found = routed(ViT(FAMILY))
    muon = {name for name, (rule, _) in found.items() if rule == "muon"}
    hidden = {f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    stem = {f"patch_embed.layers.{name}.weight" for name in ("3", "6.0", "7", "10.0", "11", "14.0")}
    assert muon == hidden | stem | {"patch_embed.proj.weight"}
    free = {"cls_token", "dist_token", "pos_embed"} | {n for n in found if n.endswith("bias") or "norm" in n}
    assert all(found[name] == ("rest", 0.0) for name in free)
    outer = {"patch_embed.layers.0.weight", "head.weight", "head_dist.weight"}
    assert all(found[name] == ("rest", 0.1) for name in outer | {f"blocks.{i}.mlp.conv.weight" for i in (0, 1)})


def test_a_frozen_input_layer_does_not_turn_the_next_layer_into_one():
    model = ViT(dataclasses.replace(CONFIG, num_classes=4))
    model.patch_embed.requires_grad_(False)
    optimizer = MUON.build_optimizer(model, cross_entropy, "cpu")
    assert any(p is model.blocks[0].attn.qkv.weight for p in optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match="no hidden matrix"):
        MUON.build_optimizer(nn.Linear(3, 4), cross_entropy, "cpu")


def orthogonal(matrix):
    """Newton-Schulz with timm's five "quintic" triples, in float64 and as the formula reads."""
    x = matrix.double() / matrix.double().norm()
    for a, b, c in [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                    (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)]:  # fmt: skip
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x


def test_steps_of_muon_are_the_formulas_in_float64_at_the_two_learning_rates():
    torch.manual_seed(0)
    model = ViT(FAMILY)
    optimizer = MUON.build_optimizer(model, cross_entropy, "cpu")
    watched = [model.blocks[1].mlp.fc1.weight, model.patch_embed.layers[3].weight, model.head.weight]
    start = [p.detach().double().clone() for p in watched]
    expected, mean, square = list(start), [0.0] * 3, 0.0
    for step, factor in enumerate((1.0, 0.5), 1):  # the schedule halves both rates
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        grads = [p.grad.double() for p in watched]
        mean = [0.9 * m + 0.1 * g for m, g in zip(mean, grads)]
        square = 0.999 * square + 0.001 * grads[2].square()
        ahead = [0.9 * m + 0.1 * g for m, g in zip(mean, grads)]  # Nesterov
        for i in (0, 1):
            update = 0.2 * max(ahead[i].flatten(1).shape) ** 0.5 * orthogonal(ahead[i].flatten(1)).view_as(grads[i])
            expected[i] = expected[i] * (1 - factor * 0.02 * 0.1) - factor * 0.02 * update
        update = ahead[2] / (1 - 0.9**step) / (square / (1 - 0.999**step)).sqrt()
        expected[2] = expected[2] * (1 - factor * 3e-3 * 0.1) - factor * 3e-3 * update
        for group in optimizer.param_groups:
            group["lr"] = factor * MUON.lr
        optimizer.step()
    # timm iterates in bfloat16, which has 3 digits
    for p, before, wanted, tolerance in zip(watched, start, expected, (0.02, 0.02, 1e-4)):
        assert (p.detach().double() - wanted).norm() < tolerance * (wanted - before).norm()


def test_a_loss_that_is_not_finite_stops_with_where_and_what_to_try(data, tmp_path):
    path = tmp_path / "run.safetensors"

    def objective(model, batch):
        loss, logs = cross_entropy(model, batch)
        objective.step += 1
        return (loss * math.nan if objective.step == 7 else loss), logs

    objective.step = 0
    with pytest.raises(NotFinite, match=r"nan at epoch 2, step 3 of 4 .*Try a lower lr"):
        trained(data, objective=objective, checkpoint=path, save_every=0)
    _, history = trained(data, checkpoint=path, save_every=0)  # goes on from the end of epoch 1
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
        ({"optimizer": "lion"}, "optimizer='lion': choose one of adamw, adam, sgd, muon"),
        ({"optimizer": "muon"}, "rest_lr=None, optimizer='muon'"),
        ({"rest_lr": 0.1}, "rest_lr=0.1, optimizer='adamw'"),
        ({"optimizer": "muon", "rest_lr": 0.1, "lr": 0}, "rates above 0"),
        ({"optimizer": "muon", "rest_lr": 0.1, "momentum": 1.0}, "momentum=1.0"),
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


def test_a_batch_larger_than_the_data_is_refused(data):
    with pytest.raises(ValueError, match="batch=100 is larger than the 64 training images"):
        trained(data, dataclasses.replace(RECIPE, batch=100))


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
