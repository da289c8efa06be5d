"""FaViT: a four-stage pyramid whose attention is split among three teams of channels.

One team sees the whole image through ProbSparse attention (Zhou et al. 2021, "Informer", eq. 3-4), one its own
window, one a dilated grid over the image. Built from the description of the factorised-attention project; the
shapes of the parts that it leaves open were chosen to land on its parameter counts.

Inside the model tokens are kept as a grid, B H W C.
"""

import math
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import nn

from vitlab.models.checkpoint import register
from vitlab.models.factorized import FactorizedAttention
from vitlab.models.layers import DropPath

TEAMS = ("global", "local", "dilated")
GLOBALS = ("probsparse", "full")


@register("favit")
@dataclass(frozen=True, kw_only=True)
class FaViTConfig:
    """Shape of a `FaViT`, a stage an entry of dims, depths, heads, mlp_ratios and reductions.

    stem: (kernel, stride) of the first embedding; every later stage halves the side (3x3, stride 2). reductions:
    stride by which the global team's keys and values are thinned out. window: side of a window (a stage
    that is smaller is one window). teams: who takes part; the global team has an eighth of each head's channels, the
    others share the rest; where the grid is a single window a dilated team does the same as a local one, and is
    left out beside it. samples: keys that judge a query (None: all of them); top: c of the c ln N queries that attend
    in full.
    """

    image_size: int = 224
    in_chans: int = 3
    num_classes: int = 10
    stem: tuple = (7, 4)
    dims: tuple = (64, 128, 256, 512)
    depths: tuple = (2, 2, 6, 2)
    heads: tuple = (1, 2, 4, 8)
    mlp_ratios: tuple = (8, 6, 4, 4)
    reductions: tuple = (8, 4, 2, 1)
    window: int = 7
    teams: tuple = TEAMS
    global_attention: str = "probsparse"
    samples: int | None = 25
    top: float = 5.0
    drop_path: float = 0.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        stages = ("dims", "depths", "heads", "mlp_ratios", "reductions")
        for name in (*stages, "stem", "teams"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len({len(getattr(self, name)) for name in stages}) != 1 or not self.dims:
            given = ", ".join(f"{name} {len(getattr(self, name))}" for name in stages)
            raise ValueError(f"every stage needs one entry in each of dims, depths, heads ...; given: {given}")
        for name in (*stages, "stem"):
            if any(not isinstance(v, int) or v < 1 for v in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: whole numbers of at least 1 are needed")
        if not self.teams or set(self.teams) - set(TEAMS) or len(set(self.teams)) < len(self.teams):
            raise ValueError(f"teams={self.teams}: choose from {', '.join(TEAMS)}, each at most once")
        if self.global_attention not in GLOBALS:
            raise ValueError(f"global_attention={self.global_attention!r}: choose one of {', '.join(GLOBALS)}")
        for name, value in {"window": self.window, "samples": 1 if self.samples is None else self.samples}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: a whole number of at least 1 is needed")
        if not 0 < self.top < math.inf:
            raise ValueError(f"top={self.top}: a positive number is needed")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path}: a rate in [0, 1) is needed")
        if len(self.stem) != 2 or self.stem[0] < self.stem[1] or not self.stem[0] % 2:
            raise ValueError(f"stem={self.stem}: (kernel, stride) with an odd kernel, no smaller than the stride")
        self._check_sides()

    def _check_sides(self):
        for i, (dim, heads) in enumerate(zip(self.dims, self.heads)):
            if dim % heads or (len(self.teams) > 1 and dim // heads % 16):
                raise ValueError(f"stage {i + 1}: dim={dim} must be {heads} heads of a multiple of 16 channels each")
        if (misfit := self._misfit(self.image_size)) is not None:
            near = [range(self.image_size - 1, 0, -1), range(self.image_size + 1, 4 * self.image_size + 512)]
            sizes = [next((size for size in sizes if self._misfit(size) is None), None) for sizes in near]
            raise ValueError(
                f"image_size={self.image_size}: stage {misfit + 1} is no grid of whole windows (side {self.window}) "
                f"and whole reductions ({self.reductions[misfit]}); the nearest sizes that are: "
                f"{' and '.join(str(size) for size in sizes if size)}"
            )

    def _misfit(self, size):
        """The first stage whose grid an image of `size` pixels does not fill exactly; None where all do."""
        for i, reduction in enumerate(self.reductions):
            side, rest = divmod(size, self.stem[1] * 2**i)
            if rest or not side or side % min(self.window, side) or side % reduction:
                return i
        return None

    def _side(self, stage):
        return self.image_size // (self.stem[1] * 2**stage)

    @property
    def sides(self):
        """Tokens along one side of the grid, a stage."""
        return tuple(self._side(i) for i in range(len(self.dims)))

    def windows(self, stage):
        """Side of the stage's windows."""
        return min(self.window, self._side(stage))

    def team_widths(self, stage):
        """{team: channels of each of its heads} in a stage; together they are a head's channels."""
        width = self.dims[stage] // self.heads[stage]
        twice = {"dilated"} if self._side(stage) <= self.window and "local" in self.teams else set()
        near = [t for t in self.teams if t not in {"global"} | twice]
        if "global" not in self.teams:
            return {t: width // len(near) for t in near}
        if not near:
            return {"global": width}
        return {"global": width // 8} | {t: (width - width // 8) // len(near) for t in near}

    def top_queries(self, stage):
        """u = c ln N: queries of the stage that attend in full, at least 1."""
        n = self._side(stage) ** 2
        return min(n, max(1, int(self.top * math.log(n)))) if n > 1 else 1

    def build(self):
        return FaViT(self)

    def macs(self):
        """Closed-form multiply-accumulates of one image (matmuls and convolutions).

        A block with N tokens of width D: 2 N D^2 (queries, mixing), 2 M c^2 for keys and values of a team of c
        channels over its M tokens, 2 N w^2 c for a team of windows of side w; the global team: N c for the reduction,
        N s c to judge the queries by s keys, 2 u M c for the u that attend (2 N M c where all do); MLP of ratio r:
        2 N r D^2 + 9 N r D.
        """
        total, chans = self.dims[-1] * self.num_classes, self.in_chans
        for i, dim in enumerate(self.dims):
            kernel, n = self.stem[0] if i == 0 else 3, self._side(i) ** 2
            total += kernel**2 * chans * dim * n
            chans, reduced = dim, n // self.reductions[i] ** 2
            block = 2 * n * dim**2 + self.mlp_ratios[i] * (2 * n * dim**2 + 9 * n * dim)
            for team, width in self.team_widths(i).items():
                c = width * self.heads[i]
                if team != "global":
                    block += 2 * n * c**2 + 2 * n * self.windows(i) ** 2 * c
                    continue
                block += 2 * reduced * c**2 + (n * c if self.reductions[i] > 1 else 0)
                if self.global_attention == "full":
                    block += 2 * n * reduced * c
                else:
                    judges = reduced if self.samples is None else min(self.samples, reduced)
                    block += n * judges * c + 2 * self.top_queries(i) * reduced * c
            total += self.depths[i] * block
        return total


class ConvMlp(nn.Module):
    """Linear, depthwise 3x3, GELU, linear (PVTv2, Wang et al. 2022); the convolution tells positions. Grid -> grid."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x):
        x = self.conv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(x))


class FaViTBlock(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)); on grids B H W C."""

    def __init__(self, config, stage, drop_path):
        super().__init__()
        dim = config.dims[stage]
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=config.norm_eps) for _ in range(2))
        self.attn = FactorizedAttention(config, stage)
        self.mlp = ConvMlp(dim, config.mlp_ratios[stage] * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)).flatten(1, 2)).view_as(x)
        return x + self.drop_path(self.mlp(self.norm2(x)).flatten(1, 2)).view_as(x)


