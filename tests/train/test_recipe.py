"""Muon: which parameters it takes, and its steps against the formulas in float64."""

import dataclasses

import pytest
import torch
from torch import nn
from train_cases import CONFIG

from vitlab.models.vit import ViT
from vitlab.train import recipe
from vitlab.train.loop import cross_entropy
from vitlab.train.recipe import Recipe, told_apart

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


# timm iterates in bfloat16, which has 3 digits; where the CPU would emulate that, in float32
@pytest.mark.parametrize(("units", "tolerance"), [(True, 0.02), (False, 1e-4)])
def test_steps_of_muon_are_the_formulas_in_float64_at_the_two_learning_rates(monkeypatch, units, tolerance):
    monkeypatch.setattr(recipe, "has_bfloat16", lambda: units)
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
    for p, before, wanted, allowed in zip(watched, start, expected, (tolerance, tolerance, 1e-4)):
        assert (p.detach().double() - wanted).norm() < allowed * (wanted - before).norm()


@pytest.mark.parametrize(("given", "words"), [
    ({"optimizer": "muon"}, "rest_lr=None"),
    ({"rest_lr": 1e-3}, "optimizer='adamw'"),
    ({"optimizer": "muon", "rest_lr": 1e-3, "lr": 0.0}, "rates above 0"),
    ({"optimizer": "muon", "rest_lr": 1e-3, "momentum": 1.0}, "momentum=1.0"),
])  # fmt: skip
def test_muon_wants_two_rates_and_the_others_one(given, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**given)


def test_a_rate_that_came_later_counts_only_where_it_is_used():
    assert "rest_lr" not in told_apart(Recipe()) and told_apart(MUON)["rest_lr"] == 3e-3
