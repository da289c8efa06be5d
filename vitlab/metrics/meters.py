"""Meters of running code: time and memory. They know of tensors and callables, not of data sets.

Every meter runs what it is given in eval mode without gradients, warmed up and synchronised, on inputs that
are already on the device, so no figure includes data loading.
"""

import contextlib
import math
import os
import statistics
import time
from dataclasses import dataclass

import torch

from vitlab.utils.device import running


def inputs_of(example):
    """The arguments that an example stands for: itself if it is a tensor, those of a tuple, none for None."""
    return () if example is None else (example,) if isinstance(example, torch.Tensor) else tuple(example)


def place(example, device):
    """Where the work runs: `device`, else the example's; ValueError where the clock would not be known."""
    inputs = inputs_of(example)
    if device is None and not inputs:
        raise ValueError("without an example, say which device the functions run on: device='cpu' or 'cuda'")
    device = torch.device(inputs[0].device if device is None else device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"only cpu and cuda are measured, not {device.type}")
    return device


# ---------------------------------------------------------------------------------------------- time

@dataclass(frozen=True)
class Timing:
    """Seconds a run: median and quartiles of `n` runs."""

    median_s: float
    q25_s: float
    q75_s: float
    n: int


def compare(functions, example=None, *, device=None, dtype=None, warmup=5, seconds=1.0, min_runs=10):
    """Time several functions or models against each other: {name: callable} -> {name: Timing}.

    Round-robin, the order turned by one each round, so that clock drift and noisy neighbours hit all alike.
    Each is called with `example` (a tensor or a tuple of them; None: no argument), `warmup` times unmeasured,
    then until it has had `seconds` seconds and `min_runs` runs. Modules are put into eval mode; a function that
    wraps one must see to that itself. CUDA: events around one run on an idle device, launch overhead included.
    CPU: perf_counter_ns. ValueError for nothing to time, below one run, or seconds below 0 or not finite.
    """
    if not functions or min_runs < 1 or warmup < 0 or not 0 <= seconds < math.inf:
        raise ValueError(
            f"timing needs functions, min_runs >= 1, warmup >= 0 and finite seconds >= 0; got {list(functions)}, "
            f"min_runs={min_runs}, warmup={warmup}, seconds={seconds}"
        )
    device, inputs, names = place(example, device), inputs_of(example), list(functions)
    on_gpu = device.type == "cuda"
    clock = _cuda_seconds if on_gpu else _cpu_seconds
    spent = {name: [] for name in names}
    scope = torch.cuda.device(device) if on_gpu else contextlib.nullcontext()
    with running(functions.values(), device, dtype), scope:
        for name in names:
            for _ in range(warmup):
                functions[name](*inputs)
        if on_gpu:
            torch.cuda.synchronize(device)
        while any(len(s) < min_runs or sum(s) < seconds for s in spent.values()):
            for name in names:
                spent[name].append(clock(functions[name], inputs))
            names.append(names.pop(0))
    return {name: _timing(spent[name]) for name in functions}


def training_step(model, images, inputs=False):
    """A function that runs `model` on `images` forward and back once, for meters, which run in inference mode.

    The loss is the sum of the output; `inputs`: with the gradient of the images too.
    """
    images = images.detach().clone().requires_grad_(inputs)
    wanted = [*model.parameters(), *[images] * inputs]

    def step():
        with torch.inference_mode(False), torch.enable_grad():
            torch.autograd.grad(model(images).sum(), wanted)

    return step


def latency(function, example=None, **options):
    """Time of one call of a function or model on `example`, as a Timing; arguments as in `compare`."""
    return compare({"": function}, example, **options)[""]


def _cpu_seconds(function, inputs):
    start = time.perf_counter_ns()
    function(*inputs)
    return (time.perf_counter_ns() - start) * 1e-9


def _cuda_seconds(function, inputs):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function(*inputs)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _timing(seconds):
    q25, median, q75 = statistics.quantiles(seconds * (2 if len(seconds) == 1 else 1), n=4, method="inclusive")
    return Timing(median, q25, q75, len(seconds))


# -------------------------------------------------------------------------------------------- memory

@dataclass(frozen=True)
class Memory:
    """Bytes: the model's weights and buffers, its input, the most it allocates beside them in a forward pass."""

    weights: int
    inputs: int
    activations: int

    @property
    def peak(self):
        """What this forward pass needs in all: weights + inputs + activations."""
        return self.weights + self.inputs + self.activations


def peak_memory(function, example, *, device=None, dtype=None):
    """Peak memory of one forward pass in inference mode, as a Memory.

    Counted is what torch's allocators hand out: on CUDA its peak above what was held before, on a CPU every
    allocation and release the profiler reports. The process's resident size is not used: it holds the
    interpreter, libraries and freed pages the allocator keeps, and hardly moves with the model.
    """
    device, inputs = place(example, device), inputs_of(example)
    is_module = isinstance(function, torch.nn.Module)
    weights = [*function.parameters(), *function.buffers()] if is_module else []

    def run():
        with running([function], device, dtype):
            function(*inputs)

    run()  # libraries' workspaces are made once, and are not the model's
    activations = _cuda_activations(run, device) if device.type == "cuda" else _cpu_activations(run)
    return Memory(_bytes(weights), _bytes(inputs), activations)


def _bytes(tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _cuda_activations(run, device):
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_activations(run):
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr from C++
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile:
        run()
    events, found = list(profile.kineto_results.experimental_event_tree()), []
    for event in events:
        events += event.children
        fields = event.extra_fields
        if hasattr(fields, "alloc_size") and fields.device.type == "cpu":
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return _peak(sorted(found))


def _peak(allocations):
    """Most bytes held at once, from (time, address, bytes; negative when released) in order."""
    held, level, peak = {}, 0, 0
    for _, address, size in allocations:
        if size > 0:
            held[address] = size
            level += size
        else:  # a block from before the profile may be released with any size, and was never counted
            level -= held.pop(address, 0)
        peak = max(peak, level)
    return peak
