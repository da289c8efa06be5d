"""Dress rehearsal for CUDA: forwards on tensors that say they are on a GPU but hold nothing (torch's FakeTensorMode).

They need no driver. What mixes devices fails, and so does what asks the device for a number or for a shape that hangs
on the data (.item(), nonzero, boolean masks): it would wait for the GPU, and could not be captured in a CUDA graph.

What cannot be rehearsed this way: the backward pass, fused optimisers, autocast (off without a driver); compiled models
and Triton's kernels (tests/models has the interpreter and a compilation ahead of time); real generators (a stand-in
whose draws come from nowhere); CUDA's clocks, memory counters and NVML (stand-ins here, NVML's in tests/metrics);
`accuracy` and all else that ends in numbers of the host; cutting, which reads masks there; building a model, whose
initial draws look at numbers: models are built on the CPU and moved. AdaptiveViT asks once a batch for the sizes of its
groups, as its docstring says.
"""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

import vitlab
from vitlab.compress.distill import Distill
from vitlab.compress.pruning.gates import GatedViT
from vitlab.compress.sparsify import HeadPenalty, allocate, best_heads, importance, silenced
from vitlab.compress.tokens.controller import AdaptiveViT
from vitlab.compress.tokens.merge import ACTIONS
from vitlab.compress.tokens.reduction import TokenConfig
from vitlab.compress.tokens.scores import SCORES, SIGNED
from vitlab.data.augment import Augment, mix, normalize
from vitlab.data.datasets import Split, batches
from vitlab.metrics import meters
from vitlab.models.attention import ATTENTIONS, PROVIDERS
from vitlab.models.favit import FaViTConfig
from vitlab.models.layers import STEMS
from vitlab.models.resnet import ResNetConfig
from vitlab.models.timm import TimmConfig
from vitlab.train.loop import Batch, cross_entropy
from vitlab.utils.device import running

SMALL = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 3, "heads": 2}
OURS = {"stem": "conv", "mlp": "conv", "pool": "mean"}


class Draws(TorchFunctionMode):
    """Random draws without a generator: a real one of the GPU cannot be made here."""

    device = torch.device("cuda")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kept = {k: None if v is self else v for k, v in (kwargs or {}).items()}
        return function(*(a for a in args if a is not self), **kept)


@pytest.fixture
def cuda():
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def moved(model):
    """`model` with tensors on a GPU in place of its parameters and buffers; what it keeps elsewhere stays behind."""
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(tensor, device="cuda"), tensor.requires_grad)
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = torch.empty_like(tensor, device="cuda")
    return model.eval()


def vit(**options):
    return vitlab.ViTConfig(**SMALL | options).build()


def slim(**options):
    return vitlab.prune(vit(**options), criterion="magnitude", ratio=0.5)


def gated(**options):
    return GatedViT(vit(**options))


def sparse(*, k=4, gate="l1", block=1, score="learned", **options):
    arguments = {"k": k, "gate": gate, "block": block, "score": score}
    return vit(attention="topk", attention_args=arguments, **options)


class Mixes(nn.Module):
    def forward(self, images):
        return images + torch.ones(8).to(torch.float32)


class Asks(nn.Module):
    def forward(self, images):
        return images * images.mean().item()


class Selects(nn.Module):
    def forward(self, images):
        return images[images > 0]


@pytest.mark.parametrize("wrong, error", [(Mixes, RuntimeError), (Asks, DataDependentOutputException),
                                          (Selects, DynamicOutputShapeException)])  # fmt: skip
def test_a_rehearsal_sees_what_goes_wrong(wrong, error, cuda):
    with pytest.raises(error):
        wrong()(torch.empty(4, 8, device="cuda"))


