"""Knowledge distillation: objectives for `fit` that ask a teacher about the same augmented batch.

objective = Distill(teacher, temperature=4, alpha=0.7)                 # Hinton et al. 2015
objective = Distill(teacher, kind="hard", alpha=0.5)                   # Touvron et al. 2021 (DeiT)
objective = Distill(teacher, kind="zscore", temperature=2, alpha=0.9)  # Sun et al. 2024
objective = Distill(teacher, alpha=0, terms=[Locality(192, 8, (128, 256))])   # Li et al. 2022
fit(student, data, recipe, objective=objective)
"""

import copy
import inspect

import torch
import torch.nn.functional as F
from torch import nn

from vitlab.compress.pruning.convert import as_slim
from vitlab.metrics.predict import input_size, kl_divergence
from vitlab.train.loop import hits

KINDS = ("soft", "hard", "zscore")


class Distill(nn.Module):
    """Objective: (1 - alpha) * cross-entropy with the targets + alpha * distillation loss + terms.

    kind: "soft": T^2 KL(teacher || student) of logits divided by the temperature T; "zscore": the same of
    logits standardised per image; "hard": cross-entropy with the teacher's decision. A student with a
    distillation token (two outputs in training) is taught by the labels on its first head and by the teacher
    on its second; any other has both on its only one. terms: modules called as term(student's, teacher's
    intermediates, images), each with `.weight` and `.name` (`Features`, `AttentionMaps`, `Locality`).

    The teacher is copied, kept in eval mode, without gradients, and is no part of this module's parameters,
    state or modes; only the terms' projectors are, and `fit` trains those. It moves with `.to(...)`. Its
    images are resized to what it takes.
    """

    def __init__(self, teacher, *, kind="soft", temperature=4.0, alpha=0.7, terms=()):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
        if not 0 <= alpha <= 1 or not temperature > 0:
            raise ValueError(f"alpha={alpha}, temperature={temperature}: a share in [0, 1] and a number above 0")
        self.kind, self.temperature, self.alpha = kind, temperature, alpha
        self.terms = nn.ModuleList(terms)
        # in a tuple, so that nn.Module does not see it; a copy, so that training its original, or the student
        # itself as its own teacher, cannot put it into training mode or change it
        self._held = (_frozen(teacher, bool(self.terms)),)

    @property
    def teacher(self):
        return self._held[0]

    def _apply(self, fn, recurse=True):
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def ask(self, images):
        """What the teacher says of images B C H W: (logits B K, intermediates or None)."""
        side = input_size(self.teacher, images.shape[-1])
        if side != images.shape[-1]:
            images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
        if not self.terms:
            return self.teacher(images), None
        return self.teacher(images, intermediates=True)

    def forward(self, model, batch):
        known, teacher_seen = self.ask(batch.images)
        out, seen = model(batch.images, intermediates=True) if self.terms else (model(batch.images), None)
        own, taught = out if isinstance(out, tuple) else (out, out)
        if taught.shape != known.shape:
            raise ValueError(f"the teacher's logits are {tuple(known.shape)}, the student's {tuple(taught.shape)}")
        truth = F.cross_entropy(own.float(), batch.targets)
        logs = {"accuracy": hits(own, batch), "ce": truth.detach()}
        loss = (1 - self.alpha) * truth
        if self.alpha:
            told = self.distance(taught.float(), known.float())
            loss, logs["kd"] = loss + self.alpha * told, told.detach()
        for term in self.terms:
            value = term(seen, teacher_seen, batch.images)
            loss, logs[term.name] = loss + term.weight * value, value.detach()
        agree = taught.argmax(1) == known.argmax(1)
        return loss, {**logs, "agreement": agree.float().mean() * 100}

    def distance(self, student, teacher):
        """The distillation loss between logits B K (0-d)."""
        if self.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(1))
        if self.kind == "zscore":
            student, teacher = standardised(student), standardised(teacher)
        return self.temperature**2 * kl_divergence(student, teacher, self.temperature)


def standardised(logits):
    """Logits B K with mean 0, standard deviation 1 per image (Sun et al. 2024, "Logit standardization")."""
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


