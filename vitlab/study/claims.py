"""What five earlier projects published about cheaper Vision Transformers, as data: claims.csv, read and checked."""

import csv
import difflib
import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

ALLOWED = {
    "kind": ("structural", "accuracy", "speed", "memory", "power", "qualitative"),
    "better": ("higher", "lower", "equal"),
    "source": ("published", "verified"),  # the project says so; found by running the project's own code
    "judged": ("always", "as published", "never"),
    "notebook": ("01", "02", "03", "04", "05", "06"),
}
PROJECTS = {
    "S0": "Sparse-ViT: sparse training of a Vision Transformer from scratch",
    "S1": "FaViT: factorised attention with ProbSparse queries",
    "S2": "Structured pruning and distillation: of a Vision Transformer, by a CNN",
    "S3": "Token pruning: by attention scores, with an alpha schedule",
    "S4": "Linear-ViT: linear attention, Ripple and Hydra",
}
SI = {"%": 0.01, "M": 1e6, "MMac": 1e6, "GMac": 1e9, "MB": 1e6, "ms": 1e-3, "min": 60.0}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One published (or verified) figure or statement, with the conditions it was published under."""

    project: str
    model: str
    metric: str
    value: float | tuple | str | bool
    unit: str = ""
    text: str = ""  # the claim as a reader sees it
    kind: str
    better: str
    judged: str
    tolerance: float = 0.0  # relative to `scale`; of an accuracy: the seed noise of the one run that was published
    against: str = ""  # the project's model that a relative figure is relative to
    beside: str = ""  # the project's model that an absolute figure was to be better (worse, no worse) than
    derived_from: tuple[str, ...] = ()  # claims, of which this is the quotient, the change in % or the order
    own: str = ""  # two claims (and a factor) whose quotient the project's own figures give for this one
    under: float | None = None  # what a loss was said to stay under, in the claim's unit
    unrun: bool = False  # no run is behind the figure: a literal, a formula, a projection
    untestable: str = ""  # why it is never judged, if not for the unknown hardware
    notebook: str
    source: str = "published"
    table: str = ""
    name: str = ""  # the model's name in the project's words
    condition: str = ""  # what the figure depends on: "name=value; ..."
    note: str = ""
    digits: int = 0  # printed after the decimal point
    rounding: float = 0.0  # half a unit of the last of them
    scale: float = 0.0  # |value|; of a percentage saved or changed: the quotient behind it, in per cent

    def __post_init__(self):
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"claim {self.id}: {name} is {getattr(self, name)!r}, allowed: {allowed}")
        if not re.fullmatch(r"S\d/[\w.-]+/[\w.-]+", self.id):
            raise ValueError(f"claim {self.id!r}: an id is project/model/metric, of letters, digits, '.' and '-'")
        if self.untestable and self.judged != "never":
            raise ValueError(f"claim {self.id}: untestable, and yet judged {self.judged!r}")
        if self.tolerance < 0 or (self.numeric and not math.isfinite(self.value)):
            raise ValueError(f"claim {self.id}: value and tolerance must be finite, tolerance >= 0")

    @property
    def id(self):
        return f"{self.project}/{self.model}/{self.metric}"

    @property
    def numeric(self):
        return isinstance(self.value, (int, float)) and not isinstance(self.value, bool)

    @property
    def slack(self):
        """Half the width of the band around the claimed value, in the claim's unit."""
        return max(self.rounding, self.tolerance * self.scale)

    def in_unit(self, raw):
        """`raw` (a count, bytes, seconds, or a fraction where the unit is %) in the claim's unit."""
        return raw / SI.get(self.unit, 1.0)