KINDS = {
    **{f"attention {name}": lambda name=name: vit(attention=name) for name in {**ATTENTIONS, **PROVIDERS}},
    **{f"stem {name}": lambda name=name: vit(stem=name) for name in STEMS},
    "top-k": lambda: sparse(), "top-k of blocks": lambda: sparse(pool="mean", k=8, block=4, gate="hard-concrete"),
    "distilled": lambda: vit(distilled=True), "conv": lambda: vit(**OURS), "head": lambda: vit(head_hidden=16),
    "registers": lambda: vit(registers=2),
    "slim": slim, "slim conv": lambda: slim(**OURS), "gated": gated, "gated conv": lambda: gated(**OURS),
    "reduced": lambda: vitlab.reduce_tokens(vit(), r_max=0.5),
    "resnet": lambda: ResNetConfig().build(),
    "favit": lambda: FaViTConfig(image_size=32, stem=(3, 2), dims=(16, 32, 64), depths=(1, 1, 1), heads=(1, 2, 4),
                                 mlp_ratios=(4, 4, 4), reductions=(2, 1, 1), window=4).build(),
    "timm": lambda: TimmConfig(name="vit_tiny_patch16_224", options={"img_size": 32, "depth": 1}).build(),
    "from timm": lambda: vitlab.from_timm(
        TimmConfig(name="vit_tiny_patch16_224", options={"img_size": 32, "depth": 1}).build()),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model(name):
    model = KINDS[name]()
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved(model)
        with running([model], "cuda"):
            out = model(torch.empty(4, 3, 32, 32, device="cuda"))
        with torch.no_grad():
            trained = model.train()(torch.empty(4, 3, 32, 32, device="cuda"))
    for found in (out, *(trained if isinstance(trained, tuple) else (trained,))):
        assert found.device.type == "cuda" and found.shape[0] == 4


def test_every_registered_kind_is_rehearsed():
    assert {KINDS[name]().config.kind for name in KINDS} == set(vitlab.KINDS)


REDUCED = [(action, score) for action in ACTIONS for score in (SCORES if action == "drop" else ("cls", "received"))
           if not (action == "fuse" and score in SIGNED)]  # fmt: skip


@pytest.mark.parametrize("base", [{}, OURS, {"distilled": True}], ids=["plain", "conv", "distilled"])
@pytest.mark.parametrize("action, score", REDUCED)
def test_every_way_to_reduce_tokens(action, score, base):
    makes = [vit, slim] if score == "cls" else [vit]
    models = [vitlab.reduce_tokens(make(**base), r_max=0.5, action=action, score=score) for make in makes]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for model in models:
            assert moved(model)(torch.empty(4, 3, 32, 32, device="cuda")).device.type == "cuda"


def test_a_model_that_chooses_by_image_asks_for_the_sizes_of_its_groups_and_nothing_else(cuda, monkeypatch):
    levels = [TokenConfig(r_max=r, protect=(0,)) for r in (0.2, 0.5)]
    with contextlib.ExitStack() as real:
        real.enter_context(torch._subclasses.fake_tensor.unset_fake_temporarily())
        model = AdaptiveViT(vitlab.reduce_tokens(vit(), r_max=0.5), levels, (0.5,))
    moved(model)
    images = torch.empty(4, 3, 32, 32, device="cuda")
    with torch.no_grad():
        assert model.level(images)[0].device.type == "cuda"
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)) as asked:
            model(images)
    assert "bincount" in "".join(str(entry.statement) for entry in asked.traceback)


def test_keys_are_shared_out_on_the_host():
    model = vit()
    # what stops it is not that two devices meet
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException) as asked:
        allocate(moved(model), torch.empty(4, 3, 32, 32, device="cuda"), 20)
    assert "tolist" in "".join(str(entry.statement) for entry in asked.traceback)


@pytest.mark.parametrize("gate", ["l1", "hard-concrete"])
def test_heads_are_told_apart_on_the_host_and_silenced_on_the_device(gate):
    model = sparse(gate=gate)
    kept = [torch.tensor([True, False])] * len(model.blocks)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        moved(model)
        assert {g.device.type for g in [*importance(model), *best_heads(model, count=3)]} == {"cpu"}
        images, labels = torch.empty(4, 3, 32, 32, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
        assert silenced(model, kept)(images).device.type == "cuda"
        loss, _ = HeadPenalty(0.1)(model.train(), Batch(images, torch.empty(4, 10, device="cuda"), labels, 0))
        assert loss.device.type == "cuda"


if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_standard_gamma", "Meta"):  # torch 2.11 has none
    torch.library.impl("aten::_standard_gamma", "Meta")(lambda alpha, generator=None: torch.empty_like(alpha))


@pytest.mark.parametrize("names", [
    "", "crop(4)", "rrc", "flip", "trivial", "randaugment(2,9)", "jitter(0.4,0.4,0.4)", "erase(0.25)",
    "crop(4)+flip+trivial", "rrc+flip+randaugment(2,9)+jitter(0.4,0.4,0.4)+erase(0.25)",
])  # fmt: skip
def test_augmentation(names, cuda):
    images, draws = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="cuda"), Draws()
    mean = (0.5,) * 3
    with draws:
        found = Augment(names, mean=mean)(images, draws)
        found = normalize(found, mean, mean, size=24)
        labels = torch.zeros(8, dtype=torch.int64, device="cuda")
        mixed, targets = mix(found, labels, 10, draws, mixup=0.8, cutmix=1.0, smoothing=0.1)
    assert mixed.shape == (8, 3, 24, 24) and targets.shape == (8, 10)
    assert {t.device.type for t in (mixed, targets)} == {"cuda"}


def test_batches_and_objectives(cuda):
    images, labels = torch.empty(10, 3, 32, 32, device="cuda"), torch.zeros(10, dtype=torch.int64, device="cuda")
    found = list(batches(Split(images, labels), 4))
    assert [len(x) for x, _ in found] == [4, 4, 2] and found[0][0].device.type == "cuda"
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        model, distill = vit(), Distill(vit())
    moved(model), moved(distill.teacher)
    batch = Batch(images, torch.empty(10, 10, device="cuda"), labels, 0)
    with torch.no_grad():
        for objective in (cross_entropy, distill):
            loss, logs = objective(model, batch)
            assert loss.ndim == 0 and {v.device.type for v in (loss, *logs.values())} == {"cuda"}


class Event:
    """A stand-in for CUDA's: each run takes 2 ms."""

    def __init__(self, enable_timing=False):
        pass

    record = synchronize = lambda self, *_: None
    elapsed_time = lambda self, other: 2.0  # noqa: E731


def test_measures_paths_for_the_device(monkeypatch, cuda):
    said = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: said.append(name))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 1100)
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        model = vit()
    moved(model)
    images = torch.empty(4, 3, 32, 32, device="cuda")
    timing = meters.latency(model, images, seconds=0.01)
    assert timing.median_s == 0.002 and "synchronize" in said
    memory = meters.peak_memory(model, images)
    assert memory.activations == 1000 and "reset_peak_memory_stats" in said
