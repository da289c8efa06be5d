"""Power and energy of a GPU, from NVML's sensors. Where there is none the reading says so: no guesses."""

import contextlib
import itertools
import threading
import time
from dataclasses import dataclass

import torch

SETTLE = 1.0  # seconds: NVML's power reading is an average over the last second on recent cards


@dataclass(frozen=True)
class Reading:
    """Mean watts and joules of a window. `source`: "counter" or "sampling"; None: `reason` says why not."""

    seconds: float
    watts: float | None = None
    joules: float | None = None
    source: str | None = None
    reason: str = ""


class NoSensor(Exception):
    """There is nothing to read; the message says why."""


class EnergyMeter:
    """Reads a CUDA device's power while its block runs; `meter.reading` has the result after.

    NVML's energy counter is followed by a thread from its first step to its last (it steps about every
    100 ms, so the window must be `min_seconds` long); where the card has no counter, power is sampled.
    `available` and `reason` say beforehand whether there is a sensor. The sensor is the whole card's: other
    processes on it are in the reading. The work must be synchronised before the block ends.
    """

    def __init__(self, device="cuda", *, min_seconds=2.0, interval=0.02):
        self.device, self.min_seconds, self.interval = torch.device(device), min_seconds, interval
        self.available, self.reason, self.reading = False, "", None

    def __enter__(self):
        self.available, self.reason = False, ""
        self._stack, self._seen, self._stop = contextlib.ExitStack(), [], threading.Event()
        try:
            self.source, self._read = self._stack.enter_context(_sensor(self.device))
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
        watts = (_counted if self.source == "counter" else _sampled)(self._seen)
        if watts is None:
            return Reading(seconds, reason="the sensor did not move")
        return Reading(seconds, watts, watts * seconds, self.source)


def _counted(seen):
    """Watts from (seconds, millijoules): between the counter's first and last step; None if it has none."""
    steps = [now for before, now in itertools.pairwise(seen) if now[1] != before[1]]
    if len(steps) < 2 or steps[-1][1] <= steps[0][1]:
        return None
    (first, start), (last, end) = steps[0], steps[-1]
    return (end - start) / 1000 / (last - first)


def _sampled(seen):
    """Watts from (seconds, milliwatts): the mean once the reading has settled; None without a sample."""
    values = [value for moment, value in seen if moment >= min(SETTLE, seen[-1][0] / 2)]
    return sum(values) / len(values) / 1000 if values else None


@contextlib.contextmanager
def _sensor(device):
    """("counter", a function giving millijoules) or ("sampling", one giving milliwatts); else NoSensor."""
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
        handle = _handle(nvml, device)
    except (nvml.NVMLError, AssertionError, RuntimeError) as problem:  # torch's when it has no CUDA
        raise NoSensor(f"NVML does not find {device}: {problem}") from problem
    with contextlib.suppress(nvml.NVMLError):
        if nvml.nvmlDeviceGetMigMode(handle)[0]:
            raise NoSensor("the card is split (MIG), and its sensor reads the whole of it")
    readers = {"counter": nvml.nvmlDeviceGetTotalEnergyConsumption, "sampling": nvml.nvmlDeviceGetPowerUsage}
    for source, read in readers.items():
        try:
            read(handle)
        except nvml.NVMLError as problem:
            reason = str(problem)
        else:
            return source, lambda read=read: read(handle)
    raise NoSensor(f"the card reports neither energy nor power: {reason}")


def _handle(nvml, device):
    """NVML's handle of a torch device, by UUID or PCI address: CUDA_VISIBLE_DEVICES renumbers torch's."""
    properties = torch.cuda.get_device_properties(device)
    uuid = str(getattr(properties, "uuid", ""))
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    except nvml.NVMLError:
        if not hasattr(properties, "pci_bus_id"):
            raise
    address = (getattr(properties, "pci_domain_id", 0), properties.pci_bus_id, properties.pci_device_id)
    return nvml.nvmlDeviceGetHandleByPciBusId("{:08X}:{:02X}:{:02X}.0".format(*address))
