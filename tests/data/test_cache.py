"""A cache is in date and whole, or it is not read."""

import os
import signal
import subprocess
import sys

import torch
from data_cases import noise, pets, save

from vitlab.data.datasets import load
from vitlab.utils import tensors


def caches(root):
    return sorted((root / "cache").glob("*.safetensors"))


def test_changed_folders_are_read_again(tmp_path):
    folder = pets(tmp_path / "pets", {"a": 10, "b": 10})
    first = load(f"folder:{folder}", root=tmp_path)
    (stamp,) = [p.stat().st_mtime_ns for p in caches(tmp_path)]
    assert load(f"folder:{folder}", root=tmp_path).key == first.key
    assert [p.stat().st_mtime_ns for p in caches(tmp_path)] == [stamp]
    save(folder / "a" / "000.png", noise(77, 40, 40, 3))
    changed = load(f"folder:{folder}", root=tmp_path)
    save(folder / "a" / "new.png", noise(78, 40, 40, 3))
    more = load(f"folder:{folder}", root=tmp_path)
    assert len({first.key, changed.key, more.key}) == 3 and len(more.train) == len(first.train) + 1
    assert len(caches(tmp_path)) == 1  # the old ones do not pile up


def test_a_damaged_cache_is_never_read(tmp_path):
    folder = pets(tmp_path / "pets", {"a": 10, "b": 10})
    first = load(f"folder:{folder}", root=tmp_path)
    (cache,) = caches(tmp_path)
    whole = cache.read_bytes()
    wrecks = [whole[:cut] for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1)]
    for wreck in [
        *wrecks,
        bytes(len(whole)),
        b"junk" * 999,
        whole[:-999] + bytes([whole[-999] ^ 4]) + whole[-998:],  # one bit of one pixel
        whole.replace(b'\\"version\\": 1', b'\\"version\\": 0'),
    ]:
        assert wreck != whole
        cache.write_bytes(wreck)
        again = load(f"folder:{folder}", root=tmp_path)
        assert again.key == first.key and torch.equal(again.train.images, first.train.images)
        tensors.load_tensors(cache)  # written anew, as ValueError would say


def test_killed_while_the_cache_is_written(tmp_path):
    folder = pets(tmp_path / "pets", {"a": 30, "b": 30}, size=(8, 8))
    script = (
        "import os, signal, sys, vitlab.data.datasets as d\n"
        "def stop(tensors, path, metadata):\n"
        "    save(tensors, path, metadata); os.truncate(path, os.path.getsize(path) // 2)\n"
        "    print('writing', flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        "import vitlab.utils.tensors as t\nsave, t.save_file = t.save_file, stop\n"
        f"d.load('folder:{folder}', root={str(tmp_path)!r})\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL and "writing" in ended.stdout
    (left,) = (p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock")
    assert left.suffix == ".part" and not caches(tmp_path)
    os.utime(left, (0, 0))  # as if long ago
    assert len(load(f"folder:{folder}", root=tmp_path).train) == 49
    assert len(caches(tmp_path)) == 1 and not list((tmp_path / "cache").glob("*.part"))


def test_loading_changes_no_cache(mini_cifar):
    root, _ = mini_cifar
    first = load("cifar10", root=root, val=50)
    before = {p: p.read_bytes() for p in caches(root)}
    second = load("cifar10", root=root, val=50)
    second.train.images.zero_()
    second.test.images.zero_()
    assert {p: p.read_bytes() for p in caches(root)} == before
    third = load("cifar10", root=root, val=50)
    assert torch.equal(third.train.images, first.train.images) and third.key == first.key


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path, capsys):
    folder = pets(tmp_path / "pets", {"a": 10, "b": 10})
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cache").write_text("a file where the folder should be")
    first = load(f"folder:{folder}", root=tmp_path / "root")
    assert "cannot be written" in capsys.readouterr().out
    assert load(f"folder:{folder}", root=tmp_path / "root").key == first.key


def test_a_full_disk_is_no_failure(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
    folder = pets(tmp_path / "pets", {"a": 10, "b": 10})
    assert len(load(f"folder:{folder}", root=tmp_path).train) == 16
    assert "No space left" in capsys.readouterr().out and not list((tmp_path / "cache").glob("*.safetensors*"))
