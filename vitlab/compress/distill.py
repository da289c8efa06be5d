"""Knowledge distillation: objectives for `fit` that ask a teacher about the same augmented batch.

objective = Distill(teacher, temperature=4, alpha=0.7)                 # Hinton et al. 2015
objective = Distill(teacher, kind="hard", alpha=0.5)                   # Touvron et al. 2021 (DeiT)
objective = Distill(teacher, kind="zscore", temperature=2, alpha=0.9)  # Sun et al. 2024
objective = Distill(teacher, alpha=0, terms=[Locality(192, 8, (128, 256))])   # Li et al. 2022
fit(student, data, recipe, objective=objective)
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from vitlab.metrics.predict import input_size, kl_divergence
from vitlab.models.checkpoint import fingerprint
from vitlab.models.timm import as_vit
from vitlab.train.loop import hits
from vitlab.utils.checks import is_number
from vitlab.utils.device import eager

KINDS = ("soft", "hard", "zscore")


class Distill(nn.Module):
    """Objective: (1 - alpha) * cross-entropy with the targets + alpha * distillation loss + terms.

    kind: "soft": T^2 KL(teacher || student) of logits divided by the temperature T; "zscore": the same of logits
    standardised per image; "hard": cross-entropy with the teacher's decision. A student with a distillation token
    (two outputs in training) is taught by the labels on its first head and by the teacher on its second; any other has
    both on its only one. terms: `Features`, `AttentionMaps`, `Locality`, or other `Term`s.

    The teacher is copied, kept in eval mode, and is no part of this module's parameters, state or modes; only the
    projectors of terms are, and `fit` trains those. It moves with `.to(...)`. Its images are resized to what it takes.
    """

    def __init__(self, teacher, *, kind="soft", temperature=4.0, alpha=0.7, terms=()):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
        if not (is_number(alpha) and 0 <= alpha <= 1 and is_number(temperature) and temperature > 0):
            raise ValueError(f"alpha={alpha!r}, temperature={temperature!r}: a share in [0, 1] and a number above 0")
        self.kind, self.temperature, self.alpha = kind, temperature, alpha
        self.terms = nn.ModuleList(terms)
        # in a tuple, which nn.Module does not look into; a copy, which no training of its original changes
        self._held = (_frozen(teacher, bool(self.terms)),)

    @property
    def teacher(self):
        return self._held[0]

    def describe(self):
        """All that tells this objective from another, as plain data."""
        return {"kind": self.kind, "temperature": self.temperature, "alpha": self.alpha,
                "teacher": fingerprint(self.teacher), "terms": [term.describe() for term in self.terms]}  # fmt: skip

    def _apply(self, fn, recurse=True):
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def ask(self, images):
        """What the teacher says of images B C H W: (logits B K, intermediates or None)."""
        side = input_size(self.teacher, images.shape[-1])
        if side != images.shape[-1]:
            images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
        return self.teacher(images, intermediates=True) if self.terms else (self.teacher(images), None)

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


class Term(nn.Module):
    """What compares a student's inside with a teacher's: the mean over `pairs` of (student's layer, teacher's layer).

    weight: in the loss. dims: (student's, teacher's channels) of each pair, where a linear projection of the student's
    `grid` x `grid` patch tokens is compared; it starts the same whatever was drawn before.
    """

    def __init__(self, pairs=((-1, -1),), weight=1.0, grid=0, dims=()):
        super().__init__()
        self.pairs, self.weight, self.grid = tuple(tuple(pair) for pair in pairs), weight, grid
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.projectors = nn.ModuleList(nn.Linear(*pair) for pair in dims)

    def describe(self):
        return {"term": self.name, "pairs": self.pairs, "weight": self.weight, "grid": self.grid}

    def forward(self, seen, known, images):
        """The term (0-d) from the student's and the teacher's intermediates of images B C H W."""
        return sum(self.distance(seen, known, k, *pair) for k, pair in enumerate(self.pairs)) / len(self.pairs)

    def distance(self, seen, known, k, i, j):
        """Mean squared error of the k-th pair's features B N C, both standardised over their channels."""
        goal, own = self.goal(known, j), self.projectors[k](_patches(seen, i, self.grid, "student"))
        return F.mse_loss(*(F.layer_norm(x.float(), x.shape[-1:]) for x in (own, goal)))


class Features(Term):
    """Term: patch tokens of student blocks, projected, against those of teacher blocks (FitNets, Romero et al. 2015).

    dims: embedding channels (student, teacher); grid: patches along a side of both; pairs: ((student block, teacher
    block), ...).
    """

    name = "features"

    def __init__(self, dims, grid, pairs=((-1, -1),), weight=1.0):
        super().__init__(pairs, weight, grid, [dims] * len(pairs))

    def goal(self, known, j):
        return _patches(known, j, self.grid, "teacher")


class AttentionMaps(Term):
    """Term: KL divergence of attention rows, teacher || student, heads averaged (after MiniLM, 2020).

    Both models need the same tokens. pairs as in `Features`.
    """

    name = "attention"

    def distance(self, seen, known, k, i, j):
        own, goal = seen["attention"][i], known["attention"][j]  # B heads N N
        if own is None or goal is None or own.shape[-1] != goal.shape[-1]:
            raise ValueError(f"attention maps of student block {i} and teacher block {j} cannot be compared")
        return kl_divergence(*(a.float().mean(1).clamp_min(1e-9).log().flatten(0, 1) for a in (own, goal)))


class Locality(Term):
    """Term: a CNN's feature maps, resized to the grid, guide the patch tokens (Li et al. 2022, "Locality guidance").

    dim: the student's channels; grid: its patches along a side; channels: of the CNN's features used. pairs: ((student
    block, CNN stage), ...), as many as channels; by default the last stages, with blocks spread over `depth`.
    """

    name = "locality"

    def __init__(self, dim, grid, channels, pairs=None, depth=6, weight=1.0):
        count = len(channels)
        pairs = pairs or [(round((k + 1) * depth / count) - 1, k - count) for k in range(count)]
        if len(pairs) != count:
            raise ValueError(f"{len(pairs)} pairs for the channels of {count} CNN stages")
        super().__init__(pairs, weight, grid, [(dim, c) for c in channels])

    def goal(self, known, j):
        if "features" not in known:
            raise ValueError("Locality needs a CNN teacher that gives 'features' (vitlab.models.resnet.ResNet)")
        image, size = known["features"][j].float(), (self.grid, self.grid)
        smaller = image.shape[-1] < self.grid
        image = F.interpolate(image, size, mode="bilinear") if smaller else F.adaptive_avg_pool2d(image, size)
        return image.flatten(2).transpose(1, 2)  # B C g g -> B N C


def _patches(seen, block, grid, who):
    """The patch tokens (the last ones) that a block gave: B grid^2 D."""
    if "tokens" not in seen:
        raise ValueError(f"this term compares tokens of ViTs; the {who} gives only {', '.join(seen)}")
    tokens = seen["tokens"][block]
    if tokens.shape[1] < grid**2:
        raise ValueError(f"grid={grid}: the {who} has {tokens.shape[1]} tokens")
    return tokens[:, -(grid**2) :]


def _frozen(teacher, intermediates):
    """A copy of the teacher in eval mode, without gradients; timm's as ours where terms look at its intermediates."""
    teacher = eager(teacher)
    teacher = as_vit(teacher) if intermediates and not hasattr(teacher, "config") else teacher
    return copy.deepcopy(teacher).eval().requires_grad_(False)
