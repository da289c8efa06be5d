"""Killed and started again, a notebook ends where it would have ended (see kills.py, which does it twenty times)."""

import random

import pytest
from kills import check_end, disturbed, project, undisturbed

pytestmark = pytest.mark.long

BOOK = ["02_tune"]  # trains a model, then another that goes on from it


@pytest.mark.timeout(900)
def test_killed_at_random_moments_a_study_ends_bit_identical(tmp_path):
    whole, begin, end = undisturbed(project(tmp_path / "whole", 2, BOOK))
    folder, log = project(tmp_path / "killed", 2, BOOK), []
    kills = disturbed(folder, random.Random(7), 2, begin, end, log.append)  # all of it, then the runner alone
    print("\n".join(log))
    assert kills == 2, log
    check_end(folder, whole)
