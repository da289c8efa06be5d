"""What README tells a newcomer to type works, in order, in an empty folder."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

import vitlab
from vitlab import cli
from vitlab.data import datasets

README = (Path(__file__).parents[2] / "README.md").read_text()

# what takes hours, a download or the reader's own images, and what stands for it here
OFFLINE = {"cifar10": "tiny", "--epochs 20": "--epochs 1", "--fine-tune 5": "--fine-tune 1",
           "timm:deit_tiny_patch16_224,pretrained": "fewer.safetensors", "folder:/data/birds": "tiny"}  # fmt: skip


def snippets(language):
    found = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found
    return found


def test_snippets_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load, names = datasets.load, {}

    def less(*given, **options):  # the bundled images, but fewer, for time
        data = load(*given, **options)
        return dataclasses.replace(data, train=data.train.take(300), test=data.test.take(100))

    monkeypatch.setattr(datasets, "load", less)
    for code in snippets("python"):
        exec(code, names)
    assert "accuracy_top1" in capsys.readouterr().out
    again = vitlab.load("fewer.safetensors")
    assert again.macs() == names["fewer"].macs() < 0.5 * names["model"].config.macs()
    commands = [shlex.split(line, comments=True) for code in snippets("sh") for line in code.splitlines()]
    quick = {"train": ["--depth", "1", "--dim", "24", "--patch-size", "16", "--device", "cpu"],
             "measure": ["--batch-size", "8", "--seconds", "0.01"], "apply": ["--batch", "2", "--device", "cpu"],
             "export": ["--seconds", "0.01"]}  # fmt: skip
    monkeypatch.setattr("vitlab.run.apply.SECONDS", 0.01)
    monkeypatch.setattr("torch.compile", lambda model, **_: model)
    for _, name, *options in [c for c in commands if c[0] == "vitlab"]:
        given = " ".join(options)
        for there, here in OFFLINE.items():
            given = given.replace(there, here)
        assert cli.main([name, *given.split(), *quick.get(name, [])]) == 0


def test_options_that_readme_names_exist():
    known = vars(cli.parser().parse_args(["run"])) | vars(cli.parser().parse_args(["report"]))
    for option in re.findall(r"--[a-z][a-z-]+", README.split("## Your own model")[0]):
        assert option.strip("-").replace("-", "_") in {*known, "help"}


@pytest.mark.parametrize("name", vitlab.PUBLIC)
def test_the_public_face_is_there_and_documented(name):
    assert getattr(vitlab, name).__doc__ and name in dir(vitlab)


def test_an_unknown_name_is_named():
    with pytest.raises(AttributeError, match=r"vitlab has no 'prun'; it has .*prune"):
        vitlab.prun  # noqa: B018
