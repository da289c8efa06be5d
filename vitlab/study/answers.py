"""Which measured rows answer a published claim, in its unit."""

import math
from dataclasses import fields

from vitlab.study import noise, zoo
from vitlab.train.recipe import Recipe

# metric -> the column of a row that answers it; of what is relative, the column that is compared
ANSWERS = {
    "accuracy": "accuracy_top1", "masked-accuracy": "accuracy_top1", "cifar100-accuracy": "accuracy_top1",
    "tiny-imagenet-accuracy": "accuracy_top1", "accuracy-drop": "accuracy_top1", "parameters": "params",
    "macs": "macs", "true-macs": "macs", "size": "size_mb", "input-tokens": "tokens", "latency": "latency_ms",
    "throughput": "images_per_s", "memory": "peak_mb", "power": "power_w", "training-time": "train_s",
    "evaluation-time": "test_s", "speed-up": "images_per_s", "own-speed-up": "images_per_s",
    "training-speed-up": "training_images_per_s",
}  # fmt: skip
DEVICE = "cuda"  # ten epochs of 3.8 GMac in an hour, 2.2 ms an image: the projects' times are those of GPUs
RAW = ("params", "macs", "train_s", "test_s")  # columns of counts and seconds
TEST_IMAGES = 10_000  # what an evaluation time is of


def _of(rows, claim, model, column):
    """The rows of a model of the claim's project, or of its stand-in, that have a value in `column`, by seed."""
    on = " on tiny-imagenet" if claim.metric == "tiny-imagenet-accuracy" else ""
    rows = rows[rows[column].notna()] if column in rows else rows.head(0)
    return rows[rows.arm.str.replace(zoo.STAND_IN, "", regex=True) == f"{claim.project}/{model}{on}"].set_index("seed")


def _timed_otherwise(claim, column, row):
    """What of a timing is not as published: the kind of device, and the batch, which is the training's or `timed`."""
    condition = dict(part.split("=") for part in claim.condition.split("; "))
    batch = 1 if column == "latency_ms" else int(condition.get("timed", condition["batch"]))
    measured = 1 if column == "latency_ms" else row.get("batch", math.nan)
    kind = row.get("device_type", "an unknown device")
    return ["" if kind == DEVICE else f"timed on {kind}", "" if measured == batch else f"timed at batch {measured:g}"]


def answers(claim, rows):
    """(values, as_published, why): what measured rows (a DataFrame) answer to a claim, one value a seed, in its unit.

    The rows of the arm "project/model" answer (of a scaled-down stand-in, "project/model-small"), by the column of
    the metric; what is relative, with the row of the same seed of the model it is `against`. To a claim that is
    always judged, only models of the published shape answer; to one of speed or memory, trained in whatever way, but a
    speed is as published only on the published kind of device, at the published batch. values is [] where nothing does.
    """
    column = ANSWERS.get(claim.metric.removesuffix("-change"))
    if "images_per_s" in rows:
        rows = rows.assign(test_s=TEST_IMAGES / rows.images_per_s)
    if claim.judged == "always":
        rows = rows[rows.as_published.astype(bool)]
    mine, base = (_of(rows, claim, model, column) for model in (claim.model, claim.against or claim.model))
    mine = mine[mine.index.isin(base.index)]
    if not len(mine):
        return [], False, "not measured in this run"
    values = mine[column].astype(float)
    if claim.against:
        base = base[column].astype(float).reindex(values.index)
        values = {"%": 100 * (values / base - 1), "x": values / base, "points": base - values}[claim.unit]
    elif column in RAW:
        values = values.map(claim.in_unit)
    parts, as_published = mine.changes.iloc[0].split("; "), bool(mine.as_published.all())
    if claim.kind in ("speed", "memory", "power") and not claim.metric.startswith("training"):
        trained = {field.name for field in fields(Recipe)}
        kept = [part for part in parts if part.split(" ")[0] not in trained]
        parts, as_published = kept, as_published or (parts != kept and not kept)
    if claim.kind == "speed" and claim.judged == "as published":
        otherwise = list(filter(None, _timed_otherwise(claim, column, mine.iloc[0])))
        parts, as_published = parts + otherwise, as_published and not otherwise
    return values.tolist(), as_published, "; ".join(filter(None, parts))


def image_noise_of(claim, rows):
    """What the test images leave open of a claim: where it is of two arms, by those on which they disagree."""
    other, named = claim.against or claim.beside, rows.arm.str.replace(zoo.STAND_IN, "", regex=True)
    arms = [rows.arm[named == f"{claim.project}/{model}"].tolist() for model in (claim.model, other)]
    return noise.paired_image_noise(rows, *(a[-1] for a in arms)) if all(arms) else noise.image_noise(rows)


def differences(claim, rows):
    """The measured figure less that of the model it is set beside (`Claim.beside`), one a seed that both have."""
    column = ANSWERS.get(claim.metric)
    if not claim.beside or column not in rows:
        return []
    mine, other = (_of(rows, claim, model, column)[column].astype(float) for model in (claim.model, claim.beside))
    return (mine - other).dropna().tolist()
