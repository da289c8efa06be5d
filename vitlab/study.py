"""What a notebook works with: data sets, arms that are trained once, rows, figures, claims.

    study = Study("01_baseline", preset="tiny")
    arms = study.arms(spec, data, seeds=[0, 1, 2])    # fit, or load what was fitted before
    rows = study.rows(arms, data)                     # measured, each written to results/
    study.save(plots.curves(arms), "curves")
    study.settle("S0/dense/parameters", 5.53, as_published=True)
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vitlab import claims, plots, rng, zoo
from vitlab import data as datasets
from vitlab.files import atomic, digest, plain, read_json, write_json
from vitlab.inference import hold_memory
from vitlab.measure import accuracy, measure
from vitlab.models.vit import ViT
from vitlab.provenance import provenance
from vitlab.recipe import told_apart
from vitlab.train import History, cross_entropy, fit

DEMO = Path(__file__).parents[1] / "checkpoints" / "demo"  # trained arms that come with the project


@dataclass(frozen=True)
class Arm:
    """A finished arm: its model (in eval mode), how it was trained and how that went."""

    name: str
    seed: int
    key: str
    model: torch.nn.Module
    history: History
    spec: zoo.Spec

    @property
    def title(self):
        return self.spec.title


class Study:
    """One notebook's view of the project: where its outputs go and what it has settled.

    notebook: its file's stem; preset: the folder under results/, figures/ and checkpoints/. device: "auto" is
    CUDA where there is one. root: the folder all outputs go under (default: VITLAB_ROOT, else the
    checkout). VITLAB_FRESH=1 trains what was trained before again.
    """

    def __init__(self, notebook, preset="tiny", *, device="auto", root=None, log=print):
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(auto if device == "auto" else device)
        self.notebook, self.preset, self.log = notebook, preset, log
        self.root = Path(root or os.environ.get("VITLAB_ROOT") or Path(__file__).parents[1])
        self.fresh = os.environ.get("VITLAB_FRESH") == "1"
        self.verdicts = {}
        self._data, self._trained = {}, set()
        hold_memory()
        plots.theme()
        _whole_tables()

    def folder(self, kind):
        """results/ or figures/ of this notebook and preset."""
        return self.root / kind / self.preset / self.notebook

    # ------------------------------------------------------------------------------------------- data

    def data(self, name, *, optional=False, **options):
        """The data set `name` on the study's device (see `vitlab.data.load`), loaded once.

        optional: a data set that cannot be had is None, and the log says so, instead of an error.
        """
        key = digest([name, options])
        if key not in self._data:
            try:
                self._data[key] = datasets.load(name, device=self.device, **options)
            except datasets.DatasetMissing as error:
                if not optional:
                    raise
                self.log(f"not run for want of data: {error}")
                return None
        return self._data[key]

    # ------------------------------------------------------------------------------------------- arms

    def arm(self, spec, data, seed=0, *, build=ViT, objective=cross_entropy, on_epoch=(), variant="", name=None):
        """The trained `Arm` of a `zoo.Spec` on `data`: loaded if it was trained before, else trained now.

        objective and on_epoch go to `fit`; whatever they add must be told apart by `variant` (plain data: it
        is part of the key, as are the configuration, the recipe, the data and the seed), ValueError
        otherwise. A run that was stopped goes on where it was.
        """
        if (objective is not cross_entropy or on_epoch) and not variant:
            raise ValueError(f"{spec.name}: an arm with its own objective or hooks needs a `variant` for its key")
        spec, name = zoo.fitted(spec, data), name or spec.name
        recipe = plain(spec.recipe) | {"seed": seed}
        key = arm_key(spec.config, recipe, data.key, variant)
        path = self.root / "checkpoints" / self.preset / f"{key}.safetensors"
        rng.seed_all(seed)
        model = build(spec.config).to(self.device)
        if not self.fresh or key in self._trained:
            for found in (path, _shipped(key)):
                if found and found.exists() and found.with_suffix(".json").exists():
                    return self._load(found, name, seed, key, model, spec)
        self.log(f"{name}, seed {seed}: training {spec.recipe.epochs} epochs on {data.name}")
        state = self.root / ".state" / "training" / self.preset / f"{key}.safetensors"
        if self.fresh:
            state.unlink(missing_ok=True)
        history = fit(
            model, data, type(spec.recipe)(**recipe), objective=objective, on_epoch=on_epoch, checkpoint=state,
            log=self.log, tensorboard=self.root / "runs" / self.preset / f"{name.replace('/', '-')}-s{seed}",
            name=name,
        )  # fmt: skip
        self._store(path, name, seed, model, history, spec, data, variant)
        state.unlink(missing_ok=True)
        self._trained.add(key)
        return Arm(name, seed, key, model, history, spec)

    def arms(self, spec, data, seeds, **options):
        """`arm` for each seed."""
        return [self.arm(spec, data, seed, **options) for seed in seeds]

    def _store(self, path, name, seed, model, history, spec, data, variant):
        with atomic(path) as part:
            save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, part)
        # the description comes last: weights without it are not yet an arm
        write_json(
            path.with_suffix(".json"),
            {"name": name, "seed": seed, "config": plain(spec.config), "recipe": plain(spec.recipe), "data": data.key,
             "dataset": data.name, "variant": variant, "history": history.rows,
             "trained_in": history.dtype} | provenance(self.device),
        )  # fmt: skip

    def _load(self, path, name, seed, key, model, spec):
        stored = read_json(path.with_suffix(".json"))
        model.load_state_dict(load_file(path))
        history = History(stored["history"], resumed=len(stored["history"]), dtype=stored.get("trained_in"))
        how = "comes with the project, in half precision" if stored.get("key") else "trained before"
        self.log(f"{name}, seed {seed}: {how} ({history.seconds:,.0f} s on {stored['device']})")
        return Arm(name, seed, key, model.eval(), history, spec)

    # ------------------------------------------------------------------------------------------- rows

    def row(self, arm, data, *, seconds=2.0, batch=256, **extra):
        """Measure `arm` on the test split of `data`, write its row to results/ and return it.

        The test split is read by this and by `scores`, of finished arms, and nowhere else. `seconds` goes to
        each timing, `batch` is that of throughput and memory; `extra` columns are added.
        """
        started = time.time()
        dtype = arm.spec.recipe.torch_dtype(self.device)
        found = measure(arm.model, data, dtype=dtype, batch=batch, seconds=seconds)
        last = arm.history.rows[-1] if len(arm.history) else {}
        row = {
            "arm": arm.name, "title": arm.title, "seed": arm.seed, "key": arm.key, "dataset": data.name,
            "notebook": self.notebook, "preset": self.preset, "epochs": arm.spec.recipe.epochs,
            "as_published": not arm.spec.changes, "changes": arm.spec.why,
            "val_accuracy": last.get("val_accuracy"), "train_s": arm.history.seconds,
        } | found | extra  # fmt: skip
        self.write_row(f"{arm.name}-{data.name}-s{arm.seed}", row, measured_s=time.time() - started)
        return row

    def write_row(self, name, row, **extra):
        """Write one row, with its provenance, to results/<preset>/<notebook>/<name>.json."""
        safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
        write_json(self.folder("results") / f"{safe}.json", row | extra | provenance(self.device))

    def rows(self, arms, data, **options):
        """A DataFrame of the rows of several arms on the same data."""
        import pandas as pd

        return pd.DataFrame([self.row(arm, data, **options) for arm in arms])

    def scores(self, arm, data):
        """The `Accuracy` of an arm on the test split (confusion matrix, per class)."""
        dtype = arm.spec.recipe.torch_dtype(self.device)
        classes = data.num_classes
        return accuracy(arm.model, data.test, mean=data.mean, std=data.std, num_classes=classes, dtype=dtype)

    # -------------------------------------------------------------------------------- figures and claims

    def save(self, figure, name):
        """Write a figure to figures/<preset>/<notebook>/<name>.png and .pdf, and return it for display."""
        return plots.save(figure, self.folder("figures") / name)

    def settle(self, claim, values, *, as_published, why=""):
        """Settle a claim (see `vitlab.claims.settle`); it is kept for `claims_table` and written to results/."""
        verdict = claims.settle(claim, values, as_published=as_published, why=why)
        self.verdicts[verdict.claim] = verdict
        rows = [v.to_row() for v in self.verdicts.values()]
        write_json(self.folder("results") / "claims.json", {"verdicts": rows} | provenance(self.device))
        return verdict

    def claims_table(self, selected):
        """claimed | measured | verdict | note of the selected claims; what was not settled is pending."""
        return claims.table(selected, self.verdicts.values())

    def claims_summary(self, selected):
        """One sentence of counts over the selected claims."""
        return claims.summary([self.verdicts.get(c.id) or claims.settle(c, None, as_published=False) for c in selected])


def arm_key(config, recipe, data, variant=""):
    """The key of an arm: its configuration, recipe (a dictionary, with the seed), data's key and variant.

    How fast it ran, compiled or in which precision, is not part of it.
    """
    return digest([type(config).__name__, plain(config), told_apart(recipe), data, variant])


def _shipped(key):
    """Path of the trained arm of that key that comes with the project, or None; VITLAB_FRESH=1 trains it again."""
    for described in sorted(DEMO.glob("*.json")):
        if read_json(described)["key"] == key:
            return described.with_suffix(".safetensors")
    return None


def _whole_tables():
    """Tables in a notebook are shown whole: a note that is cut off tells nothing."""
    import pandas as pd

    pd.set_option("display.max_colwidth", None, "display.max_rows", 200)


def say(text):
    """Show a sentence, written in Markdown, where a notebook shows outputs (plain text elsewhere)."""
    from IPython.display import Markdown, display

    display(Markdown(text))


def read_rows(root, preset, notebook="*"):
    """A DataFrame of all rows under results/<preset>/<notebook>/; empty where there are none."""
    import pandas as pd

    files = sorted(Path(root, "results", preset).glob(f"{notebook}/*.json"))
    return pd.DataFrame([json.loads(f.read_text()) for f in files if f.name != "claims.json"])
