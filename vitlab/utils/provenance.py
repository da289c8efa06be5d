"""Where a number comes from: code, versions, hardware, time."""

import contextlib
import datetime
import functools
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

from vitlab.utils.device import device_name

PACKAGES = ("vitlab", "torch", "torchvision", "timm", "ptflops", "numpy")


def provenance(device):
    """{"stamp", "jobs", "commit", "dirty", "versions", "device", "finished"}: plain data to stand in a row.

    `stamp` is that of the notebook's run (see vitlab/run/stamps.py), None outside `vitlab run`; `jobs` of them ran side
    by side. `dirty` says that the package, notebooks or presets had changes that were not committed (None: no git).
    """
    commit, dirty = _checkout(time.monotonic() // 60)
    return {
        "stamp": os.environ.get("VITLAB_STAMP"),
        "jobs": int(os.environ.get("VITLAB_JOBS", 1)),
        "commit": commit,
        "dirty": dirty,
        "versions": dict(_versions()),
        "device": device_name(device),
        "cuda": torch.version.cuda if torch.device(device).type == "cuda" else None,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def _versions():
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@functools.lru_cache(maxsize=1)
def _checkout(minute):
    """(commit, dirty), asked once a minute: git takes longer than a row, and rows are written by the dozen."""
    changed = _git("status", "--porcelain", "--", ":/vitlab", ":/notebooks", ":/presets")
    return _git("rev-parse", "--short=12", "HEAD") or None, None if changed is None else bool(changed)


def _git(*arguments):
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return None
