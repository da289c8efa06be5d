"""Token reduction that changes: with the epoch and the validation curve (hooks of `fit`), and from image to image."""

import math
import statistics

import torch
import torch.nn.functional as F
from torch import nn

from vitlab.compress.tokens.reducer import Reducer, Tokens
from vitlab.compress.tokens.scores import entropy
from vitlab.utils.device import evaluating


class PruneFrom:
    """Switch a `TokenViT` to its reduction at epoch `start` (from 0): the plain model is trained until then."""

    def __init__(self, start):
        if start < 0:
            raise ValueError(f"start={start}: an epoch of at least 0 is needed")
        self.start = start

    def __call__(self, epoch, model, history):
        model.active = epoch >= self.start

    def describe(self):
        return {"prune from": self.start}


class SlopeSchedule:
    """Remove more while validation still rises, less when it falls.

    Each epoch from `start` on, the slope of the last `window` validation accuracies (points an epoch, least
    squares) decides: above `rise`, r_max grows by `step` up to `r_max`; below `fall`, it shrinks by it.
    """

    def __init__(self, r_max=0.6, start=1, step=0.1, window=3, rise=0.2, fall=-0.2):
        self.settings = {"r_max": r_max, "start": start, "step": step, "window": window, "rise": rise, "fall": fall}
        self.now = 0.0
        if not 0 < step <= 1 or not 0 <= r_max < 1 or window < 2 or fall > rise:
            allowed = "r_max in [0, 1), step in (0, 1], window of at least 2 epochs and fall <= rise"
            raise ValueError(f"{self.settings}: {allowed} are needed")

    def __call__(self, epoch, model, history):
        has = self.settings
        curve = [v for v in history["val_accuracy"] if v is not None][-has["window"] :]
        if epoch >= has["start"] and len(curve) > 1:
            slope = statistics.linear_regression(range(len(curve)), curve).slope  # points an epoch
            self.now += has["step"] * ((slope > has["rise"]) - (slope < has["fall"]))
            self.now = min(max(self.now, 0.0), has["r_max"])
        model.active = self.now > 0
        model.reduce_by(r_max=self.now, counts=None)

    def describe(self):
        return {"by slope": self.settings}

    def state_dict(self):
        return {"now": self.now}

    def load_state_dict(self, state):
        self.now = state["now"]


class AdaptiveViT(nn.Module):
    """A TokenViT whose reduction hangs on the image: one of `levels`, from gentle to strong.

    levels: TokenConfigs that leave the first block alone. The choice is made after it, by the entropy of the attention
    that the head reads (in [0, 1]; a sharp gaze needs fewer tokens): level i of an image with entropy below
    thresholds[i - 1] (which must fall), or by a `controller` once `fit_controller` has set one.
    per: "image": each image by itself; images of one level run together. "batch": one level for all by their mean
    entropy, as published; for training only: eval mode goes by image whatever `per` says.
    """

    def __init__(self, model, levels, thresholds, *, per="image"):
        super().__init__()
        if per not in ("image", "batch"):
            raise ValueError(f"per={per!r}: choose one of image, batch")
        if len(thresholds) != len(levels) - 1 or list(thresholds) != sorted(thresholds)[::-1]:
            raise ValueError(f"thresholds={thresholds}: {len(levels) - 1} falling numbers are needed")
        self.model, self.controller, self.per, self.thresholds = model, None, per, tuple(thresholds)
        self.reducers = [Reducer(model.adapter, level) for level in levels]
        whole = self.reducers[0].total
        if any(level.counts[0] < whole for level in self.reducers):
            raise ValueError("a level removes tokens before the choice: protect the first block")
        self.shares = [sum(level.counts) / (len(level.counts) * whole) for level in self.reducers]  # of all tokens
        self.used = [0] * len(levels)  # images seen at each level, in eval mode

    def gaze(self, images):
        """(entropy B, features B F, the sequence after the first block)."""
        reducer = self.reducers[-1]
        state = reducer.start(images, record=True)
        view = reducer.view(0, state)
        return entropy(view), features(view), reducer.block(0, state)

    def level(self, images):
        """Level of each image, int64 B, and the sequence so far."""
        sharpness, seen, state = self.gaze(images)
        if self.controller is not None:
            return self.controller(seen).argmax(1), state
        if self.training and self.per == "batch":
            sharpness = sharpness.mean().expand_as(sharpness)
        return (sharpness[:, None] < torch.tensor(self.thresholds, device=images.device)).sum(1), state

    def forward(self, images):
        """images B C H W -> logits B K."""
        chosen, state = self.level(images)
        sizes = torch.bincount(chosen, minlength=len(self.reducers)).tolist()
        order, parts = chosen.argsort(stable=True).split(sizes), []
        for reducer, rows in zip(self.reducers, order):
            if len(rows):
                picked = {name: None if value is None else value[rows] for name, value in vars(state).items()}
                parts.append(reducer.finish(Tokens(**picked), 1))
        if not self.training:
            self.used = [a + b for a, b in zip(self.used, sizes)]
        return torch.cat(parts)[torch.cat(order).argsort()]


