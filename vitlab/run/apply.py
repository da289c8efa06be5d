"""`vitlab apply`: the study's methods on a model and images of one's own, and whether it paid.

Every step keeps what it has done in a folder beside --out, so that the same command goes on where it was stopped.
"""

import contextlib
import copy
import math
import shutil
from pathlib import Path

from vitlab.compress.budget import BudgetImpossible
from vitlab.compress.distill import Distill
from vitlab.compress.pruning.gates import GatedViT
from vitlab.compress.pruning.structured import prune, slim
from vitlab.compress.tokens.reduction import TokenConfig, TokenViT, reduce_tokens
from vitlab.data import datasets
from vitlab.metrics import meters
from vitlab.metrics.counts import macs, size_bytes
from vitlab.metrics.predict import logits
from vitlab.metrics.statistics import paired_difference
from vitlab.models import checkpoint
from vitlab.models.timm import TimmConfig, as_vit
from vitlab.run import choices
from vitlab.run.auto_tokens import sought
from vitlab.run.runner import columns
from vitlab.train.loop import cross_entropy, fit
from vitlab.train.recipe import Recipe
from vitlab.utils import files, rng
from vitlab.utils.device import example

BEFORE, FREE, UNCUT, AFTER = "before", "pooled last block alone", "uncut, fine-tuned", "after"
SECONDS = 2.0  # for each timing
WIDE = 2.0  # points to either side: a change of accuracy that is known no better is said to be so
WORTH = 1.03  # faster by less is no gain: timings of one model differ by as much
FINE_TUNE = {"lr": 2e-4, "warmup": 0.5, "smoothing": 0.1}


def checked(options):
    """The Recipe of the fine-tuning, after a look at all that can be wrong with the options (ValueError)."""
    if not options.prune and not options.reduce_tokens:
        raise ValueError("nothing to do: give --prune 0.5, --reduce-tokens auto, or both")
    if options.distill and not options.fine_tune:
        raise ValueError("--distill needs --fine-tune EPOCHS")
    if options.out.exists():
        raise ValueError(f"{options.out} exists: give --out another name, or remove it")
    if options.reduce_tokens:
        token_options(options.reduce_tokens)
    given = choices.typed(Recipe, options.fields)
    return Recipe(**{**FINE_TUNE, **given, "epochs": options.fine_tune or 1})


def image_size(name, data):
    """Pixels that a folder's images are decoded at, as the model takes them; None for other data, which are resized."""
    if not data.startswith("folder:"):
        return None
    kind, _, timms = name.partition(":")
    return (TimmConfig(name=timms.split(",")[0]) if kind == "timm" else checkpoint.read(name).config).image_size


def load_model(name, classes, device):
    """(model, whether its head is new) of a checkpoint's path, `timm:NAME` or `timm:NAME,pretrained`."""
    if not name.startswith("timm:"):
        model = checkpoint.load(name, device)
        if isinstance(model, GatedViT):
            model = slim(model)
        if model.config.num_classes != classes:
            raise ValueError(f"{name} tells {model.config.num_classes} classes apart, the data have {classes}")
        return model if isinstance(model, TokenViT) else as_vit(model), False
    import timm

    name, _, weights = name.removeprefix("timm:").partition(",")
    if weights not in ("", "pretrained"):
        raise ValueError(f"timm:{name},{weights}: only ',pretrained' may follow the name")
    TimmConfig(name=name)  # names the models that are like a misspelt one
    try:
        model = timm.create_model(name, pretrained=bool(weights))
    except Exception as error:  # whatever a download may raise
        raise ValueError(f"timm:{name},{weights}: its weights cannot be had: {error}") from error
    if not weights:
        print(f"timm:{name} without ',pretrained': its weights are random, so that only its times tell anything")
    new = not weights or model.num_classes != classes
    if new:
        model.reset_classifier(classes)
    return as_vit(model).to(device).eval(), new


def token_options(text):
    """"r_max=.6,action=size-priced" or "auto,action=merge" -> (whether counts are sought, TokenConfig's fields)."""
    parts = [part.strip() for part in text.split(",")]
    given = dict(part.partition("=")[::2] for part in parts if part != "auto")
    if "auto" in parts and {"counts", "r_max", "alpha", "schedule"} & set(given):
        raise ValueError(f"--reduce-tokens {text}: 'auto' chooses how many tokens stay")
    try:
        found = choices.typed(TokenConfig, given)
        TokenConfig(**found)
    except ValueError as error:
        raise ValueError(f"--reduce-tokens {text}: 'auto' or NAME=VALUE is needed, and {error}") from error
    return "auto" in parts, found


