"""The one measuring stick: accuracy, parameters, operations, size, time, memory, power of any model.

`measure()` gives the row that every arm of the study gets; its columns are in COLUMNS. The parts can be
called alone: counts and meters are here by name.
"""

from dataclasses import dataclass

import torch

from vitlab.metrics.counts import macs, macs_by_module, macs_by_part, parameters, ptflops_macs, size_bytes
from vitlab.metrics.meters import compare, latency, peak_memory, training_step
from vitlab.metrics.power import energy_per_image
from vitlab.metrics.predict import input_size, logits
from vitlab.metrics.statistics import packed
from vitlab.utils.checks import is_number
from vitlab.utils.device import device_name, device_of, example

__all__ = [
    "COLUMNS", "Accuracy", "accuracy", "compare", "device_name", "energy_per_image", "latency", "macs",
    "macs_by_module", "macs_by_part", "measure", "parameters", "peak_memory", "ptflops_macs", "score", "show",
    "size_bytes", "training_speed",
]


@dataclass(frozen=True)
class Accuracy:
    """How well a model does on `n` images. Percentages, but for `loss` (mean NLL, nats) and `ece` (0 to 1).

    top5: None with fewer than five classes. ece: expected calibration error (Guo et al. 2017, eq. 3) over
    15 bins of equal width. per_class: recall, None for a class without images. confusion: images counted,
    rows are the truth, columns the prediction. right: whether each image was judged rightly, see `statistics.packed`.
    """

    top1: float
    top5: float | None
    loss: float
    ece: float
    per_class: tuple
    confusion: list
    n: int
    right: str


def accuracy(model, split, *, mean, std, num_classes, size=None, batch_size=512, dtype=None):
    """Accuracy of `model` on a split of uint8 images, in eval mode (each module's own mode is put back).

    `size` resizes the images on the device (default: what the model takes). The figures are computed in
    float64 on the CPU, so that they are the same every time. ValueError: an empty split, outputs that are
    not N x num_classes or not finite, a label outside the classes.
    """
    outputs, labels = logits(model, split, mean=mean, std=std, size=size, batch_size=batch_size, dtype=dtype)
    return score(outputs, labels, num_classes)


def score(outputs, labels, num_classes):
    """The Accuracy of logits (N K) against labels (N); errors as in `accuracy`."""
    outputs, labels = outputs.double().cpu(), labels.cpu()
    n = len(labels)
    if outputs.shape != (n, num_classes):
        raise ValueError(f"the model gives {tuple(outputs.shape)} for {n} images of {num_classes} classes")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, with {num_classes} classes")
    if broken := int((~outputs.isfinite()).any(1).sum()):
        raise ValueError(f"the output is not finite for {broken} of {n} images: did training diverge?")
    chances = outputs.softmax(1)  # N K
    confidence, predicted = chances.max(1)
    right = predicted == labels
    confusion = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, -1)
    among = (outputs.topk(min(5, num_classes)).indices == labels[:, None]).any(1)
    return Accuracy(
        top1=100 * right.double().mean().item(),
        top5=100 * among.double().mean().item() if num_classes >= 5 else None,
        loss=torch.nn.functional.cross_entropy(outputs, labels).item(),
        ece=_ece(confidence, right.double()),
        per_class=tuple(100 * row[k] / sum(row) if any(row) else None for k, row in enumerate(confusion.tolist())),
        confusion=confusion.tolist(),
        n=n,
        right=packed(right),
    )


def _ece(confidence, right, bins=15):
    # bin m holds confidences in ((m - 1) / bins, m / bins]; its weight times |accuracy - confidence| is
    # |sum of right - sum of confidence| / n
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, right - confidence)
    return gaps.abs().sum().item() / len(right)


def training_speed(models, *, batch, seconds=1.0, device="cpu", dtype=None):
    """{name: images a second} of forward and backward of whole models {name: model with a `config`}, in turns.

    In turns, so that they share any noise; without dropout, whose time is the same in all.
    """
    steps = {}
    for name, model in models.items():
        config = model.to(device).eval().config
        shape = config.in_chans, config.image_size, config.image_size
        steps[name] = training_step(model, example(model, shape, batch))
    timed = compare(steps, device=device, dtype=dtype, warmup=2, seconds=seconds, min_runs=3)
    return {name: batch / t.median_s for name, t in timed.items()}


@dataclass(frozen=True)
class Column:
    """How a column of a row is shown: value * scale, in `unit`, `digits` decimals; which way is `better`."""

    label: str
    unit: str = ""
    better: str | None = None  # "higher", "lower"
    digits: int = 2
    scale: float = 1.0


