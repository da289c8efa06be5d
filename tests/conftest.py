import os

import pytest

from vitlab.utils import threads

threads.wait_passively()
# files of tests that run side by side share the cores, and so do the processes that they start
_beside = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(2, threads.physical_cores() // _beside))))

import torch  # noqa: E402 - OpenMP reads how many, and how to wait, when torch is loaded


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "long" not in item.keywords)  # side by side, a long one begun last is waited for
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs CUDA")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
