"""`vitlab apply` on a folder of images: what it makes, what it says of it, and how it goes on when stopped."""

import os

import pytest
import torch
from PIL import Image

import vitlab
from vitlab import cli
from vitlab.metrics.statistics import paired_difference
from vitlab.models import checkpoint
from vitlab.models.vit import ViT, ViTConfig
from vitlab.run import apply, auto_tokens

CONFIG = ViTConfig(image_size=32, patch_size=8, dim=24, depth=2, heads=3, mlp_dim=48, num_classes=2)


@pytest.fixture
def given(tmp_path, monkeypatch):
    """The command's arguments for a small model and 2 x 20 images, and the file it writes."""
    monkeypatch.setenv("VITLAB_DATA", str(tmp_path / "cache"))
    for k, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(20):
            colour = (12 * i, 250 * k, 90)
            Image.new("RGB", (40, 32), colour).save(tmp_path / "pets" / name / f"{i}.png")
    torch.manual_seed(0)
    checkpoint.save(ViT(CONFIG), tmp_path / "model.safetensors")
    monkeypatch.setattr(apply, "SECONDS", 0.0)
    monkeypatch.setattr(apply, "WORTH", 0.0)  # on so small a model nothing is faster
    out = tmp_path / "small.safetensors"
    return ["apply", str(tmp_path / "model.safetensors"), "--data", f"folder:{tmp_path / 'pets'}", "--out", str(out),
            "--device", "cpu", "--batch", "1,4"], out  # fmt: skip


def test_it_makes_a_smaller_model_and_says_whether_that_paid(given, capsys):
    command, out = given
    command += ["--prune", "0.4", "--fine-tune", "2"]
    assert cli.main([*command, "--reduce-tokens", "r_max=.5,action=size-priced", "--distill", "--lr", "1e-3"]) == 0
    said = capsys.readouterr().out
    head = next(line for line in said.splitlines() if "uncut, fine-tuned   " in line)
    assert head.split("  ")[-1].strip() == "after" and "pooled last block alone" in head
    for words in ("accuracy, %", "change, points", "ms at batch 4", "At batch 1 it", "At batch 4 it", "left 0m00s"):
        assert words in said
    small = vitlab.load(out)
    assert small.config.tokens.action == "size-priced" and small.config.base.macs() <= 0.6 * CONFIG.macs()
    about = checkpoint.read(out).about
    assert about["recipe"]["lr"] == 1e-3 and about["recipe"]["epochs"] == 2
    assert not out.with_name(f"{out.name}.work").exists()
    assert cli.main(command) == 2 and "exists" in capsys.readouterr().err


def test_accuracies_that_say_little_are_said_to():
    right = torch.arange(400) < 300
    rows = {apply.BEFORE: {"right": right, "chance": torch.tensor(0.1)}}

    def doubts():
        right = rows[apply.BEFORE]["right"]
        return apply.doubt(rows, paired_difference(right, right))

    assert doubts() == []
    rows[apply.BEFORE]["chance"] = torch.tensor(0.75)
    assert "75.0 % are right, about as many as by naming the commonest class" in doubts()[0]
    rows[apply.BEFORE] = {"right": right[270:310], "chance": torch.tensor(0.1)}
    # no pair differs: the interval is that of 1/2 each way in 42
    assert doubts() == ["40 test images tell a change to about 4.7 points only"]


def test_a_stopped_run_goes_on_where_it_was(given, monkeypatch, capsys):
    command, out = given
    command += ["--prune", "0.4", "--fine-tune", "1"]
    compare = apply.compare

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(apply, "compare", stopped)
    assert cli.main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err and not out.exists()
    assert cli.main([*command, "--lr", "1e-3"]) == 2
    assert "is a run that was stopped, with other options (recipe" in capsys.readouterr().err
    monkeypatch.setattr(apply, "compare", compare)
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "epoch 1/1" not in said and "pruning" not in said, "what was done is not done again"
    assert vitlab.load(out).config.macs() <= 0.6 * CONFIG.macs()


@pytest.mark.parametrize("gain", [0.0, 9.0])
def test_auto_takes_tokens_away_only_where_that_is_faster(given, gain, monkeypatch, capsys):
    command, out = given
    monkeypatch.setattr(apply, "WORTH", gain)
    monkeypatch.setattr(auto_tokens, "PASSES", (1, 3))
    monkeypatch.setattr(auto_tokens, "TokenLatency", lambda *_, **__: lambda counts: float(sum(counts)))
    assert cli.main([*command, "--reduce-tokens", "auto,action=drop"]) == 0
    said, kind = capsys.readouterr().out, vitlab.load(out).config.kind
    assert (kind, "all stay" in said) == (("vit", True) if gain else ("reduced", False))


def test_timms_models_and_those_of_other_kinds(given, tmp_path, capsys):
    pytest.importorskip("timm")
    command, _ = given
    command[1] = "timm:vit_tiny_patch16_224"
    assert cli.main([*command, "--prune", "0.5"]) == 2
    assert "has no head for these 2 classes yet: give --fine-tune 5" in capsys.readouterr().err
    command[1] = "timm:vit_tiny_patch16_225"
    assert cli.main([*command, "--prune", "0.5"]) == 2 and "vit_tiny_patch16_224" in capsys.readouterr().err
    command[1] = str(tmp_path / "resnet.safetensors")
    checkpoint.save(checkpoint.config_class("resnet")(num_classes=2).build(), command[1])
    assert cli.main([*command, "--prune", "0.5"]) == 2
    assert "a ResNet is neither vitlab's ViT nor a timm VisionTransformer" in capsys.readouterr().err
    options = apply.token_options("r_max=.6, alpha=1.5,action=size-priced,pooled_last=true")
    assert options == (False, {"r_max": 0.6, "alpha": 1.5, "action": "size-priced", "pooled_last": True})


def test_a_second_run_on_the_same_output_is_refused_by_name(tmp_path):
    out = tmp_path / "small.safetensors"
    with apply.work_on(out, {"prune": 0.5}) as work:
        with pytest.raises(TimeoutError, match=f"still held by .*process {os.getpid()}"), apply.work_on(out, {}):
            pass
        assert (work.folder / "options.json").exists(), "the first one's folder stays"
    assert not work.folder.exists()
