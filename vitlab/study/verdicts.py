"""What measurements say of the published claims, and the tables of it.

The rule. A claim is a band, `value ± slack`: half a unit of its last printed digit, or its tolerance if that
is wider (a published accuracy was one run; its tolerance stands for that run's seed noise). A measurement is
an interval, `mean ± margin` (see `noise.interval`).

    mean inside the band                   confirmed
    mean outside, the interval reaches it  within noise: these runs cannot tell
    interval and band apart                exceeded on the better side, else refuted

Only like is judged with like: structural claims always (build the published model and count it), all others
only if `as_published`. A replication of three seeds or more at another scale tells the direction of a difference or of
an ordering (see `directions`); what has its own figures, or no run, against it is told without any measurement; what
no run here can judge, such as an absolute time on unknown hardware, is not testable here.
"""

from collections import Counter
from dataclasses import dataclass, replace

import pandas as pd

from vitlab.metrics.statistics import holm
from vitlab.study import directions, zoo
from vitlab.study.claims import get, load, quantity
from vitlab.study.directions import DIRECTIONS, LEVEL
from vitlab.study.noise import interval
from vitlab.utils.checks import is_number

CONTRADICTED, NO_RUN = "contradicted by its own data", "no run behind it"
JUDGED = ("confirmed", "exceeded", "within noise", "refuted", *DIRECTIONS, CONTRADICTED, NO_RUN)
STATUSES = (*JUDGED, "not testable here", "pending")
SEEDS = directions.SEEDS  # a notebook times in as many rounds
HARDWARE = "the hardware behind the published figure is not known"  # why a claim is never judged, unless it says why


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the measured `values` (one a seed) say of the claim with id `claim`; plain data."""

    claim: str
    status: str
    values: tuple = ()
    mean: float | None = None
    std: float | None = None  # of the sample (n - 1)
    margin: float | None = None  # half the interval around the mean
    differences: tuple = ()  # to the model that the claim's is set beside, one a seed
    in_turns: bool = False  # both models of a relative speed were timed in turns in one run
    shared: float = 0.0  # of an accuracy: what the test images give all runs (standard deviation, points)
    direction: str = ""  # one of DIRECTIONS, where the values tell one
    p: float | None = None  # of the direction: of what it was tested against
    as_published: bool = False
    why: str = ""  # what is not as published, as it was given
    reason: str = ""  # all there is to say of the status


def _measured(claim, values):
    """`values` as a tuple, one a run; ValueError where one is not of the claim's type, or not finite."""
    values = values if isinstance(values, (list, tuple)) else [] if values is None else [values]
    if isinstance(claim.value, tuple):
        values = [tuple(run) for run in values]
    wanted = type(claim.value).__name__ if not claim.numeric else "finite number (None: nothing was measured)"
    for value in values:
        numbers = value if isinstance(value, tuple) else (value,)
        words = isinstance(claim.value, (bool, str))
        if not (isinstance(value, type(claim.value)) if words else all(map(is_number, numbers))):
            raise ValueError(f"claim {claim.id} ({claim.text!r}) takes a {wanted}, not {value!r}")
    return tuple(values)


def _compare(claim, mean, margin):
    away = mean - claim.value
    slack = claim.slack + 1e-9 * abs(claim.value)  # a figure exactly at the edge of rounding counts as inside
    if abs(away) <= slack:
        return "confirmed"
    if abs(away) - margin <= slack:
        return "within noise"
    better = {"higher": away > 0, "lower": away < 0, "equal": False}[claim.better]
    return "exceeded" if better else "refuted"


