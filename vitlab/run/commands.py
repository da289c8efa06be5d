"""`vitlab train | evaluate | measure`: the study's models, loop and measuring stick on the command line.

Only the standard library is imported at the top, as in `vitlab.cli`.
"""

import argparse
import dataclasses
from pathlib import Path

ATTENTIONS = ("softmax", "linear", "ripple", "hydra")
STATE = ".training"  # appended to the checkpoint's name: what a stopped run goes on from

TRAIN_HELP = """\
Train a ViT as the linear-attention project does (S4/baseline in vitlab/zoo.py: AdamW, cosine, smoothing, mixup;
10 of 200 epochs are warm-up, in that proportion for other lengths), with any of four attentions."""


def add(commands):
    """Add the three sub-commands to the parser of `vitlab`."""
    add_train(commands)
    add_evaluate(commands)
    add_measure(commands)


def add_train(commands):
    sub = commands.add_parser("train", help="train a ViT", description=TRAIN_HELP, allow_abbrev=False,
                              formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    sub.add_argument("--attention", choices=ATTENTIONS, default="softmax", help="the attention of every block")
    sub.add_argument("--dataset", default="cifar100", help="cifar10, cifar100, tiny-imagenet, tiny or folder:PATH")
    for name, kind, default, text in (
        ("epochs", int, 200, "passes over the training images"), ("batch-size", int, 128, "images a step"),
        ("lr", float, 3e-4, "peak learning rate"), ("dim", int, 384, "width"), ("depth", int, 12, "blocks"),
        ("heads", int, 6, "heads"), ("patch-size", int, 4, "pixels"), ("image-size", int, 32, "pixels"),
        ("seed", int, 0, "seed of everything random"),
    ):  # fmt: skip
        sub.add_argument(f"--{name}", type=kind, default=default, help=text)
    # no defaults here: given with another attention they are a mistake
    sub.add_argument("--ripple-stages", type=int, default=argparse.SUPPRESS, help="1 to 4 (published: 3)")
    sub.add_argument("--hydra-branches", type=int, default=argparse.SUPPRESS, help="1 to 8 (published: 4)")
    sub.add_argument("--no-kernels", action="store_true", help="plain PyTorch in place of the fused kernels")
    sub.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="where the model goes")
    sub.add_argument("--resume", action="store_true", help="go on with the run that was stopped at --checkpoint")
    sub.add_argument("--logs", type=Path, metavar="DIR", help="TensorBoard's folder (default: FILE.logs)")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
    sub.set_defaults(action=train)


def add_evaluate(commands):
    sub = commands.add_parser("evaluate", help="accuracy, by class too, of a trained model", allow_abbrev=False)
    _which(sub)
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results.json and figures")
    sub.set_defaults(action=evaluate)


def add_measure(commands):
    sub = commands.add_parser("measure", help="size, operations, time, memory of a model", allow_abbrev=False)
    _which(sub, required=False)
    sub.add_argument("--timm", metavar="NAME", help="a model of timm's, with random weights, in place of a checkpoint")
    sub.add_argument("--batch-size", type=int, default=256, help="images in a pass for throughput and memory")
    sub.add_argument("--seconds", type=float, default=2.0, help="for each timing")
    sub.add_argument("--out", type=Path, metavar="FILE", help="write the row as JSON, too")
    sub.set_defaults(action=measure)


def _which(sub, required=True):
    sub.add_argument("--checkpoint", type=Path, required=required, metavar="FILE", help="what `vitlab train` wrote")
    sub.add_argument("--dataset", help="default: what the checkpoint was trained on" if required else
                     "read accuracy on it, too (with --timm: its number of classes only)")  # fmt: skip
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")


# ------------------------------------------------------------------------------------------- actions

