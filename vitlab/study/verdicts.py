"""What measurements say of the published claims, and the tables of it.

The rule. A claim is a band, `value ± slack`: half a unit of its last printed digit, or its tolerance if that
is wider (a published accuracy was one run; its tolerance stands for that run's seed noise). A measurement is
an interval, `mean ± margin` (see `noise.interval`).

    interval inside the band               confirmed
    interval and band apart                exceeded on the better side, else refuted
    they overlap                           within noise: these runs cannot tell

Only like is judged with like: structural claims always (build the published model and count it), everything
else only if `as_published`, and absolute times, memories and powers never, as their hardware is unknown; the
quotients of those are. What is not judged is still shown, as "not comparable".
"""

import json
import math
import numbers
from collections import Counter
from dataclasses import asdict, dataclass

import pandas as pd

from vitlab.models.checkpoint import as_dataclass
from vitlab.study.claims import get, quantity
from vitlab.study.noise import NOISE, interval

JUDGED = ("confirmed", "refuted", "within noise", "exceeded")
STATUSES = (*JUDGED, "not comparable", "pending")
# metric -> the column of a row that answers it; of what is relative, the column that is compared
COLUMNS = {
    "accuracy": "accuracy_top1", "masked-accuracy": "accuracy_top1", "cifar100-accuracy": "accuracy_top1",
    "tiny-imagenet-accuracy": "accuracy_top1", "accuracy-drop": "accuracy_top1", "parameters": "params",
    "macs": "macs", "true-macs": "macs", "size": "size_mb", "input-tokens": "tokens", "latency": "latency_ms",
    "throughput": "images_per_s", "memory": "peak_mb", "power": "power_w", "training-time": "train_s",
    "evaluation-time": "test_s", "speed-up": "images_per_s", "own-speed-up": "images_per_s",
    "training-speed-up": "training_images_per_s",
}  # fmt: skip
RAW = ("params", "macs", "train_s", "test_s")  # columns of counts and seconds
TEST_IMAGES = 10_000  # what an evaluation time is of


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the measured `values` (one a seed) say of the claim with id `claim`; plain data."""

    claim: str
    status: str
    values: tuple = ()
    mean: float | None = None
    std: float | None = None  # of the sample (n - 1)
    margin: float | None = None  # half the interval around the mean
    as_published: bool = False
    reason: str = ""

    def __post_init__(self):
        if self.status not in STATUSES:
            raise ValueError(f"verdict on {self.claim}: status {self.status!r}, allowed: {STATUSES}")

    def to_row(self):
        """The verdict as a dictionary that JSON can hold."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_row(row):
        """The verdict that `to_row` wrote; missing or unknown keys: ValueError."""
        return as_dataclass(Verdict, {k: _frozen(v) for k, v in row.items()})


def _frozen(value):
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def answers(claim, rows):
    """(values, as_published, why): what measured rows (a DataFrame) answer to a claim, one value a seed, in its unit.

    The rows of the arm "project/model" answer (of a scaled-down stand-in, "project/model-small"), by the column of
    the metric; what is relative, with the row of the same seed of the model it is `against`. To a claim that is
    always judged, only models of the published shape answer. values is [] where nothing does.
    """
    column = COLUMNS.get(claim.metric.removesuffix("-change"))
    if "images_per_s" in rows:
        rows = rows.assign(test_s=TEST_IMAGES / rows.images_per_s)
    rows = rows[rows[column].notna()] if column in rows else rows.head(0)
    if claim.judged == "always":
        rows = rows[rows.as_published.astype(bool)]
    on = " on tiny-imagenet" if claim.metric == "tiny-imagenet-accuracy" else ""

    def of(model):
        return rows[rows.arm.str.replace("-small", "") == f"{claim.project}/{model}{on}"].set_index("seed")

    mine = of(claim.model)
    if claim.against:
        mine = mine[mine.index.isin(of(claim.against).index)]
    if not len(mine):
        return [], False, "not measured in this run"
    values = mine[column].astype(float)
    if claim.against:
        base = of(claim.against)[column].astype(float).reindex(values.index)
        values = {"%": 100 * (values / base - 1), "x": values / base, "points": base - values}[claim.unit]
    elif column in RAW:
        values = values.map(claim.in_unit)
    return values.tolist(), bool(mine.as_published.all()), mine.changes.iloc[0]


