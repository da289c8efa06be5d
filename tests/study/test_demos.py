"""The trained models that come with the project: on real test images they are what checkpoints/README.md says."""

import re
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest

from vitlab.compress.sparsify import HeadPenalty, Progressive
from vitlab.data import datasets as data
from vitlab.metrics import measure
from vitlab.models import checkpoint
from vitlab.run.notebooks import read_yaml
from vitlab.study import linear, zoo
from vitlab.study.study import DEMO, arm_key


@pytest.fixture(scope="module")
def tiny():
    return data.load("tiny")


def accuracy(model, tiny):
    return measure.accuracy(model, tiny.test, mean=tiny.mean, std=tiny.std, num_classes=10).top1


def test_the_demo_forms_keep_their_accuracy_and_cost_what_they_say(tiny):
    plain = checkpoint.load(DEMO / "ours-cifar10.safetensors")
    small = checkpoint.load(DEMO / "ours-cifar10-slim.safetensors")
    fewer = checkpoint.load(DEMO / "ours-cifar10-ward.safetensors")
    whole = accuracy(plain, tiny)
    assert whole > 75, "500 real images; 10 % would be chance"
    # three standard errors of 500 images
    assert abs(accuracy(small, tiny) - whole) < 6 and abs(accuracy(fewer, tiny) - whole) < 6
    macs = measure.macs(plain, (3, 32, 32))
    assert 0.55 * macs < small.config.macs() <= 0.6 * macs
    assert fewer.token_config.action == "size-priced" and 0.5 * macs < fewer.macs() < 0.8 * macs
    assert all((a == b).all() for a, b in zip(fewer.state_dict().values(), plain.state_dict().values()))


def test_the_newer_recipe_is_the_better_one(tiny):
    files = [DEMO / f"ours-cifar10{name}.safetensors" for name in ("", "-muon", "-muon-s1", "-muon-s2")]
    before, *after = (accuracy(checkpoint.load(file), tiny) for file in files)
    assert min(after) > before


# as in the cpu preset: half of three epochs, rounded, until few keys are read
AS_DESCRIBED = {"objective": HeadPenalty(0.001), "on_epoch": [Progressive(until=2, curve="cubic", tau=(1.5, 0.3))]}


@pytest.mark.parametrize("name, file, how", [("S0/dense", "S0-dense-12", {}), ("S0/dense-6", "S0-dense-6", {}),
                                             ("S0/sparse", "S0-sparse", AS_DESCRIBED)])  # fmt: skip
def test_sparse_vits_models_are_of_the_published_shape_and_have_learnt(tiny, name, file, how):
    path, spec = DEMO / f"{file}-cifar10.safetensors", zoo.get(name)
    about = checkpoint.read(path).about
    assert about["key"] == arm_key(spec.config, spec.recipe, about["data"], **how)
    assert len(about["history"]) == spec.recipe.epochs == 3 and about["history"][-1]["val_accuracy"] > 45
    few = tiny.test.take(200)
    found = measure.accuracy(checkpoint.load(path), few, mean=tiny.mean, std=tiny.std, num_classes=10).top1
    assert found > 35, "200 real images; 10 % would be chance"


def of_the_cpu_preset():
    """{file of a demo: its Spec, seed, data, least validation accuracy, number format} of arms that notebooks find."""
    preset = Path(zoo.__file__).parents[2] / "presets" / "cpu.yaml"
    sections = read_yaml(preset.read_text(), preset.name)
    ours, plain = (zoo.scaled(k, sections["01_baseline"]["changes"][k]) for k in ("ours", "S4/baseline"))
    section = sections["06_linear_attention"]
    tiny = zoo.scaled("ours", section["changes"]["ours"])
    fine = zoo.scaled("S4/baseline", section["changes"]["S4/baseline"] | section["finer"])
    linear_ones = {"ours-tiny": tiny, "ours-tiny-none": linear.without_attention(tiny, "none"), "S4-257-softmax": fine}
    larger = {"S4": plain, "S4-linear": linear.variant(plain, "linear")}
    for form in ("ripple", "hydra"):
        linear_ones[f"ours-tiny-{form}"] = linear.variant(tiny, form)
        for arms, name, spec in ((linear_ones, "S4-257", fine), (larger, "S4", plain)):
            arms[f"{name}-{form}"] = linear.variant(spec, form)
            arms[f"{name}-softmax-{form}-convs"] = linear.variant(spec, form, product="softmax")
    larger["S4-softmax-hydra-macs"] = linear.same_macs(plain, larger["S4-hydra"].config.macs(), "as many MACs")
    found = {"ours-cifar100-muon": (ours, 0, "cifar100", 70, "bfloat16")}
    for seed, end in enumerate(("", "-s1", "-s2")):
        found[f"ours-cifar10-muon{end}"] = ours, seed, "cifar10", 90, "bfloat16"
        for name, spec in larger.items():
            least = 42 if name == "S4-hydra" else 45
            found[f"{name}-cifar100-s{seed}"] = spec, seed, "cifar100", least, "bfloat16"
        for name, spec in linear_ones.items():
            least = 24 if "257" in name else 40
            found[f"{name}-cifar100-s{seed}"] = spec, seed, "cifar100", least, "float32"
    return found


CPU_ARMS = of_the_cpu_preset()


@pytest.mark.parametrize("file", CPU_ARMS)
def test_arms_of_the_cpu_preset_are_found_by_its_notebooks(file):
    spec, seed, dataset, at_least, trained_in = CPU_ARMS[file]
    about = checkpoint.read(DEMO / f"{file}.safetensors").about
    config = replace(spec.config, num_classes=100 if dataset == "cifar100" else 10)
    assert about["dataset"] == dataset
    assert about["key"] == arm_key(config, replace(spec.recipe, seed=seed), about["data"])
    assert about["trained_in"] == trained_in, "arms that are compared had the same number format"
    assert about["history"][-1]["val_accuracy"] > at_least


def test_every_demo_is_described_and_small():
    text = (DEMO.parent / "README.md").read_text()
    files = list(DEMO.glob("*.safetensors"))
    described = re.findall(r"`demo/(\S+?\.safetensors)`", text)
    assert len(described) == len(set(described)) and len(files) > 60
    for file in files:
        assert sum(fnmatch(file.name, pattern) for pattern in described) == 1, file.name
    for pattern in described:
        assert any(fnmatch(file.name, pattern) for file in files), pattern
    assert max(f.stat().st_size for f in files) < 12e6
