import pytest

from vitlab.utils import threads

threads.wait_passively()

import torch  # noqa: E402 - OpenMP reads how to wait when torch is loaded

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs CUDA")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
