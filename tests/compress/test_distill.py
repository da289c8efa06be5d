"""Distillation losses against float64 formulas; the teacher's isolation from student and objective."""

import copy
import json

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import nn

from vitlab.compress.distill import AttentionMaps, Distill, Features, Locality, standardised
from vitlab.compress.pruning.budget import select
from vitlab.compress.pruning.criteria import score
from vitlab.compress.pruning.gates import L1, GatedViT
from vitlab.compress.pruning.shape import prunable
from vitlab.compress.pruning.structured import shape_of
from vitlab.compress.pruning.structured import slim as cut
from vitlab.metrics.predict import kl_divergence
from vitlab.models import checkpoint
from vitlab.models.resnet import ResNet, ResNetConfig
from vitlab.models.vit import ViT, ViTConfig
from vitlab.train.loop import Batch, fit
from vitlab.train.recipe import Recipe
from vitlab.utils import rng
from vitlab.utils.files import plain

TINY = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 3, "heads": 3, "mlp_dim": 40}


def student(**changes):
    torch.manual_seed(0)
    return ViT(ViTConfig(**TINY | changes)).train()


def cnn(**changes):
    torch.manual_seed(1)
    given = {"image_size": 16, "widths": (8, 12, 16), "residual": (1,)}
    return ResNet(ResNetConfig(**given | changes))


def batch(n=6, side=16):
    draw = rng.generator(0, "batch")
    labels = torch.arange(n) % 10
    targets = 0.9 * nn.functional.one_hot(labels, 10).float() + 0.01
    return Batch(torch.randn(n, 3, side, side, generator=draw), targets, labels, 0)


def formula_soft(student, teacher, t):
    """T^2 KL(teacher || student) in NumPy's float64."""
    p, q = (log_softmax(x.detach().double().numpy() / t, axis=1) for x in (teacher, student))
    return float((np.exp(p) * (p - q)).sum(1).mean() * t * t)


def cross_entropy64(logits, targets):
    return float(-(targets.double().numpy() * log_softmax(logits.detach().double().numpy(), axis=1)).sum(1).mean())


def test_soft_and_standardised_losses():
    draw = rng.generator(0, "logits")
    own, goal = (3 * torch.randn(5, 10, generator=draw) for _ in range(2))
    for t in (1.0, 4.0, 20.0):
        assert t**2 * kl_divergence(own, goal, t).item() == pytest.approx(formula_soft(own, goal, t), rel=1e-5)
    z = goal.double().numpy()
    z = (z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True)
    assert np.allclose(standardised(goal).numpy(), z, atol=1e-5)
    # only the order and shape of the logits count, not their size: the point of the method
    assert torch.allclose(standardised(7 * goal + 3), standardised(goal), atol=1e-5)


@pytest.mark.parametrize("kind, temperature, alpha", [("soft", 4.0, 0.7), ("zscore", 2.0, 0.9), ("hard", 1.0, 0.5)])
@pytest.mark.parametrize("distilled", [False, True])
def test_objective_against_float64(kind, temperature, alpha, distilled):
    model, teacher, seen = student(distilled=distilled), cnn().eval(), batch()
    loss, logs = Distill(teacher, kind=kind, temperature=temperature, alpha=alpha)(model, seen)
    out, known = model(seen.images), teacher(seen.images)
    own, taught = out if distilled else (out, out)
    if kind == "hard":
        told = cross_entropy64(taught, nn.functional.one_hot(known.argmax(1), 10))
    else:
        pair = (taught, known) if kind == "soft" else (standardised(taught), standardised(known))
        told = formula_soft(*pair, temperature)
    expected = (1 - alpha) * cross_entropy64(own, seen.targets) + alpha * told
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    # a small divergence is a difference of logarithms near 2: float32 leaves it 1e-6
    assert logs["kd"].item() == pytest.approx(told, rel=1e-4, abs=2e-6)
    assert logs["ce"].item() == pytest.approx(cross_entropy64(own, seen.targets), rel=1e-5)
    assert set(logs) == {"accuracy", "ce", "kd", "agreement"}


def test_timms_distillation_is_the_same_loss_and_gradient():
    task, held = pytest.importorskip("timm.task"), pytest.importorskip("timm.task.distillation")
    model, teacher, seen, found = student(), student(depth=2).eval(), batch(), []
    model.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # its teacher's
    theirs = task.LogitDistillationTask(
        model, held.DistillationTeacher(copy.deepcopy(teacher), device="cpu"), criterion=nn.CrossEntropyLoss(),
        task_loss_weight=0.4, temperature=3.0, device="cpu", verbose=False,
    )  # fmt: skip
    for loss in (lambda: Distill(teacher, temperature=3.0, alpha=0.6)(model, seen)[0],
                 lambda: theirs(seen.images, seen.targets)["loss"]):  # fmt: skip
        model.zero_grad()
        value = loss()
        value.backward()
        found.append((value, model.blocks[0].attn.qkv.weight.grad.clone()))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found))


