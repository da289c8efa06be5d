"""Every command reads every kind of checkpoint, or says by name why it cannot use it; what is exported is equal."""

import json

import pytest
import torch

import vitlab
from vitlab import cli
from vitlab.compress.pruning.gates import GatedViT
from vitlab.models import checkpoint
from vitlab.models.vit import ViT, ViTConfig
from vitlab.study import plots

pytestmark = pytest.mark.long

SMALL = {"image_size": 32, "patch_size": 16, "dim": 16, "depth": 2, "heads": 2, "num_classes": 10}
TIMM = {"name": "vit_tiny_patch16_224", "num_classes": 10, "options": {"img_size": 32, "depth": 1, "embed_dim": 24}}
BATCHES = [(torch.randn(4, 3, 32, 32), torch.arange(4))]


def dense(**options):
    torch.manual_seed(0)
    return ViT(ViTConfig(**SMALL | options)).eval()


MAKE = {
    "vit": dense,
    "ripple": lambda: dense(attention="ripple"),
    "slim": lambda: vitlab.prune(dense(), BATCHES, ratio=0.5, multiple=1, uniform=False),
    "reduced": lambda: vitlab.reduce_tokens(dense(), r_max=0.5, action="size-priced", pooled_last=True),
    "slim and reduced": lambda: vitlab.reduce_tokens(MAKE["slim"](), r_max=0.5),
    "gated": lambda: GatedViT(dense()),
    "sparse": lambda: dense(attention="topk", attention_args={"k": 0.5}),
    "linear": lambda: dense(attention="linear"),
    "favit": lambda: checkpoint.config_class("favit")(
        image_size=32, stem=(3, 2), dims=(32, 64), depths=(1, 1), heads=(1, 2), mlp_ratios=(2, 2), reductions=(4, 2),
        window=4, samples=8).build(),
    "resnet": lambda: checkpoint.config_class("resnet")(widths=(4, 8), residual=(1,), num_classes=10).build(),
    "timm": lambda: checkpoint.from_dict({"kind": "timm", **TIMM}).build(),
}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)


@pytest.fixture
def files(tmp_path):
    def write(kind):
        path = tmp_path / f"{kind}.safetensors"
        checkpoint.save(MAKE[kind](), path, {"dataset": "tiny"})
        return str(path)

    return write


@pytest.mark.parametrize("kind", MAKE)
def test_every_command_reads_every_checkpoint(kind, files, tmp_path, capsys, monkeypatch):
    path, out = files(kind), tmp_path / "out"
    monkeypatch.setattr(plots, "save", lambda figure, path: figure)  # test_commands.py looks at the figure
    assert cli.main(["evaluate", "--checkpoint", path, "--out", str(out), "--device", "cpu"]) == 0
    fast = ["--seconds", "0.001", "--device", "cpu", "--batch-size", "2"]
    assert cli.main(["measure", "--checkpoint", path, "--out", str(out / "row.json"), *fast]) == 0
    found = json.loads((out / "row.json").read_text())
    assert found["params"] == sum(p.numel() for p in checkpoint.load(path).parameters())
    assert cli.main(["export", path, "--pt2", "--seconds", "0.001", "--batch", "1,3"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert f"{kind}.pt2: " in said and "batch 3" in said
    again = torch.export.load(tmp_path / f"{kind}.pt2").module()
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(again(images), checkpoint.load(path)(images), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["vit", "slim", "reduced"])
def test_onnx_is_equal_at_every_batch(kind, files, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from vitlab.run import export

    path = files(kind)
    assert cli.main(["export", path, "--onnx", "--out", str(tmp_path / "new"), "--seconds", "0.001"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("onnxruntime", "torch, eager", "torch, compiled", "batch 16"))
    run, model = export.onnx_session(tmp_path / "new" / f"{kind}.onnx"), checkpoint.load(path)
    assert export.difference(model, run, (3, 32, 32), (1, 2, 7)) < 1e-4


def test_what_is_missing_for_onnx_is_named(files, capsys, monkeypatch):
    from vitlab.run import export

    monkeypatch.setattr(export, "NEEDED", ("onnx", "no_such_package"))
    assert cli.main(["export", files("vit"), "--onnx"]) == 2
    assert "ONNX needs no_such_package: pip install no_such_package" in capsys.readouterr().err
