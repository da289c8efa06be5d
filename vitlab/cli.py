"""The command line: `vitlab run | data | readme | train | evaluate | measure`.

Each sub-command is a function that adds itself to the parser.

Only the standard library is imported at the top: run_all.sh checks its options here before anything is
installed.
"""

import argparse
import importlib.util
import os
import re
import signal
import sys

from vitlab.run import commands as work

NEEDED = ("torch", "torchvision", "papermill", "nbconvert", "ipykernel", "yaml")
INTERRUPTED_CODE, USAGE_CODE = 130, 2

RUN_HELP = """\
Run the notebooks and keep their executed copies in executed/<preset>/, figures in figures/<preset>/ and
rows in results/<preset>/. What is up to date is skipped; what was stopped goes on where it was.

exit codes: 0 all well; 1 a notebook (or test) failed; 2 wrong options; 75 the budget is spent, the same
command goes on; 130 interrupted"""

SETUP_HELP = """\
set-up by run_all.sh (these are not options of `vitlab run`'s own work):
  VITLAB_PYTHON   the interpreter that .venv is made from; with --no-install, the one that is used as it is
  VITLAB_DATA     folder with cifar10.npz, cifar100.npz (default: ~/.cache/vitlab, downloaded to there)
  VITLAB_ROOT     folder that results go to (default: the checkout)"""


def parser():
    """The parser with all sub-commands."""
    top = argparse.ArgumentParser(prog="vitlab", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_run, add_data, add_readme):
        add(commands)
    work.add(commands)
    return top


def add_run(commands):
    """`vitlab run`: what run_all.sh calls."""
    sub = commands.add_parser(
        "run", help="run the notebooks, or the tests", description=RUN_HELP, epilog=SETUP_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        prog=os.environ.get("VITLAB_PROG") or "vitlab run",
    )
    sub.add_argument("--preset", metavar="NAME", help="presets/NAME.yaml (default: what suits the machine)")
    sub.add_argument("--only", type=names, metavar="01,05", help="these notebooks only")
    sub.add_argument("--seeds", type=seeds, metavar="0,1,2", help="these seeds instead of the preset's")
    sub.add_argument("-p", "--parameter", action="append", type=assignment, default=[], metavar="NAME=VALUE",
                     help="set a parameter of all chosen notebooks (VALUE as in YAML); may be repeated")
    resume = sub.add_mutually_exclusive_group()
    resume.add_argument("--resume", action="store_true", default=True,
                        help="skip what is up to date, go on with what was stopped (the default)")
    resume.add_argument("--fresh", dest="resume", action="store_false",
                        help="run everything again, and train every arm again")
    sub.add_argument("--budget", type=seconds, metavar="25m",
                     help="stop cleanly before so much time has passed (90s, 25m, 1h30m)")
    sub.add_argument("--notebook-timeout", type=seconds, metavar="2h", help="stop a notebook after this")
    sub.add_argument("--list", action="store_true", help="show the notebooks and where each preset stands")
    sub.add_argument("--test", action="store_true", help="run ruff, pytest and the notebooks under nbval")
    sub.add_argument("--project", metavar="DIR", help="folder with notebooks/, presets/ (default: this one)")
    sub.add_argument("--no-install", action="store_true", help="(run_all.sh) install nothing, make no .venv")
    sub.add_argument("--check-options", action="store_true", help=argparse.SUPPRESS)
    sub.set_defaults(action=run)


def add_data(commands):
    """`vitlab data`: get data sets and say what is in them."""
    sub = commands.add_parser("data", help="fetch, check and describe data sets", allow_abbrev=False)
    sub.add_argument("name", nargs="+", help="cifar10, cifar100, tiny-imagenet, tiny or folder:PATH")
    sub.add_argument("--root", help="where they are kept (default: VITLAB_DATA, else ~/.cache/vitlab)")
    sub.set_defaults(action=data)


def add_readme(commands):
    """`vitlab readme`: write the computed tables into README.md."""
    sub = commands.add_parser(
        "readme", help="write the tables computed from the rows into README.md", allow_abbrev=False,
        description="Writes the tables between the markers of README.md, from results/ and executed/ alone.",
    )
    sub.add_argument("--check", action="store_true", help="change nothing; exit 1 where the text is stale")
    sub.set_defaults(action=refresh_readme)


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


def assignment(text):
    """"epochs=3" -> ("epochs", 3)."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if importlib.util.find_spec("yaml") is None:  # nothing is installed yet; it is read again later
        return name, value
    import yaml

    return name, yaml.safe_load(value)


def run(options):
    """Run what the options ask for; the exit code."""
    if options.check_options:
        return 0
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"{sys.executable} lacks {', '.join(missing)}: install requirements.lock into it, or name "
            f"another interpreter with VITLAB_PYTHON"
        )
    from vitlab.run import notebooks, runner

    project = notebooks.project(options.project)
    if options.list:
        return show(project)
    if options.test:
        from vitlab.run.selftest import selftest

        return selftest(project)
    preset, why = (options.preset, "as asked") if options.preset else runner.choose_preset(project)
    print(f"preset {preset}: {why}", flush=True)
    jobs = runner.plan(project, preset, options.only, options.seeds, dict(options.parameter))
    if not jobs:
        print("no notebooks yet")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        outcomes = runner.run(project, jobs, options.resume, options.budget, options.notebook_timeout)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED_CODE
    print("\n" + runner.summary(project, jobs, outcomes), flush=True)
    code = runner.exit_code(outcomes)
    if any(o.status in (runner.PAUSED, runner.WAITING) for o in outcomes):
        without = "" if options.resume else ", without --fresh,"
        print(f"\nThe budget is spent; the same command{without} goes on from here.", flush=True)
    return code


def show(project):
    """Print the notebooks, and where each preset stands."""
    from vitlab.run import notebooks, runner

    found, presets = notebooks.find(project.source), notebooks.presets(project.source)
    if not found:
        print("no notebooks yet")
        return 0
    standing = {}
    for preset in presets:
        for job in runner.plan(project, preset):
            standing[job.notebook.stem, preset] = runner.standing(project, job)
    width = max(len(n.stem) for n in found)
    print("  ".join(["notebook".ljust(width), *(p.ljust(10) for p in presets), "title"]))
    for notebook in found:
        states = [standing[notebook.stem, p].ljust(10) for p in presets]
        print("  ".join([notebook.stem.ljust(width), *states, notebook.title]))
    return 0


def data(options):
    """Load each data set (which fetches, checks and caches it) and print what is in it."""
    from vitlab.data.datasets import load

    for name in options.name:
        found = load(name, root=options.root)
        parts = ", ".join(f"{part} {len(getattr(found, part)):,}" for part in ("train", "val", "test"))
        print(f"{name}: {parts}; {found.num_classes} classes, {found.image_size} pixels, key {found.key}")
    return 0


def refresh_readme(options):
    """Refresh README.md, or say whether it is stale; the exit code."""
    from vitlab.run import notebooks, readme

    root = notebooks.project().source
    if options.check:
        print("README.md is stale: run `vitlab readme`" if (old := readme.stale(root)) else "README.md is up to date")
        return int(old)
    print("README.md was refreshed" if readme.refresh(root) else "README.md was up to date")
    return 0


def main(arguments=None):
    """The command; its exit code. Bad input is one line on stderr, not a traceback."""
    top = parser()
    options, unknown = top.parse_known_args(arguments)
    if unknown:
        print(f"unknown options: {' '.join(unknown)} (--help lists the known ones)", file=sys.stderr)
        return USAGE_CODE
    try:
        return options.action(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_CODE


if __name__ == "__main__":
    sys.exit(main())
