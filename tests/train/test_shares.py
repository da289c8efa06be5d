"""Batches shared out to threads: the gradient is autograd's of the whole batch, and the same every time."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from train_cases import same

from vitlab.data.datasets import Split
from vitlab.models.vit import ViT, ViTConfig
from vitlab.train import loop, shares
from vitlab.train.loop import Batch, cross_entropy, fit
from vitlab.train.recipe import Recipe
from vitlab.utils import rng

CONFIG = ViTConfig(image_size=16, patch_size=8, dim=16, depth=2, heads=2, num_classes=4)
RECIPE = Recipe(
    epochs=2, batch=64, smoothing=0.1, mixup=0.5, augment="crop(2)+flip", dtype="float32", clip=1.0, ema=0.9
)


@pytest.fixture(autouse=True)
def threads():
    """Two threads, whatever this machine has; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def more(data):
    """Twice the toy images, so that a batch of 64 is not all there is."""
    train = Split(*(torch.cat([t, t.flip(0)]) for t in (data.train.images, data.train.labels)))
    return dataclasses.replace(data, train=train)


def trained(data, config=CONFIG, **options):
    rng.seed_all(1)
    model = ViT(config)
    return model, fit(model, data, RECIPE, log=None, **options)


def asked(monkeypatch):
    """The list to which every later run adds its number of shares."""
    counts, original = [], shares.Gradient
    monkeypatch.setattr(shares, "Gradient", lambda *a: counts.append(a[3]) or original(*a))
    return counts


@pytest.mark.parametrize("images, count", [(12, 2), (13, 2), (13, 4), (3, 2)])
@pytest.mark.parametrize("changes", [{}, {"distilled": True}, {"stem": "residual", "mlp": "conv"}])  # with batch norm
def test_loss_logs_and_gradient_are_those_of_the_whole_batch(images, count, changes):
    torch.manual_seed(0)
    model = ViT(dataclasses.replace(CONFIG, **changes)).double()
    unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    batch = Batch(torch.randn(images, 3, 16, 16).double(), torch.rand(images, 4).double().softmax(1),
                  torch.randint(4, (images,)), 0)  # fmt: skip
    whole = copy.deepcopy(model)
    wanted, logs = cross_entropy(whole, batch)
    gradients = torch.autograd.grad(wanted, [*whole.parameters()])
    parameters = [*model.parameters(), unused]
    gradient = shares.Gradient(lambda part: cross_entropy(model, part), parameters, "cpu", count, model)
    loss, found = gradient(batch, torch.float32)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found["accuracy"].double(), logs["accuracy"].double(), rtol=1e-6, atol=0)
    for parameter, of_all in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, of_all, rtol=1e-9, atol=1e-14)
    for buffer, of_all in zip(model.buffers(), whole.buffers(), strict=True):  # running statistics
        torch.testing.assert_close(buffer, of_all, rtol=1e-12, atol=1e-14)
    assert unused.grad is None and torch.get_num_threads() == 2
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norms_gradient_is_as_exact_as_torchs(dtype):
    """Of two shares in that type, against torch's own of the whole batch in float64."""
    torch.manual_seed(0)
    norm, x, target = nn.BatchNorm2d(5), 3 + 2 * torch.randn(24, 5, 7, 7), torch.randn(24, 5, 7, 7)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2), norm.bias.normal_()

    def gradients(norm, x, target, weights):
        x = x.detach().requires_grad_()
        team = shares.Threads(weights)

        if len(weights) == 1:
            loss = (norm(x).double() * target.double()).sum() / len(x)
            return torch.autograd.grad(loss, [x, *norm.parameters()])
        parts = [p.detach().requires_grad_() for p in x.split([round(w * len(x)) for w in weights])]
        wanted = target.split([len(part) for part in parts])

        def of(part, given):
            loss = (norm(part).double() * given.double()).sum() / len(part)
            return torch.autograd.grad(loss, [part, *norm.parameters()])

        with team.norms([norm]), ThreadPoolExecutor(len(parts)) as pool:
            work = [pool.submit(team.run, i, of, p, g) for i, (p, g) in enumerate(zip(parts, wanted))]
            found = [each.result() for each in work]
        scaled = [[w * g for g in of_part] for w, of_part in zip(weights, found)]
        return torch.cat([s[0] for s in scaled]), *(sum(g) for g in zip(*(s[1:] for s in scaled)))

    exact = gradients(copy.deepcopy(norm).double(), x.to(dtype).double(), target, [1.0])
    whole, shared = (gradients(norm, x.to(dtype), target, weights) for weights in ([1.0], [0.25, 0.75]))
    for of_shares, of_torch, of_exact in zip(shared, whole, exact, strict=True):
        error, torchs = ((found.double() - of_exact).norm() / of_exact.norm() for found in (of_shares, of_torch))
        assert error < 2 * torchs + 1e-6


