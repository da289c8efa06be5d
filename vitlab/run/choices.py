"""What `vitlab train` was asked for, as a model's config and a recipe: any field of either is an option."""

import ast
import contextlib
import dataclasses
import difflib
import typing

from vitlab.models import checkpoint
from vitlab.study import zoo

# option of the command line -> what the attention calls it, the attentions that have it
ATTENTION_OPTIONS = {
    "ripple_stages": ("stages", ("ripple",)),
    "hydra_branches": ("branches", ("hydra",)),
    "no_kernels": ("kernels", ("linear", "ripple", "hydra")),
}


def recipe(given):
    """The published recipe with what is given; the warm-up in proportion to the epochs."""
    published = zoo.get("S4/baseline").recipe
    given = typed(type(published), given)
    warmup = published.warmup * given.get("epochs", published.epochs) / published.epochs
    return dataclasses.replace(published, **{"warmup": warmup, **given})


def config(options, given):
    """A function of the data that makes the config asked for; what is wrong with the options is said before."""
    kind, _, name = options.model.partition(":")
    cls = checkpoint.config_class(kind)
    if "num_classes" in given:
        raise ValueError(f"--num-classes {given['num_classes']}: the data decide on that")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given = typed(cls, given) | ({"name": name} if name else {})
    needed = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := sorted(set(needed) - {*given, "num_classes"}):
        raise ValueError(f"--model {options.model} needs {', '.join(missing)}, too; "
                         "a model around another one is made by pruning or shortening it")  # fmt: skip
    if kind == "vit":
        published = zoo.get("S4/baseline").config
        given = {name: getattr(published, name) for name in fields} | {"mlp_dim": None} | given
    for option, (name, owners) in ATTENTION_OPTIONS.items():
        if (value := getattr(options, option)) is not None:
            if (attention := given["attention"] if kind == "vit" else kind) not in owners:
                wanted = f"--{option.replace('_', '-')} needs --attention {' or '.join(owners)}"
                raise ValueError(f"{wanted}, not {attention}")
            given["attention_args"] += ((name, value),)

    def make(data):
        size = {"image_size": data.image_size} if "image_size" in fields else {}
        return cls(**{**size, **given, "num_classes": data.num_classes})

    return make


def typed(cls, given):
    """{field: text} as values of the dataclass's types; ValueError for an unknown name or another type."""
    hints, found = typing.get_type_hints(cls), {}
    fields = [f.name for f in dataclasses.fields(cls)]
    for name, text in given.items():
        option = f"--{name.replace('_', '-')}"
        if name not in fields:
            near = difflib.get_close_matches(name, fields) or fields
            raise ValueError(f"unknown option {option}: {cls.__name__} has {', '.join(near)}")
        kinds = [typing.get_origin(kind) or kind for kind in typing.get_args(hints[name]) or (hints[name],)]
        value = text
        if str not in kinds:
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval({"none": "None", "true": "True", "false": "False"}.get(text, text))
        if tuple in kinds and isinstance(value, (list, dict)):
            value = tuple(value.items() if isinstance(value, dict) else value)
        if type(value) is int and float in kinds:
            value = float(value)
        if type(value) not in kinds:
            wanted = " or ".join(kind.__name__.replace("NoneType", "none") for kind in kinds)
            raise ValueError(f"{option} {text!r}: {wanted} is needed")
        found[name] = value
    return found
