import dataclasses
import functools
import json
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

from vitlab.data.datasets import Split
from vitlab.metrics import measure, meters
from vitlab.metrics.measure import accuracy, macs, macs_by_module, peak_memory, ptflops_macs, score
from vitlab.metrics.meters import compare, energy_per_image, latency
from vitlab.metrics.power import EnergyMeter

PIXELS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}


def random_split(n, classes, size=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, size, size), generator=draw, dtype=torch.uint8)
    return Split(images, torch.randint(0, classes, (n,), generator=draw))


def linear_model(classes, size=8, scale=1.0):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * size * size, classes))
    with torch.no_grad():
        model[2].weight.mul_(scale)
    return model


def small_timm(name="vit_tiny_patch16_224", patch_size=4, **options):
    return timm.create_model(name, patch_size=patch_size, **options)


# ------------------------------------------------------------------------------------------ accuracy

def by_hand(outputs, labels, classes, bins=15):
    """Every figure of Accuracy, one image at a time, in NumPy."""
    top1 = top5 = loss = 0.0
    confusion = np.zeros((classes, classes), int)
    binned = [[] for _ in range(bins)]
    for row, label in zip(outputs.astype(np.float64), labels):
        chances = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        guess = int(row.argmax())
        top1 += guess == label
        top5 += label in np.argsort(-row)[:5]
        loss -= np.log(chances[label])
        confusion[label, guess] += 1
        which = next(m for m in range(bins) if m / bins < chances[guess] <= (m + 1) / bins or m == bins - 1)
        binned[which].append((guess == label, chances[guess]))
    n = len(labels)
    ece = sum(len(b) / n * abs(np.subtract(*np.mean(b, axis=0))) for b in binned if b)
    return 100 * top1 / n, 100 * top5 / n, loss / n, ece, confusion


@pytest.mark.parametrize("classes", [3, 5, 10])
def test_accuracy_equals_figures_worked_out_by_hand(classes):
    split, model = random_split(301, classes), linear_model(classes, scale=3.0).train()
    found = accuracy(model, split, **PIXELS, num_classes=classes, batch_size=64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in PIXELS.values())
    with torch.no_grad():
        outputs = model[2](((split.images / 255 - mean) / std).flatten(1)).numpy()
    top1, top5, loss, ece, confusion = by_hand(outputs, split.labels.numpy(), classes)
    assert found.top1 == pytest.approx(top1)
    assert found.top5 == (pytest.approx(top5) if classes >= 5 else None)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.ece == pytest.approx(ece, rel=1e-4)
    assert found.confusion == confusion.tolist()
    assert found.per_class == pytest.approx(tuple(100 * confusion.diagonal() / confusion.sum(1)))
    assert found.n == 301
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_ece_of_known_confidences():
    # two images at 0.9 (one right), two at 0.6 (both right): 1/2 |0.5 - 0.9| + 1/2 |1 - 0.6| = 0.4
    outputs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]).log()
    found = score(outputs, torch.tensor([0, 1, 0, 0]), 2)
    assert found.ece == pytest.approx(0.4)
    assert found.top1 == 75
    assert found.confusion == [[3, 0], [1, 0]]
    assert found.per_class == (100.0, 0.0)


def test_a_class_without_images_has_no_accuracy():
    assert score(torch.eye(3), torch.tensor([0, 1, 1]), 3).per_class == (100.0, 50.0, None)


def test_accuracy_puts_back_every_modules_mode_and_leaves_no_trace():
    model = linear_model(4).train()
    model[2].eval()
    accuracy(model, random_split(20, 4), **PIXELS, num_classes=4)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert all(p.grad is None for p in model.parameters())


def test_accuracy_of_a_distilled_model_that_gives_a_pair_in_training():
    model = small_timm("deit_tiny_distilled_patch16_224", img_size=16, patch_size=8, num_classes=7, depth=1)
    model.set_distilled_training(True)
    model.train()
    found = accuracy(model, random_split(9, 7, size=16), **PIXELS, num_classes=7)
    assert found.n == 9 and model.training


def test_accuracy_resizes():
    model = linear_model(3, size=12)
    split = random_split(10, 3)
    with pytest.raises(RuntimeError):
        accuracy(model, split, **PIXELS, num_classes=3)
    assert accuracy(model, split, **PIXELS, num_classes=3, size=12).n == 10


@pytest.mark.parametrize(
    ("outputs", "labels", "says"),
    [
        (torch.zeros(2, 4), [0, 1], "gives \\(2, 4\\) for 2 images of 3 classes"),
        (torch.tensor([[0, float("nan"), 1]] * 2), [0, 1], "not finite for 2 of 2"),
        (torch.zeros(2, 3), [0, 3], "from 0 to 3"),
    ],
)
def test_bad_outputs_are_refused(outputs, labels, says):
    with pytest.raises(ValueError, match=says):
        score(outputs, torch.tensor(labels), 3)


