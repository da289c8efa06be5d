"""A model is its config: the registry of the kinds of models there are, and one file format for all of them.

A config is a frozen dataclass under `@register(kind)`. It has `build()`, which makes the module (whose `config` is that
config), `macs()`, the multiply-accumulates of one image in closed form, and, for images, `image_size`, `in_chans` and
`num_classes`. A model around another has the other's config in its own (`Wrapper`).

A file holds tensors and JSON (safetensors), never code, so that loading one that comes from elsewhere is safe.
"""

import dataclasses
import hashlib
import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

import vitlab
from vitlab.utils.device import eager
from vitlab.utils.files import plain
from vitlab.utils.tensors import load_tensors, save_tensors

FORMAT = "vitlab-model-1"
REGISTRY = {}  # kind -> config class


def register(kind):
    """Class decorator: the frozen dataclass below it is the config of models of this `kind`."""

    def enter(config_class):
        config_class.kind = kind
        REGISTRY[kind] = config_class
        return config_class

    return enter


def config_class(kind):
    """The config class of that kind; the module that registers it is imported when it is first asked for."""
    if kind not in REGISTRY and kind in vitlab.KINDS:
        importlib.import_module(vitlab.KINDS[kind])
    if kind not in REGISTRY:
        raise ValueError(f"kind={kind!r}: no such model; there are {', '.join({**vitlab.KINDS, **REGISTRY})}")
    return REGISTRY[kind]


class Wrapper:
    """Base class of a config around another one, `base`; what it does not say itself, the base says."""

    def __getattr__(self, name):
        if name.startswith("__") or name == "base":  # copies and pickles ask before there is a base
            raise AttributeError(name)
        return getattr(self.base, name)


def as_dataclass(cls, value):
    """`value` if it is a `cls`, else the `cls` with the fields in the dictionary `value`; ValueError names others."""
    if isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a {cls.__name__}, nor a dictionary of its fields")
    known = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(value) - set(known)):
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; its fields: {', '.join(known)}")
    try:
        return cls(**value)
    except TypeError as error:  # a field is missing, or of a type that cannot be compared
        raise ValueError(f"{cls.__name__} cannot be made from {value}: {error}") from error


def to_dict(config):
    """The config as plain data: {"kind": ..., **fields}; configs within it likewise."""
    if type(config) is not REGISTRY.get(getattr(config, "kind", None)):
        raise ValueError(f"a {type(config).__name__} is not the config of a registered kind of model")
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {"kind": config.kind} | {
        name: to_dict(value) if hasattr(value, "kind") else plain(value) for name, value in fields.items()
    }


def from_dict(stored):
    """The config that `to_dict` gave as plain data. ValueError: an unknown kind, field or value, by name."""
    if not isinstance(stored, dict) or "kind" not in stored:
        raise ValueError(f"{str(stored)[:80]!r} is not a config: a dictionary with a kind is needed")
    fields = {
        name: from_dict(value) if isinstance(value, dict) and "kind" in value else value
        for name, value in stored.items() if name != "kind"
    }  # fmt: skip
    return as_dataclass(config_class(stored["kind"]), fields)


@dataclass(frozen=True)
class Stored:
    """What a file holds: the model's config, what was written about it (plain data), its tensors by name."""

    config: object
    about: dict
    tensors: dict


def save(model, path, about=None):
    """Write a model to one safetensors file, whole or not at all: weights in their precision, config, `about`.

    about: plain data that goes along (how it was trained, ...). ValueError: a model without a registered config.
    """
    model = eager(model)
    if not hasattr(model, "config"):
        raise ValueError(f"a {type(model).__name__} has no config, so that nothing could build it again")
    meta = {"format": FORMAT, "config": json.dumps(to_dict(model.config)),
            "about": json.dumps(plain(about or {}), allow_nan=False)}  # fmt: skip
    # copies, as safetensors refuses tensors that share their memory
    save_tensors(path, {k: v.detach().to("cpu", copy=True).contiguous() for k, v in model.state_dict().items()}, meta)


def read(path):
    """What `save` wrote to `path`, as `Stored`. ValueError, with the file's name, for anything else."""
    return _named(path, _read)


def load(path, device="cpu"):
    """The model that `save` wrote to `path`, in eval mode on `device`; float32 whatever the file's precision."""

    def build(path):
        stored = _read(path)
        model = stored.config.build()
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in stored.tensors.items()})
        return model.eval().to(device)

    return _named(path, build)


def fingerprint(model):
    """A short hexadecimal digest of what a model is: its class, its config if it has one, its weights and buffers."""
    found = hashlib.sha256(f"{type(model).__qualname__} {plain(getattr(model, 'config', None))}".encode())
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def _named(path, action):
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is {'a folder' if Path(path).is_dir() else 'not there'}")
    try:
        return action(path)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no model that this version can read: {error}") from error


def _read(path):
    tensors, meta = load_tensors(path)
    if meta.get("format") != FORMAT:
        raise ValueError(f"its format is {meta.get('format')!r}, not {FORMAT!r}")
    return Stored(from_dict(json.loads(meta["config"])), json.loads(meta["about"]), tensors)
