"""Seeds, and the state of every random generator, saved and restored whole."""

import hashlib
import random

import numpy as np
import torch


def generator(seed, *names, device="cpu"):
    """A torch.Generator on `device` whose stream depends on `seed` and on what it is for (`names`).

    Different names give independent streams of one seed, so that adding a draw in one place (say,
    augmentation) leaves every other (say, shuffling) as it was.
    """
    text = "/".join(map(str, (seed, *names)))
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") & (2**63 - 1)
    return torch.Generator(device).manual_seed(value)


def seed_all(seed):
    """Seed Python's, NumPy's and torch's global generators (weights, dropout, stochastic depth)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def state():
    """The global generators' state as tensors: {name: uint8 tensor} (plus NumPy's and Python's as int64)."""
    found = {"torch": torch.get_rng_state()}
    _, keys, position, has_gauss, gauss = np.random.get_state()
    found["numpy"] = torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64)
    found["numpy_gauss"] = torch.tensor(gauss, dtype=torch.float64)
    found["python"] = torch.tensor(random.getstate()[1], dtype=torch.int64)
    if torch.cuda.is_available():
        found |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return found


def restore(found):
    """Put back what `state()` gave. States of GPUs that are not here are passed over."""
    torch.set_rng_state(found["torch"].cpu())
    *keys, position, has_gauss = found["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, found["numpy_gauss"].item()))
    random.setstate((3, tuple(found["python"].tolist()), None))
    for index in range(torch.cuda.device_count()):
        if f"cuda{index}" in found:
            torch.cuda.set_rng_state(found[f"cuda{index}"].cpu(), index)