# -------------------------------------------------------------------------------------------- counts

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight
        self.c = nn.Linear(8, 3).requires_grad_(False)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def test_parameters_and_size_count_shared_tensors_once(tmp_path):
    model = Tied()
    assert measure.parameters(model) == 64 + 27
    assert measure.parameters(model, trainable_only=True) == 64
    safetensors.torch.save_model(model, tmp_path / "whole.safetensors")
    size = (tmp_path / "whole.safetensors").stat().st_size
    assert abs(measure.size_bytes(model) - size) <= 32  # save_model notes the second name
    assert measure.size_bytes(model) == measure.size_bytes(Tied().bfloat16())


def vit_macs(tokens, dim, depth, mlp, heads_out, stem):
    """qkv 3 N D^2, scores N^2 D, values N^2 D, proj N D^2, MLP 2 N D H; head on one token."""
    block = 3 * tokens * dim**2 + 2 * tokens**2 * dim + tokens * dim**2 + 2 * tokens * dim * mlp
    return stem + depth * block + dim * heads_out


class Plain(nn.Module):
    """A transformer block's attention, by hand or fused."""

    def __init__(self, fused):
        super().__init__()
        self.fused, self.qkv, self.proj = fused, nn.Linear(96, 288), nn.Linear(96, 96)

    def forward(self, images):
        x = images.flatten(2).transpose(1, 2).repeat(1, 1, 32)  # B 64 96
        q, k, v = self.qkv(x).view(-1, 64, 3, 4, 24).permute(2, 0, 3, 1, 4)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q @ k.transpose(-2, -1) * 24**-0.5).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [False, True])
def test_macs_of_attention_however_written(fused):
    assert macs(Plain(fused), (3, 8, 8)) == 64 * 96 * 288 + 2 * 64 * 64 * 96 + 64 * 96 * 96


def test_macs_of_timms_vit_and_of_torchvisions_with_its_opaque_fast_path():
    from torchvision.models import VisionTransformer

    expected = vit_macs(65, 96, 3, 384, 10, stem=64 * 3 * 4 * 4 * 96)
    model = small_timm(img_size=32, embed_dim=96, depth=3, num_classes=10)
    assert model.blocks[0].attn.fused_attn
    model.train()
    assert macs(model, (3, 32, 32)) == pytest.approx(expected, rel=1e-3)
    assert model.training
    theirs = VisionTransformer(32, 4, 3, 3, 96, 384, num_classes=10)
    assert macs(theirs, (3, 32, 32)) == pytest.approx(expected, rel=1e-3)


def test_macs_of_our_vit_with_a_conv_stem():
    from vitlab.models.vit import ViT, ViTConfig

    model = ViT(ViTConfig(image_size=32, patch_size=4, dim=48, depth=2, heads=3, mlp_dim=96, num_classes=10))
    assert macs(model, (3, 32, 32)) == vit_macs(model.config.tokens, 48, 2, 96, 10, stem=64 * 48 * 48)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.Conv2d(16, 32, 3, 1, 1, groups=4, bias=False),
        nn.Conv2d(32, 32, 5, 1, 2, groups=32, bias=False), nn.Conv2d(32, 8, 1, bias=False),
    )  # fmt: skip


def test_macs_of_convolutions_equal_the_formula_and_ptflops():
    pixels = 16 * 16
    layers = [pixels * 27 * 16, pixels * 4 * 9 * 32, pixels * 25 * 32, pixels * 32 * 8]
    found = macs_by_module(conv_net(), (3, 32, 32))
    assert found == {"": sum(layers), **{str(i): layer for i, layer in enumerate(layers)}}
    assert ptflops_macs(conv_net(), (3, 32, 32)) == (sum(layers), "")


def test_macs_of_a_known_conv_net_agree_with_ptflops():
    model = timm.create_model("resnet18", num_classes=10)
    theirs, _ = ptflops_macs(model, (3, 64, 64))  # it adds norms and activations to the products
    assert macs(model, (3, 64, 64)) == pytest.approx(theirs, rel=0.015)


def test_macs_by_module_add_up():
    model = small_timm(img_size=16, embed_dim=48, depth=2, num_classes=5)
    found = macs_by_module(model, (3, 16, 16))
    blocks = [found[f"blocks.{i}"] for i in range(2)]
    assert found["blocks"] == sum(blocks)
    assert found[""] == found["blocks"] + found["patch_embed"] + found["head"]
    linears = sum(found[f"blocks.0.attn.{part}"] for part in ("qkv", "proj"))
    assert found["blocks.0.attn"] == linears + 2 * 17 * 17 * 48  # the products belong to no layer