# weights before a batch norm hardly have a gradient, so that Adam's steps are made of its rounding, too
@pytest.mark.parametrize(("changes", "off", "of_loss"), [({}, 1e-5, 1e-5), ({"stem": "conv"}, 1e-2, 1e-3)])
def test_training_is_the_same_every_time_and_that_of_one_thread_but_for_rounding(
    more, monkeypatch, changes, off, of_loss
):
    counts, config = asked(monkeypatch), dataclasses.replace(CONFIG, **changes)
    one, history = trained(more, config)
    two, _ = trained(more, config)
    torch.set_num_threads(1)
    alone, by_one = trained(more, config)
    assert counts == [2, 2, 1] and same(one, two)
    for a, b in zip(one.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=off)
    assert history["loss"] == pytest.approx(by_one["loss"], rel=of_loss)


def test_stopped_within_and_after_an_epoch_a_run_ends_bit_identical(more, tmp_path, monkeypatch):
    whole, _ = trained(more)
    original, steps = loop._Run.step, []

    def step(run, *given):
        steps.append(given)
        if len(steps) in (2, 4):
            raise KeyboardInterrupt
        return original(run, *given)

    monkeypatch.setattr(loop._Run, "step", step)
    options = {"checkpoint": tmp_path / "state.safetensors", "save_every": 0, "save_within": 0}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trained(more, **options)
    again, history = trained(more, **options)
    assert history.resumed == 1 and same(whole, again)


NOISY = {
    "dropout": lambda: ViT(dataclasses.replace(CONFIG, dropout=0.1)),
    "stochastic depth": lambda: ViT(dataclasses.replace(CONFIG, drop_path=0.1)),
    "another batch norm": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * 16 * 16), nn.Linear(3 * 16 * 16, 4)),
    "batch norm of each batch alone": lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten()),
    "Gumbel noise": lambda: ViT(dataclasses.replace(CONFIG, attention="topk", attention_args={"k": 2})),
    "timm, stochastic depth": lambda: VisionTransformer(16, 8, embed_dim=16, depth=2, num_heads=2, drop_path_rate=0.1),
}


@pytest.mark.parametrize("what", NOISY)
def test_a_model_whose_images_are_not_each_for_itself_is_left_whole(what):
    model, images = NOISY[what]().train(), torch.randn(2, 3, 16, 16)
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert shares.how_many(model, images, 64) == 1
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Counting(nn.Module):
    """Keeps account of its passes, as a running statistic does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, images):
        self.passes += 1
        return images.mean((2, 3))


def test_a_changed_buffer_counts_too_and_is_put_back():
    model = Counting().train()
    assert shares.how_many(model, torch.randn(2, 3, 4, 4), 64) == 1 and model.passes == 0


@pytest.mark.parametrize("batch, threads, count", [(64, 2, 2), (63, 2, 1), (128, 2, 2), (96, 4, 3), (128, 1, 1)])
def test_no_share_is_smaller_than_pays(batch, threads, count):
    torch.set_num_threads(threads)
    timm = VisionTransformer(16, 8, embed_dim=16, depth=2, num_heads=2).train()
    assert shares.how_many(timm, torch.randn(2, 3, 16, 16), batch) == count


def test_an_objective_or_a_hook_is_given_whole_batches(more, monkeypatch):
    counts, seen = asked(monkeypatch), []

    def objective(model, batch):
        seen.append(len(batch.images))
        return cross_entropy(model, batch)

    trained(more, objective=objective)
    trained(more, on_epoch=[lambda *_: None])
    assert counts == [1, 1] and set(seen) == {64}


def test_an_error_in_a_share_is_raised(more):
    batch = Batch(torch.randn(4, 3, 16, 16), torch.rand(4, 4), torch.tensor([0, 0, 1, 1]), 0)
    model, calls = ViT(dataclasses.replace(CONFIG, stem="conv")), []

    def fails(part):
        calls.append(part)
        if part.labels[0]:  # the last share: the first waits for it
            raise RuntimeError("a share went wrong")
        return cross_entropy(model, part)

    gradient = shares.Gradient(fails, [*model.parameters()], "cpu", 2, model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a share went wrong"):
            gradient(batch, torch.float32)
    assert len(calls) == 4
