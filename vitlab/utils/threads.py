"""How many threads torch computes with, and how they wait for each other. All but `workers` is to be called
before torch is imported.

OpenMP's threads spin while they wait for the slowest. Where another process wants the same core, the slowest is not
even running, and the others burn the time that it needs: two trainings on two cores can slow each other down a
hundredfold (bench/neighbour.py). So waiting threads sleep here, by the command line after a brief look for work
(vitlab/cli.py). How many threads pay depends on the machine and its load, too, so `choose` times it. Sums are added in
another order with another number of threads, so that runs agree to the last bit only where it is the same:
OMP_NUM_THREADS fixes it.
"""

import os
import statistics
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# read when OpenMP is loaded by GNU's, which torch's own build brings, and by LLVM's and Intel's
PASSIVE = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
FEWEST = 32  # images that a thread takes at a time: with fewer, what Python does for every operation counts
CPUS = Path("/sys/devices/system/cpu")
WORTH = 0.9  # more threads are taken where they bring the time below this share of what fewer need


def wait_passively():
    """Let waiting threads sleep, in this process and those it starts: whether it came before torch was loaded.

    What the user has set stays.
    """
    for name, value in PASSIVE.items():
        os.environ.setdefault(name, value)
    return "torch" not in sys.modules


def physical_cores(cpus=CPUS):
    """Number of cores this process may run on; logical CPUs that share a core count once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)

    def core(number):
        try:
            return (cpus / f"cpu{number}" / "topology" / "thread_siblings_list").read_text().strip()
        except OSError:  # not Linux, or hidden: each its own
            return str(number)

    return len({core(number) for number in allowed})


def choose(jobs=1):
    """Set torch's number of threads, here and (OMP_NUM_THREADS) in processes to be started; one line that says which.

    jobs: how many processes will compute side by side; each gets its share of the cores. Within it the fastest
    number in a training step of a small ViT is taken, the smaller one where that is hardly slower. OMP_NUM_THREADS,
    where the user has set it, is left alone.
    """
    if given := os.environ.get("OMP_NUM_THREADS"):
        return f"threads: {given} (OMP_NUM_THREADS)"
    import torch

    cores = physical_cores()
    times = timings(max(1, cores // jobs))
    count = fewest(times)
    beside = f" shared by {jobs} jobs" if jobs > 1 else ""
    torch.set_num_threads(count)
    os.environ["OMP_NUM_THREADS"] = str(count)
    timed = ", ".join(f"{n}: {1e3 * t:.0f} ms" for n, t in times.items())
    return f"threads: {count} (of {cores} cores{beside}; a small training step with {timed})"


def fewest(times):
    """The number of threads to take from {threads: seconds}, in rising order: more only where that is worth it."""
    chosen = next(iter(times))
    for count, spent in times.items():
        if spent < WORTH * times[chosen]:
            chosen = count
    return chosen


def workers(count):
    """A pool of `count` threads, each of which computes with its share of torch's; torch's number stays as it is."""
    import torch

    threads, started = torch.get_num_threads(), threading.Barrier(count)

    def begin():
        torch.get_num_threads()  # a thread takes the number of all at its first question: it must not come later
        torch.set_num_threads(max(1, threads // count))

    pool = ThreadPoolExecutor(count, "share", begin)
    list(pool.map(lambda _: started.wait(), range(count)))  # all of them are there
    torch.set_num_threads(threads)  # that of the pool's threads was also the default of every later one
    return pool


def timings(most, rounds=5):
    """{number of threads: median seconds of a small ViT's training step}, for 1, 2, 4, ... and `most`, in turns."""
    from torch.utils.benchmark import Timer

    step = _step()
    counts = sorted({2**k for k in range(most.bit_length()) if 2**k < most} | {most})
    timers = {count: Timer("step()", globals={"step": step}, num_threads=count) for count in counts}
    # a timer's first step, which wakes or makes threads, is not counted; it puts their number back
    turns = [{count: timer.timeit(1).median for count, timer in timers.items()} for _ in range(rounds)]
    return {count: statistics.median(turn[count] for turn in turns) for count in counts}


def _step():
    """A function that trains a block of width 128 on 32 images of 64 tokens once."""
    import torch

    with torch.random.fork_rng(devices=()):
        block = torch.nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
    tokens = torch.randn(32, 64, 128, generator=torch.Generator().manual_seed(0))  # B N D
    return lambda: block(tokens).square().mean().backward()
