"""The command line: `vitlab run | train | evaluate | measure | apply | export | report | data`.

The options stand in cli.toml. Only the standard library is imported at the top: run_all.sh checks its options here
before anything is installed, and help comes at once. What the commands do is in `vitlab.run.commands`, for `run` in
`vitlab.run.study_run`.
"""

import argparse
import ast
import importlib.util
import os
import re
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
USAGE_CODE = 2
# How often an idle thread of GNU's OpenMP looks for work before it sleeps. Never (what "passive" means by itself) makes
# two threads wake each other in every operation: a forward pass of one image of our baseline took 7.8 ms instead of
# 3.3, one thread alone 4.3. It is still few enough for a busy neighbour (bench/neighbour.py).
SHORT_SPIN = {"GOMP_SPINCOUNT": "20000"}


def parser():
    """The parser with all sub-commands."""
    top = argparse.ArgumentParser(prog="vitlab", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    said = tomllib.loads((HERE / "cli.toml").read_text(encoding="utf-8"))
    shared = said.pop("shared")
    said["run"]["prog"] = os.environ.get("VITLAB_PROG") or "vitlab run"
    said["train"]["epilog"] = fields_help()
    for name, command in said.items():
        options = command.pop("options") | {option: shared[option] for option in command.pop("shared", ())}
        hidden = {"action": "store_true", "help": argparse.SUPPRESS}
        options |= dict.fromkeys(command.pop("hidden", ()), hidden)
        sub = commands.add_parser(name, allow_abbrev=False, **command,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        for option, given in options.items():
            reader = {"type": READERS[given["type"]]} if "type" in given else {}
            sub.add_argument(*option.split(), **given | reader)
    return top


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


def seconds(text):
    """"90s", "25m", "1h30m" -> seconds."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    hours, minutes, rest = (int(g or 0) for g in match.groups()) if match else (0, 0, 0)
    if not (total := hours * 3600 + minutes * 60 + rest):
        raise argparse.ArgumentTypeError(f"{text!r} is no length of time such as 90s, 25m or 1h30m")
    return total


def positive(kind, what, most=float("inf")):
    """A reader of numbers of that kind above 0 and below `most`; `what`: how they are called where one is not."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < most:
            raise argparse.ArgumentTypeError(f"{text!r}: {what} is needed")
        return value

    return read


def assignment(text):
    """"epochs=3" -> ("epochs", "3"); the value is read as YAML later, when something is sure to be installed."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


whole = positive(int, "a whole number of at least 1")
READERS = {
    "names": names, "seeds": seeds, "seconds": seconds, "assignment": assignment, "Path": Path, "whole": whole,
    "number": positive(float, "a finite number above 0"),
    "share": positive(float, "a share between 0 and 1", most=1),
    "batches": lambda text: [whole(part) for part in names(text) or [text]],  # "1,64" -> [1, 64]
}  # fmt: skip


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
    said = []
    for what, file, name in (("a ViT", "models/vit.py", "ViTConfig"), ("the recipe", "train/recipe.py", "Recipe")):
        body = next(n.body for n in ast.parse((HERE / file).read_text(encoding="utf-8")).body
                    if isinstance(n, ast.ClassDef) and n.name == name)  # fmt: skip
        found = [f"--{n.target.id.replace('_', '-')}" for n in body if isinstance(n, ast.AnnAssign)]
        lines = ("  " + " ".join(found[i : i + 6]) for i in range(0, len(found), 6))
        said.append("\n".join([f"fields of {what}:", *lines]))
    return "\n\n".join(said)


def set_waiting():
    """Let OpenMP's threads wait as `SHORT_SPIN` says, here and in the kernels started from here; before torch comes.

    What the user has set stays. Whether it came before torch was loaded.
    """
    from vitlab.utils import threads

    if os.environ.get("OMP_WAIT_POLICY", "passive").lower() == "passive":
        for name, value in SHORT_SPIN.items():
            os.environ.setdefault(name, value)
    return threads.wait_passively()


def main(arguments=None):
    """The command; its exit code. Bad input is one line on stderr, not a traceback."""
    options, unknown = parser().parse_known_args(arguments)
    try:
        if unknown and options.command not in ("train", "apply"):
            raise ValueError(f"unknown options: {' '.join(unknown)} (--help lists the known ones)")
        options.fields, options.words = fields(unknown), sys.argv[1:] if arguments is None else arguments
        if getattr(options, "check_options", False):
            return 0
        needed = ("torch", "torchvision", "papermill", "nbconvert", "ipykernel", "yaml")
        if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
            raise ValueError(f"{sys.executable} lacks {', '.join(missing)}: install requirements.lock into it, or name "
                             "another interpreter with VITLAB_PYTHON")  # fmt: skip
        set_waiting()
        if options.command == "run":
            from vitlab.run import study_run as commands
        else:
            from vitlab.run import commands

        return getattr(commands, options.command)(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_CODE


if __name__ == "__main__":
    sys.exit(main())
