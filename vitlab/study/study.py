"""What a notebook works with: data sets, arms that are trained once, rows, figures, conclusions, claims.

study = Study("01_baseline", preset="tiny")
arms = study.arms(spec, data, seeds=[0, 1, 2])    # fit, or load what was fitted before
rows = study.rows(arms, data)                     # measured, each written to results/
study.save(plots.curves(arms), "curves")
study.conclude(f"The best reads {rows.accuracy_top1.max():.2f} %.")
study.settle_rows(rows, claims.select(project="S0"))
"""

import copy
import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from vitlab.data import datasets
from vitlab.metrics.measure import accuracy, measure
from vitlab.models import checkpoint
from vitlab.study import plots, verdicts, zoo
from vitlab.study.answers import answers, differences, image_noise_of
from vitlab.study.noise import image_noise
from vitlab.train.loop import History, cross_entropy, fit
from vitlab.train.recipe import told_apart
from vitlab.utils import rng
from vitlab.utils.device import hold_memory
from vitlab.utils.files import described, digest, identity, locked, read_record, write_record
from vitlab.utils.provenance import provenance

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"  # trained arms that come with the project
NO_ROWS = {"verdicts": "claims.json", "conclusions": "conclusions.json"}  # files beside the rows of a notebook


@dataclass(frozen=True)
class Arm:
    """A finished arm: its model (in eval mode), how it was trained and how that went."""

    name: str
    seed: int
    key: str
    model: torch.nn.Module
    history: History
    spec: zoo.Spec
    before: int = 0  # epochs of the arm that it started from

    @property
    def title(self):
        return self.spec.title

    @property
    def epochs(self):
        """Epochs that its weights have seen, those of the arm it started from among them."""
        return self.before + self.spec.recipe.epochs


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
        self.root = Path(root or os.environ.get("VITLAB_ROOT") or Path(__file__).parents[2])
        self.fresh = os.environ.get("VITLAB_FRESH") == "1"
        self.verdicts, self.conclusions = {}, {}
        self._data, self._trained, self._read = {}, set(), []
        hold_memory()
        plots.theme()
        # tables in a notebook are shown whole: a note that is cut off tells nothing
        pd.set_option("display.max_colwidth", None, "display.max_rows", 200)

    def folder(self, kind):
        """results/ or figures/ of this notebook and preset."""
        return self.root / kind / self.preset / self.notebook

    def data(self, name, *, optional=False):
        """The data set `name` on the study's device (see `vitlab.data.datasets.load`), loaded once.

        optional: a data set that cannot be had is None, and the log says so, instead of an error.
        """
        if name not in self._data:
            try:
                self._data[name] = datasets.load(name, device=self.device)
            except datasets.DatasetMissing as error:
                if not optional:
                    raise
                self.log(f"not run for want of data: {error}")
            if name in self._data and (few := os.environ.get("VITLAB_REHEARSAL")):  # see `vitlab run --rehearse`
                self._data[name] = self._data[name].few(int(few))
        return self._data.get(name)

    def arm(self, spec, data, seed=0, *, start=None, objective=cross_entropy, on_epoch=(), name=None):
        """The trained `Arm` of a `zoo.Spec` on `data`: loaded if it was trained before, else trained now.

        The model is what `spec.config` builds, or a copy of that of `start`, a finished Arm. objective and on_epoch
        go to `fit`. The arm is known by its `arm_key`, which has all of these in it; ValueError where an objective
        or a hook does not say what it does. A run that was stopped goes on where it was.
        """
        spec, name = zoo.fitted(spec, data), name or spec.name
        if start is not None:
            spec = dataclasses.replace(spec, config=start.model.config)
        recipe, before = dataclasses.replace(spec.recipe, seed=seed), start.epochs if start else 0
        key = arm_key(spec.config, recipe, data.key, start=start, objective=objective, on_epoch=on_epoch)
        path = self.root / "checkpoints" / self.preset / f"{key}.safetensors"
        state = self.root / ".state" / "training" / self.preset / f"{key}.safetensors"
        with locked(state.with_suffix(".lock"), lambda line: self.log(f"{name}, seed {seed}: {line}")):
            stored = (path if path.exists() else _shipped(key)) if not self.fresh or key in self._trained else None
            if stored:
                arm = self.load(stored, spec, name=name, seed=seed)
                if arm.key != key:
                    raise ValueError(f"{stored} holds another arm ({arm.key}): delete it, and {name} is trained again")
                return dataclasses.replace(arm, before=before)
            rng.seed_all(seed)
            model = (spec.config.build() if start is None else copy.deepcopy(start.model)).to(self.device)
            self.log(f"{name}, seed {seed}: training {recipe.epochs} epochs on {data.name}")
            if self.fresh:
                state.unlink(missing_ok=True)
            history = fit(
                model, data, recipe, objective=objective, on_epoch=on_epoch, checkpoint=state, log=self.log, name=name,
                tensorboard=self.root / "runs" / self.preset / f"{name.replace('/', '-')}-s{seed}",
            )  # fmt: skip
            about = {"key": key, "name": name, "seed": seed, "recipe": recipe, "dataset": data.name, "data": data.key,
                     "start": start and start.key, "history": history.rows, "trained_in": history.dtype}  # fmt: skip
            checkpoint.save(model, path, about | provenance(self.device))
            state.unlink(missing_ok=True)
            self._trained.add(key)
            return Arm(name, seed, key, model, history, spec, before)

    def arms(self, spec, data, seeds, **options):
        """`arm` for each seed."""
        return [self.arm(spec, data, seed, **options) for seed in seeds]

    def load(self, path, spec, *, name=None, seed=0):
        """The Arm in a checkpoint, as an arm of `spec`; what the file does not tell of its training is unknown."""
        about = checkpoint.read(path).about
        rows = about.get("history", [])
        history = History(rows, resumed=len(rows), dtype=about.get("trained_in"))
        name, key = name or spec.name, about.get("key") or digest(Path(path).read_bytes().hex())
        how = "comes with the project, in half precision" if Path(path).parent == DEMO else "trained before"
        self.log(f"{name}, seed {seed}: {how} ({history.seconds:,.0f} s on {about.get('device', 'another machine')})")
        return Arm(name, seed, key, checkpoint.load(path, self.device), history, spec)

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
            "notebook": self.notebook, "preset": self.preset, "device_type": self.device.type, "epochs": arm.epochs,
            "as_published": not arm.spec.changes, "changes": arm.spec.why,
            "val_accuracy": last.get("val_accuracy"), "train_s": arm.history.seconds,
            "trained_in": arm.history.dtype,
        } | found | extra  # fmt: skip
        self.write_row(f"{arm.name}-{data.name}-s{arm.seed}", row, measured_s=time.time() - started)
        self._read.append(row)
        return row

    def write_row(self, name, row, **extra):
        """Write one row, with its provenance, to results/<preset>/<notebook>/<name>.json."""
        safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
        write_record(self.folder("results") / f"{safe}.json", row | extra | provenance(self.device))

    def rows(self, arms, data, **options):
        """A DataFrame of the rows of several arms on the same data."""
        return pd.DataFrame([self.row(arm, data, **options) for arm in arms])

    def scores(self, arm, data):
        """The `Accuracy` of an arm on the test split (confusion matrix, per class)."""
        return accuracy(arm.model, data.test, mean=data.mean, std=data.std, num_classes=data.num_classes,
                        dtype=arm.spec.recipe.torch_dtype(self.device))  # fmt: skip

    def save(self, figure, name):
        """Write a figure to figures/<preset>/<notebook>/<name>.png and .pdf, and return it for display."""
        return plots.save(figure, self.folder("figures") / name)

    def conclude(self, text, about=None):
        """Show a sentence (Markdown), and keep it in results/: what README and the scoreboard say of this notebook.

        about: what it is about, a few words; another sentence about the same takes its place. The file has the
        sentences in the order in which they were first said.
        """
        self.conclusions[about or text] = {"about": about, "text": text}
        self._write("conclusions", list(self.conclusions.values()))
        say(text)

    def settle(self, claim, values, **options):
        """`verdicts.settle`; what it says is kept for `claims_table` and written to results/.

        `shared`, unless given, is the noise that the test images give the arms that were measured so far.
        """
        options = {"shared": image_noise(pd.DataFrame(self._read))} | options
        verdict = verdicts.settle(claim, values, **options)
        self.verdicts[verdict.claim] = verdict
        self._write("verdicts", [dataclasses.asdict(v) for v in self.verdicts.values()])
        return verdict

    def settle_rows(self, rows, selected, **options):
        """Settle the selected claims by what the rows (a DataFrame) answer (see `answers`); options: of `settle`."""
        for claim in selected:
            values, as_published, why = answers(claim, rows)
            found = {"differences": differences(claim, rows), "shared": image_noise_of(claim, rows)} | options
            self.settle(claim, values, as_published=as_published, why=why, **found)

    def _write(self, what, rows):
        write_record(self.folder("results") / NO_ROWS[what], {what: rows} | provenance(self.device))

    def claims_table(self, selected):
        """claimed | measured | verdict | note of the selected claims; what was not settled is pending.

        Here as in CLAIMS.md, directions are corrected for the number of comparisons.
        """
        return verdicts.table(selected, verdicts.controlled(self.verdicts.values()))

    def claims_summary(self, selected):
        """One sentence of counts over the selected claims."""
        settled = {v.claim: v for v in verdicts.controlled(self.verdicts.values())}
        return verdicts.summary(settled.get(c.id, verdicts.Verdict(claim=c.id, status="pending")) for c in selected)


