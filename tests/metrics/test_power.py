"""Power and energy on a card that is played, and the words where there is none."""

import time
import types

import pytest
import torch
from torch import nn

from vitlab.metrics import power
from vitlab.metrics.meters import Timing
from vitlab.metrics.power import energy_per_image

pytestmark = pytest.mark.alone


class Nvml(types.ModuleType):
    """A card that draws `watts`; its counter steps every 20 ms."""

    class NVMLError(Exception):
        pass

    def __init__(
        self, watts=100.0, counter=True, uuids=("GPU-one", "GPU-two"), mig=0, dies_after=1e9, starts=True
    ):  # fmt: skip
        super().__init__("pynvml")
        self.start, self.asked, self.open = time.perf_counter(), [], 0
        self.watts, self.counter, self.uuids = watts, counter, uuids
        self.mig, self.dies_after, self.starts = mig, dies_after, starts

    def nvmlInit(self):
        if not self.starts:
            raise self.NVMLError("Not Loaded")
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
        monkeypatch.setattr(power, "pynvml", fake)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties",
            lambda device: types.SimpleNamespace(uuid=found[device.index or 0]),
        )  # fmt: skip
        return fake

    return plug


@pytest.fixture
def read(monkeypatch):
    """Energy of sleeping for so many seconds, four images at a time."""
    monkeypatch.setattr(power, "WINDOW_S", 0.2)
    monkeypatch.setattr(power, "POLL_S", 0.002)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(power, "latency", lambda *_, **__: Timing(0.002, 0.002, 0.002, 1))

    def measured(seconds=0.4, device="cuda", idle_seconds=0.3, work=lambda images: time.sleep(0.002)):
        return energy_per_image(work, torch.zeros(4, 3), device=device, seconds=seconds, idle_seconds=idle_seconds)

    return measured


def test_energy_from_the_counter(card, read):
    fake = card(mig=None, watts=50.0)
    clock = []

    def work(images):
        time.sleep(0.002)
        clock.append(time.perf_counter())

    found = read(device="cuda:1", work=work)
    assert found.watts == pytest.approx(50, rel=0.2) and found.idle_watts == pytest.approx(50, rel=0.25)
    assert found.images == 4 * (len(clock) - 1) and found.reason == ""
    elapsed = clock[-1] - clock[0]
    assert found.joules_per_image == pytest.approx(50 * elapsed / found.images, rel=0.25)
    assert set(fake.asked) == {"GPU-two"} and fake.open == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"counter": False}, "NVML does not read cuda: Not Supported"),
        ({"uuids": ()}, "NVML does not read cuda: Not Found"),
        ({"starts": False}, "NVML does not start: Not Loaded"),
        ({"mig": 1}, "MIG"),
        ({"watts": 0.0}, "did not move"),
        ({"dies_after": 0.1}, "NVML does not read cuda: GPU is lost"),
    ],
)
def test_a_sensor_that_does_not_work_gives_no_number(card, read, options, says):
    fake = card(**options)
    found = read()
    assert (found.watts, found.joules_per_image, found.idle_watts) == (None, None, None)
    assert says in found.reason and fake.open == 0


def test_a_short_window_gives_no_number(card, read):
    card()
    found = read(seconds=0.05)
    assert found.watts is None and "below 0.2 s" in found.reason and found.idle_watts > 0
    assert "below 0.2 s" in read(idle_seconds=0.05).reason


def test_an_error_of_the_model_is_not_swallowed(card, read):
    fake = card()

    def work(images):
        raise KeyError("mine")

    with pytest.raises(KeyError):
        read(work=work)
    assert fake.open == 0


def test_without_a_sensor_nothing_is_invented():
    start = time.perf_counter()
    found = energy_per_image(nn.Flatten(), torch.zeros(2, 3, 4, 4))
    assert (found.watts, found.joules_per_image, found.idle_watts) == (None, None, None)
    assert "cpu" in found.reason and time.perf_counter() - start < 1


@pytest.mark.gpu
def test_power_on_the_gpu():
    matrix = torch.zeros(4096, 4096, device="cuda")
    found = energy_per_image(lambda x: x @ x, matrix, seconds=2.5)
    if found.reason:
        pytest.skip(f"this machine shows no power: {found.reason}")
    assert found.watts > 20
    assert found.joules_per_image == pytest.approx(found.watts * 2.5 / found.images, rel=0.1)