def train(options):
    """Train as asked; the exit code. The model is written to --checkpoint, a description beside it (.json)."""
    from vitlab.data import datasets as data
    from vitlab.models import checkpoint, linear, vit
    from vitlab.train.loop import BudgetSpent, fit
    from vitlab.utils import files, rng
    from vitlab.utils.provenance import provenance

    state = _fresh_or_resumed(options)
    device = _device(options.device)
    arguments = _attention_args(options)
    recipe = _recipe(options)
    found = data.load(options.dataset, device=device)
    config = _config(options, arguments, found)
    rng.seed_all(options.seed)
    model = vit.ViT(config).to(device)
    print(f"{options.attention} attention, {sum(p.numel() for p in model.parameters()):,} parameters on {device}; "
          f"linear product: {linear.kernel_choice(model, dtype=recipe.torch_dtype(device))}")  # fmt: skip
    logs = options.logs or options.checkpoint.with_name(f"{options.checkpoint.name}.logs")
    if not options.resume:
        _graph(vit.ViT(config), logs)
    try:
        history = fit(model, found, recipe, checkpoint=state, tensorboard=logs, name=options.attention)
    except BudgetSpent as stop:
        print(f"{stop}; --resume goes on")
        return 75
    checkpoint.save(model, options.checkpoint)
    files.write_json(options.checkpoint.with_name(f"{options.checkpoint.name}.json"),
                     {"dataset": options.dataset, "data": found.key, "recipe": files.plain(recipe),
                      "config": files.plain(config), "history": history.rows} | provenance(device))  # fmt: skip
    state.unlink(missing_ok=True)
    print(f"{options.checkpoint}: {len(history)} epochs in {history.seconds:,.0f} s; TensorBoard: {logs}")
    return 0


def evaluate(options):
    """Accuracy on the test images, overall and by class: printed, and results.json, confusion.png/.pdf in --out."""
    import matplotlib

    matplotlib.use("Agg")
    from vitlab.metrics import measure as stick
    from vitlab.study import plots
    from vitlab.utils import files
    from vitlab.utils.provenance import provenance

    device = _device(options.device)
    model, found = _model(options.checkpoint, device), _data(options, device)
    _same_classes(model, found)
    score = stick.accuracy(model, found.test, mean=found.mean, std=found.std, num_classes=found.num_classes)
    plots.theme()
    title = f"{options.checkpoint.stem} on {found.name}, test images"
    plots.save(plots.confusion(score.confusion, found.classes, title=title), options.out / "confusion")
    by_class = dict(zip(found.classes, score.per_class))
    result = dataclasses.asdict(score) | {"per_class": by_class, "dataset": found.name, "data": found.key,
                                          "checkpoint": options.checkpoint.name}  # fmt: skip
    files.write_json(options.out / "results.json", result | provenance(device))
    top5 = f", top-5 {score.top5:.2f} %" if score.top5 is not None else ""
    print(f"top-1 {score.top1:.2f} %{top5}, NLL {score.loss:.3f}, calibration error {100 * score.ece:.2f} % "
          f"on {score.n:,} test images")  # fmt: skip
    ranked = sorted((c for c in by_class.items() if c[1] is not None), key=lambda c: -c[1])
    shown = ranked if len(ranked) <= 20 else [*ranked[:5], ("...", None), *ranked[-5:]]
    for name, value in shown:
        print(f"  {name}" if value is None else f"  {value:6.2f} %  {name}")
    print(f"{options.out}: results.json, confusion.png, confusion.pdf")
    return 0


def measure(options):
    """Print the row of `vitlab.metrics.measure.measure` for a checkpoint or a timm model; the exit code."""
    from vitlab.metrics import measure as stick
    from vitlab.utils import files
    from vitlab.utils.provenance import provenance

    if (options.checkpoint is None) == (options.timm is None):
        raise ValueError("measure needs either --checkpoint FILE or --timm NAME")
    device = _device(options.device)
    found = _data(options, device) if options.dataset else None
    settings = {"device": device, "batch": options.batch_size, "seconds": options.seconds}
    if options.timm:
        model, shape = _timm(options.timm, found)
        # its weights are random: an accuracy would only be chance
        row = stick.measure(model.to(device), shape=shape, **settings)
    else:
        model = _model(options.checkpoint, device)
        if found:
            _same_classes(model, found)
        config = model.config
        row = stick.measure(model, found, shape=(config.in_chans, config.image_size, config.image_size), **settings)
    row = {"model": options.timm or options.checkpoint.name, "dataset": found and found.name} | row
    for column, form in stick.COLUMNS.items():
        print(f"{form.label:>36}  {stick.show(row[column], column, unit=True)}")
    print(f"{'on':>36}  {row['device']}, {row['dtype']}")
    if options.out:
        files.write_json(options.out, row | provenance(device))
    return 0


# ------------------------------------------------------------------------------------------- helpers

