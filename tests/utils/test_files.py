"""What keys are made of."""

from dataclasses import dataclass, field

from vitlab.utils.files import LATER, identity, plain


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