def arm_key(config, recipe, data, *, start=None, objective=cross_entropy, on_epoch=()):
    """The key of an arm: a digest of all that can change its numbers.

    That is its model's config, the recipe (with the seed), the data's key, the key of the arm it starts from, and
    what objective and hooks say of themselves (see `described`). Whether it was compiled is not part of it, and
    the number format only where the recipe fixes one.
    """
    method = {"start": start and start.key, "on_epoch": [described(hook) for hook in on_epoch],
              "objective": None if objective is cross_entropy else described(objective)}  # fmt: skip
    method = {k: v for k, v in method.items() if v}
    return digest([type(config).__name__, identity(config), told_apart(recipe), data, method or ""])


def _shipped(key):
    """Path of the trained arm of that key that comes with the project, or None."""
    return next((p for p in sorted(DEMO.glob("*.safetensors")) if checkpoint.read(p).about.get("key") == key), None)


def say(text):
    """Show a sentence, written in Markdown, where a notebook shows outputs (plain text elsewhere)."""
    from IPython.display import Markdown, display

    display(Markdown(text))


def read_rows(root, preset, notebook="*"):
    """A DataFrame of all rows under results/<preset>/<notebook>/; empty where there are none."""
    files = sorted(Path(root, "results", preset).glob(f"{notebook}/*.json"))
    return pd.DataFrame([read_record(f) for f in files if f.name not in NO_ROWS.values()])