@contextlib.contextmanager
def work_on(out, options):
    """The `Work` on `out`, removed at the end; TimeoutError, which names it, while another process is at it."""
    with files.locked(Path(f"{out}.work", "at-work.lock"), stop=lambda: True):
        work = Work(out, options)
        yield work
        shutil.rmtree(work.folder)


class Work:
    """What is done so far, in a folder of its own; a run with other options is not gone on with."""

    def __init__(self, out, options):
        self.folder, options = Path(f"{out}.work"), files.plain(options)
        note = self.folder / "options.json"
        if note.exists() and (before := files.read_json(note)) != options:
            changed = ", ".join(f"{k}: {before.get(k)!r}" for k in options if before.get(k) != options[k])
            raise ValueError(f"{self.folder} is a run that was stopped, with other options ({changed}): "
                             "give the same, another --out, or remove it")  # fmt: skip
        files.write_json(note, options)

    def train(self, name, model, data, recipe, objective=cross_entropy):
        """Train `model` in place, or what is left of it."""
        print(f"\n{name}: epochs {recipe.epochs}, on {len(data.train):,} images", flush=True)
        state = self.folder / f"{name.replace(' ', '-').replace(',', '')}.training"
        history = fit(model, data, recipe, objective=objective, checkpoint=state, save_within=60.0, name=name)
        if history.resumed:
            print(f"epochs done before: {history.resumed} of {recipe.epochs}", flush=True)
        return model


def cut(model, data, options):
    """The smaller model, before it is trained again: pruned, then run on fewer tokens."""
    base, tokens = (model.plain, model.token_config) if isinstance(model, TokenViT) else (model, None)
    small = base
    if options.prune:
        print(f"\npruning {options.prune:.0%} of the MACs: what 256 training images say of each channel", flush=True)
        whole = base.config.macs()
        try:
            small = prune(base, data, macs=(1 - options.prune) * whole)
        except BudgetImpossible as short:
            most = math.floor(100 * (1 - short.least / whole)) / 100
            raise ValueError(f"--prune {options.prune:g}: at most {most:g} of this model's MACs can go") from short
        print(f"{base.config.macs() / 1e6:,.1f} -> {small.config.macs() / 1e6:,.1f} MMac an image", flush=True)
    if options.reduce_tokens:
        auto, fields = token_options(options.reduce_tokens)
        tokens = TokenConfig(**fields) if not auto else sought(
            base, small, data, options.batch[-1], fields, seconds=SECONDS, worth=WORTH
        )
    return reduce_tokens(small, tokens) if tokens else small


def compare(arms, costly, data, batches):
    """A row an arm: right on each test image, and for those in `costly` what they cost, timed in turns."""
    rows = {}
    for name, model in arms.items():
        print(f"judging {name!r} on {len(data.test):,} test images", flush=True)
        found, labels = logits(model, data.test, mean=data.mean, std=data.std, batch_size=max(64, batches[-1]))
        rows[name] = {"right": (found.argmax(1) == labels).cpu(), "chance": labels.bincount().max() / len(labels)}
    models, first = {name: arms[name] for name in costly}, arms[BEFORE].config
    shape = first.in_chans, first.image_size, first.image_size
    for batch in batches:
        print(f"timing at batch {batch}, in turns", flush=True)
        images = example(arms[BEFORE], shape, batch)
        timed = meters.compare(models, images, warmup=2, seconds=SECONDS, min_runs=5)
        for name, timing in timed.items():
            rows[name][batch] = timing.median_s
    for name, model in models.items():
        peak = meters.peak_memory(model, images).peak
        rows[name] |= {"macs": macs(model, shape), "size": size_bytes(model), "memory": peak}
    return {name: rows[BEFORE] | row for name, row in rows.items()}  # who was not timed costs the same as before


