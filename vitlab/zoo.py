"""The models and recipes of the study: the earlier projects' baselines as published, and our own.

A notebook runs them as they are or scaled by its preset; `scaled` keeps the list of what was changed,
and a figure counts as measured "as published" only when that list is empty.
"""

import dataclasses
from dataclasses import dataclass

from vitlab.models.vit import ViTConfig
from vitlab.recipe import EXECUTION, Recipe


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A model, how it is trained and on what; `changes` says what differs from the published setting."""

    name: str
    title: str
    dataset: str
    config: ViTConfig
    recipe: Recipe
    changes: tuple[str, ...] = ()

    @property
    def why(self):
        """What was changed, as text ("" where nothing was)."""
        return "; ".join(self.changes)


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
                dim=256, depth=7, heads=4, mlp_dim=512, mlp="conv", stem="residual", pool="mean", pos="none",
                drop_path=0.1,
            ),
            # optimiser and stem were chosen by pilots on a CPU, see presets/cpu.yaml
            recipe=Recipe(
                epochs=100, batch=512, optimizer="muon", lr=8e-3, rest_lr=8e-3, momentum=0.95, warmup=5, smoothing=0.1,
                mixup=0.2, cutmix=1.0, mix_off=10, ema=0.999, augment="crop(4)+flip+trivial",
            ),
        ),
    )
}

# trained beside a baseline of SPECS, with and without a teacher; `get` and `scaled` know them too
STUDENTS = {
    spec.name: spec
    for spec in (
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

CONFIG_FIELDS = {f.name for f in dataclasses.fields(ViTConfig)}
RECIPE_FIELDS = {f.name for f in dataclasses.fields(Recipe)}


def get(name):
    """The Spec of that name; an unknown one is a ValueError with the list."""
    known = SPECS | STUDENTS
    if name not in known:
        raise ValueError(f"unknown model {name!r}; there are: {', '.join(known)}")
    return known[name]


def scaled(name, changes=None):
    """The Spec `name` with some fields of its configuration or recipe (or its dataset) set otherwise.

    A field that is set to what it already is does not count as a change. Unknown fields: ValueError.
    """
    spec, changes = get(name), dict(changes or {})
    known = CONFIG_FIELDS | RECIPE_FIELDS | {"dataset"}
    if unknown := sorted(set(changes) - known):
        raise ValueError(f"{name} has no {', '.join(unknown)}; its fields: {', '.join(sorted(known))}")
    if changes.keys() & {"dim"} and "mlp_dim" not in changes:
        # the width of the MLP follows the model's, as in the published shape
        changes["mlp_dim"] = changes["dim"] * spec.config.mlp_dim // spec.config.dim
    config = dataclasses.replace(spec.config, **{k: v for k, v in changes.items() if k in CONFIG_FIELDS})
    recipe = dataclasses.replace(spec.recipe, **{k: v for k, v in changes.items() if k in RECIPE_FIELDS})
    dataset = changes.get("dataset", spec.dataset)
    return dataclasses.replace(
        spec, dataset=dataset, config=config, recipe=recipe, changes=_differences(spec, dataset, config, recipe)
    )


def fitted(spec, data):
    """The Spec with as many classes as `data` has (the number of classes is the data's, not a change)."""
    return dataclasses.replace(spec, config=dataclasses.replace(spec.config, num_classes=data.num_classes))


def _differences(spec, dataset, config, recipe):
    found = [] if dataset == spec.dataset else [f"{dataset} instead of {spec.dataset}"]
    for old, new in ((spec.config, config), (spec.recipe, recipe)):
        for field in dataclasses.fields(old):
            was, now = getattr(old, field.name), getattr(new, field.name)
            # how fast and in what order it ran is not what was published
            if was != now and field.name not in (*EXECUTION, "seed", "num_classes"):
                found.append(f"{field.name} {now} instead of {was}")
    return tuple(found)
