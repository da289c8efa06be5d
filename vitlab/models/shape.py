"""The widths of one block of a ViT, which may differ from head to head and from block to block."""

from dataclasses import dataclass

FILLED = 2  # at most so many times the channels, to fill unequal heads up to one width


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Widths of one block.

    heads: runs of equal heads, ((count, query/key width, value width), ...); () leaves of the attention
    what its output bias adds. hidden: MLP channels; 0 likewise. scale: of the attention logits; in a pruned block still
    the unpruned head_dim ** -0.5, however many dimensions are left. drop_path: rate of its stochastic depth.
    """

    heads: tuple
    hidden: int
    scale: float
    drop_path: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "heads", tuple(tuple(run) for run in self.heads))

    @classmethod
    def uniform(cls, dim, heads, hidden=0, drop_path=0.0):
        """`heads` equal heads that share `dim` channels."""
        width = dim // heads
        return cls(heads=((heads, width, width),), hidden=hidden, scale=width**-0.5, drop_path=drop_path)

    @property
    def each_head(self):
        """((query/key width, value width), ...) of every head."""
        return tuple((qk, v) for count, qk, v in self.heads for _ in range(count))

    @property
    def widths(self):
        """Widths of the queries of all heads, then of their keys, then of their values: the rows of qkv."""
        return [head[i] for i in (0, 0, 1) for head in self.each_head]

    @property
    def width(self):
        """The widest of all query, key and value widths."""
        return max(self.widths, default=0)

    @property
    def qk(self):
        """Query (or key) channels of all heads."""
        return sum(qk for qk, _ in self.each_head)

    @property
    def v(self):
        """Value channels of all heads."""
        return sum(v for _, v in self.each_head)

    @property
    def even(self):
        """Whether all widths are one."""
        return len(set(self.widths)) == 1

    @property
    def padded(self):
        """Width that all heads are filled up to with zeros, so that one fused attention does them.

        0 where they need none, or where the filling (`FILLED`) would be more than what is filled up.
        """
        widths = [width for head in self.each_head for width in head]
        if self.even or self.width * len(widths) > FILLED * sum(widths):
            return 0
        return self.width


def runs(heads):
    """[(query/key width, value width)] -> ((count, query/key width, value width), ...) of equal neighbours."""
    found = []
    for qk, v in heads:
        if found and found[-1][1:] == (qk, v):
            found[-1] = (found[-1][0] + 1, qk, v)
        else:
            found.append((1, qk, v))
    return tuple(found)