def _finite(claim, value):
    if isinstance(value, (bool, str)) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"claim {claim.id}: {value!r} is not a finite number (None: nothing was measured)")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _measured(claim, values):
    """`values` as a tuple of plain Python values of the claim's type, one a run."""
    values = values.tolist() if hasattr(values, "tolist") else values  # arrays and tensors
    values = [] if values is None else values if isinstance(values, (list, tuple)) else [values]
    if isinstance(claim.value, tuple):
        runs = values if not values or isinstance(values[0], (list, tuple)) else [values]
        return tuple(tuple(_finite(claim, v) for v in run) for run in runs)
    runs, kind = [v.item() if hasattr(v, "item") else v for v in values], type(claim.value)
    if claim.numeric:
        return tuple(_finite(claim, v) for v in runs)
    if wrong := [v for v in runs if not isinstance(v, kind)]:
        raise ValueError(f"claim {claim.id} ({claim.text!r}) takes a {kind.__name__}, not {wrong[0]!r}")
    return tuple(runs)


def _compare(claim, mean, margin):
    away = mean - claim.value
    slack = claim.slack + 1e-9 * abs(claim.value)  # a figure exactly at the edge of rounding counts as inside
    if abs(away) + margin <= slack:
        return "confirmed"
    if abs(away) - margin <= slack:
        return "within noise"
    better = {"higher": away > 0, "lower": away < 0, "equal": False}[claim.better]
    return "exceeded" if better else "refuted"


def settle(claim, values, *, as_published, why=""):
    """The `Verdict` of measured `values`, one a seed, on a claim (or the id of one).

    `values` are in the claim's unit (see `Claim.in_unit`): numbers, lists of tokens, words such as "O(n)", or
    booleans for a statement; one alone may stand without its list. None or nothing at all: pending.
    `as_published` says that everything the figure depends on (model, input size, data; for an accuracy also
    the epochs) is as the project published it; `why` says what is not. Structural claims are judged either
    way, so their values must come from the published model, whatever size was trained.
    Raises ValueError for values that are not finite or not of the claim's type.
    """
    claim = get(claim) if isinstance(claim, str) else claim
    values, found = _measured(claim, values), {}
    if values and claim.numeric:
        noise = NOISE[claim.kind] * (1.0 if claim.kind == "accuracy" else claim.scale)
        found = dict(zip(("mean", "std", "margin"), interval(values, noise)))
    if not values:
        status = "pending"
    elif claim.judged == "never":
        status, why = "not comparable", why or "the hardware behind the published figure is not known"
    elif claim.judged == "as published" and not as_published:
        status, why = "not comparable", why or "not measured at the published scale"
    elif claim.numeric:
        status = _compare(claim, found["mean"], found["margin"])
    else:
        agreed = [str(v).replace(" ", "") == str(claim.value).replace(" ", "") for v in values]
        status = "confirmed" if all(agreed) else "within noise" if any(agreed) else "refuted"
    return Verdict(claim=claim.id, status=status, values=values, as_published=as_published, reason=why, **found)


def _measured_text(claim, verdict):
    if not verdict.values:
        return "-"
    runs = f" (n = {len(verdict.values)})"
    if not claim.numeric:
        words = {True: "yes", False: "no"} if isinstance(claim.value, bool) else {}
        seen = dict.fromkeys(words.get(v, v) if words else v for v in verdict.values)
        return " / ".join(quantity(v, claim.unit, 0) for v in seen) + runs
    digits = 0 if all(isinstance(v, int) for v in verdict.values) else max(claim.digits, 1)
    number = quantity(verdict.mean, "", digits, "+" if claim.metric.endswith("-change") else "")
    if verdict.std is not None:
        number = f"{number} ± {verdict.std:.{max(digits, 1)}f}"
    return quantity(number, claim.unit, 0) + runs


def table(claims, verdicts=()):
    """A DataFrame `claimed | measured | verdict | note` indexed by claim id, in the order of `claims`.

    A claim without a verdict is pending; one with several (as published, and as described) has a row for
    each. Verdicts on other claims are left out.
    """
    rows, verdicts = [], tuple(verdicts)
    for claim in claims:
        mine = [v for v in verdicts if v.claim == claim.id]
        for verdict in mine or [Verdict(claim=claim.id, status="pending")]:
            note = "; ".join(part for part in (verdict.reason, claim.note) if part)
            rows.append((claim.id, claim.text, _measured_text(claim, verdict), verdict.status, note))
    return pd.DataFrame(rows, columns=["claim", "claimed", "measured", "verdict", "note"]).set_index("claim")


def summary(verdicts):
    """One sentence of counts, such as "3 of 5 claims judged: 2 confirmed, 1 refuted; 2 pending."."""
    counts = Counter(v.status for v in verdicts)
    total, judged = counts.total(), sum(counts[s] for s in JUDGED)
    if not total:
        return "No claims."
    said = [", ".join(f"{counts[s]} {s}" for s in STATUSES if counts[s] and (s in JUDGED) == yes) for yes in (1, 0)]
    sentence = f"{judged} of {total} claim{'s' if total != 1 else ''} judged{': ' if said[0] else ''}{said[0]}"
    return sentence + (f"; {said[1]}." if said[1] else ".")
