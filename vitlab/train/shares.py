"""Loss and gradient of a batch; on the CPU by several threads, each with a share of the images.

Threads that share out every operation wait for each other after each. Shares of a batch need not, until their gradients
are added (bench/train.py times training). The sums are added in another order than by one thread, but always in the
same one.
"""

import contextlib
import dataclasses
import threading
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from vitlab.train.batchnorm import normalised
from vitlab.utils.device import autocast
from vitlab.utils.threads import FEWEST, workers


class Gradient:
    """Computes a loss and leaves its gradient in the parameters' `grad`.

    loss: a `Batch` -> (loss, logs), 0-d. shares: how many threads do it on a CPU, each with a share of the images
    and of torch's threads; then the loss must be a mean over images, each of which is for itself (see `alone`) but
    for the batch norms of `model`, which take the statistics of the whole batch.
    """

    def __init__(self, loss, parameters, device, shares=1, model=None):
        self.loss, self.parameters, self.device, self.pool = loss, parameters, device, None
        self.norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] if model else []
        if shares > 1:
            self.pool = workers(shares)
        self.shares = shares

    def __call__(self, batch, dtype):
        """(loss, logs) of a Batch, under autocast to `dtype`."""
        if self.pool is None:
            with autocast(self.device, dtype):
                loss, logs = self.loss(batch)
            loss.backward()
            return loss, logs
        parts = zip(*(t.chunk(self.shares) for t in (batch.images, batch.targets, batch.labels)))
        parts = [dataclasses.replace(batch, images=i, targets=t, labels=k) for i, t, k in parts]
        weights = [len(part.images) / len(batch.images) for part in parts]
        with Threads(weights).norms(self.norms) as team:
            work = [self.pool.submit(team.run, at, self._of, part, dtype) for at, part in enumerate(parts)]
            errors = [error for part in work if (error := part.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        scalars, gradients = zip(*(part.result() for part in work))
        for parameter, *shares in zip(self.parameters, *gradients):
            parameter.grad = None if shares[0] is None else _weighted(shares, weights)
        logs = {name: _weighted([found[name] for found in scalars], weights) for name in scalars[0]}
        return logs.pop("loss"), logs

    def _of(self, part, dtype):
        """({name: value, "loss": value}, gradients) of some of the images, in a thread of the pool."""
        with autocast(self.device, dtype):
            loss, logs = self.loss(part)
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return {name: value.detach() for name, value in {**logs, "loss": loss}.items()}, gradients


class Threads:
    """Threads that each have a share of a batch, as a team (see `batchnorm`)."""

    def __init__(self, weights):
        self.weights, self.own = weights, threading.local()
        self.given, self.barrier = [None] * len(weights), threading.Barrier(len(weights))

    @property
    def index(self):
        return self.own.index

    @property
    def speaks(self):
        return self.index == 0

    @contextlib.contextmanager
    def norms(self, norms):
        """Let these BatchNorm2d take the team's statistics, for a block."""
        for norm in norms:
            norm.forward = partial(normalised, norm, team=self)
        try:
            yield self
        finally:
            self.barrier.abort()  # after an interrupt no thread may wait for one that takes its own statistics now
            for norm in norms:
                del norm.forward

    def run(self, index, work, *given):
        """work(*given) as the worker `index`; where it fails, those that wait for it do (BrokenBarrierError)."""
        self.own.index = index
        try:
            return work(*given)
        except BaseException:
            self.barrier.abort()
            raise

    def gather(self, tensor):
        """That of each thread, stacked."""
        self.given[self.index] = tensor
        self.barrier.wait()
        found = torch.stack(self.given)
        self.barrier.wait()  # nobody gives the next before all have read this
        return found


def _weighted(values, weights):
    return sum(value * weight for value, weight in zip(values, weights))


def how_many(model, images, batch):
    """Shares of a `batch` of so many images for the model in training on the CPU; images: a few of them, B C H W.

    It is for training with no objective and no hooks: what they do is not known to be of one image alone.
    """
    most = min(torch.get_num_threads(), batch // FEWEST)
    return most if most > 1 and alone(model, images) else 1


@torch.no_grad()
def alone(model, images):
    """Whether in training the model treats each image by itself and the same every time.

    It does not if it draws random numbers, as dropout does, changes a buffer, or has batch statistics; those of a
    BatchNorm2d are left out, as threads take them together. Buffers and the state of the random numbers stay as they
    were.
    """
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.training]
    if not all(type(norm) is nn.BatchNorm2d and norm.affine and norm.momentum and norm.track_running_stats
               for norm in norms):  # fmt: skip
        return False
    with torch.random.fork_rng(devices=()):
        random, buffers = torch.get_rng_state(), [buffer.clone() for buffer in model.buffers()]
        for norm in norms:
            norm.eval()
        model(images)
        for norm in norms:
            norm.train()
        kept = all(map(torch.equal, buffers, model.buffers()))
        for buffer, before in zip(model.buffers(), buffers):
            buffer.copy_(before)
        return kept and torch.equal(random, torch.get_rng_state())
