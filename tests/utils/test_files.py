"""What keys are made of."""

import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from vitlab.utils.files import LATER, identity, locked, plain


@dataclass(frozen=True)
class Old:
    dim: int = 4
    shape: tuple = (1, 2)


@dataclass(frozen=True)
class New(Old):
    norm: str = field(default="layer", metadata=LATER)
    blocks: tuple = field(default_factory=tuple, metadata=LATER)
    base: Old | None = field(default=None, metadata=LATER)


def test_a_later_field_counts_only_where_it_is_used():
    assert identity(New()) == identity(Old()) == plain(Old())
    assert identity(New(norm="rms")) == plain(Old()) | {"norm": "rms"}
    assert identity(New(blocks=(New(dim=5),))) == plain(Old()) | {"blocks": [{"dim": 5, "shape": [1, 2]}]}
    assert identity({"model": New(base=New())}) == {"model": plain(Old()) | {"base": plain(Old())}}
    assert plain(New())["norm"] == "layer", "what is saved holds every field"


def test_a_lock_is_waited_for(tmp_path):
    waiting = "import sys; from vitlab.utils.files import locked\nwith locked(sys.argv[1]): print('got it', flush=True)"
    with locked(tmp_path / "new" / "lock"):
        process = subprocess.Popen([sys.executable, "-c", waiting, tmp_path / "new" / "lock"], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)
    assert process.communicate(timeout=60)[0] == b"got it\n"