def _own(claim):
    """(whether the project's own figures contradict the claim, what they give in words)."""
    if not claim.own:
        return False, ""
    above, below, *factor = claim.own.split()
    above, below, factor = get(above), get(below), float(factor[0]) if factor else 1.0
    value = factor * above.value / below.value
    error = value * (above.rounding / above.value + below.rounding / below.value)
    apart = abs(value - claim.value) > error + claim.slack
    words = f"its own figures, {above.text} and {below.text}, give {quantity(value, claim.unit, 2)}"
    if claim.metric == "speed-up":
        limit = mac_limit(get(f"{claim.project}/alpha-{claim.model.rpartition('-')[2]}/tokens").value)
        apart |= claim.value - claim.rounding > limit  # a limit needs no tolerance
        words += f", and by its operations it could be {limit:.2f}x at most"
    return apart, words


def mac_limit(tokens, name="S3/baseline"):
    """Operations of a model's blocks on all tokens over those on `tokens`, what each block passes on.

    The last block's own cut comes after it and saves nothing.
    """
    config = zoo.get(name).config
    seen = [get(f"{name}/input-tokens").value, *tokens[:-1]]
    cost = [n * config.dim * (4 * config.dim + 2 * config.mlp_dim) + 2 * n * n * config.dim for n in seen]
    return len(cost) * cost[0] / sum(cost)


def settle(claim, values, *, as_published, why="", differences=(), in_turns=False, shared=0.0):
    """The `Verdict` of measured `values`, one a seed, on a claim (or the id of one).

    `values`: a list, in the claim's unit (see `Claim.in_unit`), of numbers, lists of tokens, words such as "O(n)", or
    booleans for a statement; one number or word alone will do; None or []: what can be said without, else pending.
    `as_published`: everything the figure depends on (model, input size, data; for an accuracy also the epochs) is as
    published, else `why` says what is not. Structural claims are judged either way, so their values must come from
    the published model. `differences`, `in_turns`, `shared`: see `directions.direction`. ValueError for values of
    another type.
    """
    claim = get(claim) if isinstance(claim, str) else claim
    values, found = _measured(claim, values), {}
    if values and claim.numeric:
        found = dict(zip(("mean", "std", "margin"), interval(values, directions.run_noise(claim, in_turns))))
    given, (contradicted, own) = why, _own(claim)
    like = claim.judged == "always" or (claim.judged == "as published" and as_published)
    towards, words, p = (
        (None, "", None) if like else directions.direction(claim, values, differences, in_turns=in_turns, shared=shared)
    )
    if contradicted:
        status, towards, p = CONTRADICTED, None, None
    elif values and like and claim.numeric:
        status = _compare(claim, found["mean"], found["margin"])
        if claim.kind == "accuracy" and claim.better == "equal" and status == "refuted" and found["mean"] > claim.value:
            why = "; ".join(w for w in (why, "a better baseline leaves less of what is claimed over it") if w)
    elif values and like:
        agreed = [str(v).replace(" ", "") == str(claim.value).replace(" ", "") for v in values]
        status = "confirmed" if all(agreed) else "within noise" if any(agreed) else "refuted"
    elif claim.unrun:
        status, words = NO_RUN, f"{towards}: {words}" if towards else words
    elif claim.judged == "never":
        more = why if claim.untestable and not values else ""  # what was changed, or not measured, matters to none
        status, why = "not testable here", "; ".join(w for w in (claim.untestable or HARDWARE, more) if w)
    else:
        status = towards or "pending"
        why = why or ("not measured at the published scale" if values else "")
    reason = "; ".join(part for part in (own, words, why) if part)
    return Verdict(claim=claim.id, status=status, values=values, as_published=as_published, why=given, reason=reason,
                   differences=tuple(float(d) for d in differences), in_turns=in_turns, shared=shared,
                   direction=towards or "", p=p, **found)  # fmt: skip


