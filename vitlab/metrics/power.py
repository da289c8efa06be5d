"""Power and energy of a GPU, from NVML's energy counter. Where there is none the reading says so: no guesses."""

import contextlib
import itertools
import time
from dataclasses import dataclass

import pynvml
import torch

from vitlab.metrics.meters import inputs_of, latency, place
from vitlab.utils.device import running

WINDOW_S = 2.0  # the counter moves about every 0.1 s, so shorter windows say little
POLL_S = 0.02


class NoSensor(Exception):
    """There is nothing to read; the message says why."""


@dataclass(frozen=True)
class Energy:
    """Watts under load and before it, joules an image; None where not measured, and `reason` says why."""

    watts: float | None = None
    joules_per_image: float | None = None
    idle_watts: float | None = None
    images: int = 0
    reason: str = ""


def energy_per_image(function, example, *, device=None, dtype=None, seconds=3.0, idle_seconds=2.0):
    """Power while a function or model runs on `example` (B ...) again and again, and energy an image, as an Energy.

    The idle baseline is read first, over `idle_seconds`, and is not subtracted. Both windows must be at least
    WINDOW_S long. The counter is the whole card's: other processes on it are in the reading.
    """
    device, inputs = place(example, device), inputs_of(example)
    found = {}
    try:
        with _counter(device) as read:
            torch.cuda.synchronize(device)
            found["idle_watts"], _, _ = _watts(read, lambda: time.sleep(POLL_S), idle_seconds)
            once = latency(function, example, device=device, dtype=dtype, warmup=3, seconds=0, min_runs=3).median_s
            chunk = max(1, int(POLL_S / once))

            def work():
                torch.cuda.synchronize(device)  # with the round before, so that the card works while it is read
                for _ in range(chunk):
                    function(*inputs)

            with running([function], device, dtype):
                found["watts"], elapsed, rounds = _watts(read, work, seconds)
    except NoSensor as problem:
        return Energy(**found, reason=str(problem))
    images = (rounds - 1) * chunk * len(inputs[0])  # the last round is not over
    return Energy(**found, joules_per_image=found["watts"] * elapsed / images, images=images)


def _watts(read, work, seconds):
    """(watts, seconds, rounds) of calling `work` for that long: between the counter's first and last step."""
    if seconds < WINDOW_S:
        raise NoSensor(f"a window of {seconds:.2f} s is below {WINDOW_S} s")
    seen, start = [], time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        work()
        seen.append((time.perf_counter(), read()))
    steps = [now for before, now in itertools.pairwise(seen) if now[1] != before[1]]
    if len(steps) < 2:
        raise NoSensor("the sensor did not move")
    (first, begin), (last, end) = steps[0], steps[-1]
    return (end - begin) / 1000 / (last - first), elapsed, len(seen)


@contextlib.contextmanager
def _counter(device):
    """A function that reads the device's energy counter, in millijoules; else, there or later, NoSensor."""
    if device.type != "cuda":
        raise NoSensor(f"there is no power sensor for {device.type}")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as problem:
        raise NoSensor(f"NVML does not start: {problem}") from problem
    try:
        # by UUID, since CUDA_VISIBLE_DEVICES renumbers torch's devices
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        with contextlib.suppress(pynvml.NVMLError):
            if pynvml.nvmlDeviceGetMigMode(handle)[0]:
                raise NoSensor("the card is split (MIG), and its sensor reads the whole of it")
        yield lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as problem:
        raise NoSensor(f"NVML does not read {device}: {problem}") from problem
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