def features(view):
    """What a controller sees of an image, B 5: entropy, largest share, shares of the top tenth and half of the
    patches in the attention that the head reads, and the mean similarity of the patches' keys."""
    given = view.given().mean(1)
    given = (given / given.sum(-1, keepdim=True)).sort(dim=1, descending=True).values
    tenth, half = (max(1, given.shape[1] // part) for part in (10, 2))
    keys = view.patch_keys().float()
    alike = keys.mean(1).square().sum(1)
    even = [entropy(view), given[:, 0], given[:, :tenth].sum(1), given[:, :half].sum(1), alike]
    return torch.stack(even, dim=1)


def fit_controller(adaptive, images, labels, share, *, epochs=200, seed=0, batch=256):
    """Train a controller for `adaptive` on calibration images; the ViT stays as it is.

    Two small layers from `features` to one logit a level minimise, over their own choice p of level, the expected loss
    sum_l p_l (cross-entropy_l + price * tokens_l / tokens_plain), exactly. share: the mean of tokens_l / tokens_plain
    to come out at; the price is found for it by bisection. images: normalised, B C H W. Returns (controller, {"price",
    "tokens": the mean share that came out, "share" of images at each level}).
    """
    shares = torch.tensor(adaptive.shares, device=images.device)
    if not shares.min() <= share <= shares.max():
        raise ValueError(f"share={share}: the levels leave between {shares.min():.3f} and {shares.max():.3f}")
    table, seen = _table(adaptive, images, labels, batch)
    low, high, tried = 1e-4, 1e2, []  # cross-entropy for all tokens
    for _ in range(14):
        price = math.sqrt(low * high)
        tried.append(_fitted(table, seen, shares, price, epochs, seed))
        low, high = (price, high) if tried[-1][1]["tokens"] > share else (low, price)
    found = min(tried, key=lambda t: abs(t[1]["tokens"] - share))
    adaptive.controller = found[0]
    return found


def _fitted(table, seen, shares, price, epochs, seed):
    """A controller for the losses `table` (B levels) at one price, and what came of it."""
    cost, mean, scale = table + price * shares, seen.mean(0), seen.std(0).clamp_min(1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        controller = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, len(shares))).to(table.device)
    optimizer = torch.optim.AdamW(controller.parameters(), lr=0.02, weight_decay=0.01)
    with torch.enable_grad():
        for _ in range(epochs):
            optimizer.zero_grad()
            (controller((seen - mean) / scale).softmax(1) * cost).sum(1).mean().backward()
            optimizer.step()
    with torch.no_grad():
        first = controller[0]  # from now on it takes features as they are
        first.weight /= scale
        first.bias -= first.weight @ mean
        chosen = torch.bincount(controller(seen).argmax(1), minlength=len(shares)) / len(seen)
    return controller, {"price": price, "tokens": (chosen * shares).sum().item(), "share": chosen.tolist()}


@torch.no_grad()
def _table(adaptive, images, labels, batch):
    """Cross-entropy of every image at every level, B levels, and the features, B 5."""
    rows, seen = [], []
    with evaluating(adaptive):
        for part, target in zip(images.split(batch), labels.split(batch)):
            _, found, state = adaptive.gaze(part)
            outs = [reducer.finish(state, 1) for reducer in adaptive.reducers]
            rows.append(torch.stack([F.cross_entropy(o.float(), target, reduction="none") for o in outs], dim=1))
            seen.append(found)
    return torch.cat(rows), torch.cat(seen)
