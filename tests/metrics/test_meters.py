"""Time and memory of code whose time and memory are known."""

import functools
import math
import time

import pytest
import torch
from torch import nn

from vitlab.metrics import measure, meters
from vitlab.metrics.measure import macs, peak_memory
from vitlab.metrics.meters import compare, latency

pytestmark = pytest.mark.alone


def test_latency_is_the_time_of_one_call():
    found = latency(lambda x: time.sleep(0.004), torch.zeros(1), warmup=1, seconds=0.05, min_runs=5)
    assert 0.004 <= found.q25_s <= found.median_s <= found.q75_s < 0.04
    assert found.n >= 5
    assert latency(lambda: None, device="cpu", seconds=0, min_runs=1).n == 1


def test_compare_takes_turns_and_warms_up():
    calls = []
    functions = {name: functools.partial(calls.append, name) for name in "abc"}
    found = compare(functions, device="cpu", warmup=2, seconds=0, min_runs=4)
    assert "".join(calls) == "aabbcc" + "abcbcacababc"
    assert list(found) == ["a", "b", "c"] and {t.n for t in found.values()} == {4}


def test_timing_runs_in_eval_and_inference_mode_under_autocast():
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            seen.append((self.training, torch.is_inference_mode_enabled(), y.dtype))
            return y

    model = Spy(4, 4).train()
    latency(model, torch.zeros(2, 4), dtype=torch.bfloat16, seconds=0, min_runs=1)
    assert set(seen) == {(False, True, torch.bfloat16)} and model.training
    assert latency(torch.compile(model, backend="eager"), torch.zeros(2, 4), seconds=0).n == 10


def test_throughput_counts_the_images():
    class Wait(nn.Module):
        def forward(self, x):
            time.sleep(0.001 * len(x))

    found = measure.measure(Wait(), shape=(3, 2, 2), batch=8, seconds=0.05)
    assert 200 < found["images_per_s"] <= 1000


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(ValueError, match="device"):
        latency(lambda: None)
    with pytest.raises(ValueError, match="not meta"):
        latency(lambda x: x, torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match="min_runs"):
        latency(lambda: None, device="cpu", min_runs=0)
    with pytest.raises(ValueError, match="seconds=nan"):
        latency(lambda: None, device="cpu", seconds=math.nan)
    with pytest.raises(ValueError, match="batch=0"):
        measure.measure(nn.Flatten(), shape=(3, 4, 4), batch=0)


def test_peak_memory_of_a_known_network():
    # widest moment: ReLU's input and output, 32 x 1000 floats each; the input is not an activation
    model = nn.Sequential(nn.Linear(100, 1000), nn.ReLU(), nn.Linear(1000, 50))
    found = peak_memory(model, torch.zeros(32, 100))
    assert found.activations == 2 * 32 * 1000 * 4
    assert found.weights == 4 * (100 * 1000 + 1000 + 1000 * 50 + 50)
    assert found.inputs == 32 * 100 * 4
    assert found.peak == found.activations + found.weights + found.inputs
    in_place = nn.Sequential(model[0], nn.ReLU(inplace=True), model[2])
    assert peak_memory(in_place, torch.zeros(32, 100)).activations == 32 * (1000 + 50) * 4


def test_peak_memory_grows_with_the_square_of_the_tokens():
    def attend(x):  # scores and their softmax live together beside nothing else
        return (x @ x.transpose(-2, -1)).softmax(-1)

    peaks = [peak_memory(attend, torch.zeros(1, n, 8)).activations for n in (64, 128)]
    assert peaks == [2 * 4 * 64**2, 2 * 4 * 128**2]


def test_releasing_older_memory_does_not_hide_a_peak():
    older = [torch.zeros(100_000) for _ in range(2)]

    def run(x):
        older.pop()
        return torch.ones(10_000)

    assert peak_memory(run, torch.zeros(10)).activations == 40_000
    events = [(1, 0xA, -500), (2, 0xB, 300), (3, 0xB, -300), (4, 0xC, 200), (5, 0xB, 150)]
    assert meters._peak(events) == 350


@pytest.mark.gpu
def test_memory_and_time_on_the_gpu():
    model = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 128)).cuda()
    images = torch.zeros(256, 1024, device="cuda")
    found = peak_memory(model, images)
    assert found.activations == pytest.approx(2 * 256 * 4096 * 4, rel=0.02)
    matrix = torch.zeros(8192, 8192, device="cuda", dtype=torch.bfloat16)
    large = latency(lambda x: x @ x, matrix, seconds=0.2).median_s
    assert 2 * 8192**3 / large < 2e15  # an unsynchronised clock would show launches only
    assert macs(model, (256, 1024)) == 256 * (1024 * 4096 + 4096 * 128)
