"""Running a model over a split: the one place where images are prepared and logits collected."""

import torch
import torch.nn.functional as F

from vitlab.data.augment import normalize
from vitlab.data.datasets import batches
from vitlab.utils.device import device_of, running


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
    size = size or input_size(model, split.images.shape[-1])
    device, found = device_of(model), []
    with running([model], device, dtype):
        for images, _ in batches(split, batch_size):
            found.append(model(normalize(images.to(device), mean, std, size=size)).float())
    return torch.cat(found), split.labels.to(device)


def kl_divergence(logits, reference, temperature=1.0):
    """Mean Kullback-Leibler divergence (nats, 0-d) of softmax(logits / T) from softmax(reference / T), both B K.

    KL(reference || logits): what predictions lose that stand in for the reference's. Needs no labels and, unlike
    accuracy, tells small changes apart.
    """
    own, goal = (F.log_softmax(x / temperature, dim=1) for x in (logits, reference))
    return F.kl_div(own, goal, reduction="batchmean", log_target=True)