def settled(files):
    """The verdicts by the present rules on all claims: of each (content of a claims.json, note, shared), and of those
    that none has. shared: see `directions.direction`; for what was settled before a verdict kept its own.

    The directions found for a project are one family: what Holm's correction does not leave clear is unclear.
    """
    found = []
    for content, note, shared in files:
        for row in content.get("verdicts", ()):
            why = "; ".join(w for w in (row.get("why", row.get("reason", "")), note) if w)
            extra = {"differences": row.get("differences", ()), "in_turns": row.get("in_turns", False),
                     "shared": row.get("shared", shared)}  # fmt: skip
            found.append(settle(row["claim"], row["values"], as_published=row["as_published"], why=why, **extra))
    known = {verdict.claim for verdict in found}
    return controlled([*found, *(settle(c, None, as_published=False) for c in load() if c.id not in known)])


def controlled(verdicts):
    """The verdicts with the directions of each project corrected for their number (Holm)."""
    verdicts = list(verdicts)
    for project in sorted({v.claim[:2] for v in verdicts}):
        family = [i for i, v in enumerate(verdicts) if v.claim[:2] == project and v.p is not None]
        for i, p in zip(family, holm([verdicts[i].p for i in family])):
            if p > LEVEL and verdicts[i].direction in DIRECTIONS[:2]:
                verdicts[i] = _unclear(verdicts[i], f"not clear among {len(family)} comparisons (Holm)")
    return verdicts


def _unclear(verdict, why):
    """The verdict with its direction, also where only its reason tells one, called unclear."""
    reason = f"{verdict.reason.replace(verdict.direction, DIRECTIONS[2], 1)}; {why}"
    status = DIRECTIONS[2] if verdict.status == verdict.direction else verdict.status
    return replace(verdict, status=status, direction=DIRECTIONS[2], reason=reason)


def _measured_text(claim, verdict):
    if not verdict.values:
        return "-"
    runs = f" (n = {len(verdict.values)})"
    if not claim.numeric:
        words = {True: "yes", False: "no"} if isinstance(claim.value, bool) else {}
        seen = dict.fromkeys(words.get(v, v) if words else v for v in verdict.values)
        return " / ".join(quantity(v, claim.unit, 0) for v in seen) + runs
    digits = claim.digits if float(verdict.mean).is_integer() else max(claim.digits, 1)
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


def counted(verdicts):
    """The verdicts that count: on what was published (not on facts found since), and on no figure twice.

    Of a figure and its change from a baseline, the first counts, unless only the second is judged. An order of figures
    does not count beside them.
    """
    verdicts = [v for v in verdicts if get(v.claim).source == "published"]
    judged, there, twice = {v.claim for v in verdicts if v.status in JUDGED}, {v.claim for v in verdicts}, set()
    for claim in (get(v.claim) for v in verdicts):
        if claim.value is True and there.intersection(claim.derived_from):
            twice.add(claim.id)
            continue
        for source in {s for s in claim.derived_from if s.startswith(f"{claim.project}/{claim.model}/")} & there:
            twice.add(source if claim.id in judged and source not in judged else claim.id)
    return [v for v in verdicts if v.claim not in twice]


def summary(verdicts):
    """One sentence of counts, such as "3 of 5 claims judged: 2 confirmed, 1 refuted; 2 pending."."""
    counts = Counter(v.status for v in counted(verdicts))
    total, judged = counts.total(), sum(counts[s] for s in JUDGED)
    if not total:
        return "No claims."
    said = [", ".join(f"{counts[s]} {s}" for s in STATUSES if counts[s] and (s in JUDGED) == yes) for yes in (1, 0)]
    sentence = f"{judged} of {total} claim{'s' if total != 1 else ''} judged{': ' if said[0] else ''}{said[0]}"
    return sentence + (f"; {said[1]}." if said[1] else ".")


def counts(verdicts):
    """A DataFrame of how many claims of each project (rows) have each status (columns that occur)."""
    frame = pd.DataFrame([(v.claim[:2], v.status) for v in counted(verdicts)], columns=["project", "status"])
    frame = pd.crosstab(frame.project, frame.status)
    return frame[[status for status in STATUSES if status in frame]]
