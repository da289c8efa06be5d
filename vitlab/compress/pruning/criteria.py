"""What a unit is worth: scores of every prunable unit by five criteria, and chance. Larger = keep."""

import torch
import torch.nn.functional as F

from vitlab.compress.pruning.gates import GatedViT
from vitlab.compress.pruning.shape import head_index, kind_of, prunable, sizes
from vitlab.data.augment import normalize
from vitlab.utils import rng

CRITERIA = ("gates", "magnitude", "taylor", "fisher", "geometric-median", "random")


def score(model, criterion, *, kinds=("qk", "v", "mlp"), data=None, seed=0):
    """{structure: scores of its units} of a model (anything `prunable` takes, or a `GatedViT`).

    criterion:
    "gates": |trained gate| (of a GatedViT);
    "magnitude": L2 norm of the unit's weights, relative to the mean in its structure;
    "taylor": |gate * d loss / d gate|, mean over batches: the first-order change of the loss when the unit
    is removed (Molchanov et al. 2019, eq. 8);
    "fisher": half the mean squared gradient of the gate over single images (Theis et al. 2018, eq. 8);
    "geometric-median": sum of distances to the other units' weights, relative to the mean (He et al. 2019);
    "random": the control, drawn from `seed`.
    data: [(images float B C H W, labels B), ...], for taylor and fisher (see `calibration`).

    Raises ValueError for an unknown criterion or kind, and for missing data or gates.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion={criterion!r}: choose one of {', '.join(CRITERIA)}")
    if criterion in ("taylor", "fisher") and (isinstance(data, torch.Tensor) or not data):
        raise ValueError(f"criterion={criterion!r} needs data=[(images, labels), ...]; see criteria.calibration")
    if criterion == "gates":
        return _gates(model, kinds)
    core = model.core if isinstance(model, GatedViT) else prunable(model)
    units = sizes(core.config, kinds)
    if criterion == "random":
        return {name: torch.rand(n, generator=rng.generator(seed, "prune", name)) for name, n in units.items()}
    if criterion in ("taylor", "fisher"):
        return _gradients(model, kinds, data, squared=criterion == "fisher")
    found = {}
    for name in units:
        vectors = unit_weights(core, name)
        worth = vectors.norm(dim=1) if criterion == "magnitude" else _distances(vectors)
        found[name] = worth if kind_of(name) == "block" else worth / worth.mean().clamp_min(1e-12)
    return found


def calibration(data, images=256, batch=64, seed=0, size=None):
    """[(normalised images float B C H W, labels B), ...]: a fixed random part of the training split.

    data: a `vitlab.data.datasets.Dataset`; size: side in pixels that the model takes, where it differs.
    """
    train, draw = data.train, rng.generator(seed, "calibration")
    pick = torch.randperm(len(train), generator=draw)[:images].to(train.labels.device)
    return [(normalize(train.images[ids], data.mean, data.std, size=size), train.labels[ids])
            for ids in pick.split(batch)]  # fmt: skip


def _gates(model, kinds):
    if not isinstance(model, GatedViT):
        raise ValueError("criterion='gates' needs a GatedViT whose gates were trained (objective L1)")
    if missing := set(kinds) - set(model.kinds):
        raise ValueError(f"this model has trained gates for {', '.join(model.kinds)}, not {', '.join(sorted(missing))}")
    return {k: v.detach().abs() for k, v in model.values().items() if kind_of(k) in kinds}


def _gradients(model, kinds, data, squared):
    """Mean over batches of |gate * gradient|, or over images of (gate * gradient)^2 / 2."""
    gated = GatedViT(model.core if isinstance(model, GatedViT) else model, kinds)
    if isinstance(model, GatedViT):  # the gates so far belong to the weights
        gated.mask({k: v.detach() for k, v in model.values().items()})
    gated.eval()
    names = {k: gated.gates[k.replace(".", "_")] for k in gated.structures if kind_of(k) in kinds}
    batches = [(x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(x))] if squared else list(data)
    total = {k: torch.zeros_like(g) for k, g in names.items()}
    for images, labels in batches:
        loss = F.cross_entropy(gated(images), labels)
        for (k, gate), grad in zip(names.items(), torch.autograd.grad(loss, list(names.values()))):
            change = gate.detach() * grad
            total[k] += change.square() / 2 if squared else change.abs()
    return {k: v / len(batches) for k, v in total.items()}


def _distances(vectors):
    if len(vectors) == 1:
        raise ValueError("criterion='geometric-median' compares the units of a structure: 'block' has only one")
    return torch.cdist(vectors[None], vectors[None])[0].sum(1)


@torch.no_grad()
def unit_weights(core, name):
    """units x weights: every weight that leaves with a unit of that structure, as one row.

    Heads of unequal widths are padded with zeros.
    """
    kind, weights = kind_of(name), {k: v.float() for k, v in core.state_dict().items()}
    if kind == "embed":  # rows of the layers that write a residual channel, columns of those that read it
        writers = ("patch_embed.proj.weight", ".attn.proj.weight", ".mlp.fc2.weight")
        parts = [w.flatten(1) for k, w in weights.items() if k.endswith(writers) and w.numel()]
        parts += [w.T for k, w in weights.items() if k.endswith((".attn.qkv.weight", ".mlp.fc1.weight"))]
        return torch.cat(parts, 1)
    at = name.removesuffix(kind)
    if kind == "mlp":
        return torch.cat([weights[at + "mlp.fc1.weight"], weights[at + "mlp.fc2.weight"].T], 1)
    if kind == "block":
        flat = torch.cat([v.flatten() for k, v in weights.items() if k.startswith(at)])
        return flat[None] / len(flat) ** 0.5
    block = core.config.shapes[int(name.split(".")[1])]
    q, k, v = weights[at + "attn.qkv.weight"].split([block.qk, block.qk, block.v])
    parts = {"qk": torch.cat([q, k], 1), "v": torch.cat([v, weights[at + "attn.proj.weight"].T], 1)}
    if kind != "heads":
        return parts[kind]
    rows = [torch.cat([part[head_index(block, n) == h].flatten() for n, part in parts.items()])
            for h in range(len(block.each_head))]  # fmt: skip
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
