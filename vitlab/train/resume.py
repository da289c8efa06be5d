"""The whole state of a training run in one atomic safetensors file."""

import contextlib
import dataclasses
import json
from pathlib import Path

import torch
from torch import nn

from vitlab.train.recipe import told_apart
from vitlab.utils import rng
from vitlab.utils.files import described, digest, identity
from vitlab.utils.tensors import load_tensors, save_tensors

FORMAT = "vitlab-training-1"


class TrainingState:
    """Saves and restores weights, optimiser, averaged weights, objective, hooks, generators, history and `dtype`
    (the precision the run is executed in; None as long as none was loaded or set).

    A path of None keeps nothing. Model, recipe, data, objective and hooks must be those of the saved run, else
    ValueError: another run's state is never taken up by mistake.
    """

    def __init__(self, path, recipe, run, hooks):
        self.path = Path(path) if path else None
        self.run, self.model, self.hooks = run, run.model, hooks
        self.objective = run.objective if isinstance(run.objective, nn.Module) else None
        shapes = {k: list(v.shape) for k, v in self.model.state_dict().items()}
        # how a run is executed may change between its parts; what is computed may not
        config = getattr(self.model, "config", None)
        config = identity(config) if dataclasses.is_dataclass(config) else None
        self.identity = digest({"recipe": told_apart(recipe), "model": [type(self.model).__name__, config, shapes],
                                "data": run.data.key, "method": all_described([run.objective, *hooks])})
        self.dtype = None

    def tensors(self):
        found = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.run.ema is not None:
            found |= {f"ema.{k}": v for k, v in self.run.ema.module.state_dict().items()}
        if self.objective is not None:
            found |= {f"objective.{k}": v for k, v in self.objective.state_dict().items()}
        for index, slots in self.run.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{k}": v for k, v in slots.items() if torch.is_tensor(v)}
        found |= {f"begun.{k}": v for k, v in self.run.begun.items()}
        return found | {f"rng.{k}": v for k, v in rng.state().items()}

    def save(self, history):
        if self.path is None:
            return
        hooks = [hook.state_dict() if hasattr(hook, "state_dict") else None for hook in self.hooks]
        meta = {"format": FORMAT, "identity": self.identity, "history": json.dumps(history), "hooks": json.dumps(hooks),
                "dtype": self.dtype or ""}  # fmt: skip
        # clones: tied or viewed tensors share storage, which safetensors refuses
        save_tensors(self.path, {k: v.detach().cpu().clone().contiguous() for k, v in self.tensors().items()}, meta)

    def load(self):
        """Restore the run found at the path; its history, [] when there is none."""
        if self.path is None or not self.path.exists():
            return []
        try:
            tensors, meta = load_tensors(self.path)
        except ValueError as error:
            raise ValueError(f"{self.path} is not a readable checkpoint ({error}); delete it to start anew") from error
        if meta.get("format") != FORMAT or meta.get("identity") != self.identity:
            raise ValueError(
                f"{self.path} belongs to another run (its model, recipe, data or method differ): give another path, "
                "or delete it"
            )
        groups = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            groups.setdefault(kind, {})[rest] = tensor
        for hook, stored in zip(self.hooks, json.loads(meta["hooks"])):
            if stored is not None:
                hook.load_state_dict(stored)
            if hasattr(hook, "restore"):
                self.run.reshaped(hook.restore(self.model))
        self.model.load_state_dict(groups["model"])
        if self.run.ema is not None:
            self.run.ema.module.load_state_dict(groups["ema"])
        if self.objective is not None:
            self.objective.load_state_dict(groups.get("objective", {}))
        self._load_optimizer(groups.get("optimizer", {}))
        self.run.begun = groups.get("begun", {})
        rng.restore(groups["rng"])
        self.dtype = meta.get("dtype") or None
        return json.loads(meta["history"])

    def _load_optimizer(self, tensors):
        state = {}
        for name, tensor in tensors.items():
            index, _, slot = name.partition(".")
            state.setdefault(int(index), {})[slot] = tensor
        whole = self.run.optimizer.state_dict()
        self.run.optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def all_described(methods):
    """`described`, of those objectives and hooks that say what they do."""
    found = []
    for method in methods:
        with contextlib.suppress(ValueError):
            found.append(described(method))
    return found


def carry_state(old, before, new, after, carry):
    """Give the optimiser `new` the state of `old`, cut as `carry(name, tensor)` says where a parameter was cut.

    before, after: {name: parameter} of the model then and now; parameters of neither keep their state.
    """
    names = {id(parameter): name for name, parameter in after.items()}
    for parameter in (p for group in new.param_groups for p in group["params"]):
        name = names.get(id(parameter))
        was = before[name] if name else parameter
        state = dict(old.state.get(was, {}))
        for slot, value in state.items():
            if name and torch.is_tensor(value) and value.shape == was.shape:
                # fused optimisers read the state in the parameter's own order in memory
                state[slot] = carry(name, value).clone(memory_format=torch.contiguous_format)
        if state:
            new.state[parameter] = state