class Features(nn.Module):
    """Term: tokens of student blocks against those of teacher blocks, both ViTs with the same patch grid.

    Mean squared error between the teacher's patch tokens and a linear projection of the student's, both
    standardised per token (FitNets, Romero et al. 2015). pairs: ((student block, teacher block), ...), from
    0, negative from the end; dims: embedding channels (student, teacher); grid: patches along a side.
    """

    name = "features"

    def __init__(self, dims, grid, pairs=((-1, -1),), weight=1.0):
        super().__init__()
        self.grid, self.pairs, self.weight = grid, tuple(pairs), weight
        self.projectors = nn.ModuleList(nn.Linear(*dims) for _ in pairs)

    def forward(self, seen, known, images):
        total = 0
        for projector, (i, j) in zip(self.projectors, self.pairs):
            own, goal = _patches(seen, i, self.grid, "student"), _patches(known, j, self.grid, "teacher")
            own, goal = projector(own).float(), goal.float()
            total = total + F.mse_loss(F.layer_norm(own, own.shape[-1:]), F.layer_norm(goal, goal.shape[-1:]))
        return total / len(self.pairs)


class AttentionMaps(nn.Module):
    """Term: KL divergence of attention rows, teacher || student, heads averaged (after MiniLM, 2020).

    Both models need the same tokens. pairs as in `Features`.
    """

    name = "attention"

    def __init__(self, pairs=((-1, -1),), weight=1.0):
        super().__init__()
        self.pairs, self.weight = tuple(pairs), weight

    def forward(self, seen, known, images):
        total = 0
        for i, j in self.pairs:
            own, goal = seen["attention"][i], known["attention"][j]
            if own is None or goal is None or own.shape[-1] != goal.shape[-1]:
                raise ValueError(f"attention maps of student block {i} and teacher block {j} cannot be compared")
            own, goal = own.float().mean(1).clamp_min(1e-9), goal.float().mean(1).clamp_min(1e-9)
            total = total + (goal * (goal.log() - own.log())).sum(-1).mean()
        return total / len(self.pairs)


class Locality(nn.Module):
    """Term: features of a small CNN guide the ViT's patch tokens (Li et al. 2022, "Locality guidance").

    The student's patch tokens of a block, as a grid, pass a 1x1 convolution; the CNN's feature map, resized
    to the grid, is the goal: mean squared error, both standardised over channels.
    dim: the student's channels; grid: its patches along a side; channels: of the CNN's features used.
    pairs: ((student block, CNN stage), ...), as many as channels; by default the last stages, with blocks
    spread over `depth`.
    """

    name = "locality"

    def __init__(self, dim, grid, channels, pairs=None, depth=6, weight=1.0):
        super().__init__()
        count = len(channels)
        spread = [round((k + 1) * depth / count) - 1 for k in range(count)]
        self.pairs = tuple(pairs or zip(spread, range(-count, 0)))
        if len(self.pairs) != count:
            raise ValueError(f"{len(self.pairs)} pairs for the channels of {count} CNN stages")
        self.grid, self.weight = grid, weight
        self.projectors = nn.ModuleList(nn.Linear(dim, c) for c in channels)

    def forward(self, seen, known, images):
        if "features" not in known:
            raise ValueError("Locality needs a CNN teacher that gives 'features' (vitlab.models.resnet.ResNet)")
        total = 0
        for projector, (i, stage) in zip(self.projectors, self.pairs):
            own = projector(_patches(seen, i, self.grid, "student")).float()  # B N C
            goal = known["features"][stage].float()
            goal = _regrid(goal, self.grid).flatten(2).transpose(1, 2)  # B C g g -> B N C
            total = total + F.mse_loss(F.layer_norm(own, own.shape[-1:]), F.layer_norm(goal, goal.shape[-1:]))
        return total / len(self.pairs)


def _regrid(features, grid):
    if features.shape[-1] >= grid:
        return F.adaptive_avg_pool2d(features, grid)
    return F.interpolate(features, size=(grid, grid), mode="bilinear", align_corners=False)


def _patches(seen, block, grid, who):
    """The patch tokens (the last ones) that a block gave: B grid^2 D."""
    if "tokens" not in seen:
        raise ValueError(f"this term compares tokens of ViTs; the {who} gives only {', '.join(seen)}")
    tokens = seen["tokens"][block]
    if tokens.shape[1] < grid**2:
        raise ValueError(f"grid={grid}: the {who} has {tokens.shape[1]} tokens")
    return tokens[:, -(grid**2) :]


def _frozen(teacher, intermediates):
    """A copy of the teacher (of what torch.compile wraps) in eval mode, without gradients.

    Where terms look inside it, a ViT of timm's becomes its `SlimViT`, which shows its intermediates.
    """
    teacher = getattr(teacher, "_orig_mod", teacher)
    if intermediates and "intermediates" not in inspect.signature(teacher.forward).parameters:
        teacher = as_slim(teacher)
    return copy.deepcopy(teacher).eval().requires_grad_(False)


__all__ = ["AttentionMaps", "Distill", "Features", "Locality", "standardised"]
