"""Loss and gradient of a batch; on the CPU by several threads, each with a share of the images.

Threads that share out every operation wait for each other after each. Shares of a batch need not, until their gradients
are added (bench/train.py times training). The sums are added in another order than by one thread, but always in the
same one.
"""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch.nn.modules.batchnorm import _NormBase

from vitlab.utils.device import autocast

SMALLEST = 32  # images of a share: with fewer, what Python does for every operation, one thread at a time, counts


class Gradient:
    """Computes a loss and leaves its gradient in the parameters' `grad`.

    loss: a `Batch` -> (loss, logs), 0-d. shares: how many threads do it on a CPU, each with a share of the images
    and of torch's threads; then the loss must be a mean over images, each of which is for itself (see `alone`).
    """

    def __init__(self, loss, parameters, device, shares=1):
        self.loss, self.parameters, self.device, self.pool = loss, parameters, device, None
        if shares > 1:
            threads, started = torch.get_num_threads(), threading.Barrier(shares)
            self.pool = ThreadPoolExecutor(shares, "share", torch.set_num_threads, (max(1, threads // shares),))
            list(self.pool.map(lambda _: started.wait(), range(shares)))
            torch.set_num_threads(threads)  # that of the pool's threads was also the default of every later one
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
        work = [self.pool.submit(self._of, part, dtype) for part in parts]
        wait(work)  # after an error in one, the next batch must not meet the rest
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


def _weighted(values, weights):
    return sum(value * weight for value, weight in zip(values, weights))


def how_many(model, images, batch):
    """Shares of a `batch` of so many images for the model in training on the CPU; images: a few of them, B C H W.

    It is for training with no objective and no hooks: what they do is not known to be of one image alone.
    """
    most = min(torch.get_num_threads(), batch // SMALLEST)
    return most if most > 1 and alone(model, images) else 1


@torch.no_grad()
def alone(model, images):
    """Whether in training the model treats each image by itself and the same every time.

    It does not if it draws random numbers, as dropout does, changes a buffer, or has batch statistics. (Threads can
    exchange those exactly, as `parallel` does, but on two cores the laptop's baseline then trained 120 images/s, and
    655 with every operation shared out.) Buffers and the state of the random numbers stay as they were.
    """
    if any(isinstance(module, _NormBase) and module.training for module in model.modules()):
        return False
    with torch.random.fork_rng(devices=()):
        random, buffers = torch.get_rng_state(), [buffer.clone() for buffer in model.buffers()]
        model(images)
        kept = all(map(torch.equal, buffers, model.buffers()))
        for buffer, before in zip(model.buffers(), buffers):
            buffer.copy_(before)
        return kept and torch.equal(random, torch.get_rng_state())
