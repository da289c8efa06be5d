"""Arms of the pruning study, its sweeps and tables, and the two peers it stands beside."""

import copy
import dataclasses
from types import SimpleNamespace

import matplotlib
import pandas as pd
import pytest
import torch

from vitlab.compress.distill import Distill
from vitlab.compress.pruning.budget import select
from vitlab.compress.pruning.criteria import score
from vitlab.compress.pruning.shape import sizes
from vitlab.compress.pruning.structured import masked, shape_of, slim
from vitlab.models.vit import ViT, ViTConfig
from vitlab.study import pruning as pruned
from vitlab.study import zoo
from vitlab.study.study import Study

matplotlib.use("Agg")

TINY = {"dataset": "tiny", "image_size": 32, "patch_size": 16, "dim": 32, "depth": 2, "heads": 2, "head_hidden": 16,
        "epochs": 1, "batch": 500}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return Study("04_test", device="cpu", root=tmp_path_factory.mktemp("study"), log=lambda line: None)


@pytest.fixture(scope="module")
def data(study):
    return study.data("tiny")


@pytest.fixture(scope="module")
def base(study, data):
    return pruned.gated(study, zoo.scaled("S2/baseline", TINY), data, 0, l1=1e-2)


def gate_masks(base, share=0.7, multiple=4):
    shape = shape_of(base.model)
    return select(shape, score(base.model, "gates"), macs=share * shape.macs(), multiple=multiple)


def plain(seed=0, **options):
    torch.manual_seed(seed)
    options = {"image_size": 16, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 48} | options
    return ViT(ViTConfig(**options)).eval()


def test_the_student_has_the_published_size_and_stays_out_of_the_baselines():
    spec = zoo.get("S2/tiny")
    model = ViT(spec.config)
    uncounted = model.cls_token.numel() + model.pos_embed.numel()  # what the published counter passed over
    assert round((sum(p.numel() for p in model.parameters()) - uncounted) / 1e6, 2) == 1.66
    assert "S2/tiny" not in zoo.SPECS and not zoo.scaled("S2/tiny").changes
    with pytest.raises(ValueError, match="S2/tiny"):
        zoo.get("S2/tinny")


def test_a_cut_arm_is_exact_and_trained_on_from_there(study, data, base):
    masks = gate_masks(base)
    small = pruned.cut(base, masks, "cut", "cut")
    assert pruned.same(small.model, masked(base.model, masks), data) < 1e-4
    before = copy.deepcopy(small.model.state_dict())
    on = pruned.tuned(study, small, data, {"epochs": 1, "lr": 1e-3}, "on", "on", changes=("less",))
    assert on.spec.changes[-1] == "less" and on.model.config == small.model.config
    assert all(torch.equal(v, before[k]) for k, v in small.model.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in on.model.state_dict().items())
    assert on.epochs == small.epochs + 1 == 2  # what was cut keeps the epochs of what it was cut from
    again = pruned.tuned(study, small, data, {"epochs": 1, "lr": 1e-3}, "on", "on")
    assert again.key == on.key
    other = pruned.cut(base, gate_masks(base, 0.85), "cut", "cut")
    taught = pruned.tuned(study, small, data, {"epochs": 1, "lr": 1e-3}, "kd", "kd",
                          objective=Distill(base.model))  # fmt: skip
    assert len({small.key, other.key, on.key, taught.key}) == 4
    row = study.row(on, data, seconds=0.01, batch=8)
    assert row["macs"] == small.model.config.macs() and row["changes"].endswith("less")


def test_models_that_differ_stop_the_notebook(data, base):
    wrong = slim(base.model.core, gate_masks(base))
    with torch.no_grad():
        wrong.norm.weight.mul_(2)
    with pytest.raises(ValueError, match="differ by"):
        pruned.same(wrong, masked(base.model, gate_masks(base)), data)


