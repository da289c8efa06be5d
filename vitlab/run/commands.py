"""What the commands of `vitlab` do, but `run` (see study_run.py); each takes the parsed options and returns the exit
code."""

import contextlib
import dataclasses
import os
import sys

import matplotlib
import torch

from vitlab.data import datasets
from vitlab.metrics import measure as stick
from vitlab.models import checkpoint, linear
from vitlab.models.timm import TimmConfig
from vitlab.run import choices, notebooks
from vitlab.run import report as pages
from vitlab.run.study_run import BUDGET_CODE, INTERRUPTED_CODE
from vitlab.study import plots
from vitlab.train import parallel
from vitlab.train.loop import BudgetSpent, NotFinite, Recipe, fit
from vitlab.utils import files, rng, threads
from vitlab.utils.device import hold_memory
from vitlab.utils.provenance import provenance

STATE = ".training"  # appended to the checkpoint's name: what a stopped run goes on from


def report(options):
    """Write README's computed parts, RESULTS.md and CLAIMS.md; the static site where one is asked for."""
    root = notebooks.project().source
    changed = pages.refresh(root)
    print("\n".join(f"{name} was written" for name in changed) or "everything is up to date")
    if options.site:
        from vitlab.run import site

        print(f"{len(site.write(root, options.site))} pages; open {options.site / 'index.html'}")
    return 0


def data(options):
    """Load each data set (which fetches, checks and caches it) and print what is in it."""
    for name in options.name:
        print(datasets.load(name, root=options.root, on_error=options.on_error).describe())
    return 0


def train(options):
    """Train as asked. The model goes to --checkpoint, with what is to be known of its training."""
    if options.resume:
        _fresh_or_resumed(options)  # before anything is written
    with parallel.joined(_device(options.device)) as device, contextlib.ExitStack() as stack:
        if parallel.rank():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        return _train(options, device, stack)


def _train(options, device, stack):
    in_recipe = {f.name for f in dataclasses.fields(Recipe)}
    recipe = choices.recipe({name: text for name, text in options.fields.items() if name in in_recipe})
    make = choices.config(options, {name: text for name, text in options.fields.items() if name not in in_recipe})
    data = datasets.load(options.dataset, device=device, on_error=options.on_error)
    rng.seed_all(recipe.seed)
    model = make(data).build().to(device)
    logs, first = _beside(options, ".logs"), parallel.rank() == 0
    if first:  # another training on this file is named, and not waited for
        stack.enter_context(files.locked(logs / "training.lock", stop=lambda: True))
    state = _fresh_or_resumed(options)
    print(threads.choose())
    print(f"{options.model}, {sum(p.numel() for p in model.parameters()):,} parameters on {device}; "
          f"linear product: {linear.kernel_choice(model, dtype=recipe.torch_dtype(device))}")  # fmt: skip
    try:
        history = fit(model, data, recipe, checkpoint=state, tensorboard=logs, name=options.model)
    except BudgetSpent as stop:
        print(f"{stop}; --resume goes on")
        return BUDGET_CODE
    except NotFinite as error:
        raise ValueError(str(error)) from error
    if first:
        about = {"dataset": options.dataset, "data": data.key, "recipe": recipe, "history": history.rows}
        checkpoint.save(model, options.checkpoint, about | provenance(device))
        state.unlink(missing_ok=True)
    print(f"{options.checkpoint}: trained in {history.seconds:,.0f} s; TensorBoard: {logs}")
    return 0


def apply(options):
    """Make a model cheaper as asked, and say whether that paid."""
    from vitlab.run import apply

    recipe, device = apply.checked(options), _device(options.device)
    print(threads.choose(), flush=True)
    try:
        apply.apply(options, device, recipe)
    except (KeyboardInterrupt, BudgetSpent) as stop:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return BUDGET_CODE if isinstance(stop, BudgetSpent) else INTERRUPTED_CODE
    except NotFinite as error:
        raise ValueError(str(error)) from error
    return 0


def export(options):
    """Write a checkpoint in the formats asked for, check them, and time them."""
    from vitlab.run import export

    print(threads.choose(), flush=True)
    return export.export(options)


