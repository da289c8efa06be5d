"""Growth and break-even read off known series; a layer's operations, its time and memory; controls of the study."""

import dataclasses
import math

import pandas as pd
import pytest
import torch

from vitlab.metrics.counts import macs as counted
from vitlab.metrics.counts import parameters
from vitlab.metrics.measure import training_speed
from vitlab.models.sparse import TopKAttention
from vitlab.models.vit import ViT
from vitlab.study import complexity, plots, zoo
from vitlab.study import linear as linear_study

FORMS = ("ripple", "hydra")
SPEC = zoo.scaled("S4/baseline", {"dataset": "tiny", "patch_size": 8, "dim": 32, "depth": 2, "heads": 2})


def test_slope_and_crossing_of_known_powers():
    points = [(n, 3 * n**1.5) for n in (64, 128, 256, 512)]
    assert complexity.slope(points) == pytest.approx(1.5)
    # only the upper half counts: the lower one is flat
    assert complexity.slope([(1, 1), (2, 1), (4, 1), (8, 2), (16, 4), (32, 8)]) == pytest.approx(1.0)
    assert complexity.slope([(64, 2.0)]) is None
    # 300 n against n^2: equal at n = 300
    ratios = [(n, 300 / n) for n in (64, 128, 256, 512, 1024)]
    assert complexity.crossing(ratios) == 300
    assert complexity.crossing([(n, 1 / r) for n, r in ratios]) is None
    assert complexity.crossing([(n, 0.5) for n, _ in ratios]) == 64
    # below, above, below again: only the last crossing lasts
    assert 256 < complexity.crossing([(64, 0.5), (128, 0.5), (256, 2.0), (512, 0.5)]) < 512
    assert complexity.crossing([]) is None


@pytest.mark.parametrize(
    "name, word", [("softmax", "O(n^2)"), ("linear", "O(n)"), ("ripple", "O(n)"), ("hydra", "O(n)")]
)
def test_order_of_operations(name, word):
    found, exponent = complexity.order(name)
    assert found == word and exponent == pytest.approx(2 if word == "O(n^2)" else 1, abs=0.01)


def test_an_order_that_is_no_whole_power_is_refused():
    # at few tokens projections hide the quadratic term
    with pytest.raises(ValueError, match="neither"):
        complexity.order("softmax", side=16)


@pytest.mark.parametrize("name", ["softmax", "linear", "ripple", "hydra"])
def test_layer_macs_are_those_that_run(name):
    layer, macs = complexity.layer(6, dim=32, heads=2, attention=name)
    image = torch.nn.Sequential(torch.nn.Flatten(2), Transposed(), layer)
    assert macs == complexity.layer_macs(6, dim=32, heads=2, attention=name) == counted(image, (32, 6, 6))


