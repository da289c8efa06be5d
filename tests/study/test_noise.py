"""The noise that verdicts and sentences allow for."""

import pandas as pd
import pytest

from vitlab.study.noise import run_noise


def test_run_noise_is_that_of_the_seed_and_of_the_images():
    rows = pd.DataFrame({"accuracy_top1": [40.0, 60.0], "n": [100, 100]})
    assert run_noise(rows) == pytest.approx((0.5**2 + 5**2) ** 0.5)
