"""How threads wait and how many there are: decided before torch is loaded, the user's word first."""

import os
import subprocess
import sys

import pytest
import torch

from vitlab.utils import threads


def python(code, **environment):
    """What the code prints in a fresh interpreter."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


@pytest.fixture
def clean(monkeypatch):
    """The environment without any word on threads."""
    for name in (*threads.PASSIVE, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return dict(os.environ)


def test_waiting_is_set_before_torch_and_leaves_the_users_word(clean):
    code = "import os\nfrom vitlab.utils import threads\n"
    code += "print(threads.wait_passively(), os.environ['OMP_WAIT_POLICY'], os.environ['KMP_BLOCKTIME'])\n"
    assert python(code, **clean) == "True passive 0"
    assert python(code, **clean | {"OMP_WAIT_POLICY": "active"}) == "True active 0"
    assert python("import torch\n" + code, **clean) == "False passive 0", "torch's OpenMP has read it already"


def test_torchs_openmp_reads_it(clean):
    """libgomp shows what it took from the environment, when asked."""
    code = "from vitlab.utils import threads\nthreads.wait_passively()\nimport torch\n"
    done = subprocess.run([sys.executable, "-c", code], env=clean | {"OMP_DISPLAY_ENV": "true"}, capture_output=True,
                          text=True, timeout=120, check=True)  # fmt: skip
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


def test_the_command_lets_threads_spin_briefly_unless_told_otherwise(clean):
    """libgomp shows, when asked, how often it looks before it sleeps."""
    code = "from vitlab import cli\nassert cli.set_waiting()\nimport torch\n"

    def shown(**more):
        clean.pop("GOMP_SPINCOUNT", None)
        done = subprocess.run([sys.executable, "-c", code], env=clean | {"OMP_DISPLAY_ENV": "verbose"} | more,
                              capture_output=True, text=True, timeout=120, check=True)  # fmt: skip
        return done.stderr

    assert "GOMP_SPINCOUNT = '20000'" in shown() and "OMP_WAIT_POLICY = 'PASSIVE'" in shown()
    assert "GOMP_SPINCOUNT = '7'" in shown(GOMP_SPINCOUNT="7")
    assert "GOMP_SPINCOUNT = '20000'" not in shown(OMP_WAIT_POLICY="active")


def test_logical_processors_of_one_core_count_once(tmp_path, monkeypatch):
    for number, core in enumerate(("0,2", "1,3", "0,2", "1,3", "4")):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(core + "\n")
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: range(5), raising=False)
    assert threads.physical_cores(tmp_path) == 3
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {1, 3}, raising=False)
    assert threads.physical_cores(tmp_path) == 1
    assert threads.physical_cores(tmp_path / "hidden") == 2


@pytest.mark.parametrize(
    "times, count",
    [({1: 1.0}, 1), ({1: 1.0, 2: 0.95}, 1), ({1: 1.0, 2: 0.7}, 2), ({1: 1.0, 2: 0.95, 4: 0.8}, 4), ({1: 1, 2: 9}, 1)],
)
def test_more_threads_only_where_they_are_worth_it(times, count):
    assert threads.fewest(times) == count


def test_the_choice_is_made_once_handed_on_and_said(clean, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "physical_cores", lambda: 4)
    monkeypatch.setattr(threads, "timings", lambda most: {n: 1 / n for n in (1, 2, 4) if n <= most})
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "")
        said = threads.choose(jobs=2)
        assert said == "threads: 2 (of 4 cores shared by 2 jobs; a small training step with 1: 1000 ms, 2: 500 ms)"
        assert torch.get_num_threads() == 2 and os.environ["OMP_NUM_THREADS"] == "2"
        assert threads.choose() == "threads: 2 (OMP_NUM_THREADS)", "what is set stays"
    finally:
        torch.set_num_threads(before)


def test_the_timing_puts_the_number_of_threads_back():
    before, state = torch.get_num_threads(), torch.get_rng_state()
    times = threads.timings(2, rounds=1)
    assert list(times) == [1, 2] and min(times.values()) > 0
    assert torch.get_num_threads() == before and torch.equal(torch.get_rng_state(), state)
    assert list(threads.timings(1)) == [1]


@pytest.mark.parametrize("torchs, count, each", [(4, 2, 2), (2, 2, 1), (2, 3, 1)])
def test_workers_compute_with_their_share_of_torchs_threads(torchs, count, each):
    before = torch.get_num_threads()
    torch.set_num_threads(torchs)
    try:
        with threads.workers(count) as pool:
            # a thread's first operation must not give it the number of all
            found = [*pool.map(lambda _: (torch.ones(300, 300).exp().sum(), torch.get_num_threads())[1], range(9))]
        assert found == [each] * 9 and torch.get_num_threads() == torchs
    finally:
        torch.set_num_threads(before)
