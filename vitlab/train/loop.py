"""The one training loop: `fit(model, data, recipe)`.

What a method adds is passed in: an `objective(model, batch) -> loss, logs` and `on_epoch` hooks. Everything
random hangs on `recipe.seed` and the epoch, and the state is kept in one atomic file, so that a run that
was killed and started again ends where an undisturbed one would (bit for bit on the CPU).
"""

import contextlib
import dataclasses
import os
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from vitlab.data.augment import Augment, mix, normalize
from vitlab.data.datasets import batches
from vitlab.metrics.predict import input_size, logits
from vitlab.train import parallel, shares
from vitlab.train.precision import faster_dtype
from vitlab.train.progress import line, progress_bar
from vitlab.train.recipe import DTYPES, Recipe
from vitlab.train.resume import TrainingState, carry_state
from vitlab.utils import rng

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
        save_within=300.0, validate=True, log=print, tensorboard=None, name=""):  # fmt: skip
    """Train `model` in place on `data` (on the model's device) and return its `History`.

    objective(model, batch) -> (loss, {name: 0-d tensor}); if it is a Module with parameters that want a
    gradient, they are trained too. on_epoch: hooks called as hook(epoch, model, history) before each epoch; a
    hook with state_dict()/load_state_dict() (plain data) is saved with the run. A hook that takes parts of the
    model away returns carry(name, tensor) -> what is left of a tensor shaped like that parameter, by which the
    optimiser's state and the averaged weights follow; its restore(model), called after load_state_dict, takes the
    same parts away again and returns the same.
    checkpoint: path of the resumable state (safetensors), written at the end of an epoch when the last one
    is `save_every` seconds old, and within an epoch every `save_within` seconds; a run found there goes on. At the
    end the model holds the averaged weights if `recipe.ema` is set. tensorboard: a folder for its scalars.
    On a CPU a model without dropout or other noise is trained by threads that share out each batch (see `shares`).

    Raises NotFinite (the checkpoint stays the last good one), BudgetSpent when the environment's VITLAB_DEADLINE (unix
    seconds) is near, ValueError for a checkpoint of another run, and data of one class or not of the model's number.
    """
    device = next(model.parameters()).device
    data = data.to(device)
    _check_classes(model, data)
    if (images := len(data.train)) < recipe.batch:
        if log:
            log(f"batch={recipe.batch} is larger than the {images} training images: they are taken as one batch")
        recipe = dataclasses.replace(recipe, batch=images)
    parallel.check(recipe.batch)
    run = _Run(model, data, recipe, objective, device, checkpoint, on_epoch)
    history = History()
    rng.seed_all(recipe.seed)
    state = TrainingState(checkpoint, recipe, run, on_epoch)
    history.rows = parallel.alike(state.load(), f"what was trained before ({checkpoint})")
    if parallel.rank():  # process 0 writes and speaks
        state.path = log = tensorboard = None
    history.resumed = len(history)
    if recipe.dtype == "auto" and device.type == "cpu":
        # a run goes on in the precision it began in, whatever the clock would say now
        run.dtype = parallel.agreed(
            DTYPES.get(state.dtype) or faster_dtype(model, batch=recipe.batch, image_size=data.image_size, log=log)
        )
    history.dtype = state.dtype = str(run.dtype).removeprefix("torch.")
    writer = None
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(tensorboard, purge_step=history.resumed + 1)
    last_save = time.monotonic()
    for epoch in range(len(history), recipe.epochs):
        if not run.begun:
            _check_deadline(history, state, log)
            for hook in on_epoch:
                run.reshaped(hook(epoch, model, history))
        row = run.epoch(epoch, name, lambda: state.save(history.rows), save_within)
        start = time.perf_counter()
        if validate and len(data.val):
            with run.averaged():
                row |= _validation(model, data, run.dtype)
        row["seconds"] += time.perf_counter() - start
        history.rows.append(row)
        if log:
            log(line(name, row, recipe.epochs, history))
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

    def __init__(self, model, data, recipe, objective, device, checkpoint, on_epoch=()):
        self.model, self.data, self.recipe, self.objective = model, data, recipe, objective
        self.device, self.checkpoint, self.on_epoch = device, checkpoint, on_epoch
        self.dtype = recipe.torch_dtype(device)
        self.size = input_size(model, data.image_size)
        self.augment = Augment(recipe.augment, mean=data.mean)
        self.steps = len(data.train) // recipe.batch
        self.begun = {}  # of an epoch that was stopped: its losses, logs, seconds and the state of its draws
        self.build()

    def build(self):
        """What is made from the model as it is: the optimiser, the averaged weights, the compiled forward."""
        from timm.utils import ModelEmaV3

        self.optimizer = self.recipe.build_optimizer(self.model, self.objective, self.device)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.named = dict(self.model.named_parameters())
        decay = self.recipe.ema
        self.ema = ModelEmaV3(self.model, decay=decay, use_warmup=True) if decay else None
        compiles, count = self.recipe.compiles(self.device), 1
        forward = torch.compile(self.model, dynamic=False) if compiles else self.model
        plain = not (self.on_epoch or compiles) and self.objective is cross_entropy and parallel.ranks() == 1
        if plain and self.device.type == "cpu":
            few = normalize(self.data.train.images[:2], self.data.mean, self.data.std, size=self.size)
            count = shares.how_many(self.model.train(), few, self.recipe.batch)
        loss = parallel.replicated(self.objective, forward)
        self.gradient = shares.Gradient(loss, self.parameters, self.device, count, self.model)

    def reshaped(self, carry):
        """Go on with a model of which a hook took parts away; None: it took none (see `fit`)."""
        if carry is None:
            return
        named, optimizer, ema = self.named, self.optimizer, self.ema
        self.build()
        carry_state(optimizer, named, self.optimizer, self.named, carry)
        if ema is not None:
            before, module = ema.module.state_dict(), self.ema.module
            module.load_state_dict({k: carry(k, before[k]) for k in module.state_dict()})

    @contextlib.contextmanager
    def averaged(self):
        """The model itself with its averaged weights, if there are any, for a block: hooks may have set it up."""
        own = None if self.ema is None else {k: v.clone() for k, v in self.model.state_dict().items()}
        if own:
            self.model.load_state_dict(self.ema.module.state_dict())
        yield
        if own:
            self.model.load_state_dict(own)

    def epoch(self, epoch, name, save, save_within):
        """One pass over the training images, or what is left of one; the device is asked for numbers at the end."""
        self.model.train()
        parallel.draw_apart(self.recipe.seed, epoch)
        draw = rng.generator(self.recipe.seed, "augment", epoch, device=self.device)
        order = rng.generator(self.recipe.seed, "shuffle", epoch, device=self.device)
        stream = batches(self.data.train, self.recipe.batch, generator=order, drop_last=True)
        bar = progress_bar(self.steps, f"{name} epoch {epoch + 1}/{self.recipe.epochs}".strip())
        begun, self.begun = self.begun, {}
        if begun:
            draw.set_state(begun.pop("draw").cpu())
        start, saved = time.perf_counter() - begun.pop("seconds", torch.zeros(())).item(), time.monotonic()
        logs = {key: list(values.to(self.device)) for key, values in begun.items()}
        done = len(logs.get("loss", ()))
        for step, (images, labels) in enumerate(stream):
            if step >= done:
                found = self.step(epoch, step, images, labels, draw)
                for key, value in found.items():
                    logs.setdefault(key, []).append(value)
                if time.monotonic() - saved > save_within and step + 1 < self.steps and found["loss"].isfinite():
                    self.begun = {key: torch.stack(values) for key, values in logs.items()}
                    self.begun |= {"seconds": torch.tensor(time.perf_counter() - start), "draw": draw.get_state()}
                    save()
                    self.begun, saved = {}, time.monotonic()
            bar.update()
        bar.close()
        losses = torch.stack(logs.pop("loss")).cpu()
        seconds = time.perf_counter() - start
        if not losses.isfinite().all():
            self.stop(epoch, int((~losses.isfinite()).nonzero()[0]), losses)
        means = {key: torch.stack(values).float().mean().item() for key, values in logs.items()}
        return {
            "epoch": epoch + 1, "loss": losses.mean().item(), **means,
            "lr": self.recipe.lr_at(epoch + 1 - 1 / self.steps, self.steps),
            "images_per_s": len(losses) * self.recipe.batch / seconds, "seconds": seconds,
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
        images, targets, labels = parallel.shard(images, targets, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss, logs = self.gradient(Batch(images, targets, labels, epoch), self.dtype)
        if recipe.clip:
            nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, epoch * self.steps + step)
        return parallel.averages({**logs, "loss": loss})

    def stop(self, epoch, step, losses):
        before, recipe = losses[max(0, step - 3) : step].tolist(), self.recipe
        clip = "" if recipe.clip and recipe.clip <= 1 else f", clip=1.0 (now {recipe.clip})"
        kept = self.checkpoint and os.path.exists(self.checkpoint)
        raise NotFinite(
            f"the loss became {losses[step].item()} at epoch {epoch + 1}, step {step + 1} of {self.steps} "
            f"(before it: {', '.join(f'{v:.3g}' for v in before) or 'nothing'}). Try a lower lr (now {recipe.lr:g}), "
            f"more warmup (now {recipe.warmup:g} epochs){clip}{' or float32' * (self.dtype != torch.float32)}."
            f"{f' The last good state is in {self.checkpoint}.' if kept else ''}"
        )


def _check_classes(model, data):
    if data.num_classes < 2:
        raise ValueError(f"{data.name} has one class ({', '.join(data.classes)}): there is nothing to tell apart")
    known = getattr(getattr(model, "config", model), "num_classes", None)
    if known and known != data.num_classes:
        raise ValueError(f"the model tells {known} classes apart, {data.name} has {data.num_classes}")


def _validation(model, data, dtype):
    found, labels = logits(model, data.val, mean=data.mean, std=data.std, dtype=dtype)
    right = (found.argmax(1) == labels).float().mean() * 100
    return {"val_loss": F.cross_entropy(found, labels).item(), "val_accuracy": right.item()}


def _check_deadline(history, state, log):
    deadline = float(os.environ.get("VITLAB_DEADLINE", "inf"))
    need = 1.15 * max((row["seconds"] for row in history.rows[-3:]), default=0.0)
    if parallel.agreed(time.time() + need > deadline):
        state.save(history.rows)
        if log:
            log(f"time budget: stopped after epoch {len(history)}; the next call goes on from there")
        raise BudgetSpent(f"stopped after epoch {len(history)}: the next one would not end before the deadline")
