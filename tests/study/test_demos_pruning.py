"""Notebook 04's arms of the `cpu` preset that come with the project: found by key, never trained again."""

from dataclasses import replace
from pathlib import Path

import pytest

from vitlab.compress.distill import Distill
from vitlab.compress.pruning import peers
from vitlab.compress.pruning.budget import select
from vitlab.compress.pruning.criteria import score
from vitlab.compress.pruning.structured import shape_of
from vitlab.data import datasets
from vitlab.models import checkpoint
from vitlab.run.notebooks import read_yaml
from vitlab.study import pruning as pruned
from vitlab.study import study as studies
from vitlab.study import zoo

PRESET = Path(zoo.__file__).parents[2] / "presets" / "cpu.yaml"
PLAN = read_yaml(PRESET.read_text(), PRESET.name)["04_structured_pruning_kd"]
FILES = {"": "baseline-gated", "uncut": "baseline-tuned", "control": "pruned-40-tuned", "kd": "pruned-40-kd",
         "uniform": "pruned-40-uniform-tuned", "peer": "torch-pruning", "scratch": "pruned-40-scratch",
         "tiny": "tiny", "taught": "tiny-kd"}  # fmt: skip


def arms(study, data, seed):
    """{key of FILES: Arm} as the notebook makes them."""
    baseline, tiny = (zoo.scaled(name, PLAN["changes"][name]) for name in ("S2/baseline", "S2/tiny"))
    gated = pruned.gated(study, baseline, data, seed, l1=PLAN["prune"]["l1"])
    shape, gates, multiple = shape_of(gated.model), score(gated.model, "gates"), PLAN["prune"]["multiple"]
    dense, cut, even = (
        pruned.cut(gated, masks, "", "") for masks in (
            {}, *(select(shape, gates, ratio=max(PLAN["prune"]["ratios"]), multiple=multiple, uniform=uniform)
                  for uniform in (False, True))))  # fmt: skip
    peer = pruned.cut(dense, peers.torch_pruning(dense.model, shape_of(cut.model).macs(), multiple=multiple), "", "")

    def tuned(arm, **how):
        return pruned.tuned(study, arm, data, PLAN["tune"], "tuned", "", **how)

    uncut = tuned(dense)
    teacher = {"objective": Distill(uncut.model, temperature=4.0, alpha=0.7)}
    longer = replace(baseline.recipe, epochs=baseline.recipe.epochs + PLAN["tune"]["epochs"])
    return {"": gated, "uncut": uncut, "control": tuned(cut), "kd": tuned(cut, **teacher), "uniform": tuned(even),
            "peer": tuned(peer), "scratch": study.arm(replace(cut.spec, recipe=longer), data, seed),
            "tiny": study.arm(tiny, data, seed), "taught": study.arm(tiny, data, seed, **teacher)}  # fmt: skip


@pytest.mark.parametrize("seed", PLAN["seeds"])
def test_arms_are_found_by_the_notebook_and_have_learnt(seed, tmp_path, monkeypatch):
    paths = {role: studies.DEMO / f"S2-{name}-cifar10-s{seed}.safetensors" for role, name in FILES.items()}
    abouts = {role: checkpoint.read(path).about for role, path in paths.items()}
    keys = {about["data"] for about in abouts.values()}
    assert len(keys) == 1 and {about["trained_in"] for about in abouts.values()} == {"bfloat16"}, "compared, so alike"
    monkeypatch.setattr(studies, "fit", None)  # nothing is trained here
    study = studies.Study("04_structured_pruning_kd", "cpu", device="cpu", root=tmp_path)
    found = arms(study, replace(datasets.load("tiny"), key=keys.pop()), seed)
    assert {role: arm.key for role, arm in found.items()} == {role: about["key"] for role, about in abouts.items()}
    reached = {role: about["history"][-1]["val_accuracy"] for role, about in abouts.items()}
    assert min(reached.values()) > 65 and reached["uncut"] > 75, "worth pruning"
