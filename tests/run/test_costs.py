"""GPU minutes from operations: against a count by hand, and against what the notebooks really train."""

import pytest
import yaml

from vitlab.metrics import measure
from vitlab.models.vit import ViT
from vitlab.run import costs
from vitlab.run.notebooks import project
from vitlab.study import zoo


def parameters(preset, number):
    sections = yaml.safe_load((project().source / "presets" / f"{preset}.yaml").read_text())
    return next(v for k, v in sections.items() if k.startswith(number))


def test_a_run_costs_six_operations_a_mac_image_and_epoch():
    spec = zoo.get("S4/baseline")
    run = costs.of(spec)
    assert run.macs == measure.macs(ViT(spec.config), (3, 32, 32))
    assert run.minutes == pytest.approx(6 * run.macs * 45_000 * 200 / costs.RATE / 60)
    assert costs.of(spec, dataset="tiny-imagenet").minutes == pytest.approx(run.minutes * 95 / 45)
    assert costs.of(spec, share=0.5, epochs=20).minutes == pytest.approx(run.minutes / 20)


def test_every_notebook_with_training_has_its_runs():
    names = {k: [r.name for r in costs.runs(k, parameters("gpu", k))] for k in costs.COSTS}
    assert set(zoo.SPECS) <= set(names["01"]) and "ours on cifar100" in names["01"]
    assert names["05"] == ["S3/pruned", "S3/by-slope"]
    given = parameters("gpu", "06")
    forms, several = 2, sum(map(len, given["variants"].values()))
    # both forms and their controls, both in our baseline, on every other data set, the ablation, more tokens
    assert len(names["06"]) == 2 * forms + forms + forms * len(given["also"]) + 1 + several + 3
    assert costs.runs("07", {}) == []


def test_minutes_are_over_all_seeds():
    given = parameters("gpu", "05")
    one, three = costs.minutes("05", given | {"seeds": [0]}), costs.minutes("05", given | {"seeds": [0, 1, 2]})
    assert three == pytest.approx((3 * one[0], 3 * one[1])) and one[0] == 2


@pytest.mark.parametrize("number", costs.COSTS)
def test_a_smaller_preset_costs_less(number):
    defaults = {"also": [], "by_slope": False}
    small = costs.minutes(number, defaults | parameters("cpu", number))[1]
    assert 0 < small < 0.2 * costs.minutes(number, parameters("gpu", number))[1]
