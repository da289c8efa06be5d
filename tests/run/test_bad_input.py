"""What a user gets wrong on the command line: exit code 2, a message with the value, the file, what is allowed."""

import math
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vitlab
from vitlab import cli
from vitlab.models import checkpoint
from vitlab.models.vit import ViTConfig

SMALL = ["--dataset", "tiny", "--dim", "16", "--depth", "1", "--heads", "1", "--patch-size", "16", "--device", "cpu"]
TRAIN = ["train", *SMALL, "--checkpoint", "{here}/new.safetensors"]
MEASURE = ["measure", "--checkpoint", "{here}/model.safetensors", "--device", "cpu"]
EVALUATE = ["evaluate", "--dataset", "tiny", "--device", "cpu", "--out", "{here}/out"]
APPLY = ["apply", "{here}/model.safetensors", "--data", "tiny", "--device", "cpu", "--out", "{here}/new.safetensors"]
RUN = ["run", "--preset", "tiny", "--only", "01"]

CASES = {
    "no such device": ([*TRAIN, "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    "lr diverges": ([*TRAIN, "--lr", "1e12", "--epochs", "2", "--warmup", "0"], "a lower lr (now 1e+12)"),
    "lr is text": ([*TRAIN, "--lr", "fast"], "--lr 'fast': float is needed"),
    "lr is negative": ([*TRAIN, "--lr", "-1"], "lr=-1.0: a finite number of at least 0"),
    "half an epoch": ([*TRAIN, "--epochs", "1.5"], "--epochs '1.5': int is needed"),
    "epochs are text": ([*TRAIN, "--epochs", "two"], "--epochs 'two': int is needed"),
    "a slip of the pen": ([*TRAIN, "--dimm", "3"], "unknown option --dimm: ViTConfig has dim"),
    "an option without value": ([*TRAIN, "--mlp-dim"], "--mlp-dim"),
    "optimizer": ([*TRAIN, "--optimizer", "lion"], "optimizer='lion': choose one of adamw"),
    "attention": ([*TRAIN, "--attention", "flash"], "flash"),
    "classes are the data's": ([*TRAIN, "--num-classes", "3"], "--num-classes 3"),
    "no such kind": ([*TRAIN, "--model", "lstm"], "kind='lstm': no such model; there are vit"),
    "a wrapper": (["train", "--model", "reduced", "--checkpoint", "{here}/new"], "--model reduced needs base"),
    "one class": ([*TRAIN, "--dataset", "folder:{here}/one"], "one has too few class folders (cat)"),
    "broken image": ([*TRAIN, "--dataset", "folder:{here}/broken"], "--skip-broken"),
    "no head": ([*EVALUATE, "--checkpoint", "{here}/headless.safetensors"], "headless.safetensors holds no model"),
    "no model": ([*EVALUATE, "--checkpoint", "{here}/text.safetensors"], "text.safetensors holds no model"),
    "other tensors": ([*EVALUATE, "--checkpoint", "{here}/plain.safetensors"], "its format is None"),
    "no file": ([*EVALUATE, "--checkpoint", "{here}/none"], "none is not there"),
    "classes differ": ([*EVALUATE, "--checkpoint", "{here}/model.safetensors"],
                       "model.safetensors has 3 classes, tiny has 10"),
    "out is a file": ([*EVALUATE[:-1], "{here}/text.safetensors", "--checkpoint", "{here}/model.safetensors"],
                      "text.safetensors is a file"),
    "out is a folder": ([*MEASURE, "--out", "{here}"], "is a folder"),
    "no image": ([*MEASURE, "--batch-size", "0"], "'0': a whole number of at least 1"),
    "no second": ([*MEASURE, "--seconds", "0"], "'0': a finite number above 0"),
    "nan seconds": ([*MEASURE, "--seconds", "nan"], "'nan': a finite number above 0"),
    "yaml": ([*RUN, "-p", "dataset=[a"], "-p dataset: '[a' is no YAML"),
    "unknown data": ([*RUN, "-p", "dataset=mnist"], "unknown data set 'mnist': allowed are cifar10"),
    "no such folder": ([*RUN, "-p", "dataset=folder:{here}/none"], "there is no folder"),
    "text for a number": ([*RUN, "-p", "seconds=soon"], "seconds = 'soon' is of type str"),
    "nothing to apply": (APPLY, "nothing to do: give --prune 0.5, --reduce-tokens auto"),
    "more than all": ([*APPLY, "--prune", "1.5"], "'1.5': a share between 0 and 1"),
    "no such field": ([*APPLY, "--reduce-tokens", "r_min=.5"], "'r_min=.5': 'auto' or NAME=VALUE is needed, of r_max"),
    "text for a share": ([*APPLY, "--reduce-tokens", "r_max=half"], "r_max='half': the share removed"),
    "more than all tokens": ([*APPLY, "--reduce-tokens", "r_max=1.5"], "r_max=1.5: the share removed"),
    "a folder for a model": (["evaluate", "--checkpoint", "{here}", "--out", "{here}/out"], "is a folder"),
    "no such action": ([*APPLY, "--reduce-tokens", "action=burn"], "action='burn': choose one of drop"),
    "auto and a number": ([*APPLY, "--reduce-tokens", "auto,r_max=.5"], "'auto' chooses how many tokens stay"),
    "no such batch": ([*APPLY, "--prune", "0.5", "--batch", "1,0"], "'0': a whole number of at least 1"),
    "a teacher without lessons": ([*APPLY, "--prune", "0.5", "--distill"], "--distill needs --fine-tune"),
    "a recipe's slip": ([*APPLY, "--prune", "0.5", "--lrr", "1"], "unknown option --lrr: Recipe has lr"),
    "apply to other classes": ([*APPLY, "--prune", "0.5"], "model.safetensors tells 3 classes apart, the data have 10"),
    "more than can go": (["apply", "{here}/ten.safetensors", *APPLY[2:-1], "{here}/less", "--prune", ".99"],
                         "--prune 0.99: at most 0."),
    "no place": (["apply", "{here}/ten.safetensors", *APPLY[2:-1], "{here}/plain.safetensors/x", "--prune", ".5"],
                 "plain.safetensors"),
    "nothing to export": (["export", "{here}/model.safetensors"], "nothing to do: give --onnx, --pt2"),
    "export nothing": (["export", "{here}/none", "--pt2"], "none is not there"),
    "no jobs": ([*RUN, "--jobs", "0"], "'0': a whole number of at least 1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a model of 3 classes, files that hold no model, and folders of images."""
    folder = tmp_path_factory.mktemp("files")
    config = ViTConfig(image_size=32, patch_size=16, dim=16, depth=1, heads=1, num_classes=3)
    checkpoint.save(config.build(), folder / "model.safetensors")
    checkpoint.save(VIT.build(), folder / "ten.safetensors")
    tensors = load_file(folder / "model.safetensors")
    headless = {k: v for k, v in tensors.items() if not k.startswith("head")}
    meta = {"format": checkpoint.FORMAT, "about": "{}",
            "config": checkpoint.json.dumps(checkpoint.to_dict(config))}  # fmt: skip
    save_file(headless, folder / "headless.safetensors", meta)
    save_file({"x": torch.zeros(1)}, folder / "plain.safetensors")
    (folder / "text.safetensors").write_text("no tensors")
    for name in ("one/cat", "broken/cat", "broken/dog"):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(folder / name / f"{i}.png")
    (folder / "broken/dog/0.png").write_bytes(b"no picture")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named_in_a_line(name, here, capsys):
    arguments, said = CASES[name]
    before = sorted(here.iterdir())
    try:
        code = cli.main([a.format(here=here) for a in arguments])
    except SystemExit as stop:  # argparse's own complaints
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and said in error, error
    assert "Traceback" not in error and len([line for line in error.splitlines() if "error" in line]) == 1
    left = {p.name for p in here.iterdir()} - {p.name for p in before}
    assert "new.safetensors" not in left


VIT = ViTConfig(image_size=32, patch_size=16, dim=16, depth=1, heads=1, num_classes=10)
MODEL, IMAGES = VIT.build(), torch.zeros(2, 3, 32, 32)
NAN = [(torch.full_like(IMAGES, math.nan), torch.arange(2))]

CALLS = {
    "lr": (lambda: vitlab.Recipe(lr="0.1"), "lr='0.1'"),
    "warmup": (lambda: vitlab.Recipe(warmup="1"), "warmup='1'"),
    "smoothing": (lambda: vitlab.Recipe(smoothing="0.1"), "smoothing='0.1'"),
    "ema": (lambda: vitlab.Recipe(ema="0.9"), "ema='0.9'"),
    "dropout": (lambda: vitlab.ViTConfig(dropout="0.1"), "dropout='0.1': a rate"),
    "r_max": (lambda: vitlab.reduce_tokens(MODEL, r_max="0.5"), "r_max='0.5': the share removed"),
    "alpha": (lambda: vitlab.reduce_tokens(MODEL, alpha="2"), "alpha='2': a finite number above 0"),
    "power": (lambda: vitlab.reduce_tokens(MODEL, power="2"), "power='2': a number of at least 0"),
    "counts": (lambda: vitlab.reduce_tokens(MODEL, counts="99"), "counts='99': numbers, one a block"),
    "protect": (lambda: vitlab.reduce_tokens(MODEL, protect=1), "protect=1: numbers, one a block"),
    "ratio": (lambda: vitlab.prune(MODEL, criterion="magnitude", ratio="0.5"), "ratio='0.5': the share of units"),
    "macs": (lambda: vitlab.prune(MODEL, criterion="magnitude", macs="half"), "macs='half': a finite number"),
    "no number of macs": (lambda: vitlab.prune(MODEL, criterion="magnitude", macs=math.nan), "macs=nan"),
    "macs above the model's": (lambda: vitlab.prune(MODEL, criterion="magnitude", macs=4e8), "the model has"),
    "images without labels": (lambda: vitlab.prune(MODEL, IMAGES, ratio=0.5), "needs data=[(images, labels), ...]"),
    "images of NaN": (lambda: vitlab.prune(MODEL, NAN, ratio=0.5), "are not finite"),
    "calibrate on NaN": (lambda: vitlab.calibrate(MODEL, NAN[0][0], macs=1e5), "2 of 2 images hold values"),
    "calibrate on bytes": (lambda: vitlab.calibrate(MODEL, IMAGES.byte(), macs=1e5), "give them normalised"),
    "calibrate to text": (lambda: vitlab.calibrate(MODEL, IMAGES, macs="1e5"), "macs='1e5': a finite number"),
    "temperature": (lambda: vitlab.distill(MODEL, temperature="4"), "temperature='4'"),
    "seconds": (lambda: vitlab.measure(MODEL, shape=(3, 32, 32), seconds="1"), "seconds='1': a time above 0"),
    "no images": (lambda: vitlab.measure(MODEL, shape=(3, 32, 32), batch=0), "batch=0: a whole number"),
    "data": (lambda: vitlab.load_data(3), "name=3: text is needed"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_bad_values_in_python_are_named(name):
    call, said = CALLS[name]
    with pytest.raises(ValueError, match=re.escape(said)):
        call()
