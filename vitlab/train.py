"""The one training loop: `fit(model, data, recipe)`.

What a method adds is passed in: an `objective(model, batch) -> loss, logs` and `on_epoch` hooks. Everything
random hangs on `recipe.seed` and the epoch, and the state is kept in one atomic file, so that a run that
was killed and started again ends where an undisturbed one would (bit for bit on the CPU).
"""

import math
import os
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from vitlab import rng
from vitlab.augment import Augment, mix, normalize
from vitlab.data import batches
from vitlab.precision import faster_dtype
from vitlab.predict import autocast, input_size, logits
from vitlab.recipe import DTYPES, Recipe
from vitlab.resume import TrainingState

__all__ = ["Batch", "BudgetSpent", "History", "NotFinite", "Recipe", "cross_entropy", "fit", "hits"]


class NotFinite(RuntimeError):
    """The loss became NaN or infinite."""


class BudgetSpent(RuntimeError):
    """The next epoch would not end before the deadline; the state is saved, the next call goes on."""


@dataclass(frozen=True)
class Batch:
    """What an objective sees: `images` float B C H W (augmented, mixed, normalised), soft `targets` B K,
    `labels` int64 B before mixing, and the `epoch` from 0."""

    images: torch.Tensor
    targets: torch.Tensor
    labels: torch.Tensor
    epoch: int


@dataclass
class History:
    """One row an epoch: epoch (from 1), loss, accuracy (train, %), val_loss, val_accuracy (%), lr,
    images_per_s, seconds, and whatever the objective logs. dtype: the precision it was trained in."""

    rows: list = field(default_factory=list)
    resumed: int = 0
    dtype: str | None = None

    @property
    def seconds(self):
        """Training time over all parts of the run, validation included."""
        return sum(row["seconds"] for row in self.rows)

    def __getitem__(self, name):
        return [row.get(name) for row in self.rows]

    def __len__(self):
        return len(self.rows)


def cross_entropy(model, batch):
    """Cross-entropy against the soft targets; a distilled model's two heads count half each."""
    out = model(batch.images)
    outs = out if isinstance(out, tuple) else (out,)
    loss = sum(F.cross_entropy(o, batch.targets) for o in outs) / len(outs)
    return loss, {"accuracy": hits(outs[0], batch)}


def hits(output, batch):
    """Share of images (in %) whose largest logit is the largest soft target."""
    return (output.argmax(1) == batch.targets.argmax(1)).float().mean() * 100


def fit(model, data, recipe, *, objective=cross_entropy, on_epoch=(), checkpoint=None, save_every=30.0,
        validate=True, log=print, tensorboard=None, name=""):  # fmt: skip
    """Train `model` in place on `data` (on the model's device) and return its `History`.

    objective(model, batch) -> (loss, {name: 0-d tensor}); if it is a Module with parameters that want a
    gradient, they are trained too. on_epoch: hooks called as hook(epoch, model, history) before each epoch; a
    hook with state_dict()/load_state_dict() (plain data) is saved with the run.
    checkpoint: path of the resumable state (safetensors), written at the end of an epoch when the last one
    is `save_every` seconds old; a run found there goes on. At the end the model holds the averaged
    weights if `recipe.ema` is set. tensorboard: a folder for its scalars.

    Raises NotFinite (epoch, step, what to try; the checkpoint stays the last good one), BudgetSpent when the
    environment's VITLAB_DEADLINE (unix seconds) is near, ValueError for a checkpoint of another run.
    """
    device = next(model.parameters()).device
    data = data.to(device)
    if len(data.train) < recipe.batch:
        raise ValueError(f"batch={recipe.batch} is larger than the {len(data.train)} training images")
    run = _Run(model, data, recipe, objective, device)
    history = History()
    rng.seed_all(recipe.seed)
    state = TrainingState(checkpoint, recipe, model, run.optimizer, run.ema, objective, on_epoch)
    history.rows = state.load()
    history.resumed = len(history)
    if recipe.dtype == "auto" and device.type == "cpu":
        # a run goes on in the precision it began in, whatever the clock would say now
        run.dtype = DTYPES.get(state.dtype) or faster_dtype(
            model, batch=recipe.batch, image_size=data.image_size, log=log
        )
    history.dtype = state.dtype = str(run.dtype).removeprefix("torch.")
    writer = _writer(tensorboard, history.resumed, log)
    last_save = time.monotonic()
    for epoch in range(len(history), recipe.epochs):
        _check_deadline(history, state, log)
        for hook in on_epoch:
            hook(epoch, model, history)
        start = time.perf_counter()
        row = run.epoch(epoch, name)
        row |= _validation(run.ema_or_model, data, run.dtype) if validate and len(data.val) else {}
        row["seconds"] = time.perf_counter() - start
        history.rows.append(row)
        if log:
            log(_line(name, row, recipe.epochs, history))
        for key, value in row.items():
            if writer and key != "epoch":
                writer.add_scalar(key, value, row["epoch"])
        if time.monotonic() - last_save >= save_every or epoch + 1 == recipe.epochs:
            state.save(history.rows)
            last_save = time.monotonic()
    if writer:
        writer.close()
    if run.ema is not None:
        model.load_state_dict(run.ema.module.state_dict())
    model.eval()
    return history


