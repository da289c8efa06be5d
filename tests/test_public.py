"""The package's public face: every name is there, and importing the package imports nothing heavy."""

import subprocess
import sys

import pytest

import vitlab


@pytest.mark.alone
def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import time; start = time.perf_counter(); import sys, vitlab; took = time.perf_counter() - start\n"
        "assert not {'torch', 'numpy', 'pandas', 'timm'} & set(sys.modules), sorted(sys.modules)\n"
        "assert took < 0.3, took; assert 'load' in dir(vitlab)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]


@pytest.mark.parametrize("name", vitlab.PUBLIC)
def test_every_public_name_is_there(name):
    assert callable(getattr(vitlab, name)) and name in dir(vitlab)


def test_other_names_are_refused_with_the_list():
    with pytest.raises(AttributeError, match="vitlab has no 'wings'; it has load_data, ViT"):
        vitlab.wings  # noqa: B018
