"""Power and energy of a GPU, from NVML's energy counter. Where there is none the reading says so: no guesses."""

import contextlib
import itertools
import threading
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Reading:
    """Mean watts and joules of a window of so many seconds; where they are None `reason` says why."""

    seconds: float
    watts: float | None = None
    joules: float | None = None
    reason: str = ""


class NoSensor(Exception):
    """There is nothing to read; the message says why."""


class EnergyMeter:
    """Reads a CUDA device's power while its block runs; `meter.reading` has the result after.

    NVML's energy counter is followed by a thread from its first step to its last (it steps about every
    100 ms, so the window must be `min_seconds` long). `available` and `reason` say beforehand whether there is one.
    The counter is the whole card's: other processes on it are in the reading. The work must be synchronised before
    the block ends.
    """

    def __init__(self, device="cuda", *, min_seconds=2.0, interval=0.02):
        self.device, self.min_seconds, self.interval = torch.device(device), min_seconds, interval
        self.available, self.reason, self.reading = False, "", None

    def __enter__(self):
        self.available, self.reason = False, ""
        self._stack, self._seen, self._stop = contextlib.ExitStack(), [], threading.Event()
        try:
            self._read = self._stack.enter_context(_sensor(self.device))
            self.available = True
        except NoSensor as problem:
            self.reason = str(problem)
        self._start = time.perf_counter()
        if self.available:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self):
        try:
            while not self._stop.wait(self.interval):
                value = self._read()
                self._seen.append((time.perf_counter() - self._start, value))
        except Exception as problem:  # a driver may fail in many ways, and none may end the run it watches
            self.reason = f"the sensor failed: {problem}"

    def __exit__(self, *exception):
        seconds = time.perf_counter() - self._start
        if self.available:
            self._stop.set()
            self._thread.join()
        self._stack.close()
        self.reading = self._result(seconds)

    def _result(self, seconds):
        if self.reason:
            return Reading(seconds, reason=self.reason)
        if seconds < self.min_seconds:
            return Reading(seconds, reason=f"a window of {seconds:.2f} s is below {self.min_seconds} s")
        watts = _counted(self._seen)
        if watts is None:
            return Reading(seconds, reason="the sensor did not move")
        return Reading(seconds, watts, watts * seconds)


def _counted(seen):
    """Watts from (seconds, millijoules): between the counter's first and last step; None if it has none."""
    steps = [now for before, now in itertools.pairwise(seen) if now[1] != before[1]]
    if len(steps) < 2 or steps[-1][1] <= steps[0][1]:
        return None
    (first, start), (last, end) = steps[0], steps[-1]
    return (end - start) / 1000 / (last - first)


@contextlib.contextmanager
def _sensor(device):
    """A function that reads the device's energy counter, in millijoules; else NoSensor."""
    if device.type != "cuda":
        raise NoSensor(f"there is no power sensor for {device.type}")
    try:
        import pynvml
    except ImportError as problem:
        raise NoSensor("nvidia-ml-py is not installed") from problem
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as problem:
        raise NoSensor(f"NVML does not start: {problem}") from problem
    try:
        yield _reader(pynvml, device)
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _reader(nvml, device):
    try:
        # by UUID, since CUDA_VISIBLE_DEVICES renumbers torch's devices
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    except (nvml.NVMLError, AssertionError, RuntimeError) as problem:  # torch's when it has no CUDA
        raise NoSensor(f"NVML does not find {device}: {problem}") from problem
    with contextlib.suppress(nvml.NVMLError):
        if nvml.nvmlDeviceGetMigMode(handle)[0]:
            raise NoSensor("the card is split (MIG), and its sensor reads the whole of it")
    try:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError as problem:
        raise NoSensor(f"the card does not count its energy: {problem}") from problem
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