def test_the_teachers_logits_are_of_the_same_images():
    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images):
            self.seen = images
            return images.mean((2, 3)).repeat(1, 4)[:, :10] + self.weight

    objective, seen = Distill(Spy()), batch()
    objective(student(), seen)
    assert objective.teacher.seen is seen.images


def normed(x):
    x = x.detach().double().numpy()
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def test_features_attention_and_locality_against_float64():
    model, teacher, seen = student(), ViT(ViTConfig(**TINY | {"dim": 32, "heads": 4})).eval(), batch()
    terms = [Features((24, 32), 4, pairs=((0, 1), (-1, -1))), AttentionMaps(pairs=((1, 2),), weight=3.0)]
    loss, logs = Distill(teacher, alpha=0.0, terms=terms)(model, seen)
    _, own = model(seen.images, intermediates=True)
    _, goal = teacher(seen.images, intermediates=True)
    error = 0.0
    for projector, (i, j) in zip(terms[0].projectors, terms[0].pairs):
        difference = normed(projector(own["tokens"][i][:, 1:])) - normed(goal["tokens"][j][:, 1:])
        error += (difference**2).mean() / 2
    assert logs["features"].item() == pytest.approx(error, rel=1e-4)
    p, q = (a.detach().double().numpy().mean(1) for a in (goal["attention"][2], own["attention"][1]))
    divergence = (p * (np.log(p) - np.log(q))).sum(-1).mean()
    assert logs["attention"].item() == pytest.approx(divergence, rel=1e-3, abs=1e-7)
    assert loss.item() == pytest.approx(logs["ce"].item() + error + 3 * divergence, rel=1e-4)
    assert "kd" not in logs

    teacher = cnn().eval()
    guide = Locality(24, 4, (12, 16), depth=3)
    assert guide.pairs == ((1, -2), (2, -1))
    _, logs = Distill(teacher, alpha=0.0, terms=[guide])(model, seen)
    features = teacher(seen.images, intermediates=True)[1]["features"]
    error = 0.0
    for projector, (i, j) in zip(guide.projectors, guide.pairs):
        side = features[j].shape[-1] // 4
        pooled = features[j].detach().double().unfold(2, side, side).unfold(3, side, side).mean((-1, -2))
        grid = projector(own["tokens"][i][:, 1:])
        error += ((normed(grid) - normed(pooled.flatten(2).transpose(1, 2))) ** 2).mean() / 2
    assert logs["locality"].item() == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("mode", [True, False])
def test_the_teacher_stays_out_of_everything(mode):
    model, original = student().train(mode), cnn().train()
    with torch.no_grad():
        original(torch.randn(32, 3, 16, 16))  # running statistics that differ from the batch's
    objective = Distill(original, terms=[Locality(24, 4, (16,), depth=3)], alpha=0.5)
    before = {k: v.clone() for k, v in objective.teacher.state_dict().items()}
    objective.train(mode)
    model.train(mode)
    original.train()  # the caller's own copy may be trained on
    loss, _ = objective(model, batch())
    loss.backward()
    teacher = objective.teacher
    assert not any(m.training for m in teacher.modules()) and original.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in original.parameters())
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in before.items())  # running statistics too
    own = {n for n, _ in objective.named_parameters()}
    assert own == {"terms.0.projectors.0.weight", "terms.0.projectors.0.bias"} == set(objective.state_dict())
    held = {id(p) for p in teacher.parameters()}
    assert not held & {id(p) for p in [*objective.parameters(), *model.parameters()]}
    assert not any(m is teacher for m in objective.modules())
    assert all(p.grad is not None for p in objective.parameters())
    optimized = Recipe().build_optimizer(model, objective, "cpu").param_groups
    assert not held & {id(p) for group in optimized for p in group["params"]}


def test_a_student_can_be_its_own_teacher():
    model = student(dropout=0.3)
    objective = Distill(model, alpha=1.0)
    model.train()
    assert not objective.teacher.training and model.training
    torch.manual_seed(0)
    first = objective(model, batch())[0]
    with torch.no_grad():
        model.head.bias.add_(torch.arange(10.0))
    torch.manual_seed(0)
    assert objective(model, batch())[0] > first + 0.1  # the teacher has not moved along


def test_an_objective_tells_all_that_changes_a_number():
    teacher, guide = cnn(), {"dim": 24, "grid": 4, "channels": (16,), "depth": 3}
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.head.weight[0, 0] += 1e-3
    found = [
        Distill(teacher), Distill(other), Distill(teacher, alpha=0.5), Distill(teacher, temperature=2.0),
        Distill(teacher, kind="zscore"), Distill(teacher, terms=[Locality(**guide)]),
        Distill(teacher, terms=[Locality(**guide, weight=2.0)]), Distill(student()),
        Distill(teacher, terms=[Locality(**guide, pairs=((0, -1),))]), Distill(student(), terms=[AttentionMaps()]),
        Distill(student(), terms=[Features((24, 24), 4)]),
    ]  # fmt: skip
    told = [json.dumps(plain(objective.describe())) for objective in found]
    assert len(set(told)) == len(told)
    assert json.dumps(plain(Distill(copy.deepcopy(teacher)).describe())) == told[0]


