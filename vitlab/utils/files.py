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
import tempfile
import time
from pathlib import Path

LEFT_S = 3600  # age in seconds at which an unfinished file is taken for that of a run that was killed
LATER = {"later": True}  # metadata of a dataclass field that was added after arms had been trained


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; rename it onto `path` if the block ends well.

    A reader therefore never sees half a file, and a failed or killed writer leaves the old one. The
    parent folders are made. The data reach the disk before the rename. What runs that were killed an hour ago and
    more left unfinished of this file goes.
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


def identity(value):
    """What tells a configuration or recipe (a dataclass) from others, as plain data: what keys are made of.

    A field declared with `metadata=LATER` is left out while it has its default, so that the keys of what was
    trained before the field existed stay as they were. Models' configurations within it come with their kind.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        told = [f for f in dataclasses.fields(value)
                if not (f.metadata.get("later") and getattr(value, f.name) == _default(f))]  # fmt: skip
        return {f.name: _inner(getattr(value, f.name)) for f in told}
    if isinstance(value, dict):
        return {str(k): _inner(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_inner(v) for v in value]
    return plain(value)


def _inner(value):
    kind = getattr(value, "kind", None) if dataclasses.is_dataclass(value) else None
    return identity(value) if kind is None else {"kind": kind} | identity(value)


def _default(field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


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


def described(method):
    """What tells an objective or a hook apart, as plain data to make keys of.

    One with a `describe()` says it itself: plain data with all that changes what it does, to which the name of its
    class is added. A function of a module is known by its qualified name. ValueError for anything else, since a
    lambda or a function of a notebook may be another one next time.
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