def _device(name):
    import torch

    from vitlab.utils.device import hold_memory

    hold_memory()
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {name}: choose auto, cpu or cuda")
    has = torch.cuda.is_available()
    if name == "cuda" and not has:
        raise ValueError("--device cuda: PyTorch sees no CUDA device here")
    return torch.device("cuda" if name != "cpu" and has else "cpu")


def _fresh_or_resumed(options):
    """The path of the training state; errors where --resume does not fit what is there."""
    state = options.checkpoint.with_name(options.checkpoint.name + STATE)
    if options.resume and not state.exists():
        why = "its run is finished" if options.checkpoint.exists() else "no run was stopped there"
        raise FileNotFoundError(f"--resume: {state} does not exist ({why})")
    if not options.resume and state.exists():
        raise ValueError(f"{state} is a run that was stopped: --resume goes on with it; remove it to start afresh")
    if not options.resume and options.checkpoint.exists():
        raise ValueError(f"{options.checkpoint} exists: give --checkpoint another name, or remove it")
    return state


def _attention_args(options):
    """{name: value} for the attention class; an option of another attention is a ValueError."""
    found = {}
    for option, attention, name in (("ripple_stages", "ripple", "stages"), ("hydra_branches", "hydra", "branches")):
        if hasattr(options, option):
            if options.attention != attention:
                raise ValueError(f"--{option.replace('_', '-')} needs --attention {attention}, not {options.attention}")
            found[name] = getattr(options, option)
    if options.no_kernels:
        if options.attention == "softmax":
            raise ValueError("--no-kernels is for linear, ripple and hydra attention; softmax has none of our kernels")
        found["kernels"] = "off"
    return found


def _recipe(options):
    from vitlab.study import zoo

    published = zoo.get("S4/baseline").recipe
    warmup = published.warmup * options.epochs / published.epochs
    return dataclasses.replace(published, epochs=options.epochs, batch=options.batch_size, lr=options.lr,
                               warmup=warmup, seed=options.seed)  # fmt: skip


def _config(options, arguments, data):
    from vitlab.study import zoo

    published = zoo.get("S4/baseline").config
    return dataclasses.replace(
        published, image_size=options.image_size, patch_size=options.patch_size, dim=options.dim, depth=options.depth,
        heads=options.heads, mlp_dim=None, num_classes=data.num_classes, attention=options.attention,
        attention_args=tuple(arguments.items()),
    )  # fmt: skip


def _graph(model, folder):
    """Write the model's graph for TensorBoard; a model that cannot be traced costs its graph, not the run."""
    import warnings

    import torch
    from torch.utils.tensorboard import SummaryWriter

    config = model.config
    with SummaryWriter(folder) as writer, warnings.catch_warnings():
        # the trace is only drawn, never run on other shapes
        for kind in (torch.jit.TracerWarning, FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", kind)
        try:
            image = torch.zeros(1, config.in_chans, config.image_size, config.image_size)
            writer.add_graph(model.eval(), image)
        except RuntimeError as problem:
            print(f"no model graph for TensorBoard: {str(problem).splitlines()[0]}")


def _model(path, device):
    from vitlab.models import checkpoint

    return checkpoint.load(path, device)


def _data(options, device):
    """The data set asked for, else the one that the checkpoint was trained on."""
    from vitlab.data import datasets as data
    from vitlab.utils import files

    name = options.dataset
    if not name:
        described = options.checkpoint.with_name(f"{options.checkpoint.name}.json")
        if not described.exists():
            raise ValueError(f"{described} is not there to tell what the model was trained on: give --dataset")
        name = files.read_json(described)["dataset"]
    return data.load(name, device=device)


def _same_classes(model, data):
    if model.config.num_classes != data.num_classes:
        raise ValueError(f"the model has {model.config.num_classes} classes, {data.name} has {data.num_classes}")


def _timm(name, data):
    """(a timm model with random weights in eval mode, its shape C H W)."""
    import timm

    if name not in timm.list_models():
        from difflib import get_close_matches

        near = ", ".join(get_close_matches(name, timm.list_models(), n=3)) or "see timm.list_models()"
        raise ValueError(f"--timm {name}: timm has no such model ({near})")
    options = {"num_classes": data.num_classes} if data else {}
    model = timm.create_model(name, **options).eval()
    return model, tuple(model.pretrained_cfg["input_size"])
