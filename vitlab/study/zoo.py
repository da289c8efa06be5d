"""The models and recipes of the study: the earlier projects' baselines as published, and our own.

A notebook runs them as they are or scaled by its preset; `scaled` keeps the list of what was changed,
and a figure counts as measured "as published" only when that list is empty.
"""

from dataclasses import dataclass, fields, replace

from vitlab.models.checkpoint import Wrapper
from vitlab.models.favit import VARIANTS
from vitlab.models.vit import ViTConfig
from vitlab.train.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A model, how it is trained and on what; `changes` says what differs from the published setting."""

    name: str
    title: str
    dataset: str = "cifar10"
    config: object  # of any registered kind of model
    recipe: Recipe
    changes: tuple[str, ...] = ()

    @property
    def why(self):
        """What was changed, as text ("" where nothing was)."""
        return "; ".join(self.changes)


SPARSE_RECIPE = Recipe(epochs=3, batch=64, optimizer="adam", lr=3e-4, weight_decay=0, schedule="constant", augment="")
FAVIT_RECIPE = Recipe(
    epochs=30, batch=128, lr=1e-3, warmup=5, smoothing=0.1, mixup=0.8, cutmix=1.0, ema=0.999,
    augment="rrc+flip+randaugment(2,9)+jitter(0.4,0.4,0.4)+erase(0.25)",
)  # fmt: skip
# its own schedule followed the test set, which a fair run cannot: cosine stands in for it
PRUNING_RECIPE = Recipe(epochs=100, batch=64, optimizer="adam", lr=1e-4, weight_decay=0)
LINEAR_RECIPE = Recipe(
    epochs=200, batch=128, lr=3e-4, warmup=10, smoothing=0.1, mixup=0.8, clip=1.0,
    augment="crop(4)+flip+rotate(15)+jitter(0.2,0.2,0.2)+erase(0.25)",
)  # fmt: skip
OUR_RECIPE = Recipe(
    epochs=100, batch=512, lr=2e-3, warmup=5, smoothing=0.1, mixup=0.2, cutmix=1.0, mix_off=10, clip=1.0, ema=0.999,
    augment="crop(4)+flip+trivial",
)  # fmt: skip

SPARSE = ViTConfig(image_size=224, patch_size=16, dim=192, depth=12, heads=3)
SIX = replace(SPARSE, depth=6, heads=6)
TOP_K = replace(SIX, attention="topk", attention_args={"k": 32, "score": "learned", "gate": "l1"})
PRUNING = ViTConfig(dim=512, depth=6, heads=8, mlp_dim=512, qkv_bias=False, head_hidden=512, dropout=0.1)
TOKENS = ViTConfig(image_size=48, dim=512, depth=8, heads=8)
LINEAR = ViTConfig(num_classes=100, dim=384, depth=12, heads=6, qkv_bias=False, dropout=0.1)
OURS = ViTConfig(
    dim=256, depth=8, heads=4, mlp_dim=512, mlp="conv", stem="conv", pool="mean", pos="none", drop_path=0.1
)

BASELINES = (
    Spec(name="S0/dense", title="Sparse-ViT's dense baseline", config=SPARSE, recipe=SPARSE_RECIPE),
    Spec(name="S2/baseline", title="Structured pruning's baseline", config=PRUNING, recipe=PRUNING_RECIPE),
    Spec(name="S3/baseline", title="Token pruning's baseline", config=TOKENS,
         recipe=Recipe(epochs=10, batch=128, optimizer="adamw", lr=3e-4)),
    Spec(name="S4/baseline", title="Linear-ViT's baseline", dataset="cifar100", config=LINEAR, recipe=LINEAR_RECIPE),
    Spec(name="ours", title="our conv-stem baseline", config=OURS, recipe=OUR_RECIPE),
)  # fmt: skip
# what later notebooks train beside a baseline
BESIDE = (
    Spec(name="S0/dense-6", title="dense, of Sparse-ViT's depth", config=SIX, recipe=SPARSE_RECIPE),
    Spec(name="S0/sparse", title="Sparse-ViT as described", config=TOP_K, recipe=SPARSE_RECIPE),
    Spec(name="S1/B1", title="FaViT-B1", config=VARIANTS["b1"], recipe=FAVIT_RECIPE),
    Spec(name="S1/B3", title="FaViT-B3", config=VARIANTS["b3"], recipe=replace(FAVIT_RECIPE, epochs=50)),
    Spec(name="S2/tiny", title="Structured pruning's tiny student", recipe=PRUNING_RECIPE,
         config=replace(PRUNING, dim=256, depth=4, heads=4, mlp_dim=256, head_hidden=256)),
)  # fmt: skip
STAND_IN = r"-(small|tiny)\b"  # what is left out of an arm's name for that of the published model it stands for
TINY = {"ours": 0.1}  # share of a model's MACs below which its stand-in is "-tiny": 02, 03 and 06 have another than 01
SPECS, OTHERS = ({spec.name: spec for spec in specs} for specs in (BASELINES, BESIDE))


def get(name):
    """The Spec of that name; an unknown one is a ValueError with the list."""
    known = SPECS | OTHERS
    if name not in known:
        raise ValueError(f"unknown model {name!r}; there are: {', '.join(known)}")
    return known[name]


def scaled(name, changes=None):
    """The Spec `name` with some fields of its configuration or recipe (or its dataset) set otherwise.

    A field that is set to what it already is does not count as a change. A model of another size than the published
    one is a stand-in, and is called so: "S3/baseline-small" (or "-large", or "-tiny": see TINY). Unknown fields:
    ValueError.
    """
    spec, changes = get(name), dict(changes or {})
    shape, recipe = ([field.name for field in fields(part)] for part in (spec.config, spec.recipe))
    known = {*shape, *recipe, "dataset"}
    if unknown := sorted(set(changes) - known):
        raise ValueError(f"{name} has no {', '.join(unknown)}; its fields: {', '.join(sorted(known))}")
    if "dim" in changes and "mlp_dim" in shape and "mlp_dim" not in changes:
        # the width of the MLP follows the model's, as in the published shape
        changes["mlp_dim"] = changes["dim"] * spec.config.mlp_dim // spec.config.dim
    config = replace(spec.config, **{k: v for k, v in changes.items() if k in shape})
    recipe = replace(spec.recipe, **{k: v for k, v in changes.items() if k in recipe})
    dataset = changes.get("dataset", spec.dataset)
    changed = [] if dataset == spec.dataset else [f"{dataset} instead of {spec.dataset}"]
    for old, new in ((spec.config, config), (spec.recipe, recipe)):
        pairs = {field.name: (getattr(old, field.name), getattr(new, field.name)) for field in fields(old)}
        # how fast and in what order it ran is not what was published
        changed += [f"{key} {now} instead of {was}" for key, (was, now) in pairs.items()
                    if was != now and key not in ("compile", "dtype", "seed", "num_classes")]  # fmt: skip
    size = config.macs() - spec.config.macs()
    suffix, words = ("-small", ", scaled down") if size < 0 else ("-large", ", scaled up") if size > 0 else ("", "")
    if config.macs() < TINY.get(name, 0) * spec.config.macs():
        suffix, words = "-tiny", ", scaled down further"
    return Spec(name=spec.name + suffix, title=spec.title + words, dataset=dataset, config=config, recipe=recipe,
                changes=tuple(changed))  # fmt: skip


def fitted(spec, data):
    """The Spec with as many classes as `data` has (the number of classes is the data's, not a change)."""
    return replace(spec, config=_with_classes(spec.config, data.num_classes))


def _with_classes(config, classes):
    if isinstance(config, Wrapper):
        return replace(config, base=_with_classes(config.base, classes))
    return replace(config, num_classes=classes)
