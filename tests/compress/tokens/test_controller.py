"""Reduction that changes with the epoch, the validation curve and the image."""

import pytest
import torch
from vits import pictures, small

from vitlab.compress.tokens import controller
from vitlab.compress.tokens.reduction import TokenConfig, reduce_tokens


class Curve(dict):
    """A history: names to values."""


def test_hooks_switch_and_adapt_and_resume():
    reduced = reduce_tokens(small(), r_max=0.6)
    hook, seen = controller.PruneFrom(2), []
    for epoch in range(4):
        hook(epoch, reduced, Curve())
        seen.append((reduced.active, reduced.token_config.r_max))
    assert seen == [(False, 0.6), (False, 0.6), (True, 0.6), (True, 0.6)]
    assert hook.describe() == controller.PruneFrom(2).describe() != controller.PruneFrom(3).describe()
    with pytest.raises(ValueError, match="start=-1"):
        controller.PruneFrom(-1)
    adapt, curve, rates = controller.SlopeSchedule(r_max=0.3, step=0.2, start=1), Curve(val_accuracy=[10.0]), []
    for epoch, value in enumerate([20, 30, 30, 30, 20, 10]):
        adapt(epoch, reduced, curve)
        rates.append(round(reduced.token_config.r_max, 3))
        curve["val_accuracy"].append(value)
    assert rates == [0.0, 0.2, 0.3, 0.3, 0.3, 0.1]
    other = controller.SlopeSchedule(r_max=0.3, step=0.2, start=1)
    other.load_state_dict(adapt.state_dict())
    other(0, reduced, Curve(val_accuracy=[]))
    assert round(reduced.token_config.r_max, 3) == 0.1, "it goes on from where the other was"
    assert adapt.describe() == other.describe() != controller.SlopeSchedule(r_max=0.4, step=0.2, start=1).describe()


def levels():
    return [TokenConfig(r_max=r, alpha=1.0, protect=(0,)) for r in (0.0, 0.4, 0.8)]


def test_adaptive_model_gives_each_image_its_level_whoever_is_beside_it():
    model, images = reduce_tokens(small()), pictures(6)
    sharpness = controller.AdaptiveViT(model, levels(), (1.0, 0.5)).gaze(images)[0]
    assert ((sharpness > 0) & (sharpness <= 1 + 1e-6)).all()
    upper, lower = sharpness.sort().values[[3, 1]].tolist()
    adaptive = controller.AdaptiveViT(model, levels(), (upper + 1e-7, lower + 1e-7)).eval()
    found, (chosen, _) = adaptive(images), adaptive.level(images)
    assert adaptive.used == [2, 2, 2]
    for i in range(6):
        alone = reduce_tokens(model, levels()[chosen[i]])(images[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone, atol=1e-5, rtol=1e-4)
    adaptive.per = "batch"
    assert len(adaptive.train().level(images)[0].unique()) == 1
    with pytest.raises(ValueError, match="protect the first"):
        controller.AdaptiveViT(model, [TokenConfig(r_max=0.9, alpha=1.0)], ())


def test_learned_controller_follows_the_price():
    adaptive = controller.AdaptiveViT(reduce_tokens(small()), levels(), (0.9, 0.8)).eval()
    images, labels = pictures(24), torch.arange(24) % 5
    table, seen = controller._table(adaptive, images, labels, 256)
    prices = [controller._fitted(table, seen, torch.tensor(adaptive.shares), p, 40, 0)[1]["share"] for p in (0, 1e3)]
    assert prices[1] == [0, 0, 1] and prices[0] != prices[1]
    with torch.enable_grad():
        controller.fit_controller(adaptive, images, labels, min(adaptive.shares), epochs=40)
    assert adaptive(images).shape == (24, 5) and adaptive.used == [0, 0, 24]


def test_controller_learns_from_images_what_a_share_of_tokens_buys():
    """The features tell which half of the images has to keep its tokens: a controller at half price finds it."""
    torch.manual_seed(0)
    seen, hard = torch.randn(200, 5), torch.arange(200) % 2 == 0
    seen[:, 1] += 4.0 * hard
    table = torch.stack([torch.full((200,), 0.1), torch.where(hard, 2.0, 0.1)], dim=1)  # gentle, strong
    shares = torch.tensor([1.0, 0.5])
    found, info = controller._fitted(table, seen, shares, 0.5, 200, 0)
    assert (found(seen).argmax(1) == 1).eq(~hard).float().mean() > 0.95
    assert info["tokens"] == pytest.approx(0.75, abs=0.03)


def test_controller_meets_a_share_or_says_what_there_is():
    adaptive = controller.AdaptiveViT(reduce_tokens(small()), levels(), (0.9, 0.8)).eval()
    images, labels = pictures(24), torch.arange(24) % 5
    shares = [sum(r.counts) / (4 * 65) for r in adaptive.reducers]
    _, info = controller.fit_controller(adaptive, images, labels, sum(shares) / 3, epochs=30)
    assert min(shares) <= info["tokens"] <= max(shares) and info["price"] > 0
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"share={wrong}: the levels leave between"):
            controller.fit_controller(adaptive, images, labels, wrong)
