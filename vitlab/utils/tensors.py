"""Tensors, and what is said of them, in one file: safetensors, which holds no code, with a checksum over all of it."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vitlab.utils.files import atomic

SUM = "sha256"  # its name among what is said; files of before there was one have none, and are taken as they are


def save_tensors(path, tensors, said):
    """Write {name: CPU tensor} and `said` ({str: str}) to `path`, whole or not at all; OSError where it cannot be."""
    with atomic(path) as part:
        try:
            save_file(tensors, part, said | {SUM: checksum(tensors, said)})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def load_tensors(path):
    """({name: tensor}, said) of what `save_tensors` wrote; ValueError, without the file's name, unless it is whole.

    safetensors itself only sees that a file is too short; the checksum sees a bit that turned over.
    """
    try:
        with safe_open(Path(path), "pt") as file:
            said = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"it is cut short or no safetensors file ({error})") from error
    if (wanted := said.pop(SUM, None)) and wanted != checksum(tensors, said):
        raise ValueError("it is damaged: its checksum is not that of what it holds")
    return tensors, said


def checksum(tensors, said):
    """The hexadecimal SHA-256 of names, types, shapes and bytes of the tensors, and of what is said."""
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
