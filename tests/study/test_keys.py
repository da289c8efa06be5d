"""Keys of arms: whatever can change a number is in them, nothing else is, and those given before stay."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest

from vitlab.compress.pruning.gates import GatedConfig
from vitlab.models.resnet import ResNetConfig
from vitlab.models.vit import ViTConfig
from vitlab.study import linear, zoo
from vitlab.study.study import Study, arm_key
from vitlab.train.loop import History, cross_entropy
from vitlab.train.recipe import Recipe
from vitlab.utils.files import described

# given out by the first release for data with the key "D", seed 0 unless said
FIRST = {
    "S0/dense": "17ac65a50b9e", "S2/baseline": "5f094db5d37e", "S3/baseline": "dcc60e2e7d5d",
    "S4/baseline": "0b0c4fb0215c", "S2/tiny": "4ffb89faeb82",
}  # fmt: skip


class Weighted:
    """An objective (or a hook) with a setting."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, *_):
        return 0

    def describe(self):
        return {"weight": self.weight}


class Other(Weighted):
    pass


VIT = ViTConfig(image_size=8, patch_size=4, dim=8, depth=1, heads=2)
RIPPLE = dataclasses.replace(VIT, attention="ripple", attention_args=(("stages", 1),))
CONFIGS = (
    VIT, dataclasses.replace(VIT, depth=2), RIPPLE, dataclasses.replace(RIPPLE, attention_args=(("stages", 2),)),
    GatedConfig(base=VIT), GatedConfig(base=VIT, kinds=("mlp",)), ResNetConfig(image_size=8),
)  # fmt: skip
RECIPES = (Recipe(epochs=1), Recipe(epochs=1, lr=2e-3))
METHODS = (
    {}, {"objective": Weighted(1)}, {"objective": Weighted(2)}, {"objective": Other(1)}, {"on_epoch": [Weighted(1)]},
    {"on_epoch": [Weighted(1), Weighted(1)]}, {"on_epoch": (Weighted(2),)},
    {"objective": Weighted(1), "on_epoch": [Weighted(1)]},
)  # fmt: skip


@pytest.fixture
def key(tmp_path, monkeypatch):
    """The key that `Study.arm` gives, with nothing trained or stored."""
    monkeypatch.setattr("vitlab.study.study.fit", lambda *a, **k: History())
    monkeypatch.setattr("vitlab.study.study.checkpoint.save", lambda *a, **k: None)
    study = Study("01_baseline", "tiny", device="cpu", root=tmp_path, log=lambda line: None)

    def of(config, recipe, seed, data, method, start=None):
        spec = zoo.Spec(name="x", title="x", dataset="d", config=config, recipe=recipe)
        data = SimpleNamespace(key=data, name="d", num_classes=10)
        return study.arm(spec, data, seed, start=start, **method).key

    return of


def test_arms_that_differ_have_different_keys_and_equal_ones_equal(key):
    options = [*itertools.product(CONFIGS, RECIPES, (0, 1), ("a", "b"), METHODS)]
    keys = [key(*option) for option in options]
    assert len(set(keys)) == len(options)
    assert keys[:40] == [key(*option) for option in options[:40]]


def test_what_an_arm_starts_from_is_in_its_key(key):
    models = [(name, config.build()) for name in "ab" for config in CONFIGS[:2]]
    starts = [None] + [SimpleNamespace(key=name, model=model, epochs=1) for name, model in models]
    keys = [key(VIT, RECIPES[0], 0, "a", {}, start) for start in starts]
    assert len(set(keys)) == len(starts)


def test_compiled_or_not_is_not_in_the_key_but_a_fixed_number_format_is(key):
    recipes = [dataclasses.replace(RECIPES[0], **how) for how in ({"compile": "on"}, {"dtype": "bfloat16"},
                                                                  {"dtype": "float32"})]  # fmt: skip
    same, half, exact = (key(VIT, recipe, 0, "a", {}) for recipe in recipes)
    assert len({same, half, exact}) == 3 and same == key(VIT, RECIPES[0], 0, "a", {})


def test_a_recipes_own_seed_gives_way_to_the_arms(key):
    assert key(VIT, dataclasses.replace(RECIPES[0], seed=5), 0, "a", {}) == key(VIT, RECIPES[0], 0, "a", {})


def test_keys_given_before_stay():
    for name, given in FIRST.items():
        spec = zoo.get(name)
        assert arm_key(spec.config, spec.recipe, "D") == given, name
    seeded = dataclasses.replace(zoo.get("S3/baseline").recipe, seed=1)
    assert arm_key(zoo.get("S3/baseline").config, seeded, "D") == "70a05785fdc9"
    ripple = linear.variant(zoo.get("S4/baseline"), "ripple")
    assert arm_key(ripple.config, ripple.recipe, "D") == "4747e3067075"


def some_hook(epoch, model, history):
    pass


def test_a_method_says_itself_what_it_does():
    assert described(cross_entropy) == "vitlab.train.loop.cross_entropy"
    assert described(some_hook).endswith("test_keys.some_hook")
    assert described(Weighted(3)) == ["Weighted", {"weight": 3}]

    def local(model, batch):
        pass

    for silent in (lambda model, batch: 0, local, object()):
        with pytest.raises(ValueError, match=r"give it a method `describe\(\)`"):
            described(silent)
    with pytest.raises(ValueError, match="local does not say what it does"):
        described(local)
    local.describe = lambda: {"power": 2}
    assert described(local)[1] == {"power": 2}
