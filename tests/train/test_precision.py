"""Precision of training on a CPU: what the flags and the clock say, attention written out, a choice that is kept."""

import copy
import dataclasses

import pytest
import torch
from train_cases import CONFIG, RECIPE, same, trained

from vitlab.models.attention import attend
from vitlab.models.vit import ViT
from vitlab.train import loop as train
from vitlab.train import precision

AUTO = dataclasses.replace(RECIPE, dtype="auto")


def test_the_cpu_is_asked_by_its_flags(tmp_path):
    info = tmp_path / "cpuinfo"
    for text, expected in [
        ("processor : 0\nflags\t\t: fpu sse2 avx512f amx_bf16 amx_tile\n", True),
        ("processor : 0\nflags\t\t: fpu avx512_bf16\n", True),
        ("processor : 0\nFeatures\t: fp asimd bf16\n", True),
        ("processor : 0\nflags\t\t: fpu sse2 avx2 avx512f\nbugs : amx_bf16\n", False),
    ]:
        info.write_text(text)
        assert precision.has_bfloat16(info) == expected
    assert not precision.has_bfloat16(tmp_path / "none")


@pytest.mark.parametrize(("half", "chosen"), [(0.5, torch.bfloat16), (0.95, torch.float32), (2.0, torch.float32)])
def test_the_clearly_faster_precision_is_taken_and_said_once(monkeypatch, half, chosen):
    monkeypatch.setattr(precision, "_chosen", {})
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "step_seconds", lambda *_, **__: {torch.float32: 1.0, torch.bfloat16: half})
    lines = []
    assert precision.faster_dtype(ViT(CONFIG), log=lines.append) == chosen
    assert f"training in {str(chosen)[6:]}" in lines[0] and f"{half * 1e3:,.0f} ms in bfloat16" in lines[0]
    monkeypatch.setattr(precision, "step_seconds", lambda *_, **__: pytest.fail("timed a second time"))
    assert precision.faster_dtype(ViT(CONFIG), log=lines.append) == chosen and len(lines) == 1


def test_short_steps_stay_in_float32(monkeypatch):
    monkeypatch.setattr(precision, "_chosen", {})
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "step_seconds", lambda *_, **__: {torch.float32: 0.005, torch.bfloat16: 0.001})
    assert precision.faster_dtype(ViT(CONFIG)) == torch.float32


def test_without_the_flag_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    monkeypatch.setattr(precision, "step_seconds", lambda *_, **__: pytest.fail("timed"))
    assert precision.faster_dtype(ViT(CONFIG)) == torch.float32


def test_timing_changes_neither_weights_nor_statistics_nor_random_numbers():
    model = ViT(dataclasses.replace(CONFIG, stem="conv", distilled=True)).eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    times = precision.step_seconds(model, (torch.float32, torch.bfloat16), batch=4, image_size=16)
    assert set(times) == {torch.float32, torch.bfloat16} and min(times.values()) > 0
    assert torch.equal(state, torch.get_rng_state()) and not model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_run_goes_on_in_the_precision_it_began_in(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "faster_dtype", lambda *_, **__: torch.bfloat16)
    whole, history = trained(data, AUTO)
    assert history.dtype == "bfloat16"
    other, _ = trained(data, dataclasses.replace(AUTO, dtype="float32"))
    assert not same(whole, other)

    def stop(epoch, *_):
        if epoch == 1:
            raise KeyboardInterrupt

    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        trained(data, AUTO, checkpoint=path, save_every=0, on_epoch=[stop])
    monkeypatch.setattr(train, "faster_dtype", lambda *_, **__: torch.float32)
    again, resumed = trained(data, AUTO, checkpoint=path)
    assert resumed.dtype == "bfloat16" and resumed.resumed == 1 and same(whole, again)


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"mask": True}])
@pytest.mark.parametrize("autocast", [False, True])
def test_attention_for_bfloat16_training_is_softmax_attention(options, autocast):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask = torch.randn(2, 1, 1, 5) if options.get("mask") else None
    scores = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) * options.get("scale", 8**-0.5)
    weights = torch.exp(scores if mask is None else scores + mask.double())
    expected = (weights / weights.sum(-1, keepdim=True)) @ v.double()
    if not autocast:
        q, k, v = (t.bfloat16() for t in (q, k, v))
    given = {"scale": options.get("scale"), "mask": mask if mask is None else mask.to(q.dtype)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trained = attend(q.requires_grad_(), k, v, **given)
        with torch.no_grad():
            fused = attend(q, k, v, **given)
    assert "Scaled" not in type(trained.grad_fn).__name__
    for found in (trained, fused):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, atol=0.03, rtol=0.03)