def near(name, known):
    """The words for "unknown name": what is close to it, else all that is known."""
    close = difflib.get_close_matches(str(name), list(known), n=5, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"


def quantity(value, unit, digits, sign=""):
    """A number, word or list with its unit, as text."""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    text = value if isinstance(value, str) else f"{value:{sign}.{digits}f}"
    return f"{text}{'' if unit in ('', 'x') else ' '}{unit}"


@functools.cache
def load(path=None):
    """Every claim of `path` (default: the packaged claims.csv), in the order of the file.

    A row is a claim, a column a field of `Claim`. value: a number as it was printed, several with spaces between
    them, a word, or "yes" for a statement (which stands in text); none where a figure is derived_from two claims above.
    Raises ValueError, naming the claim, for whatever does not fit.
    """
    found = {}
    with open(path or Path(__file__).with_name("claims.csv"), newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = "/".join(row.get(name) or "" for name in ("project", "model", "metric"))
            try:
                if key in found:
                    raise ValueError("its id is given twice")
                found[key] = _claim({k: v for k, v in row.items() if v}, found)
            except (TypeError, ValueError) as error:
                raise ValueError(f"claim {key}: {str(error).removeprefix(f'claim {key}: ')}") from error
    return tuple(found.values())


def _claim(given, before):
    """The Claim of a row of text, its empty cells left out."""
    sources = tuple(given.get("derived_from", "").split())
    if not sources and "value" not in given:
        raise ValueError("it has no value")
    known = [_known(s, before) for s in sources]
    found = _printed(given) if "value" in given else _derived(given, *known)
    given |= {"value": found["value"], "derived_from": sources, "tolerance": float(given.get("tolerance", 0)),
              "under": float(given["under"]) if "under" in given else None, "unrun": "unrun" in given}  # fmt: skip
    return Claim(**found | given)


def _printed(given):
    """Value, text, digits, rounding and scale of a claim as it was printed."""
    text, unit = given["value"], given.get("unit", "")
    try:
        value, digits = float(text), len(text.partition(".")[2])
    except ValueError:
        several = re.fullmatch(r"\d+( \d+)+", text)
        value = True if text == "yes" else tuple(map(int, text.split())) if several else text
        return {"value": value, "text": quantity(value, unit, 0)}
    saved = unit == "%" and given["kind"] in ("speed", "memory", "power")
    return {"value": int(text) if text.isdigit() else value, "text": quantity(value, unit, digits), "digits": digits,
            "rounding": 0.5 * 10.0**-digits, "scale": abs(100 - value) if saved else abs(value)}  # fmt: skip


def _derived(given, claim, base):
    """The same of the quotient of two claims, or of the change in %: their hardware need not be known."""
    quotient, change = claim.value / base.value, given["unit"] == "%"
    value, scale = (100 * (quotient - 1), 100 * quotient) if change else (quotient, quotient)
    error = scale * (claim.rounding / claim.value + base.rounding / base.value)
    text = quantity(value, given["unit"], 2, "+" if change else "")
    return {"value": value, "digits": 2, "rounding": error, "scale": scale, "text": text}


def _known(claim_id, known):
    if claim_id not in known:
        raise ValueError(f"unknown claim {claim_id!r}; {near(claim_id, known)}")
    return known[claim_id]


def get(claim_id):
    """The claim with that id; an unknown one is a ValueError that names the nearest."""
    return _known(claim_id, {c.id: c for c in load()})


def select(*, claims=None, **wanted):
    """The claims whose fields are as wanted, each given as one value or a collection of allowed ones.

    A value that no claim has is a ValueError naming the near ones, never an empty answer; a combination that none has
    gives ().
    """
    claims = tuple(load() if claims is None else claims)
    for name, value in wanted.items():
        if name not in Claim.__dataclass_fields__:
            raise ValueError(f"claims cannot be selected by {name!r}; {near(name, Claim.__dataclass_fields__)}")
        values = {value} if isinstance(value, str) else set(value)
        known = {getattr(c, name) for c in load()}
        for missing in sorted(values - known - set(ALLOWED.get(name, ()))):
            raise ValueError(f"no claim has {name} {missing!r}; {near(missing, known)}")
        claims = tuple(c for c in claims if getattr(c, name) in values)
    return claims