COLUMNS = {
    "accuracy_top1": Column("Accuracy", "%", "higher"),
    "accuracy_top5": Column("Top-5 accuracy", "%", "higher"),
    "nll": Column("NLL", "nats", "lower", 3),
    "ece": Column("Calibration error", "%", "lower", 2, 100),
    "params": Column("Parameters", "M", "lower", 2, 1e-6),
    "macs": Column("MACs", "M", "lower", 1, 1e-6),
    "ptflops_macs": Column("MACs by ptflops", "M", "lower", 1, 1e-6),
    "size_mb": Column("Size on disk", "MB", "lower"),
    "latency_ms": Column("Latency, batch 1", "ms", "lower", 3),
    "latency_ms_q25": Column("Latency, lower quartile", "ms", "lower", 3),
    "latency_ms_q75": Column("Latency, upper quartile", "ms", "lower", 3),
    "images_per_s": Column("Throughput", "images/s", "higher", 1),
    "batch": Column("Batch of throughput, memory, power", "images", None, 0),
    "peak_mb": Column("Peak memory", "MB", "lower", 1),
    "activations_mb": Column("Peak activations", "MB", "lower", 1),
    "power_w": Column("Power", "W", "lower", 1),
    "idle_power_w": Column("Power, idle", "W", "lower", 1),
    "mj_per_image": Column("Energy per image", "mJ", "lower", 3),
}


def show(value, column, unit=False):
    """A row's value as text: show(9_750_000, "params", unit=True) is "9.75 M", None is "not measured"."""
    if column not in COLUMNS:
        raise ValueError(f"no column {column!r}; there are {', '.join(COLUMNS)}")
    if value is None:
        return "not measured"
    form = COLUMNS[column]
    return f"{value * form.scale:,.{form.digits}f}" + (f" {form.unit}" if unit and form.unit else "")


def measure(model, data=None, *, shape=None, device=None, dtype=None, batch=256, seconds=2.0):
    """Everything about one model as a flat row of plain values: COLUMNS, and what they hold for.

    data: a Dataset, on whose test images accuracy is read; without one the accuracy is None. shape: C H W (default:
    what the model takes, else the data).
    device: the model is moved there (default: where it is). dtype: autocast. batch: images in a pass for
    throughput, peak memory and energy. seconds: time for each of latency and throughput.

    Beside COLUMNS: device (name), dtype, threads, shape, n (images judged), right (which of them rightly, see
    `statistics.packed`), and not_measured, the reasons for None. peak_mb is weights + input + activations of one pass
    at `batch`; 1 MB is 1e6 bytes. ValueError when the shape cannot be known, for a batch below 1 or seconds that are
    not above 0 and finite, and as in `accuracy`.
    """
    if not (is_number(seconds) and seconds > 0):
        raise ValueError(f"seconds={seconds!r}: a time above 0 is needed")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch={batch!r}: a whole number of images, at least 1, is needed")
    if device is not None:
        model.to(device)
    device = device_of(model)
    if shape is None:
        if data is None:
            raise ValueError("measure() needs data or shape=(channels, height, width)")
        channels, side = data.test.images.shape[1::2]
        shape = (channels, input_size(model, side), input_size(model, side))
    scores = data and accuracy(model, data.test, mean=data.mean, std=data.std, num_classes=data.num_classes,
                               size=shape[-1], dtype=dtype)  # fmt: skip
    by_ptflops, why_ptflops = ptflops_macs(model, shape)
    one, many = example(model, shape), example(model, shape, batch)
    single = latency(model, one, dtype=dtype, seconds=seconds)
    large = latency(model, many, dtype=dtype, seconds=seconds, warmup=3, min_runs=5)
    memory = peak_memory(model, many, dtype=dtype)
    energy = energy_per_image(model, many, dtype=dtype)
    row = {
        "accuracy_top1": scores and scores.top1,
        "accuracy_top5": scores and scores.top5,
        "nll": scores and scores.loss,
        "ece": scores and scores.ece,
        "params": parameters(model),
        "macs": macs(model, shape),
        "ptflops_macs": by_ptflops,
        "size_mb": size_bytes(model) / 1e6,
        "latency_ms": single.median_s * 1e3,
        "latency_ms_q25": single.q25_s * 1e3,
        "latency_ms_q75": single.q75_s * 1e3,
        "images_per_s": batch / large.median_s,
        "batch": batch,
        "peak_mb": memory.peak / 1e6,
        "activations_mb": memory.activations / 1e6,
        "power_w": energy.watts,
        "idle_power_w": energy.idle_watts,
        "mj_per_image": energy.joules_per_image and energy.joules_per_image * 1e3,
    }
    reasons = {"ptflops_macs": why_ptflops, "power_w": energy.reason, "idle_power_w": energy.reason,
               "mj_per_image": energy.reason, "accuracy_top5": "fewer than five classes" if scores else ""}
    return row | {
        "n": scores and scores.n,
        "right": scores and scores.right,
        "shape": list(shape),
        "device": device_name(device),
        "dtype": str(dtype or one.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "not_measured": {k: reasons.get(k) or "no data were given" for k, v in row.items() if v is None},
    }