def test_step_by_step_ends_at_the_budget_with_the_epochs_divided(study, data, base):
    dense = pruned.cut(base, {}, "dense", "dense")
    target = 0.75 * shape_of(dense.model).macs()
    arm, steps = pruned.step_by_step(study, dense, data, {"epochs": 3, "lr": 1e-3}, "steps", "steps", macs=target,
                                     criterion="taylor", rounds=2, images=32, multiple=1)  # fmt: skip
    assert [len(a.history) for a in steps] == [1, 2] and arm.model is steps[-1].model and arm.key == steps[-1].key
    assert arm.history.seconds == pytest.approx(sum(a.history.seconds for a in steps)), "the time of all rounds"
    assert arm.spec.recipe.epochs == 3 and arm.epochs == dense.epochs + 3, "its row tells the epochs of all rounds"
    assert 0.9 * target < shape_of(arm.model).macs() <= target
    assert shape_of(steps[0].model).macs() > shape_of(arm.model).macs() and not arm.model.training
    again, found = pruned.step_by_step(study, dense, data, {"epochs": 3, "lr": 1e-3}, "steps", "steps", macs=target,
                                       criterion="taylor", rounds=2, images=32, multiple=1)  # fmt: skip
    assert again.key == arm.key and [a.history.resumed for a in found] == [1, 2], "both rounds were found finished"
    assert all(torch.equal(v, arm.model.state_dict()[k]) for k, v in again.model.state_dict().items())
    by_chance, _ = pruned.step_by_step(study, dense, data, {"epochs": 1}, "steps", "steps", macs=target,
                                       criterion="random", rounds=1, images=32, multiple=1)  # fmt: skip
    expected = select(shape_of(dense.model), score(dense.model, "random"), macs=int(target), multiple=1)
    assert by_chance.spec.config == slim(dense.model, expected).config, "the criterion that was asked for"
    with pytest.raises(ValueError, match="rounds=4"):
        pruned.step_by_step(study, dense, data, {"epochs": 3}, "", "", criterion="taylor", macs=target, rounds=4,
                            images=32)  # fmt: skip


def test_sweep_holds_the_budget_for_every_criterion(data, base):
    rows = pruned.sweep(base, data, ["gates", "taylor", "random"], [0.85, 0.7], images=32, multiple=1, seconds=0.01)
    full = rows.macs[0]
    assert list(rows.way) == ["unpruned", "gates", "gates", "taylor", "taylor", "random", "random"]
    assert full == shape_of(base.model).macs() and (rows.macs <= rows.share * full).all()
    assert rows.accuracy[0] == pytest.approx(pruned.validated(base.model, data), abs=0.3)
    assert (rows.latency_ms > 0).all()
    left, right = pruned.ranking(rows, "title").axes
    assert {text.get_text() for text in right.texts} == {"gates", "taylor", "random", "unpruned"}
    assert rows.change.tolist() == pytest.approx((rows.accuracy - rows.accuracy[0]).tolist())
    assert (rows.low <= rows.change).all() and (rows.change <= rows.high).all()
    taylor = rows[rows.way == "taylor"].sort_values("macs")
    line = left.get_lines()[1]  # it begins at the unpruned model, which has lost nothing
    assert list(line.get_xdata()) == pytest.approx([*(taylor.macs / 1e6), full / 1e6])
    assert list(line.get_ydata()) == pytest.approx([*(taylor.accuracy - rows.accuracy[0]), 0])


def test_at_equal_latency_each_way_is_the_largest_that_is_as_fast(data, base, monkeypatch):
    """With a clock that reads MACs, the answer is known: the largest share below the reference's."""
    monkeypatch.setattr(pruned, "compare", lambda models, *_, **options: {
        name: SimpleNamespace(median_s=model.config.macs()) for name, model in models.items()})
    whole = shape_of(base.model).macs()
    reference = pruned.cut(base, pruned.chooser(base, data, criterion="gates", multiple=1)(0.8), "", "").model
    rows = pruned.at_latency(base, data, ["gates", "magnitude", "torch-pruning"], reference, multiple=1, steps=7)
    assert rows.way.tolist() == ["unpruned", "reference", "gates", "magnitude", "torch-pruning"]
    limit = reference.config.macs()
    assert (rows.macs[1:] <= limit).all() and rows.macs[1] == limit and rows.share[1] == limit / whole
    assert 0.78 < rows.share[2] <= 0.8 and rows.macs[2] > 0.97 * limit
    assert (rows.latency_ms == 1e3 * rows.macs).all()
    blocks = {"blocks": {"criterion": "taylor", "kinds": ("mlp",)}}
    tiny = SimpleNamespace(config=SimpleNamespace(macs=lambda: 1))  # nothing is that fast
    monkeypatch.setattr(pruned, "_judged", lambda arm, data, models, batch, seconds: list(models))
    assert len(pruned.at_latency(base, data, blocks, tiny, images=32)) == 2


