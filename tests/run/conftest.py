"""A project in a folder of its own, on a machine without a GPU."""

import pytest
import yaml
from small_projects import write

from vitlab.run import notebooks, runner


@pytest.fixture(autouse=True)
def fixed_surroundings(monkeypatch):
    # the real one starts a process that imports torch
    monkeypatch.setattr(runner, "cuda_device", lambda: "")


@pytest.fixture
def make(tmp_path):
    """make({stem: [cell, ...]}, reads={...}, tiny={...}) -> Project in a folder of its own."""

    def build(books, reads=None, **presets):
        source = tmp_path / "a project"
        (source / "notebooks").mkdir(parents=True, exist_ok=True)
        (source / "presets").mkdir(exist_ok=True)
        for stem, cells in books.items():
            write(source / "notebooks" / f"{stem}.ipynb", cells, (reads or {}).get(stem))
        for name, sections in ({"tiny": {}} | presets).items():
            filled = {stem: {} for stem in books} | sections
            (source / "presets" / f"{name}.yaml").write_text(yaml.safe_dump(filled))
        return notebooks.Project(source, source)

    return build
