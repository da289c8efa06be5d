"""The command line: `vitlab run | train | evaluate | measure | apply | export | report | data`.

Only the standard library is imported at the top: run_all.sh checks its options here before anything is installed, and
help comes at once. What the commands do is in `vitlab.run.commands`.
"""

import argparse
import ast
import importlib.util
import math
import os
import re
import sys
from pathlib import Path

USAGE_CODE = 2

RUN_HELP = """\
Run the notebooks and keep their executed copies in executed/<preset>/, figures in figures/<preset>/ and
rows in results/<preset>/. What is up to date is skipped; what was stopped goes on where it was.

exit codes: 0 all well; 1 a notebook (or test) failed; 2 wrong options; 75 the budget is spent, the same
command goes on; 130 interrupted"""

SETUP_HELP = """\
set-up by run_all.sh (these are not options of `vitlab run`'s own work):
  --test          run ruff, pytest and the notebooks under nbval
  --no-install    install nothing, make no .venv
  VITLAB_PYTHON   the interpreter that .venv is made from; with --no-install, the one that is used as it is
  VITLAB_DATA     folder with cifar10.npz, cifar100.npz (default: ~/.cache/vitlab, downloaded to there)
  VITLAB_ROOT     folder that results go to (default: the checkout)"""

TRAIN_HELP = """\
Train a model. Every field of its config and of the training recipe is an option, such as --mlp-dim 512,
--optimizer sgd or --augment crop(4)+flip. A ViT starts from the shape of S4/baseline (vitlab/study/zoo.py); the recipe
is that model's, too: AdamW, cosine, smoothing, mixup; 10 of 200 epochs are warm-up, in that proportion for others.

Several processes or GPUs train together, each on its share of every batch, if torchrun starts them:
  torchrun --nproc-per-node 4 -m vitlab train --dataset cifar10 --checkpoint model.safetensors"""


APPLY_HELP = """\
Prune a model, run it on fewer tokens, fine-tune it, and say whether that paid: accuracy on the test images, operations,
memory and time before and after, beside the uncut model with the same training and the pooled last block alone. Fields
of the training recipe are options, too: --lr 1e-4, --augment crop(4)+flip. The same command goes on with what was
stopped."""


def parser():
    """The parser with all sub-commands."""
    top = argparse.ArgumentParser(prog="vitlab", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_run, add_train, add_evaluate, add_measure, add_apply, add_export, add_data):
        add(commands)
    sub = commands.add_parser("report", help="write what the rows say into README.md, RESULTS.md and CLAIMS.md")
    sub.add_argument("--site", type=Path, nargs="?", const=Path("site"), metavar="DIR",
                     help="the notebooks and these files as web pages, too (default: site)")
    for name in ("train", "evaluate", "measure", "apply", "data"):
        sub = commands.choices[name]
        sub.add_argument("--skip-broken", dest="on_error", action="store_const", const="skip", default="raise",
                         help="leave out images that cannot be read")
        if name != "data":
            sub.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
                             help="default: cuda where there is one")
    return top


def add_run(commands):
    sub = commands.add_parser(
        "run", help="run the notebooks", description=RUN_HELP, epilog=SETUP_HELP, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, prog=os.environ.get("VITLAB_PROG") or "vitlab run",
    )  # fmt: skip
    sub.add_argument("--preset", metavar="NAME", help="presets/NAME.yaml (default: what suits the machine)")
    sub.add_argument("--only", type=names, default=(), metavar="01,05", help="these notebooks only")
    sub.add_argument("--seeds", type=seeds, metavar="0,1,2", help="these seeds instead of the preset's")
    sub.add_argument("-p", "--parameter", action="append", type=assignment, default=[], metavar="NAME=VALUE",
                     help="set a parameter of all chosen notebooks (VALUE as in YAML); may be repeated")
    sub.add_argument("--jobs", type=positive(int), default=1, metavar="N", help="train so many notebooks and seeds "
                     "side by side, the cores shared out; each notebook then runs alone and measures what was trained")
    sub.add_argument("--slurm", nargs="?", const="", metavar="OPTIONS", help="train as tasks of a Slurm job array, "
                     "with these options of sbatch (--slurm='--partition=gpu --gpus=1'); a last job runs the notebooks")
    resume = sub.add_mutually_exclusive_group()
    resume.add_argument("--resume", action="store_true", default=True,
                        help="skip what is up to date, go on with what was stopped (the default)")
    resume.add_argument("--fresh", dest="resume", action="store_false",
                        help="run everything again, and train every arm again")
    sub.add_argument("--budget", type=seconds, default=math.inf, metavar="25m",
                     help="stop cleanly before so much time has passed (90s, 25m, 1h30m)")
    sub.add_argument("--notebook-timeout", type=seconds, default=math.inf, metavar="2h",
                     help="stop a notebook after this")
    sub.add_argument("--list", action="store_true", help="show the notebooks and where each preset stands")
    sub.add_argument("--project", metavar="DIR", help="folder with notebooks/, presets/ (default: this one)")
    for hidden in ("--test", "--no-install", "--check-options"):  # run_all.sh's
        sub.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)