def table(rows, batches):
    """The rows as text, side by side: accuracy and its change, MACs, size, memory, time and speed at each batch."""
    head = ["", "accuracy, %", "change, points", "MACs, M", "size on disk, MB", f"peak MB at batch {batches[-1]}"]
    lines = [head + [f"{what} at batch {b}" for b in batches for what in ("ms", "images/s")]]
    for name, row in rows.items():
        change = paired_difference(row["right"], rows[BEFORE]["right"])
        change = f"{change.points:+.2f} [{change.low:+.2f}, {change.high:+.2f}]" if name != BEFORE else ""
        cells = [name, f"{100 * row['right'].float().mean():.2f}", change,
                 f"{row['macs'] / 1e6:,.1f}", f"{row['size'] / 1e6:,.2f}", f"{row['memory'] / 1e6:,.1f}"]  # fmt: skip
        lines.append(cells + [f"{v:,.1f}" for b in batches for v in (1e3 * row[b], b / row[b])])
    return columns(list(zip(*lines)))


def verdict(rows, batches):
    """For each batch, whether it paid there: a sentence."""
    found, control = [], UNCUT if UNCUT in rows else BEFORE
    cost = paired_difference(rows[AFTER]["right"], rows[control]["right"])
    price = f"; accuracy against {control!r}: {cost}{'' if cost.clear else ', within noise'}"
    for batch in batches:
        gain, free = (rows[BEFORE][batch] / rows[name][batch] for name in (AFTER, FREE))
        if gain < max(free, 1) * WORTH:
            paid, told = "did not pay", ""
        else:
            paid, told = "has a price" if cost.clear and cost.points < 0 else "paid", price
        found.append(f"At batch {batch} it {paid}: {gain:.2f}x as fast as before; the pooled last block alone, which "
                     f"costs no accuracy, {free:.2f}x{told}.")  # fmt: skip
    if doubts := doubt(rows, cost):
        found.append(f"The accuracies say little: {'; '.join(doubts)}.")
    return "\n".join(found)


def doubt(rows, cost):
    """Why the accuracies, and what the change cost of them, say little: near chance, from few images."""
    right, chance, found = rows[BEFORE]["right"].float(), rows[BEFORE]["chance"].item(), []
    n, share = len(right), right.mean().item()
    if share <= chance + 1.96 * (chance * (1 - chance) / n) ** 0.5:
        found.append(f"before, {100 * share:.1f} % are right, about as many as by naming the commonest class always "
                     f"({100 * chance:.1f} %)")  # fmt: skip
    if (wide := (cost.high - cost.low) / 2) > WIDE:
        found.append(f"{n:,} test images tell a change to about {wide:.1f} points only")
    return found


def apply(options, device, recipe):
    """Do as asked, print it, and leave the smaller model at options.out; recipe: of the fine-tuning.

    KeyboardInterrupt, BudgetSpent: the same call goes on later.
    """
    rng.seed_all(recipe.seed)
    data = datasets.load(options.data, device=device, size=image_size(options.model, options.data),
                         on_error=options.on_error)  # fmt: skip
    print(data.describe(), flush=True)
    model, new = load_model(options.model, data.num_classes, device)
    if new and not options.fine_tune:
        raise ValueError(f"{options.model} has no head for these {data.num_classes} classes yet: give --fine-tune 5")
    asked = {name: getattr(options, name) for name in ("model", "prune", "reduce_tokens", "fine_tune", "distill")}
    with work_on(options.out, asked | {"recipe": recipe, "data": data.key}) as work:
        _apply(work, options, model, new, data, recipe)
    print(f"\n{options.out}: the smaller model, for vitlab evaluate, measure, export and for vitlab.load")


def _apply(work, options, model, new, data, recipe):
    if new:
        work.train("a head for these classes", model, data, recipe)
    path = work.folder / "cut.safetensors"
    if not path.exists():
        checkpoint.save(cut(model, data, options), path)
    small = checkpoint.load(path, data.train.images.device)
    free = getattr(model, "token_config", TokenConfig(r_max=0.0))
    arms = {BEFORE: model, FREE: reduce_tokens(model, free, pooled_last=True)}
    if options.fine_tune:
        objective = Distill(model) if options.distill else cross_entropy
        arms[UNCUT] = work.train(UNCUT, copy.deepcopy(model), data, recipe, objective)
        work.train("the smaller model", small, data, recipe, objective)
    print()
    rows = compare(arms | {AFTER: small}, (BEFORE, FREE, AFTER), data, options.batch)
    print(f"\n{table(rows, options.batch)}\n\n{verdict(rows, options.batch)}")
    about = {"dataset": options.data, "data": data.key, "recipe": recipe, "made from": options.model}
    checkpoint.save(small, options.out, about)
