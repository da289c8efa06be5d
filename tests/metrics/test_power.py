"""Power and energy on a card that is played, and the words where there is none."""

import functools
import sys
import time
import types

import pytest
import torch
from torch import nn

from vitlab.metrics import meters
from vitlab.metrics.meters import energy_per_image
from vitlab.metrics.power import EnergyMeter


class Nvml(types.ModuleType):
    """A card that draws `watts`; its counter steps every 20 ms."""

    class NVMLError(Exception):
        pass

    def __init__(
        self, watts=100.0, counter=True, uuids=("GPU-one", "GPU-two"), mig=0, dies_after=1e9
    ):  # fmt: skip
        super().__init__("pynvml")
        self.start, self.asked, self.open = time.perf_counter(), [], 0
        self.watts, self.counter, self.uuids = watts, counter, uuids
        self.mig, self.dies_after = mig, dies_after

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.uuids:
            raise self.NVMLError("Not Found")
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetMigMode(self, handle):
        if self.mig is None:
            raise self.NVMLError("Not Supported")
        return self.mig, self.mig

    def age(self):
        age = time.perf_counter() - self.start
        if age > self.dies_after:
            raise self.NVMLError("GPU is lost")
        return age

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.counter:
            raise self.NVMLError("Not Supported")
        return int(self.age() / 0.02) * 0.02 * self.watts * 1000


@pytest.fixture
def card(monkeypatch):
    def plug(properties=None, **options):
        fake = Nvml(**options)
        found = properties or {0: "one", 1: "two"}
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties",
            lambda device: types.SimpleNamespace(uuid=found[device.index or 0]),
        )  # fmt: skip
        return fake

    return plug


def read(seconds=0.4, device="cuda"):
    with EnergyMeter(device, min_seconds=0.2, interval=0.002) as meter:
        time.sleep(seconds)
    return meter.reading


def test_energy_from_the_counter(card):
    fake = card(mig=None)
    found = read(device="cuda:1")
    assert found.watts == pytest.approx(100, rel=0.2)
    assert found.joules == pytest.approx(found.watts * found.seconds) and found.seconds >= 0.4
    assert fake.asked == ["GPU-two"] and fake.open == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"counter": False}, "does not count its energy: Not Supported"),
        ({"uuids": ()}, "NVML does not find cuda: Not Found"),
        ({"mig": 1}, "MIG"),
        ({"watts": 0.0}, "did not move"),
        ({"dies_after": 0.1}, "the sensor failed: GPU is lost"),
    ],
)
def test_a_sensor_that_does_not_work_gives_no_number(card, options, says):
    fake = card(**options)
    found = read()
    assert found.watts is None and found.joules is None
    assert says in found.reason and fake.open == 0


def test_a_short_window_gives_no_number(card):
    card()
    found = read(0.05)
    assert found.watts is None and "below 0.2 s" in found.reason


def test_an_error_in_the_block_is_not_swallowed(card):
    fake = card()
    with pytest.raises(KeyError), EnergyMeter("cuda"):
        raise KeyError("mine")
    assert fake.open == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be a sensor")
def test_without_a_sensor_nothing_is_invented():
    start = time.perf_counter()
    found = energy_per_image(nn.Flatten(), torch.zeros(2, 3, 4, 4))
    assert (found.watts, found.joules_per_image, found.idle_watts) == (None, None, None)
    assert "cpu" in found.reason and time.perf_counter() - start < 1
    with EnergyMeter("cuda") as meter:
        pass
    assert meter.reading.watts is None and "NVML" in meter.reading.reason


def test_energy_of_an_image(card, monkeypatch):
    card(watts=50.0)
    quick = functools.partial(EnergyMeter, min_seconds=0.2, interval=0.002)
    monkeypatch.setattr(meters, "EnergyMeter", quick)
    monkeypatch.setattr(meters, "_synchronize", lambda device: None)
    monkeypatch.setattr(meters, "latency", lambda *_, **__: meters.Timing(0.01, 0.01, 0.01, 1))
    clock = []

    def work(images):
        time.sleep(0.01)
        clock.append(time.perf_counter())

    found = energy_per_image(work, torch.zeros(4, 3), device="cuda", seconds=0.5, idle_seconds=0.3)
    assert found.watts == pytest.approx(50, rel=0.2) and found.idle_watts == pytest.approx(50, rel=0.25)
    runs = found.images // 4  # the last ones were measured; a busy machine stretches them
    elapsed = clock[-1] - clock[-runs] + 0.01
    assert found.joules_per_image == pytest.approx(50 * elapsed / found.images, rel=0.25)
    assert found.images % 4 == 0


@pytest.mark.gpu
def test_power_on_the_gpu():
    matrix = torch.zeros(4096, 4096, device="cuda")
    found = energy_per_image(lambda x: x @ x, matrix, seconds=2.5)
    if found.reason:
        pytest.skip(f"this machine shows no power: {found.reason}")
    assert found.watts > 20
    assert found.joules_per_image == pytest.approx(found.watts * 2.5 / found.images, rel=0.1)