def add_train(commands):
    sub = commands.add_parser("train", help="train a model", description=TRAIN_HELP, allow_abbrev=False,
                              epilog=fields_help(), formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    sub.add_argument("--model", default="vit", metavar="KIND", help="vit (default), resnet, timm:NAME, ...")
    sub.add_argument("--dataset", default="cifar100", help="cifar10, cifar100 (default), tiny-imagenet, tiny or "
                     "folder:PATH")
    sub.add_argument("--ripple-stages", type=positive(int), help="with --attention ripple: 1 to 4 (published: 3)")
    sub.add_argument("--hydra-branches", type=positive(int), help="with --attention hydra: 1 to 8 (published: 4)")
    sub.add_argument("--no-kernels", action="store_const", const="off", help="plain PyTorch in place of our kernels")
    sub.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="where the model goes; "
                     "TensorBoard's logs go to FILE.logs")
    sub.add_argument("--resume", action="store_true", help="go on with the run that was stopped at --checkpoint")


def add_evaluate(commands):
    sub = commands.add_parser("evaluate", help="accuracy, by class too, of a trained model", allow_abbrev=False)
    sub.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="any model that vitlab wrote")
    sub.add_argument("--dataset", help="default: what the model was trained on")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results.json and figures")


def add_measure(commands):
    sub = commands.add_parser("measure", help="size, operations, time, memory of a model", allow_abbrev=False)
    sub.add_argument("--checkpoint", type=Path, metavar="FILE", help="any model that vitlab wrote")
    sub.add_argument("--timm", metavar="NAME", help="a model of timm's, with random weights, in place of a checkpoint")
    sub.add_argument("--dataset", help="read accuracy on it, too (with --timm: its number of classes only)")
    sub.add_argument("--batch-size", type=positive(int), default=256, help="images a pass for throughput and memory")
    sub.add_argument("--seconds", type=positive(float), default=2.0, help="for each timing")
    sub.add_argument("--out", type=Path, metavar="FILE", help="write the row as JSON, too")


def add_apply(commands):
    sub = commands.add_parser("apply", help="make a model of yours cheaper, and see whether it pays",
                              description=APPLY_HELP, allow_abbrev=False)  # fmt: skip
    sub.add_argument("model", metavar="MODEL", help="a file that vitlab wrote, timm:NAME or timm:NAME,pretrained")
    sub.add_argument("--data", required=True, metavar="DATA", help="folder:PATH, or cifar10, cifar100, ...")
    sub.add_argument("--prune", type=share, metavar="0.5", help="take channels that make up so much of the MACs away")
    sub.add_argument("--reduce-tokens", metavar="auto", help="r_max=.6,alpha=1.5,action=ward "
                     "(fields of TokenConfig); or auto: by this machine's clock at the last of --batch, and not at all "
                     "where that makes the model no faster")
    sub.add_argument("--fine-tune", type=positive(int), default=0, metavar="EPOCHS", help="train it again afterwards")
    sub.add_argument("--distill", action="store_true", help="with the uncut model as the teacher")
    sub.add_argument("--batch", type=batches, default=[1, 64], metavar="1,64", help="images a pass that are timed")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the smaller model goes")


