"""The whole state of a training run in one atomic safetensors file."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vitlab import rng
from vitlab.files import atomic, digest, plain
from vitlab.recipe import told_apart

FORMAT = "vitlab-training-1"


class TrainingState:
    """Saves and restores weights, optimiser, averaged weights, objective, hooks, generators, history and `dtype`
    (the precision the run is executed in; None as long as none was loaded or set).

    A path of None keeps nothing. The recipe and the names and shapes of all tensors must be those of the
    saved run, else ValueError: another run's state is never taken up by mistake.
    """

    def __init__(self, path, recipe, model, optimizer, ema, objective, hooks):
        self.path = Path(path) if path else None
        self.model, self.optimizer, self.ema, self.hooks = model, optimizer, ema, hooks
        self.objective = objective if isinstance(objective, nn.Module) else None
        self.dtype = None
        shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
        self.identity = digest({"recipe": told_apart(plain(recipe)), "shapes": shapes})

    def tensors(self):
        found = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.ema is not None:
            found |= {f"ema.{k}": v for k, v in self.ema.module.state_dict().items()}
        if self.objective is not None:
            found |= {f"objective.{k}": v for k, v in self.objective.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{k}": v for k, v in slots.items() if torch.is_tensor(v)}
        return found | {f"rng.{k}": v for k, v in rng.state().items()}

    def save(self, history):
        if self.path is None:
            return
        hooks = [hook.state_dict() if hasattr(hook, "state_dict") else None for hook in self.hooks]
        meta = {"format": FORMAT, "identity": self.identity, "history": json.dumps(history), "hooks": json.dumps(hooks),
                "dtype": self.dtype or ""}  # fmt: skip
        # clones: tied or viewed tensors share storage, which safetensors refuses
        tensors = {k: v.detach().cpu().clone().contiguous() for k, v in self.tensors().items()}
        with atomic(self.path) as part:
            save_file(tensors, part, meta)

    def load(self):
        """Restore the run found at the path; its history, [] when there is none."""
        if self.path is None or not self.path.exists():
            return []
        try:
            with safe_open(self.path, "pt") as file:
                meta = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise ValueError(f"{self.path} is not a readable checkpoint ({error}); delete it to start anew") from error
        if meta.get("format") != FORMAT or meta.get("identity") != self.identity:
            raise ValueError(
                f"{self.path} belongs to another run (its model or recipe differ); give another path, or delete it"
            )
        groups = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            groups.setdefault(kind, {})[rest] = tensor
        self.model.load_state_dict(groups["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(groups["ema"])
        if self.objective is not None:
            self.objective.load_state_dict(groups.get("objective", {}))
        self._load_optimizer(groups.get("optimizer", {}))
        for hook, stored in zip(self.hooks, json.loads(meta["hooks"])):
            if stored is not None:
                hook.load_state_dict(stored)
        rng.restore(groups["rng"])
        self.dtype = meta.get("dtype") or None
        return json.loads(meta["history"])

    def _load_optimizer(self, tensors):
        state = {}
        for name, tensor in tensors.items():
            index, _, slot = name.partition(".")
            state.setdefault(int(index), {})[slot] = tensor
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
