"""How to train, as plain data: optimiser, schedule, regularisation, precision."""

import functools
import math
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import nn

from vitlab.data.augment import Augment
from vitlab.train.precision import has_bfloat16
from vitlab.utils.checks import is_number
from vitlab.utils.files import LATER, identity

OPTIMIZERS = ("adamw", "adam", "sgd", "muon")
HEADS = {"head", "head_dist", "fc"}  # modules that give class scores
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training recipe. Two arms with equal recipes differ in nothing but their model and data.

    epochs, batch (images a step; the last, smaller batch of an epoch is left out), optimizer "adamw" | "adam" |
    "sgd" (Nesterov) | "muon" (Jordan et al. 2024, Nesterov, for the hidden matrices and convolutions; NAdamW for the
    rest: input layer, heads, norms, depthwise convolutions, tokens), lr (peak), rest_lr (Muon only: peak of its
    "rest", which follows the same schedule), weight_decay (decoupled for AdamW and Muon; never on biases, norms,
    tokens and positions), warmup (epochs, linear), schedule "cosine" (to min_lr) | "constant",
    smoothing (of labels), mixup and cutmix (Beta parameters, 0 = off), mix_off (last epochs without mixing),
    augment (spec of `vitlab.data.augment.Augment`), clip (gradient norm), ema (decay of the averaged weights),
    dtype "auto" (bfloat16 autocast on CUDA, and for training on a CPU where that is timed to be faster; else float32)
    | "float32" | "bfloat16",
    compile "auto" (on CUDA) | "on" | "off".
    """

    epochs: int = 10
    batch: int = 128
    optimizer: str = "adamw"
    lr: float = 1e-3
    rest_lr: float | None = field(default=None, metadata=LATER)
    weight_decay: float = 0.05
    betas: tuple = (0.9, 0.999)
    momentum: float = 0.9
    warmup: float = 0.0
    schedule: str = "cosine"
    min_lr: float = 0.0
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_off: int = 0
    augment: str = "crop(4)+flip"
    clip: float | None = None
    ema: float | None = None
    dtype: str = field(default="auto", metadata=LATER)
    compile: str = "auto"
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        choices = {"optimizer": OPTIMIZERS, "schedule": ("cosine", "constant"), "dtype": ("auto", *DTYPES),
                   "compile": ("auto", "on", "off")}  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for name in ("epochs", "batch"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: a whole number of at least 1 is needed")
        for name in ("lr", "weight_decay", "warmup", "min_lr", "mixup", "cutmix", "mix_off"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise ValueError(f"{name}={value!r}: a finite number of at least 0 is needed")
        if (self.optimizer == "muon") != (self.rest_lr is not None):
            raise ValueError(f"rest_lr={self.rest_lr}, optimizer={self.optimizer!r}: muon needs one, others have none")
        if self.optimizer == "muon" and not (self.lr > 0 and 0 < self.rest_lr < math.inf and 0 <= self.momentum < 1):
            raise ValueError(
                f"lr={self.lr}, rest_lr={self.rest_lr}, momentum={self.momentum}: muon needs rates above 0 and a "
                f"momentum in [0, 1)"
            )
        Augment(self.augment)  # a spec that cannot be read is refused here, not an hour later
        for name in ("smoothing", "ema"):
            value = getattr(self, name) or 0
            if not (is_number(value) and 0 <= value < 1):
                raise ValueError(f"{name}={value!r}: a number in [0, 1) is needed")

    def lr_at(self, epoch, steps):
        """The learning rate at a (fractional) epoch; `steps` steps an epoch.

        Warm-up is linear and its first step is not wasted at zero: lr * (step + 1) / warm-up steps.
        """
        if epoch < self.warmup:
            return self.lr * min(1.0, (epoch * steps + 1) / (self.warmup * steps))
        if self.schedule == "constant":
            return self.lr
        done = (epoch - self.warmup) / max(self.epochs - self.warmup, 1e-9)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    def torch_dtype(self, device):
        """The autocast precision on `device`, of a measured row too; for "auto" on a CPU, `fit` times its own."""
        if self.dtype == "auto":
            return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        return DTYPES[self.dtype]

    def compiles(self, device):
        """Whether torch.compile is used on `device`."""
        return self.compile == "on" or (self.compile == "auto" and torch.device(device).type == "cuda")

    def build_optimizer(self, model, objective, device):
        """The optimiser of the model's (and the objective's) trainable parameters, with and without decay."""
        named = [*model.named_parameters()]
        if isinstance(objective, nn.Module):
            named += [(f"objective.{n}", p) for n, p in objective.named_parameters()]
        first = next((name for name, p in named if not is_undecayed(name, p)), None)
        named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        free = [p for name, p in named if is_undecayed(name, p)]
        decayed = [(name, p) for name, p in named if not is_undecayed(name, p)]
        if self.optimizer == "muon":
            outer = [p for name, p in decayed if name == first or not HEADS.isdisjoint(name.split("."))]
            return self._muon([p for _, p in decayed], outer, free, device)
        decayed = [p for _, p in decayed]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": free, "weight_decay": 0.0}]
        groups = [g for g in groups if g["params"]]
        if not groups:
            raise ValueError("the model has no parameter that wants a gradient")
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        return kind(groups, lr=self.lr, betas=self.betas, fused=torch.device(device).type in ("cuda", "cpu"))

    def _muon(self, decayed, outer, free, device):
        if torch.device(device).type == "cpu" and not has_bfloat16():
            Muon = float32_muon()
        else:
            from timm.optim import Muon

        # of these, timm leaves to NAdamW what is no matrix: depthwise convolutions, fewer than 4 rows or columns
        hidden = [p for p in decayed if not any(p is o for o in outer)]
        if not hidden:
            raise ValueError("optimizer='muon': the model has no hidden matrix that wants a gradient")
        groups = [
            {"params": hidden, "weight_decay": self.weight_decay},
            {"params": outer, "weight_decay": self.weight_decay, "use_fallback": True},
            {"params": free, "weight_decay": 0.0, "use_fallback": True},
        ]
        return Muon(
            [g for g in groups if g["params"]], lr=self.lr, momentum=self.momentum, nesterov=True, betas=self.betas,
            fallback_lr_scale=self.rest_lr / self.lr,
        )  # fmt: skip


def float32_muon():
    """timm's Muon with its Newton-Schulz iteration in float32.

    timm fixes it to bfloat16, which a CPU without units for it emulates: of a step at width 128 that took a third.
    """
    from timm.optim import muon

    iteration = functools.partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)

    class Muon(muon.Muon):
        def step(self, closure=None):
            with mock.patch.object(muon, "zeropower_via_newtonschulz", iteration):
                return super().step(closure)

    return Muon


def told_apart(recipe):
    """What of a recipe tells runs apart, as plain data: all but compilation, and a number format where it fixes one."""
    return {k: v for k, v in identity(recipe).items() if k != "compile"}


def is_undecayed(name, parameter):
    """Biases, norms, gates, tokens and positions take no weight decay."""
    return parameter.ndim <= 1 or name.split(".")[-1] in ("cls_token", "dist_token", "reg_token", "pos_embed")
