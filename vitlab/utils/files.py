"""Files that are either whole or absent, and short digests of plain data."""

import contextlib
import dataclasses
import datetime
import glob
import hashlib
import inspect
import json
import os
import socket
import time
import uuid
from pathlib import Path

LEFT_S = 3600  # age in seconds at which an unfinished file is taken for that of a run that was killed
SUM = "sha256"  # its name in a record
LATER = {"later": True}  # metadata of a dataclass field that was added after arms had been trained


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; rename it onto `path` if the block ends well.

    So a reader never sees half a file, and a failed or killed writer leaves the old one. Parent folders are made, and
    what runs that were killed an hour ago and more left unfinished of this file goes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    part.touch()
    mode = part.stat().st_mode  # as readable as any other new file, where the writer makes a private one
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(mode)
        part.replace(path)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > LEFT_S:
                    left.unlink()
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path, tell=print, stop=lambda: False):
    """Hold the lock file `path` for a block (no lock on Windows); the block is told whether it had to wait.

    While another process holds it: tell(line) once who that is, and wait. The file says it: host, process, since when.
    The operating system takes a lock from a process that died, so none is ever left behind. TimeoutError, with
    the holder, once stop() is true.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = False
    with path.open("a+") as file:
        while not _flock(file):
            file.seek(0)
            holder = file.read()
            if stop():
                raise TimeoutError(f"{path} is still held by {holder or 'another process'}")
            if holder and not told:
                tell(f"waiting for {holder}, at work on {path.stem}")
                told = True
            time.sleep(0.2)
        file.truncate(0)
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        file.write(f"{socket.gethostname()}, process {os.getpid()}, since {since}")
        file.flush()
        yield told


def _flock(file):
    """Lock an open file if no other process has; False where one has."""
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _fields(config):
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def plain(value, fields=_fields):
    """`value` with dataclasses, tuples, sets and paths turned into what JSON can hold; `fields` says a dataclass's."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = fields(value)
    if isinstance(value, dict):
        return {str(k): plain(v, fields) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, fields) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(v, fields) for v in value)
    return str(value) if isinstance(value, Path) else value


def identity(value):
    """What tells a configuration or recipe (a dataclass) from others, as plain data: what keys are made of.

    A field with a default and `metadata=LATER` is left out while it has that default, so that the keys of what was
    trained before the field existed stay as they were. Models' configurations within it come with their kind.
    """
    def fields(config):
        told = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)
                if not (f.metadata.get("later") and getattr(config, f.name) == f.default)}  # fmt: skip
        inner = config is not value and getattr(config, "kind", None) is not None
        return {"kind": config.kind} | told if inner else told

    return plain(value, fields)


def write_text(path, text):
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Write `value` as readable JSON, whole or not at all. NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def read_json(path):
    """The value in the JSON file `path`; a broken file is named (ValueError)."""
    def refuse(word):
        raise ValueError(f"{word} is no number of JSON's")

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def write_record(path, value):
    """`write_json` of a dictionary, with a checksum over it: for numbers that others will be told."""
    write_json(path, value | {SUM: digest(value, 64)})


def read_record(path):
    """The dictionary that `write_record` wrote; ValueError, with the file's name, where it was changed since.

    A file without a checksum, written before there were any, is taken as it is.
    """
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError(f"{path} holds no record")
        if (wanted := found.pop(SUM, None)) is not None and wanted != digest(found, 64):
            raise ValueError(f"{path} is damaged or was edited: its checksum is not that of what it holds")
    except ValueError as error:
        raise ValueError(f"{error}; delete it, and `vitlab run` makes it again") from error
    return found


def digest(value, length=12):
    """A short hexadecimal SHA-256 of plain data; dictionaries hash the same in any key order."""
    text = json.dumps(plain(value), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def described(method):
    """What tells an objective or a hook apart, as plain data to make keys of.

    That is the name of its class and what its `describe()` gives, or the qualified name of a function of a module.
    ValueError for anything else, since a lambda or a function of a notebook may be another one next time.
    """
    function = inspect.isfunction(method)
    name = (method if function else type(method)).__qualname__
    if hasattr(method, "describe"):
        return [name, plain(method.describe())]
    if function and "<" not in name and method.__module__ != "__main__":
        return f"{method.__module__}.{name}"
    raise ValueError(
        f"{name} does not say what it does, so that a trained model could not be told from another: give it a "
        f"method `describe()` (a function an attribute: {name}.describe = lambda: {{...}}) that returns all its "
        "settings as plain data"
    )