def test_macs_of_products_that_torch_counts_as_nothing():
    class Products(nn.Module):
        def forward(self, x):
            matrix, vector = x[0, 0], x[0, 0, 0]  # 6 6, 6
            torch.addmv(vector, matrix, vector)
            torch.addbmm(matrix, x[0], x[0])
            return matrix @ vector, vector @ vector

    assert macs(Products(), (3, 6, 6)) == 36 + 3 * 216 + 36 + 6


@pytest.fixture(scope="module")
def custom():
    @torch.library.custom_op("vitlab_test::pairs", mutates_args=())
    def pairs(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bchw,bcvw->bhv", x, x)

    return torch.ops.vitlab_test.pairs


def test_macs_of_a_custom_operation_need_its_formula(custom):
    class Pairs(nn.Module):
        def forward(self, x):
            return custom(x)

    with pytest.warns(UserWarning, match="vitlab_test.pairs"):
        assert macs(Pairs(), (3, 4, 5)) == 0
    register_flop_formula(custom)(lambda shape, *, out_shape=None, **_: 2 * 3 * 4 * 4 * 5)
    try:
        assert macs(Pairs(), (3, 4, 5)) == 3 * 4 * 4 * 5
    finally:
        del flop_registry[custom]


def test_macs_look_inside_a_compiled_model():
    model = conv_net()
    assert macs(torch.compile(model, backend="eager"), (3, 8, 8)) == macs(model, (3, 8, 8))
    model.compile(backend="eager")
    assert macs(model, (3, 8, 8)) == macs(conv_net(), (3, 8, 8))


def test_ptflops_leaves_the_model_alone_and_fails_quietly(capfd):
    model = conv_net().train()
    before, linear = dict(vars(model)), F.linear
    assert ptflops_macs(model, (3, 8, 8))[0] > 0
    found, why = ptflops_macs(model, (1, 8, 8))
    assert found is None and "expected input" in why
    assert vars(model) == before and model.training and F.linear is linear
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------- time

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

    found = measure.throughput(Wait(), (3, 2, 2), 8, seconds=0.05)
    assert 200 < found <= 1000


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(ValueError, match="device"):
        latency(lambda: None)
    with pytest.raises(ValueError, match="not meta"):
        latency(lambda x: x, torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match="min_runs"):
        latency(lambda: None, device="cpu", min_runs=0)


# -------------------------------------------------------------------------------------------- memory

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


# --------------------------------------------------------------------------------------------- power

class Nvml(types.ModuleType):
    """A card that draws `watts`; its counter steps every 20 ms."""

    class NVMLError(Exception):
        pass

    def __init__(
        self, watts=100.0, counter=True, gauge=True, uuids=("GPU-one", "GPU-two"), mig=0, dies_after=1e9
    ):  # fmt: skip
        super().__init__("pynvml")
        self.start, self.asked, self.open = time.perf_counter(), [], 0
        self.watts, self.counter, self.gauge, self.uuids = watts, counter, gauge, uuids
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

    def nvmlDeviceGetHandleByPciBusId(self, address):
        self.asked.append(address)
        return address

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

    def nvmlDeviceGetPowerUsage(self, handle):
        if not self.gauge:
            raise self.NVMLError("Not Supported")
        # the reading lags: it shows the idle card at first
        return (self.watts if self.age() > 0.15 else 10.0) * 1000


@pytest.fixture
def card(monkeypatch):
    def plug(properties=None, **options):
        fake = Nvml(**options)
        found = properties or {0: "one", 1: "two"}
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties",
            lambda device: types.SimpleNamespace(
                uuid=found[device.index or 0], pci_bus_id=0x3B, pci_device_id=0, pci_domain_id=0
            ),
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
    assert found.source == "counter"
    assert found.watts == pytest.approx(100, rel=0.2)
    assert found.joules == pytest.approx(found.watts * found.seconds) and found.seconds >= 0.4
    assert fake.asked == ["GPU-two"] and fake.open == 0


def test_power_is_sampled_where_there_is_no_counter(card):
    card(counter=False)
    found = read()
    assert found.source == "sampling"
    assert found.watts == pytest.approx(100)  # without the lagging start


def test_a_card_is_found_by_its_address_where_its_uuid_is_unknown(card):
    fake = card(uuids=())
    assert read().watts is not None
    assert fake.asked == ["00000000:3B:00.0"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"counter": False, "gauge": False}, "neither energy nor power: Not Supported"),
        ({"mig": 1}, "MIG"),
        ({"watts": 0.0}, "did not move"),
        ({"dies_after": 0.1}, "the sensor failed: GPU is lost"),
    ],
)
def test_a_sensor_that_does_not_work_gives_no_number(card, options, says):
    fake = card(**options)
    found = read()
    assert found.watts is None and found.joules is None and found.source is None
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
    assert found.images % 4 == 0 and found.source == "counter"