def test_projectors_start_the_same_whatever_was_drawn_before():
    first = Locality(24, 4, (12, 16))
    torch.manual_seed(7)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    second = Locality(24, 4, (12, 16))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert torch.equal(torch.rand(1), drawn), "and nothing is drawn for them"


def test_a_copy_and_a_move_take_the_teacher_along():
    objective = Distill(cnn(), terms=[Locality(24, 4, (16,), depth=3)]).to(torch.float64)
    assert next(objective.teacher.parameters()).dtype == torch.float64
    assert copy.deepcopy(objective).teacher is not objective.teacher


def test_a_teacher_of_another_image_size_and_timms():
    timm = pytest.importorskip("timm.models.vision_transformer")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    teacher = timm.VisionTransformer(**sizes)
    seen = batch()
    loss, logs = Distill(teacher, terms=[Features((24, 32), 4)])(student(), seen)
    large = nn.functional.interpolate(seen.images, size=(32, 32), mode="bilinear", align_corners=False)
    assert torch.allclose(Distill(teacher).ask(seen.images)[0], teacher.eval()(large), atol=1e-6)
    assert loss.isfinite() and logs["features"] > 0


def dataset():
    from vitlab.data.datasets import Dataset, Split

    draw = rng.generator(0, "data")
    pixels = torch.randint(0, 256, (64, 3, 16, 16), generator=draw, dtype=torch.uint8)
    split = Split(pixels, torch.arange(64) % 10)
    return Dataset(name="noise", train=split, val=split, test=split, classes=tuple("abcdefghij"),
                   mean=(0.5,) * 3, std=(0.25,) * 3, key="noise")  # fmt: skip


def test_fit_trains_projectors_gates_and_slim_students():
    recipe = Recipe(epochs=2, batch=32, augment="", mixup=0.2, lr=1e-3)
    teacher = cnn()
    fit(teacher, dataset(), recipe, log=None)
    gated = GatedViT(student())
    objective = L1(1e-4, Distill(teacher, terms=[Locality(24, 4, (12, 16), depth=3)]))
    before = [p.detach().clone() for p in objective.parameters()]
    history = fit(gated, dataset(), recipe, objective=objective, log=None)
    assert len(before) == 4 and not any(torch.equal(a, b) for a, b in zip(before, objective.parameters()))
    assert {"kd", "locality", "l1", "agreement"} <= set(history.rows[0])
    assert not torch.equal(gated.gates["blocks_0_v"], torch.ones(24))
    small = cut(gated, select(shape_of(gated), score(gated, "gates"), ratio=0.3, multiple=4))
    history = fit(small, dataset(), recipe, objective=Distill(teacher, kind="zscore"), log=None)
    assert history["loss"][1] < history["loss"][0]


def test_refusals():
    for wrong in ({"kind": "firm"}, {"alpha": 1.5}, {"temperature": 0}):
        with pytest.raises(ValueError):
            Distill(cnn(), **wrong)
    with pytest.raises(ValueError, match="teacher's logits"):
        Distill(cnn(num_classes=7))(student(), batch())
    with pytest.raises(ValueError, match="CNN teacher"):
        Distill(student(), terms=[Locality(24, 4, (16,))])(student(), batch())
    with pytest.raises(ValueError, match="teacher gives only"):
        Distill(cnn(), terms=[Features((24, 16), 4)])(student(), batch())
    with pytest.raises(ValueError, match="pairs for"):
        Locality(24, 4, (16, 8), pairs=((0, 0),))


# the CNN


def test_resnet9_has_its_published_size():
    from torch.utils.flop_counter import FlopCounterMode

    model = ResNet(ResNetConfig()).eval()
    assert sum(p.numel() for p in model.parameters()) == 6_573_120
    for other in (model, cnn(widths=(6, 8), residual=()).eval()):
        side = other.config.image_size
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            logits, seen = other(torch.randn(1, 3, side, side), intermediates=True)
        assert counter.get_total_flops() == 2 * other.config.macs()
        assert [f.shape[1] for f in seen["features"]] == list(other.config.widths)
        assert torch.equal(logits, other.head(seen["pooled"]) * 0.125)


def test_resnet_saves_loads_and_refuses(tmp_path):
    model = cnn().eval()
    checkpoint.save(model, tmp_path / "cnn.safetensors")
    again = checkpoint.load(tmp_path / "cnn.safetensors")
    assert again.config == model.config and torch.equal(again(batch().images), model(batch().images))
    checkpoint.save(prunable(student()), tmp_path / "slim.safetensors")
    assert isinstance(checkpoint.load(tmp_path / "slim.safetensors"), ViT)
    for wrong in ({"widths": ()}, {"widths": (8, 8), "residual": (2,)}, {"image_size": 30}):
        with pytest.raises(ValueError):
            ResNetConfig(**wrong)