class FaViT(nn.Module):
    """images B C H W, normalised -> logits B K; `intermediates=True`: also {"stem": B H W C, "stages": [B H W C],
    "chosen": [B h u of each stage's last block, None without ProbSparse]}."""

    def __init__(self, config):
        super().__init__()
        self.config, chans = config, config.in_chans
        last = max(1, sum(config.depths) - 1)
        rates = (config.drop_path * i / last for i in range(last + 1))
        self.embeds, self.stages, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, dim in enumerate(config.dims):
            kernel, stride = config.stem if i == 0 else (3, 2)
            # padded so that the grid is exactly the image over the stride
            conv = nn.Conv2d(chans, dim, kernel, stride=stride, padding=(kernel - 1) // 2)
            self.embeds.append(nn.Sequential(conv, _ToGrid(), nn.LayerNorm(dim, eps=config.norm_eps)))
            self.stages.append(nn.Sequential(*(FaViTBlock(config, i, next(rates)) for _ in range(config.depths[i]))))
            self.norms.append(nn.LayerNorm(dim, eps=config.norm_eps))
            chans = dim
        self.head = nn.Linear(chans, config.num_classes)
        self.apply(_init)

    def forward(self, images, intermediates=False):
        side = self.config.image_size
        if images.shape[1:] != (self.config.in_chans, side, side):
            raise ValueError(
                f"images of shape {tuple(images.shape[1:])}; this model takes ({self.config.in_chans}, {side}, {side})"
            )
        x, stem, grids, chosen = images, None, [], []
        for embed, stage, norm in zip(self.embeds, self.stages, self.norms):
            x = embed(x)
            stem = x if stem is None else stem
            for block in stage:
                before, x = x, block(x)
            grids.append(norm(x))
            if intermediates:
                chosen.append(block.attn.chosen(block.norm1(before)))
            x = grids[-1].permute(0, 3, 1, 2)
        logits = self.head(grids[-1].mean((1, 2)))
        return (logits, {"stem": stem, "stages": grids, "chosen": chosen}) if intermediates else logits


class _ToGrid(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


def _init(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):  # as in PVTv2
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)


VARIANTS = {
    "b0": FaViTConfig(dims=(32, 64, 128, 256)),
    "b1": FaViTConfig(),
    "b2": FaViTConfig(depths=(2, 3, 18, 3)),
    "b3": FaViTConfig(dims=(96, 192, 384, 768), depths=(2, 3, 14, 3)),
}


# what timm asks of a model it makes: no weights to download, and the size of its images
default_cfgs = {f"favit_{name}": {"input_size": (3, c.image_size, c.image_size)} for name, c in VARIANTS.items()}


def register_with_timm():
    """Make `timm.create_model("favit_b0" ... "favit_b3")` known; `import vitlab` does it if timm was imported before.

    The factories take num_classes, img_size, in_chans and drop_path_rate; there are no pretrained weights.
    """
    from timm.models import is_model, register_model

    for name in VARIANTS:
        if not is_model(f"favit_{name}"):
            register_model(_factory(name))


def _factory(name):
    def create(pretrained=False, *, num_classes=1000, img_size=224, in_chans=3, drop_path_rate=0.0, **others):
        # timm passes its own bookkeeping along
        given = {key for key, value in others.items() if value is not None}
        unknown = given - {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
        if pretrained or unknown:
            wrong = "pretrained=True (there are no weights)" if pretrained else ", ".join(sorted(unknown))
            raise ValueError(f"favit_{name} does not take {wrong}")
        return FaViT(replace(VARIANTS[name], num_classes=num_classes, image_size=img_size, in_chans=in_chans,
                             drop_path=drop_path_rate))  # fmt: skip

    create.__name__ = f"favit_{name}"
    return create
