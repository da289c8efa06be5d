"""What the study of linear attention needs beside `Study`: variants of a baseline, controls, readings of arms."""

import dataclasses
import statistics

import torch

from vitlab.models.vit import ViT
from vitlab.utils.device import evaluating

PUBLISHED = {"ripple": {"stages": 3}, "hydra": {"branches": 4}}


def variant(spec, attention, *, name=None, title=None, **arguments):
    """The Spec with another attention, and nothing else changed.

    Attention is what the arm is about, so it is no change of the published setting; arguments other than the
    published ones (3 stages, 4 branches) are, and are listed in `changes`.
    """
    published = PUBLISHED.get(attention, {})
    arguments = published | arguments
    config = dataclasses.replace(spec.config, attention=attention, attention_args=tuple(arguments.items()))
    changed = tuple(f"{key} {value} instead of {published.get(key, 'the default')}"
                    for key, value in arguments.items() if published.get(key) != value)  # fmt: skip
    name = name or f"{spec.name.split('/')[0]}/{attention}"
    return dataclasses.replace(spec, name=name, title=title or name, config=config, changes=spec.changes + changed)


def ablation_name(attention, arguments):
    """("ripple", {"stages": 2}) -> "ripple, stages 2"."""
    return ", ".join([attention, *(f"{key} {value}" for key, value in arguments.items())])


def ablations(spec, wanted):
    """{name: Spec} of wanted {attention: [arguments, ...]}, each a variant of `spec`."""
    return {ablation_name(attention, arguments): variant(spec, attention, name=ablation_name(attention, arguments),
                                                         **arguments)
            for attention, several in wanted.items() for arguments in several}  # fmt: skip


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
    return dataclasses.replace(
        spec, name=name, title=name, config=dataclasses.replace(config, mlp_dim=width), changes=changes
    )


def parameters(config):
    """Number of parameters of the ViT of that configuration, without making any of them."""
    with torch.device("meta"):
        return sum(p.numel() for p in ViT(config).parameters())


def images_a_second(arms):
    """Median images a second in training over the epochs of all `arms`, without each run's first (it warms up)."""
    rates = [r for arm in arms for r in (arm.history["images_per_s"][1:] or arm.history["images_per_s"])]
    return statistics.median(rates)


def is_best(rows, name, group, column="val_accuracy"):
    """For each seed: whether `name` is the best of the arms `group` in `column` of the rows (a DataFrame)."""
    wide = rows[rows.arm.isin(group)].pivot_table(index="seed", columns="arm", values=column)
    return [bool(best == name) for best in wide.idxmax(axis=1)]


def receptive_field(model, images):
    """Effective receptive field (Luo et al. 2016, eq. 1) of the token in the middle of the patch grid, H W.

    The mean over normalised images B C H W of |d (sum of its last features) / d pixel|, channels summed, scaled to
    a sum of 1. The model is run in eval mode; its mode is put back.
    """
    config = model.config
    images = images.detach().clone().requires_grad_()
    with evaluating(model), torch.enable_grad():
        x = model.embed(images)
        for block in model.blocks:
            x = block(x)
        middle = config.prefix_tokens + (config.grid // 2) * (config.grid + 1)
        (slope,) = torch.autograd.grad(x[:, middle].sum(), images)
    field = slope.abs().sum(dim=1).mean(dim=0)
    return field / field.sum()


def far_share(field, patch):
    """Share of a receptive field (H W, sum 1) that lies outside the middle patch and its eight neighbours."""
    at = (field.shape[-1] // patch // 2 - 1) * patch
    low, high = max(at, 0), at + 3 * patch
    return 1 - field[low:high, low:high].sum().item()
