"""How a model is run to be looked at: its device, its mode, images of the right kind."""

import contextlib
import ctypes
import platform
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
HELD = 32 * 2**20  # bytes of the largest tensor kept: the most that glibc takes


def hold_memory():
    """Let the process keep the memory it frees (glibc only): whether that was set.

    By default large tensors get fresh pages from the kernel and give them back, again and again, which a small
    ViT's training on the CPU feels. For programs, not for library functions: it holds for the whole process.
    """
    with contextlib.suppress(OSError, AttributeError):
        allocator = ctypes.CDLL(None).mallopt
        return bool(allocator(M_MMAP_THRESHOLD, HELD) and allocator(M_TRIM_THRESHOLD, 2**31 - 1))
    return False


def autocast(device, dtype):
    """Autocast to `dtype` on the device; float32 (or None) is no autocast."""
    if dtype in (None, torch.float32):
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=dtype)


@contextlib.contextmanager
def evaluating(*models):
    """Eval mode for a block; then each module's own mode is put back. What is no module is passed over."""
    modes = {m: m.training for model in models if isinstance(model, torch.nn.Module) for m in model.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def running(functions, device, dtype=None):
    """Inference mode, autocast to `dtype`, and the modules among `functions` in eval mode, for a block.

    Autocast keeps its cast weights that long, so repeated runs pay for them once, as a server does.
    """
    with evaluating(*functions), torch.inference_mode(), autocast(device, dtype):
        yield


def device_name(device):
    """"NVIDIA H200", or the processor's name with the number of threads torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = (names[0] if names else "") or platform.processor() or platform.machine() or "CPU"
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads != 1)}"


def device_of(model):
    """The device of the model's first parameter or buffer (CPU when it has none)."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def eager(model):
    """The module inside a compiled one; any other as it is."""
    return getattr(model, "_orig_mod", model)


def example(model, shape, batch=1):
    """Random images (batch C H W) of the model's own dtype on its device, the same ones every time.

    ValueError for a batch below 1.
    """
    if batch < 1:
        raise ValueError(f"batch={batch}: at least one image is needed")
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    images = torch.randn((batch, *shape), generator=torch.Generator().manual_seed(0))
    return images.to(device_of(model), next(floats, torch.float32))
