"""Images shared out among threads: the same logits as one thread gives, in order, and no more memory."""

import threading

import pytest
import torch

from vitlab.metrics.predict import outputs
from vitlab.models.vit import ViT, ViTConfig


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ViT(ViTConfig(image_size=16, patch_size=8, dim=16, depth=2, heads=2, num_classes=4, stem="conv")).train()


class Watched(torch.nn.Module):
    """Notes who calls it, with how many images and threads, and how many calls are under way."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen, self.now, self.most, self.lock = model, [], 0, 0, threading.Lock()

    def forward(self, images):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.seen.append((threading.get_ident(), len(images), torch.get_num_threads(), self.training))
        found = self.model(images)
        with self.lock:
            self.now -= 1
        return found


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_logits_are_those_of_one_thread(model, dtype):
    images, watched = torch.randn(200, 3, 16, 16), Watched(model)
    found = outputs(watched, images, 64, "cpu", dtype)
    assert not found.requires_grad and found.dtype == torch.float32 and model.training and torch.get_num_threads() == 2
    assert {size for _, size, *_ in watched.seen} == {32, 8} and watched.most <= 2
    assert all(threads == 1 and not training for *_, threads, training in watched.seen)
    torch.set_num_threads(1)
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        assert torch.equal(found, torch.cat([model(part).float() for part in images.split(32)]))


@pytest.mark.parametrize("images, batch", [(200, 63), (60, 64)])
def test_few_images_are_run_by_the_caller_itself(model, images, batch):
    watched = Watched(model)
    outputs(watched, torch.randn(images, 3, 16, 16), batch, "cpu")
    assert {who for who, *_ in watched.seen} == {threading.get_ident()}
    assert max(size for _, size, *_ in watched.seen) == min(batch, images)


def test_what_goes_wrong_in_a_thread_is_raised_and_modes_are_put_back(model):
    calls = []

    def fails(images):
        calls.append(images)
        raise RuntimeError("a batch went wrong")

    with pytest.raises(RuntimeError, match="a batch went wrong"):
        outputs(model, torch.randn(64, 3, 16, 16), 64, "cpu", prepare=fails)
    assert calls and model.training and torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="batch=0: at least 1 image"):
        outputs(model, torch.randn(64, 3, 16, 16), 0, "cpu")