# ------------------------------------------------------------------------------------------- the row

def test_the_row_has_every_column_and_says_what_was_not_measured():
    split = random_split(20, 10, size=16)
    data = types.SimpleNamespace(test=split, num_classes=10, **PIXELS)
    model = small_timm(img_size=16, embed_dim=48, depth=1, num_classes=10)
    row = measure.measure(model, data, batch=8, seconds=0.05, energy_seconds=0.1)
    assert list(row)[: len(measure.COLUMNS)] == list(measure.COLUMNS)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    found = accuracy(model, split, **PIXELS, num_classes=10)
    assert (row["accuracy_top1"], row["accuracy_top5"], row["n"]) == (found.top1, found.top5, 20)
    assert row["params"] == sum(p.numel() for p in model.parameters())
    assert row["macs"] == vit_macs(17, 48, 1, 192, 10, stem=16 * 48 * 48)
    assert row["size_mb"] == pytest.approx(row["params"] * 4e-6, rel=0.05)
    assert row["latency_ms_q25"] <= row["latency_ms"] <= row["latency_ms_q75"]
    assert row["peak_mb"] > row["activations_mb"] > 8 * 17 * 192 * 4e-6
    assert (row["dtype"], row["shape"], row["batch"]) == ("float32", [3, 16, 16], 8)
    if not torch.cuda.is_available():
        assert set(row["not_measured"]) == {"power_w", "idle_power_w", "mj_per_image"}
        assert measure.show(row["power_w"], "power_w", unit=True) == "not measured"
    known = measure.measure(model, shape=(3, 16, 16), scores=found, batch=2, seconds=0, dtype=torch.bfloat16)
    assert (known["accuracy_top1"], known["dtype"]) == (found.top1, "bfloat16")
    with pytest.raises(ValueError, match="shape"):
        measure.measure(model)


def test_show():
    assert measure.show(9_750_000, "params") == "9.75"
    assert measure.show(9_750_000, "params", unit=True) == "9.75 M"
    assert measure.show(1234.56, "images_per_s", unit=True) == "1,234.6 images/s"
    assert measure.show(0.0123, "ece", unit=True) == "1.23 %"
    assert measure.show(None, "params", unit=True) == "not measured"
    with pytest.raises(ValueError, match="accuracy_top1"):
        measure.show(1, "accuracy")


def test_device_name_tells_the_processor_and_threads():
    threads = torch.get_num_threads()
    assert measure.device_name("cpu").endswith(f", {threads} thread{'' if threads == 1 else 's'}")
    assert len(measure.device_name("cpu").split(",")[0]) > 2


# ---------------------------------------------------------------------------------------------- CUDA

@pytest.mark.gpu
def test_memory_and_time_on_the_gpu():
    model = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 128)).cuda()
    images = torch.zeros(256, 1024, device="cuda")
    found = peak_memory(model, images)
    assert found.activations == pytest.approx(2 * 256 * 4096 * 4, rel=0.02)
    assert found.device_peak >= found.peak - 1024
    matrix = torch.zeros(8192, 8192, device="cuda", dtype=torch.bfloat16)
    large = latency(lambda x: x @ x, matrix, seconds=0.2).median_s
    assert 2 * 8192**3 / large < 2e15  # an unsynchronised clock would show launches only
    assert macs(model, (256, 1024)) == 256 * (1024 * 4096 + 4096 * 128)


@pytest.mark.gpu
def test_power_on_the_gpu():
    matrix = torch.zeros(4096, 4096, device="cuda")
    found = energy_per_image(lambda x: x @ x, matrix, seconds=2.5)
    if found.reason:
        pytest.skip(f"this machine shows no power: {found.reason}")
    assert found.watts > 20
    assert found.joules_per_image == pytest.approx(found.watts * 2.5 / found.images, rel=0.1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_program_keeps_the_memory_it_frees():
    """By the allocator's own account: free bytes it holds after four tensors of 31 MB came and went."""
    code = """
import ctypes, sys, torch
from vitlab.utils.device import hold_memory

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()

class Account(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]

if not hasattr(ctypes.CDLL(None), "mallinfo2"):
    sys.exit("no mallinfo2")
account = ctypes.CDLL(None).mallinfo2
account.restype = Account
if sys.argv[1] == "held":
    assert hold_memory()
before = account().fordblks
tensors = [torch.empty(31 * 2**20, dtype=torch.uint8) for _ in range(4)]
del tensors
print(account().fordblks - before)
"""
    kept = {}
    for how in ("held", "as it is"):
        run = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True)
        if "no mallinfo2" in run.stderr:
            pytest.skip("needs glibc >= 2.33")
        assert run.returncode == 0, run.stderr
        kept[how] = int(run.stdout)
    assert kept["held"] > 4 * 30 * 2**20
    assert kept["as it is"] < 2**20
