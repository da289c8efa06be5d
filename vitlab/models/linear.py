"""Linear attention for the one ViT: plain, Ripple (pooled keys and values) and Hydra (query branches).

Cost grows with the number of tokens, not its square. The product itself is `vitlab.models.kernels.linear`'s.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from vitlab.models.attention import ATTENTIONS, attend
from vitlab.models.kernels.linear import EPS, KERNELS, PHIS, choose, features, linear_attention, queries_keys_values
from vitlab.models.kernels.linear import macs as product_macs
from vitlab.utils.checks import is_number

PRODUCTS = ("linear", "softmax")


def depthwise(convolve, x, weight, bias=None, **options):
    """`convolve` (F.conv2d or F.conv_transpose2d) of x, B C H W, channel by channel; x's dtype.

    In float32 where autocast on a CPU would take bfloat16: strided and transposed depthwise convolutions take 16 to 66
    times as long there (PyTorch 2.15, one thread), more than all else in a layer.
    """
    options["groups"] = x.shape[1]
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return convolve(x, weight, bias, **options)
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.float()
        return convolve(x.float(), weight.float(), bias, **options).to(x.dtype)


def strided(convolve, x, weight, bias=None, *, fine):
    """`depthwise` 3x3 of stride 2 from a grid of side `fine` to half of it (F.conv2d) or back (F.conv_transpose2d).

    With one or two cells a side only the weights that meet the image, since a CPU takes many times as long for those
    that meet nothing but padding.
    """
    if fine <= 2:
        return depthwise(convolve, x, weight[..., 1 : 1 + fine, 1 : 1 + fine], bias)
    # a side of 2s - 1 was halved to s just as 2s was
    back = {"output_padding": 1 - fine % 2} if convolve is F.conv_transpose2d else {}
    return depthwise(convolve, x, weight, bias, stride=2, padding=1, **back)


class LinearAttention(nn.Module):
    """Multi-head linear attention (Katharopoulos et al. 2020, eq. 4-5); tokens B N D -> B N D.

    `phi`: feature map, "relu" for [relu(x), relu(-x)] | "elu" for elu(x) + 1 | "softmax". `eps` is added to a
    sum of non-negative terms, so the denominator is positive by construction. `kernels`: "auto" (Triton on
    CUDA, PyTorch elsewhere) | "off" | "on"; `kernel_choice` tells what a model really runs. `product`: "linear" |
    "softmax", the control that has all else (convolutions, pooled keys, branches, norm) but exact attention.
    """

    slots = 3  # query, key, value

    def __init__(self, dim, heads, *, config, phi="relu", eps=EPS, kernels="auto", product="linear", **unknown):
        super().__init__()
        name = type(self).__name__
        if unknown:
            raise ValueError(f"{name} takes no options {', '.join(unknown)}")
        if config.attention_dropout:
            raise ValueError(f"attention_dropout={config.attention_dropout}: {name} has no probabilities to drop")
        for key, value, allowed in (("phi", phi, PHIS), ("kernels", kernels, KERNELS), ("product", product, PRODUCTS)):
            if value not in allowed:
                raise ValueError(f"{key}={value!r}: choose one of {', '.join(allowed)}")
        if not (is_number(eps) and eps > 0):
            raise ValueError(f"eps={eps!r}: a finite number above 0 is needed")
        self.heads, self.head_dim = heads, dim // heads
        self.grid, self.prefix = config.grid, config.prefix_tokens
        self.phi, self.eps, self.kernels, self.product = phi, eps, kernels, product
        self.qkv = nn.Linear(dim, self.slots * dim, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def packed(self, x):
        """tokens B N D -> B N slots heads head_dim: queries, keys, values, as the kernels read them."""
        return self.qkv(x).unflatten(-1, (-1, self.heads, self.head_dim))

    def attend(self, qkv, extra=None):
        """B N slots heads head_dim -> B N R heads head_dim."""
        if self.product == "linear":
            return linear_attention(qkv, extra, phi=self.phi, eps=self.eps, kernels=self.kernels)
        q, k, v = queries_keys_values(qkv, extra)
        q = q.permute(0, 3, 2, 1, 4)  # B heads R N head_dim
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # B heads M head_dim
        y = attend(q.flatten(2, 3), k, v)
        return y.unflatten(2, q.shape[2:4]).permute(0, 3, 2, 1, 4)

    def image(self, qkv, slots=1):
        """The last `slots` slots of the patches, seen as an image B slots*D grid grid (no copy)."""
        patches = qkv[:, self.prefix :, -slots:].flatten(2)
        return patches.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)

    def with_local(self, y, local):
        """y B N D plus an image B D grid grid, which leaves the prefix tokens alone."""
        local = local.permute(0, 2, 3, 1).flatten(1, 2)
        return y + F.pad(local, (0, 0, self.prefix, 0)) if self.prefix else y + local

    def forward(self, x):
        return self.proj(self.attend(self.packed(x)).flatten(2))

    def map(self, x):
        """The weights that the quotient amounts to, B heads N N (rows sum to just below 1), for inspection."""
        qkv = self.packed(x)
        return self._weights(qkv, qkv[:, :, -2])

    def _weights(self, qkv, keys):
        """phi(q) . phi(k) over their sum, B heads N M; the mean over query branches."""
        q, k = qkv[:, :, :-2].permute(0, 2, 3, 1, 4), keys.transpose(1, 2).unsqueeze(1)  # B R h N d, B 1 h M d
        if self.product == "softmax":
            return (q @ k.mT * self.head_dim**-0.5).softmax(dim=-1).mean(dim=1)
        score = features(q, self.phi) @ features(k, self.phi).mT
        return (score / (score.sum(dim=-1, keepdim=True) + self.eps * k.shape[-2])).mean(dim=1)

    def macs(self, tokens=None, keys=0):
        """Closed-form multiply-accumulates of one image: projections and the linear product."""
        tokens = tokens or self.grid**2 + self.prefix
        shape = (1, tokens, self.slots, self.heads, self.head_dim)
        weights = self.qkv.weight.numel() + self.proj.weight.numel()
        if self.product == "softmax":
            return tokens * weights + 2 * tokens * (self.slots - 2) * (tokens + keys) * self.heads * self.head_dim
        return tokens * weights + product_macs(shape, (1, keys), self.phi)


class RippleAttention(LinearAttention):
    """Linear attention over keys and values at several resolutions, expanded back; tokens B N D -> B N D.

    Stage s pools keys and values of the patch grid by a learned depthwise 3x3 window of stride 2, the same window
    for both, so that a pooled key still stands for its pooled value; its bias tells the stages apart.
    Queries read all of them: tokens, then ceil(grid / 2)^2, ceil(grid / 4)^2, ... pooled ones. The pooled values
    are also expanded back, stage by stage, by learned transposed convolutions (bilinear at the start) that
    add each finer level on the way, and a depthwise 3x3 adds what linear attention blurs most: the neighbourhood.
    CLS and distillation tokens are keys like any other but take no part in pooling, expansion and neighbourhood.

    `stages` 1-4. Once the grid is 1 x 1, a further stage maps that cell to itself.
    """

    def __init__(self, dim, heads, *, config, stages=3, **options):
        super().__init__(dim, heads, config=config, **options)
        if stages not in (1, 2, 3, 4):
            raise ValueError(f"stages={stages!r}: choose 1, 2, 3 or 4")
        self.pools = nn.ModuleList(nn.Conv2d(dim, dim, 3, stride=2, padding=1, groups=dim) for _ in range(stages))
        self.expands = nn.ModuleList(
            nn.ConvTranspose2d(dim, dim, 3, stride=2, padding=1, groups=dim, bias=False) for _ in range(stages)
        )
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self._start()

    @torch.no_grad()
    def _start(self):
        line = torch.tensor([0.5, 1.0, 0.5])
        for pool, expand in zip(self.pools, self.expands):
            pool.weight.copy_(torch.outer(line, line) / 4)
            pool.bias.zero_()
            expand.weight.copy_(torch.outer(line, line))

    def levels(self, qkv):
        """Keys and values as images B 2D side side, from the whole grid to the coarsest."""
        images = [self.image(qkv, slots=2)]
        for pool in self.pools:
            weight, bias = pool.weight.repeat(2, 1, 1, 1), pool.bias.repeat(2)
            images.append(strided(F.conv2d, images[-1], weight, bias, fine=images[-1].shape[-1]))
        return images

    def pooled(self, levels):
        """The pooled keys and values, B M 2 heads head_dim."""
        rows = torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in levels[1:]], dim=1)  # B M 2D
        return rows.unflatten(-1, (2, self.heads, self.head_dim))

    def expanded(self, levels):
        """Pooled values brought back to the whole grid, B D grid grid."""
        values = [x.chunk(2, dim=1)[1] for x in levels]
        y = values[-1]
        for i, expand in reversed(list(enumerate(self.expands))):
            y = strided(F.conv_transpose2d, y, expand.weight, fine=values[i].shape[-1])
            y = y + values[i] if i else y
        return y

    def forward(self, x):
        qkv = self.packed(x)
        levels = self.levels(qkv)
        y = self.attend(qkv, self.pooled(levels)).flatten(2)
        return self.proj(self.with_local(y, self.expanded(levels) + self.local(self.image(qkv))))

    def sides(self):
        """Sides of the pooled grids."""
        sides = [self.grid]
        for _ in self.pools:
            sides.append((sides[-1] + 1) // 2)
        return sides[1:]

    def map(self, x):
        """As in LinearAttention; a pooled cell's weight is spread evenly over the patches that it covers."""
        qkv = self.packed(x)
        keys = torch.cat([qkv[:, :, -2], self.pooled(self.levels(qkv))[:, :, 0]], dim=1)
        own, *pooled = self._weights(qkv, keys).split([qkv.shape[1], *(s * s for s in self.sides())], dim=-1)
        at, total = torch.arange(self.grid, device=x.device), 0
        for stage, (side, weights) in enumerate(zip(self.sides(), pooled), start=1):
            cell = ((at >> stage)[:, None] * side + (at >> stage)).flatten()
            total = total + (weights / cell.bincount(minlength=side * side))[..., cell]
        return own + F.pad(total, (self.prefix, 0))

    def macs(self, tokens=None):
        sides, dim = [self.grid, *self.sides()], self.heads * self.head_dim
        # pooling keys and values, expanding values: a cell meets nine weights, the last its 1 or 4 finer cells alone
        stages = sum(coarse**2 * (fine**2 if fine <= 2 else 9) for fine, coarse in pairwise(sides))
        local = dim * (3 * stages + 9 * self.grid**2)  # the last: the neighbourhood
        return super().macs(tokens, keys=sum(s * s for s in sides[1:])) + local