class Transposed(torch.nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_linear_attention_saves_operations_from_twice_the_head_width():
    # two products: 2 n^2 D against 2 (2 d) n D + the denominators' 2 n D
    n = complexity.macs_crossover("linear", dim=384, heads=6)
    expected = next(s * s for s in range(4, 129) if s * s > 2 * 64 + 1)
    assert n == expected == 144


def test_sweep_measures_every_arm_at_every_size_and_its_figure_shows_them():
    arms = {"softmax": ("softmax", ()), "ripple": ("ripple", (("stages", 1),))}
    rows = complexity.sweep(arms, [4, 8], dim=32, heads=2, tokens=64, seconds=0.001)
    assert {(r["arm"], r["pass"], r["n"]) for r in rows} == {
        (a, p, n) for a in arms for p in complexity.PASSES for n in (16, 64)
    }
    assert all(r["ms"] > 0 and r["peak_mb"] > 0 and r["ms_q25"] <= r["ms"] <= r["ms_q75"] for r in rows)
    assert {r["n"]: r["images"] for r in rows} == {16: 4, 64: 1}
    by = {(r["arm"], r["pass"], r["n"]): r for r in rows}
    # gradients and what they need are held beside the output
    assert by["softmax", "training", 64]["peak_mb"] > by["softmax", "forward", 64]["peak_mb"]
    assert set(complexity.growth(rows)["forward"]) == set(arms)
    assert set(complexity.crossovers(rows)["training"]) == {"ripple"}
    figure = plots.scaling(rows, {"forward": {"ripple": 32}})
    assert len(figure.axes) == 4 and len(figure.axes[0].lines) == 3


def test_training_is_metered_as_it_is_done(monkeypatch):
    """Blocks of keys are gathered in eval mode only: learning which to read takes the whole table."""
    seen, mixed = set(), TopKAttention.mixed
    monkeypatch.setattr(
        TopKAttention, "mixed", lambda self, *x: seen.add((self.training, torch.is_grad_enabled())) or mixed(self, *x)
    )
    complexity.sweep({"blocks": ("topk", (("k", 8), ("block", 8)))}, [4], dim=8, heads=1, tokens=16, seconds=0)
    assert seen == {(False, False), (True, True)}


def test_sizes_that_take_too_long_are_left_out_and_said():
    said = []
    rows = complexity.sweep({"softmax": ("softmax", ())}, [4, 8], dim=32, heads=2, tokens=16, seconds=0, limit=0,
                            log=said.append)  # fmt: skip
    assert {r["n"] for r in rows} == {16} and len(said) == 2


@pytest.mark.alone
def test_training_speed_of_a_deeper_model_is_lower():
    configs = {"deep": dataclasses.replace(SPEC.config, depth=8), "shallow": dataclasses.replace(SPEC.config, depth=1)}
    found = training_speed({k: ViT(c) for k, c in configs.items()}, batch=8, seconds=0.05)
    assert found["shallow"] > 1.5 * found["deep"] > 0


def test_a_variant_changes_nothing_but_attention():
    ripple = linear_study.variant(zoo.get("S4/baseline"), "ripple")
    assert ripple.changes == () and ripple.recipe == zoo.get("S4/baseline").recipe and ripple.name == "S4/ripple"
    assert dict(ripple.config.attention_args) == {"stages": 3}
    other = linear_study.variant(zoo.get("S4/baseline"), "ripple", stages=2)
    assert other.changes == ("stages 2 instead of 3",)
    found = linear_study.ablations(SPEC, {"hydra": [{"branches": 2}, {"phi": "elu"}]})
    assert list(found) == ["hydra, branches 2", "hydra, phi elu"]
    assert SPEC.name == "S4/baseline-small" and linear_study.variant(SPEC, "ripple").name == "S4/ripple-small"
    assert dict(found["hydra, phi elu"].config.attention_args) == {"branches": 4, "phi": "elu"}


def test_published_sizes():
    base = zoo.get("S4/baseline")
    with torch.device("meta"):
        sizes = [parameters(s.config.build()) for s in (base, *(linear_study.variant(base, a) for a in FORMS))]
    assert sizes == [21_363_172, 21_667_300, 33_970_660]
    giga = [s.config.macs() / 1e9 for s in (base, *(linear_study.variant(base, a)
            for a in ("ripple", "hydra")))]  # fmt: skip
    assert [round(g, 4) for g in giga] == [1.4203, 1.4763, 2.3912]


@pytest.mark.parametrize("name", ["softmax", "ripple", "hydra"])
def test_counted_macs_are_those_of_the_model(name):
    config = SPEC.config if name == "softmax" else linear_study.variant(SPEC, name).config
    model = ViT(config)
    assert config.macs() == counted(model, (3, 32, 32))


def test_the_control_costs_what_it_should():
    target = linear_study.variant(SPEC, "hydra").config.macs()
    control = linear_study.same_macs(SPEC, target, "control")
    unit = SPEC.config.depth * SPEC.config.tokens * 2 * SPEC.config.dim
    assert abs(control.config.macs() - target) <= unit / 2 and control.config.mlp_dim > SPEC.config.mlp_dim
    assert "mlp_dim" in control.why
    with pytest.raises(ValueError, match="less than"):
        linear_study.same_macs(SPEC, 1000, "control")


def test_without_attention_no_patch_learns_of_another():
    spec = dataclasses.replace(SPEC, config=dataclasses.replace(SPEC.config, pool="mean"))
    control = linear_study.without_attention(spec, "control")
    model, images = ViT(control.config).eval(), torch.randn(2, 3, 32, 32)
    field = linear_study.receptive_field(model, images)
    assert linear_study.far_share(field, spec.config.patch_size) == pytest.approx(0, abs=1e-6)
    assert control.config.macs() == counted(model, (3, 32, 32)) < spec.config.macs() and "no heads" in control.why
    assert len(model.state_dict()) < len(ViT(spec.config).state_dict())


def test_which_is_best_a_seed():
    rows = pd.DataFrame({"arm": list("abab"), "seed": [0, 0, 1, 1], "val_accuracy": [3.0, 2, 1, 4]})
    assert linear_study.is_best(rows, "a", ["a", "b"]) == [True, False]
    assert linear_study.ahead(rows, "a", ["a", "b"]) == [1.0, -3.0] and linear_study.ahead(rows, "a", ["a"]) == []


def test_receptive_field_without_attention_is_the_patch_itself():
    torch.manual_seed(0)
    model = ViT(dataclasses.replace(SPEC.config, patch_size=4, depth=1)).train()
    images = torch.randn(2, 3, 32, 32)
    whole = linear_study.receptive_field(model, images)
    assert model.training and whole.shape == (28, 28) and whole.sum().item() == pytest.approx(1)
    assert linear_study.far_share(whole, 4) > 0
    torch.nn.init.zeros_(model.blocks[0].attn.proj.weight)
    alone = linear_study.receptive_field(model, images)
    assert alone[12:16, 12:16].sum().item() == pytest.approx(1)  # in the centre of 7 x 7 patches
    assert linear_study.far_share(alone, 4) == pytest.approx(0, abs=1e-6)
    assert linear_study.far_share(torch.full((28, 28), 1 / 28**2), 4) == pytest.approx(1 - 9 / 49)
    assert len(plots.fields({"a": whole, "b": alone}, patch=4).axes) == 3
    assert math.isfinite(float(whole.max()))
