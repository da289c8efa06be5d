"""Files that are either whole or absent, and short digests of plain data."""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; rename it onto `path` if the block ends well.

    A reader therefore never sees half a file, and a failed or killed writer leaves the old one. The
    parent folders are made. The data reach the disk before the rename.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; the result should be as readable as any other new file
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def plain(value):
    """`value` with dataclasses, tuples, sets and paths turned into what JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(v) for v in value)
    if isinstance(value, Path):
        return str(value)
    return value


LATER = {"later": True}  # metadata of a field that came later: left out of an `identity` while it has its default


def identity(value):
    """What tells `value` (a config, a recipe, ...) apart, as plain data to make keys of.

    A field that is declared `field(default=..., metadata=LATER)` is left out while it has its default, so that what was
    trained before there was that field keeps its key. Configs within a config come with their kind.
    """

    def inner(value):
        kind = getattr(value, "kind", None) if dataclasses.is_dataclass(value) else None
        return identity(value) if kind is None else {"kind": kind} | identity(value)

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value)
                  if not (f.metadata.get("later") and getattr(value, f.name) == f.default)]  # fmt: skip
        return {f.name: inner(getattr(value, f.name)) for f in fields}
    if isinstance(value, dict):
        return {str(k): inner(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [inner(v) for v in value]
    return plain(value)


def write_text(path, text):
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Write `value` as readable JSON, whole or not at all. NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def read_json(path):
    """The value in the JSON file `path`; a broken file is named (ValueError)."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def digest(value, length=12):
    """A short hexadecimal SHA-256 of plain data; dictionaries hash the same in any key order."""
    text = json.dumps(plain(value), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
