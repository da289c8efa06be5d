"""A device's name; memory that a program keeps."""

import subprocess
import sys

import pytest
import torch

from vitlab.metrics import measure


def test_device_name_tells_the_processor_and_threads():
    threads = torch.get_num_threads()
    assert measure.device_name("cpu").endswith(f", {threads} thread{'' if threads == 1 else 's'}")
    assert len(measure.device_name("cpu").split(",")[0]) > 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_program_keeps_the_memory_it_frees():
    """By the allocator's own account: free bytes it holds after four tensors of 31 MB came and went."""
    code = """
import ctypes, sys, torch
from vitlab.utils.device import hold_memory

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()

class Account(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]

if not hasattr(ctypes.CDLL(None), "mallinfo2"):
    sys.exit("no mallinfo2")
account = ctypes.CDLL(None).mallinfo2
account.restype = Account
if sys.argv[1] == "held":
    assert hold_memory()
before = account().fordblks
tensors = [torch.empty(31 * 2**20, dtype=torch.uint8) for _ in range(4)]
del tensors
print(account().fordblks - before)
"""
    kept = {}
    for how in ("held", "as it is"):
        run = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True)
        if "no mallinfo2" in run.stderr:
            pytest.skip("needs glibc >= 2.33")
        assert run.returncode == 0, run.stderr
        kept[how] = int(run.stdout)
    assert kept["held"] > 4 * 30 * 2**20
    assert kept["as it is"] < 2**20
