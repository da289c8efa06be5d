"""What keys are made of."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from vitlab.utils.files import LATER, identity, locked, plain, read_record, write_json, write_record, write_text


@dataclass(frozen=True)
class Old:
    dim: int = 4
    shape: tuple = (1, 2)


@dataclass(frozen=True)
class New(Old):
    norm: str = field(default="layer", metadata=LATER)
    blocks: tuple = field(default=(), metadata=LATER)
    base: Old | None = field(default=None, metadata=LATER)


def test_a_later_field_counts_only_where_it_is_used():
    assert identity(New()) == identity(Old()) == plain(Old())
    assert identity(New(norm="rms")) == plain(Old()) | {"norm": "rms"}
    assert identity(New(blocks=(New(dim=5),))) == plain(Old()) | {"blocks": [{"dim": 5, "shape": [1, 2]}]}
    assert identity({"model": New(base=New())}) == {"model": plain(Old()) | {"base": plain(Old())}}
    assert plain(New())["norm"] == "layer", "what is saved holds every field"


HOLD = "import sys, time; from vitlab.utils.files import locked\nwith locked(sys.argv[1]): print('in', flush=True); "


def holder(path, then):
    process = subprocess.Popen([sys.executable, "-c", HOLD + then, path], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_a_lock_is_waited_for_and_says_who_holds_it(tmp_path):
    path = tmp_path / "new" / "01.lock"
    with locked(path) as waited:
        assert not waited
        process, line = holder(path, "")
        assert re.fullmatch(rf"waiting for .+, process {os.getpid()}, since 20\S+, at work on 01", line)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
    assert process.communicate(timeout=60)[0] == "in\n"


def test_a_lock_of_a_dead_process_is_taken_over_and_one_can_stop_waiting(tmp_path):
    process, line = holder(tmp_path / "a", "time.sleep(99)")
    said = []
    with pytest.raises(TimeoutError, match=f"process {process.pid}"), locked(tmp_path / "a", said.append, lambda: said):
        pass
    assert line == "in" and f"process {process.pid}, since" in said[0]
    process.kill()
    process.wait()
    with locked(tmp_path / "a", said.append) as waited:
        assert not waited and f"process {os.getpid()}" in (tmp_path / "a").read_text()


def test_what_killed_runs_left_unfinished_goes(tmp_path):
    for name in (".a.json.x.part", ".a.json.y.part", ".b.json.x.part"):
        (tmp_path / name).write_text("half")
    for name in (".a.json.x.part", ".b.json.x.part"):
        os.utime(tmp_path / name, (0, 0))
    write_text(tmp_path / "a.json", "{}")
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", ".a.json.y.part", ".b.json.x.part"}


def test_no_flipped_bit_of_a_record_changes_what_it_says(tmp_path):
    path, record = tmp_path / "row.json", {"arm": "S0/dense", "seed": 1, "accuracy": 87.25, "of": [0.5, 10], "is": True}
    write_record(path, record)
    assert read_record(path) == record and len(record) == 5
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:  # white space, or the name that the checksum goes by
                assert read_record(path).items() >= record.items()
            except ValueError as error:
                assert "row.json" in str(error) and "delete it" in str(error)
                refused += 1
    assert refused > 0.8 * 8 * len(whole)


@pytest.mark.parametrize("content, said", [("[1]", "no record"), ('{"a": NaN}', "NaN"), ("{", "not valid JSON")])
def test_what_is_no_record_is_named(content, said, tmp_path):
    (tmp_path / "row.json").write_text(content)
    with pytest.raises(ValueError, match=rf"row\.json .*{said}.*delete it"):
        read_record(tmp_path / "row.json")


def test_a_record_of_before_there_were_checksums_is_taken_as_it_is(tmp_path):
    write_json(tmp_path / "row.json", {"accuracy": 87.25})
    assert read_record(tmp_path / "row.json") == {"accuracy": 87.25}