class _Run:
    """What stays the same over the epochs of one run."""

    def __init__(self, model, data, recipe, objective, device):
        self.model, self.data, self.recipe, self.objective, self.device = model, data, recipe, objective, device
        self.dtype = recipe.torch_dtype(device)
        self.size = input_size(model, data.image_size)
        self.augment = Augment(recipe.augment, mean=data.mean)
        self.steps = len(data.train) // recipe.batch
        self.optimizer = recipe.build_optimizer(model, objective, device)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.ema = _ema(model, recipe.ema)
        compiled = recipe.compiles(device)
        self.forward = torch.compile(model, dynamic=False) if compiled else model

    @property
    def ema_or_model(self):
        return self.model if self.ema is None else self.ema.module

    def epoch(self, epoch, name):
        """One pass over the training images; the device is asked for numbers once, at the end."""
        self.model.train()
        draw = rng.generator(self.recipe.seed, "augment", epoch, device=self.device)
        order = rng.generator(self.recipe.seed, "shuffle", epoch, device=self.device)
        stream = batches(self.data.train, self.recipe.batch, generator=order, drop_last=True)
        bar = _bar(self.steps, f"{name} epoch {epoch + 1}/{self.recipe.epochs}".strip())
        start, losses, logs = time.perf_counter(), [], {}
        for step, (images, labels) in enumerate(stream):
            loss, found = self.step(epoch, step, images, labels, draw)
            losses.append(loss)
            for key, value in found.items():
                logs.setdefault(key, []).append(value.detach())
            bar.update()
        bar.close()
        losses = torch.stack(losses).cpu()
        seconds = time.perf_counter() - start
        if not losses.isfinite().all():
            self.stop(epoch, int((~losses.isfinite()).nonzero()[0]), losses)
        means = {key: torch.stack(values).float().mean().item() for key, values in logs.items()}
        return {
            "epoch": epoch + 1, "loss": losses.mean().item(), **means,
            "lr": self.recipe.lr_at(epoch + 1 - 1 / self.steps, self.steps),
            "images_per_s": len(losses) * self.recipe.batch / seconds,
        }  # fmt: skip

    def step(self, epoch, step, images, labels, draw):
        recipe, data = self.recipe, self.data
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(epoch + step / self.steps, self.steps)
        images = normalize(self.augment(images, draw), data.mean, data.std, size=self.size)
        mixing = epoch < recipe.epochs - recipe.mix_off
        images, targets = mix(
            images, labels, data.num_classes, draw, mixup=recipe.mixup * mixing, cutmix=recipe.cutmix * mixing,
            smoothing=recipe.smoothing,
        )  # fmt: skip
        with autocast(self.device, self.dtype):
            loss, logs = self.objective(self.forward, Batch(images, targets, labels, epoch))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, epoch * self.steps + step)
        return loss.detach(), logs

    def stop(self, epoch, step, losses):
        before = losses[max(0, step - 3) : step].tolist()
        raise NotFinite(
            f"the loss became {losses[step].item()} at epoch {epoch + 1}, step {step + 1} of {self.steps} "
            f"(before it: {', '.join(f'{v:.3g}' for v in before) or 'nothing'}). Try a lower lr (now "
            f"{self.recipe.lr:g}), more warmup (now {self.recipe.warmup:g} epochs), clip=1.0 (now {self.recipe.clip}) "
            f"or dtype='float32'. The last good checkpoint is kept."
        )


def _validation(model, data, dtype):
    found, labels = logits(model, data.val, mean=data.mean, std=data.std, dtype=dtype)
    right = (found.argmax(1) == labels).float().mean() * 100
    return {"val_loss": F.cross_entropy(found, labels).item(), "val_accuracy": right.item()}


def _ema(model, decay):
    """Exponential moving average of weights and buffers, with a warm-up of the decay (timm's)."""
    if not decay:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, use_warmup=True)


def _check_deadline(history, state, log):
    deadline = float(os.environ.get("VITLAB_DEADLINE", "inf"))
    need = 1.15 * max((row["seconds"] for row in history.rows[-3:]), default=0.0)
    if time.time() + need > deadline:
        state.save(history.rows)
        if log:
            log(f"time budget: stopped after epoch {len(history)}; the next call goes on from there")
        raise BudgetSpent(f"stopped after epoch {len(history)}: the next one would not end before the deadline")


def _writer(folder, resumed, log):
    if not folder:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if log:
            log("TensorBoard is not installed (pip install tensorboard): its scalars are not written")
        return None
    return SummaryWriter(folder, purge_step=resumed + 1)


def _bar(total, text):
    from tqdm import tqdm

    # in a notebook or a log file the line per epoch is the progress; a bar there leaves litter
    return tqdm(total=total, desc=text, leave=False, disable=not sys.stderr.isatty())


def _line(name, row, epochs, history):
    left = sum(r["seconds"] for r in history.rows[-5:]) / len(history.rows[-5:]) * (epochs - row["epoch"])
    parts = [f"{name} epoch {row['epoch']:>{len(str(epochs))}}/{epochs}".strip(), f"loss {row['loss']:.3f}"]
    if "accuracy" in row:
        parts.append(f"train {row['accuracy']:.1f} %")
    if "val_accuracy" in row:
        parts.append(f"val {row['val_accuracy']:.2f} %")
    parts += [f"lr {row['lr']:.1e}", f"{row['images_per_s']:,.0f} images/s", f"left {_clock(left)}"]
    return "  ".join(parts)


def _clock(seconds):
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
