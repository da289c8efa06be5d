"""What a replication at another scale tells of a claim: which way a difference goes, not how large it is.

    what was claimed            agrees                                     opposes
    a difference                the interval is on its side of none        it is on the other side
    none (within the slack)     a loss of the slack is ruled out           a clear loss; a gain is none
    less than a bound           the whole interval is under the bound      the whole interval is over it
    a statement                 its margin (`differences`) is clear        it is clear the other way

Whatever else is unclear. Each comes with the p-value of what it was tested against, for Holm's correction.
"""

import math

from scipy.special import bdtr

from vitlab.study.claims import get, quantity
from vitlab.study.noise import IN_TURNS, NOISE, interval, no_loss_p, p_value

DIRECTIONS = ("direction agrees", "direction opposes", "direction unclear")
SEEDS = 3  # from so many on a replication tells a direction
LEVEL = 0.05


def run_noise(claim, in_turns=False):
    """Standard deviation of one run's figure in the claim's unit; what is relative has that of two runs.

    in_turns: both models of a relative speed were timed in turns in one run.
    """
    noise = IN_TURNS if in_turns and claim.kind == "speed" and claim.against else NOISE[claim.kind]
    if claim.kind != "accuracy":
        noise *= claim.scale
    elif claim.unit == "%" and claim.derived_from:  # points, as a share of the baseline's
        noise *= 100 / get(claim.derived_from[1]).value
    return noise * (math.sqrt(2) if claim.against else 1.0)


def direction(claim, values, apart=(), *, in_turns=False, shared=0.0):
    """(status, words, p) of measured `values`, one a seed; (None, words, None) where they tell none.

    apart: the figure less that of the model the claim's is set beside; of a statement, by how many points of accuracy
    it holds (over the runner-up). Without them a statement has the sign test, which takes six seeds of one mind.
    shared: standard deviation (points) that the test images give every accuracy, and more seeds do not lessen.
    """
    apart = [float(v) for v in apart]
    if claim.judged == "never":
        return None, "", None
    if isinstance(claim.value, bool):
        if not apart:
            return _by_signs(values)
        found, claimed, noise = apart, 1.0, NOISE["accuracy"] * math.sqrt(2)
    elif claim.against and claim.kind != "structural":
        none = 1.0 if claim.unit == "x" else 0.0  # the value of a relative figure that says "no difference"
        found, claimed, noise = [v - none for v in values], claim.value - none, run_noise(claim, in_turns)
    elif claim.beside:
        beside = get(f"{claim.project}/{claim.beside}/{claim.metric}")
        found, claimed, noise = apart, claim.value - beside.value, run_noise(claim) * math.sqrt(2)
    else:
        return None, "", None
    if len(found) < SEEDS:
        return None, f"a direction takes {SEEDS} seeds" if found else "", None
    images = shared * noise / NOISE["accuracy"] if claim.kind in ("accuracy", "qualitative") else 0.0  # as in `noise`
    agrees, opposes, p, against = _tested(claim, claimed, found, noise, images)
    if isinstance(claim.value, bool) and not any(values):  # more accurate, and yet not all of what was stated
        agrees = False
    return DIRECTIONS[0 if agrees else 1 if opposes else 2], _words(claim, found, noise, images) + against, p


def _tested(claim, claimed, found, noise, images):
    """(agrees, opposes, p, words of what it was tested against unless that is no difference)."""
    mean, _, margin = interval(found, noise, images)
    if claim.under is not None:
        p = p_value([v - claim.under for v in found], noise, images)
        words = f", held against the {claim.under:g} that it was to stay under"
        return mean + margin < claim.under, mean - margin > claim.under, p, words
    if claimed and abs(claimed) > claim.slack:
        towards = mean * math.copysign(1, claimed)
        return towards > margin, towards < -margin, p_value(found, noise, images), ""
    better = -1 if claim.better == "lower" else 1
    p = no_loss_p([better * v for v in found], claim.slack)
    if p <= LEVEL:
        return True, False, p, f", a loss of {quantity(claim.slack, _unit(claim), 2)} is ruled out (p = {p:.3f})"
    return False, better * mean < -margin, p_value(found, noise, images), ""


def _by_signs(said):
    """The same of a statement that held or not, seed by seed: against its being as likely as not."""
    seeds, yes = len(said), sum(said)
    if seeds < SEEDS:
        return None, f"a direction takes {SEEDS} seeds" if seeds else "", None
    p = min(1.0, 2 * float(bdtr(min(yes, seeds - yes), seeds, 0.5)))
    status = DIRECTIONS[2 if p > LEVEL else 0 if 2 * yes > seeds else 1]
    return status, f"so in {yes} of {seeds} seeds (sign test, p = {p:.2f})", p


def _unit(claim):
    return claim.unit if claim.against else "points"


def _words(claim, found, noise, images):
    mean, _, margin = interval(found, noise, images)
    ratio = claim.against and claim.unit == "x"
    sign = "" if ratio or claim.under is not None else "+"
    number = f"{mean + (1.0 if ratio else 0.0):{sign}.2f} ± {margin:.2f}"
    return f"{quantity(number, _unit(claim), 0)} (95 %, n = {len(found)})"
