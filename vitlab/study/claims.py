"""What a measurement says of a published claim, and the tables of it.

    for claim in select(notebook="04", model="pruned-40", metric="accuracy"):
        verdict = settle(claim, [78.1, 78.4, 78.0], as_published=True)

The rule. A claim is a band, `value ± slack`: half a unit of its last printed digit, or its tolerance if that
is wider (a published accuracy was one run; its tolerance stands for that run's seed noise). A measurement is
an interval, `mean ± margin`: with n >= 2 seeds the two-sided 95 % t interval of the mean, with one run
1.96 times the default noise of the kind (`NOISE`).

    interval inside the band               confirmed
    interval and band apart                exceeded on the better side, else refuted
    they overlap                           within noise: these runs cannot tell

Only like is judged with like: structural claims always (build the published model and count it), everything
else only if `as_published`, and absolute times, memories and powers never, as their hardware is unknown; the
quotients of those are. What is not judged is still shown, as "not comparable".
"""

import math
import numbers
from collections import Counter
from dataclasses import asdict, dataclass, fields
from statistics import fmean, stdev

from vitlab.study.published import ALLOWED, Claim, frozen, load, near, projects, quantity

__all__ = ["Claim", "Verdict", "get", "load", "projects", "select", "settle", "summary", "table"]

STATUSES = ("confirmed", "refuted", "within noise", "exceeded", "not comparable", "pending")
# standard deviation of a single run: points for an accuracy, a share of the figure for the others; what is
# counted, and a peak of allocated memory, repeats exactly
NOISE = {"accuracy": 0.5, "speed": 0.02, "power": 0.02, "memory": 0.0, "structural": 0.0}
# Student's t, 97.5 %, 1 to 10 degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


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
        return {k: _listed(v) for k, v in asdict(self).items()}

    @staticmethod
    def from_row(row):
        """The verdict that `to_row` wrote; missing or unknown keys: ValueError."""
        known = {f.name for f in fields(Verdict)}
        if wrong := (set(row) - known) | ({"claim", "status"} - set(row)):
            raise ValueError(f"a verdict's row: missing or unknown {sorted(wrong)}; known: {sorted(known)}")
        return Verdict(**{k: frozen(v) for k, v in row.items()})


def _listed(value):
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value


def get(claim_id):
    """The claim with that id; an unknown one is a ValueError that names the nearest."""
    known = {c.id: c for c in load()}
    if claim_id not in known:
        raise ValueError(f"unknown claim {claim_id!r}; {near(claim_id, known)}")
    return known[claim_id]


def select(*, claims=None, **wanted):
    """The claims whose fields are as wanted, each given as one value or a collection of allowed ones.

    Fields: project, model, metric, kind, source, judged, notebook, better, table. A value that no claim has
    is a ValueError naming the near ones, never an empty answer; a combination that none has gives ().
    """
    claims = tuple(load() if claims is None else claims)
    choosable = ("project", "model", "metric", "table", *ALLOWED)
    for name, value in wanted.items():
        if name not in choosable:
            raise ValueError(f"claims cannot be selected by {name!r}; {near(name, choosable)}")
        values = {value} if isinstance(value, str) else set(value)
        known = {getattr(c, name) for c in load()} | {getattr(c, name) for c in claims}
        for missing in sorted(values - known - set(ALLOWED.get(name, ()))):
            raise ValueError(f"no claim has {name} {missing!r}; {near(missing, known)}")
        claims = tuple(c for c in claims if getattr(c, name) in values)
    return claims


def _t(degrees):
    """The 97.5 % quantile of Student's t: a table, then Cornish-Fisher's expansion (within 0.001)."""
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = 1.959964
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2) + third


def _number(claim, value):
    if isinstance(value, (bool, str)) or not isinstance(value, numbers.Real):
        raise ValueError(f"claim {claim.id}: {value!r} is not a number (give None if nothing was measured)")
    if not math.isfinite(value):
        raise ValueError(f"claim {claim.id}: measured {value!r}, a finite number is needed")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _measured(claim, values):
    """`values` as a tuple of plain Python values of the claim's type, one a run."""
    values = values.tolist() if hasattr(values, "tolist") else values  # arrays and tensors
    several = isinstance(values, (list, tuple))
    if values is None or (several and not values):
        return ()
    if isinstance(claim.value, tuple):
        runs = values if several and isinstance(values[0], (list, tuple)) else [values]
        return tuple(tuple(_number(claim, v) for v in run) for run in runs)
    runs = [v.item() if hasattr(v, "item") else v for v in (values if several else [values])]
    if claim.numeric:
        return tuple(_number(claim, v) for v in runs)
    kind = type(claim.value)
    if wrong := [v for v in runs if not isinstance(v, kind)]:
        raise ValueError(f"claim {claim.id} ({claim.text!r}) takes a {kind.__name__}, not {wrong[0]!r}")
    return tuple(runs)


def _statistics(claim, values):
    """Mean, standard deviation (None for one run) and margin of numbers."""
    n = len(values)
    if n > 1:
        spread = stdev(values)
        return fmean(values), spread, _t(n - 1) * spread / math.sqrt(n)
    noise = NOISE[claim.kind]
    return float(values[0]), None, 1.96 * noise * (1.0 if claim.kind == "accuracy" else claim.scale)


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
    values = _measured(claim, values)
    if not values:
        return Verdict(claim=claim.id, status="pending", as_published=as_published, reason=why)
    mean = std = margin = None
    if claim.numeric:
        mean, std, margin = _statistics(claim, values)
    if claim.judged == "never":
        status, why = "not comparable", why or "the hardware behind the published figure is not known"
    elif claim.judged == "as published" and not as_published:
        status, why = "not comparable", why or "not measured at the published scale"
    elif claim.numeric:
        status = _compare(claim, mean, margin)
    else:
        agreed = [str(v).replace(" ", "") == str(claim.value).replace(" ", "") for v in values]
        status = "confirmed" if all(agreed) else "within noise" if any(agreed) else "refuted"
    found = {"mean": mean, "std": std, "margin": margin}
    return Verdict(
        claim=claim.id, status=status, values=values, as_published=as_published, reason=why, **found
    )


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
    import pandas as pd

    rows, verdicts = [], tuple(verdicts)
    for claim in claims:
        mine = [v for v in verdicts if v.claim == claim.id]
        for verdict in mine or [Verdict(claim=claim.id, status="pending")]:
            note = "; ".join(part for part in (verdict.reason, claim.note) if part)
            rows.append((claim.id, claim.text, _measured_text(claim, verdict), verdict.status, note))
    frame = pd.DataFrame(rows, columns=["claim", "claimed", "measured", "verdict", "note"])
    return frame.set_index("claim")


def summary(verdicts):
    """One sentence of counts, such as "3 of 5 claims judged: 2 confirmed, 1 refuted; 2 pending."."""
    counts = Counter(v.status for v in verdicts)
    total = counts.total()
    if not total:
        return "No claims."
    parts = [f"{counts[s]} {s}" for s in STATUSES[:4] if counts[s]]
    open_ones = [f"{counts[s]} {s}" for s in STATUSES[4:] if counts[s]]
    judged = sum(counts[s] for s in STATUSES[:4])
    sentence = f"{judged} of {total} claim{'s' if total != 1 else ''} judged"
    sentence += f": {', '.join(parts)}" if parts else ""
    return sentence + (f"; {', '.join(open_ones)}." if open_ones else ".")