def test_sweep_over_structures_leaves_out_what_cannot_be_reached(data, base):
    ways = {"blocks": {"criterion": "taylor", "kinds": ("block",)},
            "MLP": {"criterion": "taylor", "kinds": ("mlp",), "multiple": 1}}  # fmt: skip
    rows = pruned.sweep(base, data, ways, [0.9, 0.7], images=32, seconds=0.01)
    full, hidden = rows.macs[0], shape_of(base.model).shapes[0].hidden
    assert rows[rows.way == "blocks"].share.tolist() == [0.9, 0.7] and (rows.macs <= rows.share * full).all()
    least = slim(base.model, {f"blocks.{i}.mlp": torch.zeros(hidden) for i in (0, 1)}).config.macs()
    assert 0.7 * full < least < 0.9 * full and rows[rows.way == "MLP"].share.tolist() == [0.9]
    with pytest.raises(ValueError, match="criterion='tailor'"):
        pruned.sweep(base, data, {"x": {"criterion": "tailor"}}, [0.9], images=32, seconds=0.01)


def test_kept_share_by_hand():
    shape = shape_of(plain())
    masks = {k: torch.ones(n, dtype=torch.bool) for k, n in sizes(shape, ("qk", "v", "mlp")).items()}
    masks["blocks.1.v"][:12] = False
    masks["blocks.0.mlp"][::4] = False
    found = pruned.kept_share(shape, masks)
    assert found.loc["block 2"].tolist() == [100, 62.5, 100, 25, 100]
    assert found.loc["block 1"].tolist() == [100, 100, 75, 100, 100]


def test_relative_is_to_the_same_seed_and_keeps_what_is_missing():
    rows = pd.DataFrame({"arm": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1], "x": [10, 20, 5, 30],
                         "power_w": [None] * 4})  # fmt: skip
    found = pruned.relative(rows, ["x", "power_w"], "a")
    assert found.x.tolist() == [0, 0, -50, 50] and found.power_w.isna().all()


@pytest.mark.parametrize(("epochs", "teacher", "words"), [
    ((3.0, 5.0, 0.01), (-1.0, 1.0, 0.9), "was the epochs"), ((-1.0, 1.0, 0.9), (3.0, 5.0, 0.01), "was not the epochs"),
    ((-5.0, -3.0, 0.01), (-9.0, -7.0, 0.01), "cannot be told"), ((0.2, 2.0, 0.2), (-2.0, 0.1, 1.0), "cannot be told"),
    ((3.0, 5.0, 0.01), (2.0, 4.0, 0.01), "cannot be told")])  # fmt: skip
def test_distillation_is_credited_with_what_is_clear_only(epochs, teacher, words):
    lines = (SimpleNamespace(**dict(zip(("low", "high", "p"), line))) for line in (epochs, teacher))
    assert words in pruned.credit(*lines)


def test_the_published_export_goes_wrong_where_gates_or_heads_are_uneven(data, base):
    whole = torch.ones(32, dtype=torch.bool)
    even, uneven = whole.clone(), whole.clone()
    even[[3, 20]] = uneven[[3, 4]] = False  # one value channel of each head, two of the first
    folded = dataclasses.replace(base, model=slim(base.model))
    gates = dataclasses.replace(base, model=copy.deepcopy(base.model))
    with torch.no_grad():
        gates.model.gates["blocks_0_v"][:] = torch.linspace(0.2, 2, 32)
    assert pruned.same(pruned.published_export(folded, {"blocks.0.v": even}),
                       masked(folded.model, {"blocks.0.v": even}), data) < 1e-5  # fmt: skip
    for arm, mask in ((folded, uneven), (gates, even)):
        masks = {"blocks.0.v": mask}
        wrong = pruned.published_export(arm, masks)
        assert wrong.config.parameters() == pruned.cut(arm, masks, "", "").model.config.parameters()
        with pytest.raises(ValueError, match="differ by"):
            pruned.same(wrong, masked(arm.model, masks), data)
    small = pruned.cut(gates, masks, "cut", "")
    assert small.history.dtype == gates.history.dtype and not len(small.history)
    found, pairs = pruned.exports([gates], {"cut": [small]}, {("cut", gates.seed): masks}, data)
    assert tuple(found.arm) == pairs["cut"] == ("cut as published", "cut") and found.seed.tolist() == [gates.seed] * 2
    assert found.val_accuracy[0] == pruned.validated(wrong, data)