class HydraAttention(LinearAttention):
    """Linear attention with R query branches over one shared key and value; tokens B N D -> B N D.

    The state is built once and read by every branch. Each branch adds its own depthwise 3x3 view of the shared
    values; the branches are normalised together and fused by a learned layer, D*R -> D, and GELU, before the
    usual projection. `branches` 1-8.
    """

    def __init__(self, dim, heads, *, config, branches=4, **options):
        if not isinstance(branches, int) or not 1 <= branches <= 8:
            raise ValueError(f"branches={branches!r}: a whole number from 1 to 8 is needed")
        self.slots = branches + 2
        super().__init__(dim, heads, config=config, **options)
        self.branches = branches
        self.local = nn.Conv2d(dim, dim * branches, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim * branches, eps=config.norm_eps)
        self.fuse = nn.Linear(dim * branches, dim, bias=False)

    def forward(self, x):
        qkv = self.packed(x)
        y = self.attend(qkv).flatten(2)  # B N R*D, a branch after the other
        return self.proj(F.gelu(self.fuse(self.norm(self.with_local(y, self.views(self.image(qkv)))))))

    def views(self, image):
        """Each branch's depthwise 3x3 of an image B D grid grid: B R*D grid grid, a branch after the other."""
        if image.device.type != "cpu":
            # a grouped convolution returns D groups of R channels
            return self.local(image).unflatten(1, (-1, self.branches)).transpose(1, 2).flatten(1, 2)
        # a CPU has no fast kernel for R channels a group: branch by branch takes a fifth of the time, both ways
        weights, biases = (p.unflatten(0, (-1, self.branches)).unbind(1) for p in self.local.parameters())
        options = {"padding": 1, "groups": image.shape[1]}
        return torch.cat([F.conv2d(image, w, b, **options) for w, b in zip(weights, biases)], dim=1)

    def macs(self, tokens=None):
        tokens = tokens or self.grid**2 + self.prefix
        local = self.local.weight.numel() * self.grid**2
        return super().macs(tokens) + tokens * self.fuse.weight.numel() + local


def kernel_choice(model, device=None, dtype=torch.float32):
    """What computes the linear product in `model`, in words, for a notebook or a command line to print."""
    found = next((m for m in model.modules() if isinstance(m, LinearAttention)), None)
    if found is None:
        return "no linear attention in this model"
    device = device or found.qkv.weight.device
    return choose(device, found.head_dim, found.kernels, dtype)[1]


ATTENTIONS.update(linear=LinearAttention, ripple=RippleAttention, hydra=HydraAttention)
