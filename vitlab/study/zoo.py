"""The models and recipes of the study: the earlier projects' baselines as published, and our own.

A notebook runs them as they are or scaled by its preset; `scaled` keeps the list of what was changed,
and a figure counts as measured "as published" only when that list is empty.
"""

import dataclasses
from dataclasses import dataclass

from vitlab.models.checkpoint import Wrapper
from vitlab.models.favit import VARIANTS
from vitlab.models.vit import ViTConfig
from vitlab.train.recipe import EXECUTION, Recipe


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A model, how it is trained and on what; `changes` says what differs from the published setting."""

    name: str
    title: str
    dataset: str
    config: object  # of any registered kind of model
    recipe: Recipe
    changes: tuple[str, ...] = ()

    @property
    def why(self):
        """What was changed, as text ("" where nothing was)."""
        return "; ".join(self.changes)


FAVIT_RECIPE = Recipe(
    epochs=30, batch=128, lr=1e-3, warmup=5, smoothing=0.1, mixup=0.8, cutmix=1.0, ema=0.999,
    augment="rrc+flip+randaugment(2,9)+jitter(0.4,0.4,0.4)+erase(0.25)",
)  # fmt: skip

SPECS = {
    spec.name: spec
    for spec in (
        Spec(
            name="S0/dense",
            title="Sparse-ViT's dense baseline",
            dataset="cifar10",
            config=ViTConfig(image_size=224, patch_size=16, dim=192, depth=12, heads=3),
            recipe=Recipe(
                epochs=3, batch=64, optimizer="adam", lr=3e-4, weight_decay=0, schedule="constant", augment=""
            ),
        ),
        Spec(
            name="S2/baseline",
            title="Structured pruning's baseline",
            dataset="cifar10",
            config=ViTConfig(
                dim=512, depth=6, heads=8, mlp_dim=512, qkv_bias=False, head_hidden=512, dropout=0.1
            ),
            # its own schedule followed the test set, which a fair run cannot: cosine stands in for it
            recipe=Recipe(epochs=100, batch=64, optimizer="adam", lr=1e-4, weight_decay=0),
        ),
        Spec(
            name="S3/baseline",
            title="Token pruning's baseline",
            dataset="cifar10",
            config=ViTConfig(image_size=48, dim=512, depth=8, heads=8),
            recipe=Recipe(epochs=10, batch=128, optimizer="adamw", lr=3e-4),
        ),
        Spec(
            name="S4/baseline",
            title="Linear-ViT's baseline",
            dataset="cifar100",
            config=ViTConfig(num_classes=100, dim=384, depth=12, heads=6, qkv_bias=False, dropout=0.1),
            recipe=Recipe(
                epochs=200, batch=128, lr=3e-4, warmup=10, smoothing=0.1, mixup=0.8, clip=1.0,
                augment="crop(4)+flip+rotate(15)+jitter(0.2,0.2,0.2)+erase(0.25)",
            ),
        ),
        Spec(
            name="ours",
            title="our conv-stem baseline",
            dataset="cifar10",
            config=ViTConfig(
                dim=256, depth=8, heads=4, mlp_dim=512, mlp="conv", stem="conv", pool="mean", pos="none",
                drop_path=0.1,
            ),
            recipe=Recipe(
                epochs=100, batch=512, lr=2e-3, warmup=5, smoothing=0.1, mixup=0.2, cutmix=1.0, mix_off=10,
                clip=1.0, ema=0.999, augment="crop(4)+flip+trivial",
            ),
        ),
    )
}

# what later notebooks train beside a baseline of SPECS; `get` and `scaled` know them too
OTHERS = {
    spec.name: spec
    for spec in (
        dataclasses.replace(
            SPECS["S0/dense"],
            name="S0/dense-6",
            title="dense, of Sparse-ViT's depth",
            config=dataclasses.replace(SPECS["S0/dense"].config, depth=6, heads=6),
        ),
        dataclasses.replace(
            SPECS["S0/dense"],
            name="S0/sparse",
            title="Sparse-ViT as described",
            config=dataclasses.replace(
                SPECS["S0/dense"].config, depth=6, heads=6, attention="topk",
                attention_args={"k": 32, "score": "learned", "gate": "l1"},
            ),
        ),
        Spec(
            name="S1/B1",
            title="FaViT-B1",
            dataset="cifar10",
            config=VARIANTS["b1"],
            recipe=FAVIT_RECIPE,
        ),
        Spec(
            name="S1/B3",
            title="FaViT-B3",
            dataset="cifar10",
            config=VARIANTS["b3"],
            recipe=dataclasses.replace(FAVIT_RECIPE, epochs=50),
        ),
        Spec(
            name="S2/tiny",
            title="Structured pruning's tiny student",
            dataset="cifar10",
            config=ViTConfig(
                dim=256, depth=4, heads=4, mlp_dim=256, qkv_bias=False, head_hidden=256, dropout=0.1
            ),
            recipe=Recipe(epochs=100, batch=64, optimizer="adam", lr=1e-4, weight_decay=0),
        ),
    )
}


def get(name):
    """The Spec of that name; an unknown one is a ValueError with the list."""
    known = SPECS | OTHERS
    if name not in known:
        raise ValueError(f"unknown model {name!r}; there are: {', '.join(known)}")
    return known[name]


def scaled(name, changes=None):
    """The Spec `name` with some fields of its configuration or recipe (or its dataset) set otherwise.

    A field that is set to what it already is does not count as a change. A model of another size than the published
    one is a stand-in, and is called so: "S3/baseline-small" (or "-large"). Unknown fields: ValueError.
    """
    spec, changes = get(name), dict(changes or {})
    shape, recipe = ([f.name for f in dataclasses.fields(part)] for part in (spec.config, spec.recipe))
    known = {*shape, *recipe, "dataset"}
    if unknown := sorted(set(changes) - known):
        raise ValueError(f"{name} has no {', '.join(unknown)}; its fields: {', '.join(sorted(known))}")
    if "dim" in changes and "mlp_dim" in shape and "mlp_dim" not in changes:
        # the width of the MLP follows the model's, as in the published shape
        changes["mlp_dim"] = changes["dim"] * spec.config.mlp_dim // spec.config.dim
    made = dataclasses.replace(
        spec, dataset=changes.get("dataset", spec.dataset),
        config=dataclasses.replace(spec.config, **{k: v for k, v in changes.items() if k in shape}),
        recipe=dataclasses.replace(spec.recipe, **{k: v for k, v in changes.items() if k in recipe}),
    )  # fmt: skip
    size = made.config.macs() - spec.config.macs()
    suffix = "-small" if size < 0 else "-large" if size > 0 else ""
    title = spec.title + {"-small": ", scaled down", "-large": ", scaled up"}.get(suffix, "")
    return dataclasses.replace(made, name=spec.name + suffix, title=title, changes=_differences(spec, made))


def fitted(spec, data):
    """The Spec with as many classes as `data` has (the number of classes is the data's, not a change)."""
    return dataclasses.replace(spec, config=_with_classes(spec.config, data.num_classes))


def _with_classes(config, classes):
    if isinstance(config, Wrapper):
        return dataclasses.replace(config, base=_with_classes(config.base, classes))
    return dataclasses.replace(config, num_classes=classes)


def _differences(spec, made):
    found = [] if made.dataset == spec.dataset else [f"{made.dataset} instead of {spec.dataset}"]
    for old, new in ((spec.config, made.config), (spec.recipe, made.recipe)):
        for field in dataclasses.fields(old):
            was, now = getattr(old, field.name), getattr(new, field.name)
            # how fast and in what order it ran is not what was published
            if was != now and field.name not in (*EXECUTION, "seed", "num_classes"):
                found.append(f"{field.name} {now} instead of {was}")
    return tuple(found)
