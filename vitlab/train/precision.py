"""Which precision a training on the CPU runs in: looked up in the CPU's flags, then timed."""

import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from vitlab.metrics.predict import input_size
from vitlab.utils.device import autocast

BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}  # x86's, the last Arm's, as Linux names them
IMAGES = 32  # of a timed step: enough to fill the units, short for a large model
MARGIN = 1.2  # bfloat16 must be so much faster: a close race could go the other way the next time
SHORT = 0.03  # seconds: a model with shorter steps stays in float32, as little is won and its times say little
_chosen = {}  # architecture and batch -> dtype: within a process, runs of one model are alike


def has_bfloat16(info="/proc/cpuinfo"):
    """Whether this CPU multiplies in bfloat16; False where there is no such file to tell.

    Without these units bfloat16 is emulated, several times slower than float32.
    """
    path = Path(info)
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not BFLOAT16_FLAGS.isdisjoint(flags.split())


def step_seconds(model, dtypes, *, batch=IMAGES, image_size=32, rounds=3):
    """{dtype: CPU seconds of one training step, forward and backward under autocast}, least of `rounds` in turns.

    CPU time, since neighbours on the machine would decide by the clock on the wall. The model is copied and the
    global random numbers are put back: nothing is changed by the timing.
    """
    model = copy.deepcopy(model).train()
    size = input_size(model, image_size)
    channels = getattr(getattr(model, "config", None), "in_chans", 3)
    weights = [p for p in model.parameters() if p.requires_grad]
    found = {dtype: [] for dtype in dtypes}
    with torch.random.fork_rng(devices=[]):
        images = torch.randn(batch, channels, size, size)
        for _ in range(1 + rounds):  # the first is for warming up
            for dtype, times in found.items():
                start = time.process_time()
                with autocast("cpu", dtype):
                    out = model(images)
                    out = out[0] if isinstance(out, tuple) else out
                    loss = F.cross_entropy(out, torch.zeros(batch, dtype=torch.long))
                torch.autograd.grad(loss, weights, allow_unused=True)
                times.append(time.process_time() - start)
    return {dtype: min(times[1:]) for dtype, times in found.items()}


def faster_dtype(model, *, batch=IMAGES, image_size=32, log=None):
    """float32 or bfloat16, whichever trains `model` on this CPU faster (bfloat16 by `MARGIN`); log is told why."""
    if not has_bfloat16():
        return torch.float32
    batch = min(batch, IMAGES)
    key = (str(model), batch, image_size)
    if key not in _chosen:
        times = step_seconds(model, (torch.float32, torch.bfloat16), batch=batch, image_size=image_size)
        whole, half = times.values()
        _chosen[key] = torch.bfloat16 if half * MARGIN < whole and whole > SHORT else torch.float32
        if log and whole > SHORT:
            log(f"training in {str(_chosen[key]).removeprefix('torch.')}: {batch} images take {half * 1e3:,.0f} ms in "
                f"bfloat16, {whole * 1e3:,.0f} in float32")  # fmt: skip
    return _chosen[key]
