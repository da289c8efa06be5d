"""Running a model over a split: the one place where images are prepared and logits collected."""

import torch
import torch.nn.functional as F

from vitlab.data.augment import normalize
from vitlab.utils.device import autocast, device_of, eager, running
from vitlab.utils.threads import FEWEST, workers


def input_size(model, default):
    """Side in pixels of the images that `model` takes (ours and timm's say so), else `default`."""
    if hasattr(model, "config") and hasattr(model.config, "image_size"):
        return model.config.image_size
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return size[0] if isinstance(size, (tuple, list)) else size or default


def logits(model, split, *, mean, std, size=None, batch_size=512, dtype=None):
    """Logits of a whole split in order, float32 N K, on the model's device; labels come with them.

    The model is run in eval mode without gradients. `size` resizes the images on the device (default: what
    the model takes). An empty split is an error (ValueError).
    """
    if not len(split):
        raise ValueError("the split is empty: there is nothing to evaluate (was it loaded with val=0?)")
    size, device = size or input_size(model, split.images.shape[-1]), device_of(model)
    found = outputs(model, split.images, batch_size, device, dtype,
                    prepare=lambda images: normalize(images.to(device), mean, std, size=size))  # fmt: skip
    return found, split.labels.to(device)


def outputs(model, images, batch, device, dtype=None, *, prepare=None):
    """What `model` gives for all `images` in order, float32 N K; at most `batch` of them are under way at a time.

    It runs in eval mode, without gradients, under autocast to `dtype`; prepare(images) comes before. On a CPU each of
    torch's threads takes images of its own: unlike threads that share out every operation, they need not wait for each
    other. A compiled model runs alone.
    """
    if batch < 1:
        raise ValueError(f"batch={batch}: at least 1 image is needed")
    many = 1 if torch.device(device).type != "cpu" or eager(model) is not model else torch.get_num_threads()
    many = max(1, min(many, batch // FEWEST, len(images) // FEWEST))

    def run(part):
        with torch.inference_mode(), autocast(device, dtype):  # which hold for one thread
            return model(prepare(part) if prepare else part).float()

    parts = images.split(-(-batch // many))
    with running([model], device, dtype):
        if many == 1:
            return torch.cat([run(part) for part in parts])
        with workers(many) as pool:
            return torch.cat(list(pool.map(run, parts)))


def kl_divergence(logits, reference, temperature=1.0):
    """Mean Kullback-Leibler divergence (nats, 0-d) of softmax(logits / T) from softmax(reference / T), both B K.

    KL(reference || logits): what predictions lose that stand in for the reference's. Needs no labels and, unlike
    accuracy, tells small changes apart.
    """
    own, goal = (F.log_softmax(x / temperature, dim=1) for x in (logits, reference))
    return F.kl_div(own, goal, reduction="batchmean", log_target=True)
