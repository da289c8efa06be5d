"""Which measured rows answer a published claim, in its unit."""

from dataclasses import fields

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
RAW = ("params", "macs", "train_s", "test_s")  # columns of counts and seconds
TEST_IMAGES = 10_000  # what an evaluation time is of


def _of(rows, claim, model, column):
    """The rows of a model of the claim's project, or of its stand-in, that have a value in `column`, by seed."""
    on = " on tiny-imagenet" if claim.metric == "tiny-imagenet-accuracy" else ""
    rows = rows[rows[column].notna()] if column in rows else rows.head(0)
    return rows[rows.arm.str.replace("-small", "") == f"{claim.project}/{model}{on}"].set_index("seed")


def answers(claim, rows):
    """(values, as_published, why): what measured rows (a DataFrame) answer to a claim, one value a seed, in its unit.

    The rows of the arm "project/model" answer (of a scaled-down stand-in, "project/model-small"), by the column of
    the metric; what is relative, with the row of the same seed of the model it is `against`. To a claim that is
    always judged, only models of the published shape answer; to one of speed or memory, trained in whatever way.
    values is [] where nothing does.
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
    why = mine.changes.iloc[0]
    if claim.kind in ("speed", "memory", "power") and not claim.metric.startswith("training"):
        trained = {field.name for field in fields(Recipe)}
        why = "; ".join(part for part in why.split("; ") if part.split(" ")[0] not in trained)
    return values.tolist(), bool(mine.as_published.all()) or bool(mine.changes.iloc[0] and not why), why


def differences(claim, rows):
    """The measured figure less that of the model it is set beside (`Claim.beside`), one a seed that both have."""
    column = ANSWERS.get(claim.metric)
    if not claim.beside or column not in rows:
        return []
    mine, other = (_of(rows, claim, model, column)[column].astype(float) for model in (claim.model, claim.beside))
    return (mine - other).dropna().tolist()
