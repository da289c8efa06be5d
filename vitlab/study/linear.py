"""What the study of linear attention needs beside `Study`: variants of a baseline, its controls, receptive fields."""

import dataclasses

import torch

from vitlab.utils.device import evaluating

PUBLISHED = {"ripple": {"stages": 3}, "hydra": {"branches": 4}}


def variant(spec, attention, *, name=None, title=None, **arguments):
    """The Spec with another attention, and nothing else changed: "S4/ripple", or "S4/ripple-small" of a stand-in.

    Attention is what the arm is about, so it is no change of the published setting; arguments other than the
    published ones (3 stages, 4 branches) are, and are listed in `changes`.
    """
    published = PUBLISHED.get(attention, {})
    config = dataclasses.replace(
        spec.config, attention=attention, attention_args=tuple((published | arguments).items())
    )
    changed = tuple(f"{key} {value} instead of {published.get(key, 'the default')}"
                    for key, value in arguments.items() if published.get(key) != value)  # fmt: skip
    size = "-small" if spec.name.endswith("-small") else ""
    name = name or f"{spec.name.split('/')[0]}/{attention}{size}"
    return dataclasses.replace(spec, name=name, title=title or name, config=config, changes=spec.changes + changed)


def ablations(spec, wanted):
    """{name: Spec} of wanted {attention: [arguments, ...]}, each a variant of `spec`: "ripple, stages 2"."""
    found = {}
    for attention, arguments in ((a, given) for a, several in wanted.items() for given in several):
        name = ", ".join([attention, *(f"{key} {value}" for key, value in arguments.items())])
        found[name] = variant(spec, attention, name=name, **arguments)
    return found


def same_macs(spec, target, name):
    """A softmax Spec whose MLP is widened (or narrowed) until a model costs `target` MACs, to the nearest unit.

    The control for an attention that costs more: the same operations spent on the plainest thing. ValueError
    where the target is less than the model costs without its MLP.
    """
    config = spec.config
    tokens = config.tokens * 2 * config.dim + (9 * config.grid**2 if config.mlp == "conv" else 0)
    width = config.mlp_dim + round((target - config.macs()) / (config.depth * tokens))
    if width < 1:
        raise ValueError(f"{name}: {target:,} MACs are less than {spec.name} costs without its MLP")
    changes = (*spec.changes, f"mlp_dim {width} instead of {config.mlp_dim}")
    config = dataclasses.replace(config, mlp_dim=width)
    return dataclasses.replace(spec, name=name, title=name, config=config, changes=changes)


def without_attention(spec, name):
    """The Spec with no head in any block from the start: the control that says what attention is worth in a model.

    Where convolutions move what patches know, that may be little, and then so is what a cheaper attention can lose.
    """
    blocks = tuple(dataclasses.replace(shape, heads=()) for shape in spec.config.shapes)
    config = dataclasses.replace(spec.config, blocks=blocks)
    return dataclasses.replace(spec, name=name, title=name, config=config, changes=(*spec.changes, "no heads"))


def is_best(rows, name, group, column="val_accuracy"):
    """For each seed: whether `name` is the best of the arms `group` in `column` of the rows (a DataFrame)."""
    wide = rows[rows.arm.isin(group)].pivot_table(index="seed", columns="arm", values=column)
    return [bool(best == name) for best in wide.idxmax(axis=1)]


def ahead(rows, name, group, column="val_accuracy"):
    """For each seed: by how many points `name` is ahead of the best of the other arms of `group` (see `is_best`)."""
    wide = rows[rows.arm.isin(group)].pivot_table(index="seed", columns="arm", values=column)
    return (wide[name] - wide.drop(columns=name).max(axis=1)).tolist() if len(wide.columns) > 1 else []


def receptive_field(model, images):
    """Effective receptive field (Luo et al. 2016, eq. 1) of the token in the middle of the patch grid, H W.

    The mean over normalised images B C H W of |d (sum of its last features) / d pixel|, channels summed, scaled to
    a sum of 1. A grid of even side has no middle: the token right below it is taken, and the first row and column
    of patches are left out of the field, so that it lies in the centre of what is returned.
    """
    config = model.config
    images = images.detach().clone().requires_grad_()
    with evaluating(model), torch.enable_grad():
        x = model.embed(images)
        for block in model.blocks:
            x = block(x)
        middle = config.prefix_tokens + (config.grid // 2) * (config.grid + 1)
        (slope,) = torch.autograd.grad(x[:, middle].sum(), images)
    uneven = 0 if config.grid % 2 else config.patch_size
    field = slope.abs().sum(dim=1).mean(dim=0)[uneven:, uneven:]
    return field / field.sum()


def far_share(field, patch):
    """Share of a receptive field (H W, sum 1) that lies outside the middle patch and its eight neighbours."""
    at = (field.shape[-1] // patch // 2 - 1) * patch
    low, high = max(at, 0), at + 3 * patch
    return 1 - field[low:high, low:high].sum().item()