def add_export(commands):
    sub = commands.add_parser("export", help="write a model as ONNX or for torch.export", allow_abbrev=False)
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="any model that vitlab wrote")
    sub.add_argument("--onnx", action="store_true", help="NAME.onnx, checked and timed in onnxruntime")
    sub.add_argument("--pt2", action="store_true", help="NAME.pt2, for torch.export.load")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder for the files (default: the checkpoint's)")
    sub.add_argument("--batch", type=batches, default=[1, 16], metavar="1,16", help="images a pass that are timed")
    sub.add_argument("--seconds", type=positive(float), default=1.0, help="for each timing")


def add_data(commands):
    sub = commands.add_parser("data", help="fetch, check and describe data sets", allow_abbrev=False)
    sub.add_argument("name", nargs="+", help="cifar10, cifar100, tiny-imagenet, tiny or folder:PATH")
    sub.add_argument("--root", help="where they are kept (default: VITLAB_DATA, else ~/.cache/vitlab)")


# -------------------------------------------------------------------------------------------- values

def names(text):
    """"01,05" -> ["01", "05"]."""
    return [part for part in re.split(r"[,\s]+", text) if part]


def seeds(text):
    """"0,1,2" -> [0, 1, 2]."""
    parts = names(text)
    if not parts or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds such as 0,1,2")
    return [int(part) for part in parts]


def batches(text):
    """"1,64" -> [1, 64]."""
    return [positive(int)(part) for part in names(text) or [text]]


def share(text):
    """"0.5" -> 0.5, between 0 and 1."""
    if not re.fullmatch(r"0?\.\d+", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r}: a share between 0 and 1 is needed, such as 0.5")
    return float(text)


def seconds(text):
    """"90s", "25m", "1h30m" -> seconds."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    hours, minutes, rest = (int(g or 0) for g in match.groups()) if match else (0, 0, 0)
    if not (total := hours * 3600 + minutes * 60 + rest):
        raise argparse.ArgumentTypeError(f"{text!r} is no length of time such as 90s, 25m or 1h30m")
    return total


def positive(kind):
    """A reader of numbers of that kind, finite and above zero."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            what = "a whole number of at least 1" if kind is int else "a finite number above 0"
            raise argparse.ArgumentTypeError(f"{text!r}: {what} is needed")
        return value

    return read


def assignment(text):
    """"epochs=3" -> ("epochs", "3"); the value is read as YAML later, when something is sure to be installed."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def fields(words):
    """["--dim", "64", "--lr=0.1"] -> {"dim": "64", "lr": "0.1"}; ValueError for what has no value."""
    found, rest = {}, list(words)
    while rest:
        name, sign, value = rest.pop(0).partition("=")
        if not re.fullmatch(r"--[a-z][a-z0-9-]*", name) or not (sign or rest):
            raise ValueError(f"unknown options: {name} (--help lists the known ones)")
        found[name[2:].replace("-", "_")] = value if sign else rest.pop(0)
    return found


def fields_help():
    """The fields of a ViT's config and of the recipe, read off their source, since importing them takes seconds."""
    here, said = Path(__file__).parent, []
    for what, file, name in (("a ViT", "models/vit.py", "ViTConfig"), ("the recipe", "train/recipe.py", "Recipe")):
        body = next(n.body for n in ast.parse((here / file).read_text(encoding="utf-8")).body
                    if isinstance(n, ast.ClassDef) and n.name == name)  # fmt: skip
        found = [f"--{n.target.id.replace('_', '-')}" for n in body if isinstance(n, ast.AnnAssign)]
        lines = ("  " + " ".join(found[i : i + 6]) for i in range(0, len(found), 6))
        said.append("\n".join([f"fields of {what}:", *lines]))
    return "\n\n".join(said)


def main(arguments=None):
    """The command; its exit code. Bad input is one line on stderr, not a traceback."""
    options, unknown = parser().parse_known_args(arguments)
    try:
        if unknown and options.command not in ("train", "apply"):
            raise ValueError(f"unknown options: {' '.join(unknown)} (--help lists the known ones)")
        options.fields = fields(unknown)
        if getattr(options, "check_options", False):
            return 0
        needed = ("torch", "torchvision", "papermill", "nbconvert", "ipykernel", "yaml")
        if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
            raise ValueError(f"{sys.executable} lacks {', '.join(missing)}: install requirements.lock into it, or name "
                             "another interpreter with VITLAB_PYTHON")  # fmt: skip
        from vitlab.utils import threads

        threads.wait_passively()  # kernels, too: they get this process's environment
        from vitlab.run import commands

        return getattr(commands, options.command)(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_CODE


if __name__ == "__main__":
    sys.exit(main())