def evaluate(options):
    """Accuracy on the test images, overall and by class: printed, and results.json, confusion.png/.pdf in --out."""
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is a file; give the name of a folder")
    device = _device(options.device)
    print(threads.choose(), flush=True)
    name = options.dataset or checkpoint.read(options.checkpoint).about.get("dataset")
    if not name:
        raise ValueError(f"{options.checkpoint} does not tell what it was trained on: give --dataset")
    model, data = _model_and_data(options, device, name)
    score = stick.accuracy(model, data.test, mean=data.mean, std=data.std, num_classes=data.num_classes)
    matplotlib.use("Agg")
    plots.theme()
    title = f"{options.checkpoint.stem} on {data.name}, test images"
    plots.save(plots.confusion(score.confusion, data.classes, title=title), options.out / "confusion")
    by_class = dict(zip(data.classes, score.per_class))
    result = dataclasses.asdict(score) | {"per_class": by_class, "dataset": data.name, "data": data.key,
                                          "checkpoint": options.checkpoint.name}  # fmt: skip
    files.write_json(options.out / "results.json", result | provenance(device))
    top5 = f", top-5 {score.top5:.2f} %" if score.top5 is not None else ""
    print(f"top-1 {score.top1:.2f} %{top5}, NLL {score.loss:.3f}, calibration error {100 * score.ece:.2f} % "
          f"on {score.n:,} test images")  # fmt: skip
    print("the hardest classes:")
    for value, name in sorted((v, name) for name, v in by_class.items() if v is not None)[:10]:
        print(f"  {value:6.2f} %  {name}")
    print(f"{options.out}: results.json, confusion.png, confusion.pdf")
    return 0


def measure(options):
    """Print the row of `vitlab.metrics.measure.measure` for a checkpoint or a timm model."""
    if (options.checkpoint is None) == (options.timm is None):
        raise ValueError("measure needs either --checkpoint FILE or --timm NAME")
    if options.out and options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder; give the name of a file")
    device = _device(options.device)
    print(threads.choose(), flush=True)
    if options.timm:
        data = datasets.load(options.dataset, on_error=options.on_error) if options.dataset else None
        classes = {"num_classes": data.num_classes} if data else {}
        model = TimmConfig(name=options.timm, **classes).build().to(device)
    else:
        model, data = _model_and_data(options, device, options.dataset)
    # a timm model's weights are random: an accuracy would only be chance
    shape = model.config.in_chans, model.config.image_size, model.config.image_size
    row = stick.measure(model, None if options.timm else data, shape=shape, batch=options.batch_size,
                        seconds=options.seconds)  # fmt: skip
    row = {"model": options.timm or options.checkpoint.name, "dataset": data and data.name} | row
    for column, form in stick.COLUMNS.items():
        print(f"{form.label:>36}  {stick.show(row[column], column, unit=True)}")
    print(f"{'on':>36}  {row['device']}, {row['dtype']}")
    if options.out:
        files.write_json(options.out, row | provenance(device))
    return 0


# ------------------------------------------------------------------------------------------- helpers

def _device(name):
    hold_memory()
    has = torch.cuda.is_available()
    if name == "cuda" and not has:
        raise ValueError("--device cuda: PyTorch sees no CUDA device here")
    return torch.device("cuda" if name != "cpu" and has else "cpu")


def _beside(options, ending):
    return options.checkpoint.with_name(options.checkpoint.name + ending)


def _fresh_or_resumed(options):
    """The path of the training state; errors where --resume does not fit what is there."""
    state = _beside(options, STATE)
    if options.resume and not state.exists():
        raise ValueError(f"--resume: {state} does not exist: no run was stopped there, or it is finished")
    for path in () if options.resume else (state, options.checkpoint):
        if path.exists():
            raise ValueError(f"{path} exists: remove it, name another --checkpoint, or go on with --resume")
    return state


def _model_and_data(options, device, name):
    """The checkpoint's model and the data set of that name, if there is one."""
    model = checkpoint.load(options.checkpoint, device)
    data = datasets.load(name, device=device, on_error=options.on_error) if name else None
    if data and model.config.num_classes != data.num_classes:
        raise ValueError(f"{options.checkpoint} has {model.config.num_classes} classes, {name} has {data.num_classes}")
    return model, data
