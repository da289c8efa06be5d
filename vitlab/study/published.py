"""The published claims as data: `claims.toml`, read and checked.

The file is compact (tables as they were printed); here every cell becomes a `Claim` with its unit, the
conditions it was published under, the digits it was printed with and the notebook that settles it.
"""

import difflib
import functools
import math
import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from pathlib import Path

ALLOWED = {
    "kind": ("structural", "accuracy", "speed", "memory", "power", "qualitative"),
    "better": ("higher", "lower", "equal"),
    "source": ("published", "verified"),
    "judged": ("always", "as published", "never"),
    "notebook": ("01", "02", "03", "04", "05", "06"),
}
SI = {"%": 0.01, "M": 1e6, "MMac": 1e6, "GMac": 1e9, "MB": 1e6, "ms": 1e-3, "min": 60.0}


def near(name, known):
    """The words for "unknown name": what is close to it, else all that is known."""
    close = difflib.get_close_matches(str(name), list(known), n=5, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One published (or verified) figure or statement, with the conditions it was published under."""

    id: str  # project/model/metric
    project: str
    model: str
    name: str  # the model's name in the project's words
    table: str = ""
    metric: str
    label: str
    value: float | tuple | str | bool
    unit: str = ""
    better: str
    kind: str
    source: str = "published"
    judged: str
    notebook: str
    note: str = ""
    text: str  # the claim as a reader sees it
    digits: int = 0  # printed after the decimal point
    tolerance: float = 0.0  # relative to `scale`
    rounding: float = 0.0  # absolute
    scale: float = 0.0  # |value|; of a percentage saved or changed: the quotient behind it, in per cent
    derived_from: tuple[str, ...] = ()
    conditions: Mapping = field(default_factory=dict, hash=False)

    def __post_init__(self):
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"claim {self.id}: {name} is {getattr(self, name)!r}, allowed: {allowed}")
        if not re.fullmatch(r"S\d/[\w.-]+/[\w.-]+", self.id):
            raise ValueError(f"claim {self.id!r}: an id is project/model/metric")
        if self.tolerance < 0 or (self.numeric and not math.isfinite(self.value)):
            raise ValueError(f"claim {self.id}: value and tolerance must be finite, tolerance >= 0")

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


def frozen(value):
    """`value` with lists turned into tuples, all the way down."""
    return tuple(frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def _plain(value):
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return float(value) if isinstance(value, Decimal) else frozen(value)


def quantity(value, unit, digits, sign=""):
    """A number, word or list with its unit, as text."""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    text = value if isinstance(value, str) else f"{value:{sign}.{digits}f}"
    return f"{text}{'' if unit in ('', 'x') else ' '}{unit}"


def _lookup(mapping, name, what):
    if name not in mapping:
        raise ValueError(f"claims: unknown {what} {name!r}; {near(name, mapping)}")
    return mapping[name]


def _judged(kind, ratio):
    if kind == "structural":
        return "always"
    return "never" if kind in ("speed", "memory", "power") and not ratio else "as published"


def _claim(raw, key, value, **given):
    """One claim from the parsed file: metric, then model, then what is `given` for this very claim."""
    project_id, model_id, metric_id = key.split("/")
    project = _lookup(raw["projects"], project_id, "project")
    model = _lookup(raw["models"][project_id], model_id, f"model of {project_id}")
    metric = _lookup(raw["metrics"], "statement" if "statement" in given else metric_id, "metric")
    entry = {"source": "published", "tolerance": 0, **metric, **given}
    statement, ratio = entry.pop("statement", None), entry.pop("ratio", False)
    conditions = {**project["conditions"], **model.get("conditions", {}), **entry.pop("conditions", {})}
    if statement:
        entry.update(value=True, text=statement, label=metric_id)
    elif isinstance(value, (int, Decimal)):
        if not math.isfinite(value):
            raise ValueError(f"claim {key}: {value} is not a finite number")
        digits = entry.setdefault("digits", max(0, -Decimal(value).as_tuple().exponent))
        entry.setdefault("rounding", 0.5 * 10.0**-digits)
        entry.setdefault("scale", abs(100 - value) if ratio and entry["unit"] == "%" else abs(value))
        entry["value"] = value
    else:
        entry["value"] = frozen(value)
    learned = entry["kind"] == "structural" and model.get("learned_size", False)
    if learned:  # which channels survive differs from run to run
        entry["tolerance"] = max(entry["tolerance"], Decimal("0.02"))
    entry.setdefault("judged", "as published" if learned else _judged(entry["kind"], ratio))
    entry.setdefault("note", "" if entry["kind"] == "structural" else model.get("note", ""))
    entry.setdefault("notebook", model.get("notebook", project["notebook"]))
    entry.setdefault("text", quantity(entry["value"], entry["unit"], entry.get("digits", 0)))
    entry.update(id=key, project=project_id, model=model_id, name=model["name"], metric=metric_id)
    if unknown := set(entry) - {f.name for f in fields(Claim)}:
        raise ValueError(f"claim {key}: unknown fields {sorted(unknown)}")
    return Claim(conditions=_plain(conditions), **{k: _plain(v) for k, v in entry.items()})


def _rows(raw, table):
    extras = {name: table.get(f"{name}s", {}) for name in ("note", "text", "notebook", "unit", "tolerance")}
    columns, where = table["columns"], f"claims: {table['project']} {table['name']!r}"
    unused = {key for extra in extras.values() for key in extra}
    for model, cells in table["rows"].items():
        if len(cells) != len(columns):
            raise ValueError(f"{where}: {model} has {len(cells)} cells for {len(columns)} columns")
        for metric, value in zip(columns, cells):
            if value == "":
                continue
            given = {"table": table["name"], "source": table["source"]}
            for name, extra in extras.items():
                for key in (metric, f"{model}/{metric}"):  # the narrower one wins
                    if key in extra:
                        given[name] = extra[key]
                        unused.discard(key)
            yield _claim(raw, f"{table['project']}/{model}/{metric}", value, **given)
    if unused:
        raise ValueError(f"{where}: notes or the like for no cell: {sorted(unused)}")


def _quotient(raw, key, of, over, note):
    """A claim computed from two others: of / over."""
    value = of.value / over.value
    error = value * (of.rounding / of.value + over.rounding / over.value)
    given = {"digits": 2, "rounding": error, "text": quantity(value, "x", 2), "note": note}
    given |= {"table": of.table, "source": of.source, "derived_from": (of.id, over.id)}
    return _claim(raw, key, Decimal(value), **given)


def _change(claim, base):
    """The % change of `claim` from `base`: the quotient of the two, so its hardware need not be known."""
    quotient = claim.value / base.value
    value = 100 * (quotient - 1)
    return replace(
        claim,
        id=f"{claim.id}-change",
        metric=f"{claim.metric}-change",
        label=f"{claim.label}, change from {base.name}",
        value=value,
        unit="%",
        digits=2,
        text=quantity(value, "%", 2, "+"),
        rounding=100 * quotient * (claim.rounding / claim.value + base.rounding / base.value),
        scale=100 * quotient,
        derived_from=(claim.id, base.id),
        judged="as published" if claim.judged == "never" else claim.judged,
    )


def _parse(raw):
    try:
        claims = _collect(raw)
    except KeyError as error:
        raise ValueError(f"claims: a table or claim lacks the field {error}") from error
    if twice := sorted(k for k, n in Counter(c.id for c in claims).items() if n > 1):
        raise ValueError(f"claims: ids given twice: {twice}")
    return tuple(sorted(claims, key=lambda c: c.project))


def _collect(raw):
    claims = []
    for table in raw["tables"]:
        rows = list(_rows(raw, table))
        claims += rows
        if "change_from" in table:
            base = {c.metric: c for c in rows if c.model == table["change_from"]}
            claims += [_change(c, base[c.metric]) for c in rows if c.model != table["change_from"]]
    for entry in raw.get("claims", []):
        given = {k: v for k, v in entry.items() if k not in ("id", "value")}
        claims.append(_claim(raw, entry["id"], True if "statement" in entry else entry["value"], **given))
    by_id = {c.id: c for c in claims}
    for q in raw.get("quotients", []):
        of, over = (_lookup(by_id, q[k], "claim") for k in ("of", "over"))
        claims.append(_quotient(raw, q["id"], of, over, q.get("note", "")))
    return claims


def _raw(path=None):
    with open(path or Path(__file__).with_name("claims.toml"), "rb") as file:
        return tomllib.load(file, parse_float=Decimal)  # Decimal keeps the printed digits


@functools.cache
def load(path=None):
    """Every claim of `path` (default: the packaged claims.toml), project by project in the order of the file.

    Raises ValueError, naming the claim, for unknown or missing models, metrics and fields, values out of the
    allowed sets, and ids given twice.
    """
    return _parse(_raw(path))


def projects():
    """The five projects by id ("S0" to "S4"): name, title, dataset, recipe, notebook, conditions."""
    return {key: _plain(entry) for key, entry in _raw()["projects"].items()}
