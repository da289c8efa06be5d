"""One training on several processes or machines: `torchrun --nproc-per-node 2 -m vitlab train ...`.

Each process draws the augmentation of the whole batch and goes on with its own share of the images; gradients are
averaged by DistributedDataParallel (Li et al. 2020, arXiv:2006.15704), and BatchNorm2d takes the statistics of the
whole batch (a subclass of it, as some of timm's CNNs have, those of its share). So the steps are those of one process
with sums added in another order. Dropout and stochastic depth are not: each process draws its own. Validation is done
by every process. They share the folder of the checkpoint. A process by itself gets everything back as it is.
"""

import contextlib
import os
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from vitlab.train.batchnorm import normalised
from vitlab.utils import rng


@contextlib.contextmanager
def joined(device):
    """Join the processes that torchrun has started, for a block; gives the device of this one.

    Without torchrun it gives `device` (a torch.device) back. On CUDA each process of a machine takes the GPU of its
    local rank (NCCL), on the CPU they talk through gloo.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def ranks():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Which of them this one is; 0 is the one that writes and speaks."""
    return dist.get_rank() if ranks() > 1 else 0


def check(batch):
    """ValueError where a batch cannot be shared out evenly."""
    if batch % ranks():
        raise ValueError(f"batch={batch} cannot be shared out evenly to {ranks()} processes: choose a multiple of it")


def alike(value, what):
    """`value`; ValueError where process 0 has another one, as for a file in a folder that they do not share."""
    if value != agreed(value):
        raise ValueError(f"process {rank()} of {ranks()} has not found the same as process 0: {what}")
    return value


def agreed(value):
    """What process 0 has for `value` (plain data): what a clock decides must be the same everywhere."""
    if ranks() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def shard(*tensors):
    """This process's rows of tensors that hold the whole batch."""
    return tuple(t.chunk(ranks())[rank()] for t in tensors)


def averages(values):
    """{name: 0-d tensor}, without gradient, averaged over the processes."""
    if ranks() == 1:
        return {name: value.detach() for name, value in values.items()}
    together = torch.stack([value.detach().float() for value in values.values()])
    return dict(zip(values, _mean(together)))


def draw_apart(seed, epoch):
    """Let the global generators of each process but 0 go on from a state of their own."""
    if rank():
        rng.seed_all(rng.generator(seed, "rank", rank(), epoch).initial_seed())


def replicated(objective, model):
    """objective(model, .) as a function of a Batch, whose backward averages the gradients over the processes."""
    if ranks() == 1:
        return partial(objective, model)
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(parent, name, BatchNorm(child))
    return nn.parallel.DistributedDataParallel(_Objective(objective, model))


class _Objective(nn.Module):
    """Model and objective as one module, so that the parameters of both are averaged."""

    def __init__(self, objective, model):
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, batch):
        return self.objective(self.model, batch)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d with the statistics of all processes' images, of the weights and buffers of `original`.

    torch's SyncBatchNorm is for GPUs only.
    """

    def __init__(self, original):
        super().__init__(original.num_features, original.eps, original.momentum, device="meta")
        self._parameters, self._buffers = original._parameters, original._buffers
        self.training = original.training

    @torch.compiler.disable
    def forward(self, x):
        """x: B C H W, this process's images."""
        return super().forward(x) if ranks() == 1 else normalised(self, x, Processes())


class Processes:
    """The processes that train together, as a team (see `batchnorm`), each with as many images."""

    def __init__(self):
        self.weights, self.index, self.speaks = [1 / ranks()] * ranks(), rank(), True  # each keeps its own statistics

    def gather(self, tensor):
        """That of each process, stacked."""
        found = [torch.empty_like(tensor) for _ in self.weights]
        dist.all_gather(found, tensor.contiguous())
        return torch.stack(found)


def _mean(values):
    values = values.clone()
    dist.all_reduce(values)
    return values / ranks()
