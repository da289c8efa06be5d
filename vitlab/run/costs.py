"""What a preset still has to train, and for how long: an estimate from operations, before anything has run.

A training step costs three forward passes, two floating-point operations a multiply-accumulate. `RATE` is a fifth
of what an H200 reaches in large matrix products in bfloat16 (790 TFLOP/s), about what a compiled ViT of 22 M
parameters reaches in training; smaller models reach less, and measuring comes on top, so the minutes are a floor.
"""

import dataclasses

from vitlab.metrics.measure import macs
from vitlab.models.resnet import ResNet, ResNetConfig
from vitlab.study import linear as linear_study
from vitlab.study import zoo

RATE = 0.2 * 790e12  # FLOP/s
IMAGES = {"cifar10": 45_000, "cifar100": 45_000, "tiny-imagenet": 95_000}


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run: its name, multiply-accumulates of one image, images an epoch, epochs."""

    name: str
    macs: float
    images: int
    epochs: int

    @property
    def minutes(self):
        return 6 * self.macs * self.images * self.epochs / RATE / 60


def of(spec, name=None, *, share=1.0, dataset=None, **recipe):
    """The Run of a `zoo.Spec` on its data; share: of its MACs, where part of it was pruned."""
    epochs = recipe.get("epochs", spec.recipe.epochs)
    images = IMAGES.get(dataset or spec.dataset, IMAGES["cifar10"])
    return Run(name or spec.name, share * spec.config.macs(), images, epochs)


def runs(notebook, given):
    """The Runs of the notebook with that number ("01") under its parameters `given`; those of one seed.

    Arms that an earlier notebook has trained are not among them: they are found by their key.
    """
    return COSTS[notebook](given) if notebook in COSTS else []


def minutes(notebook, given):
    """(training runs, minutes on one GPU) over all seeds."""
    found, seeds = runs(notebook, given), len(given["seeds"])
    return seeds * len(found), seeds * sum(run.minutes for run in found)


def _changed(given, name, **more):
    return zoo.scaled(name, dict(given["changes"].get(name, {})) | more)


def _baseline(given):
    found = [of(_changed(given, name)) for name in zoo.SPECS]
    return found + [of(_changed(given, name), f"{name} on {data}", dataset=data) for name, data in given["also"]]


def _pruning(given):
    base, tiny, ours = (_changed(given, n) for n in ("S2/baseline", "S2/tiny", "ours"))
    left = 1 - max(given["prune"]["ratios"])
    found = [of(base), of(base, "uncut", **given["tune"]), of(tiny), of(tiny, "S2/tiny-kd")]
    found += [of(ours, "ours, uncut", **given["tune_ours"])]
    found += [of(base, arm, share=left, **given["tune"]) for arm in ("tuned", "kd", "timm", "torch-pruning")]
    grid = given["grid"]
    short = len(grid["temperatures"]) * len(grid["alphas"]) + 6  # the control, and five kinds of teaching
    found += [of(base, "grid", share=left, epochs=grid["epochs"])] * short
    arms = ("random", "control", "kd-self", "kd-cnn", "locality", "in rounds")
    found += [of(ours, arm, share=given["prune"]["share"], **given["tune_ours"]) for arm in arms]
    cnn = ResNet(ResNetConfig(image_size=ours.config.image_size, widths=given["cnn"]["widths"]))
    side = (3, ours.config.image_size, ours.config.image_size)
    return [*found, Run("cnn", macs(cnn, side), IMAGES["cifar10"], given["cnn"]["epochs"])]


def _tokens(given):
    spec = _changed(given, "S3/baseline")
    return [of(spec, "S3/pruned")] + [of(spec, "S3/by-slope")] * bool(given["by_slope"])


def _linear(given):
    base, ours = _changed(given, "S4/baseline"), dataclasses.replace(_changed(given, "ours"), dataset="cifar100")
    forms = [linear_study.variant(base, name) for name in ("ripple", "hydra")]
    # the softmax control of a form has as many operations as the form
    found = [of(f) for f in forms] * 2 + [of(linear_study.variant(ours, name)) for name in ("ripple", "hydra")]
    found += [of(spec, dataset=data) for data in given["also"] for spec in forms]
    short, fine = (_changed(given, "S4/baseline", **given[k]) for k in ("ablation", "finer"))
    arms = [short, *linear_study.ablations(short, given["variants"]).values()]
    arms += [fine, *(linear_study.variant(fine, name) for name in ("ripple", "hydra"))]
    return found + [of(arm) for arm in arms]


COSTS = {"01": _baseline, "04": _pruning, "05": _tokens, "06": _linear}
