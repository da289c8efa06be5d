"""A real JupyterLab in a real browser: notebook 05's panel, its slider moved by the mouse."""

import contextlib
import importlib.util
import json
import os
import subprocess
import symtable
import sys
import time
from pathlib import Path

import chromium
import nbformat
import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
STEM = "05_token_pruning"
needs_lab = pytest.mark.skipif(importlib.util.find_spec("jupyterlab") is None, reason="needs JupyterLab")


def defined_and_wanted(source):
    """The names that a cell gives a value to, and those that it takes from cells above."""
    module = symtable.symtable(source, "cell", "exec")
    inner, above = module.get_children(), set()
    while inner:  # functions and comprehensions
        scope = inner.pop()
        inner += scope.get_children()
        above |= {s.get_name() for s in scope.get_symbols() if s.is_global()}
    defined = {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported()}
    return defined, (above | {s.get_name() for s in module.get_symbols()}) - defined


def slice_to(node, last):
    """The notebook with only those code cells that the cell which contains the text `last` depends on.

    All of notebook 05 takes minutes, most of them for what the panel does not need.
    """
    kept, wanted = [], set()
    for cell in reversed([c for c in node.cells if c.cell_type == "code"]):
        defined, needed = defined_and_wanted(cell.source)
        if last in cell.source or wanted & defined:
            kept.insert(0, cell)
            wanted = (wanted - defined) | needed
    return nbformat.v4.new_notebook(cells=kept, metadata=node.metadata)


@contextlib.contextmanager
def lab(folder):
    """The address, with its token, of a JupyterLab server on a free port whose files and settings are in `folder`."""
    quiet = folder / "lab_settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)  # else a question about news lies over the notebook
    quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    own = {f"JUPYTER{name}_DIR": str(folder / name.strip("_").lower())
           for name in ("_CONFIG", "_DATA", "_RUNTIME", "LAB_SETTINGS", "LAB_WORKSPACES")}  # fmt: skip
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    surroundings = os.environ | own | {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": paths,
                                       "VITLAB_ROOT": str(folder / "written")}  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=18888",
               "--IdentityProvider.token=a-token", f"--ServerApp.root_dir={folder / 'notebooks'}"]  # fmt: skip
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=surroundings, stdout=log, stderr=log)
    try:
        end = time.monotonic() + chromium.START
        while not (found := list((folder / "runtime").glob("jpserver-*.json"))):
            assert server.poll() is None and time.monotonic() < end, (folder / "server.log").read_text()
            time.sleep(0.2)
        about = json.loads(found[0].read_text())
        yield f"{about['url']}lab/tree/{STEM}.ipynb?token={about['token']}"
    finally:
        server.terminate()  # which ends its kernels, too
        server.wait(60)


ALPHA = "[...document.querySelectorAll('.widget-slider')].find(s => s.textContent.startsWith('alpha'))"
PICTURE = "document.querySelector('.widget-output img')?.src"
ERRORS = "[...document.querySelectorAll('[data-mime-type$=error]')].map(e => e.textContent.slice(0, 2000))"


@chromium.needed
@needs_lab
@pytest.mark.timeout(1200)
def test_the_panel_answers_to_the_slider(tmp_path):
    (tmp_path / "notebooks").mkdir()
    node = slice_to(nbformat.read(ROOT / "notebooks" / f"{STEM}.ipynb", 4), "token_panel.panel(")
    assert 3 < len(node.cells) < 15, "the panel needs some of the cells, not all"
    quick = 'changes["S3/baseline"]["epochs"], alphas, images = 1, [1.5], {"sweep": 8, "calibration": 4}'
    node.cells.insert(1, nbformat.v4.new_code_cell(quick))  # where papermill would set parameters, too
    nbformat.write(node, tmp_path / "notebooks" / f"{STEM}.ipynb")
    with lab(tmp_path) as address, chromium.browser(tmp_path / "profile") as page:
        page.open(address, 1280, 1000)
        page.until("document.querySelector('#jp-main-statusbar')?.textContent.includes('| Idle')", 180)
        page.drag("[...document.querySelectorAll('.lm-MenuBar-item')].find(i => i.textContent === 'Run')")
        page.drag("document.querySelector('.lm-Menu-item[data-command=\"runmenu:run-all\"]')")
        page.until(f"{ERRORS}.length || {PICTURE}", 600)
        assert page.value(ERRORS) == []
        page.value(f"{ALPHA}.scrollIntoView(), window.before = {PICTURE}, 0")
        page.screenshot(tmp_path / "before.png")
        handle, readout = (f"{ALPHA}.querySelector('{part}')" for part in (".noUi-handle", ".widget-readout"))
        readout += ".textContent"
        assert page.value(readout) == "1.50"
        page.drag(handle, 20)
        page.until(f"{PICTURE} && {PICTURE} !== window.before", 120)
        page.screenshot(tmp_path / "after.png")
        assert float(page.value(readout)) > 1.6
        page.drag(handle, -20)
        page.until(f"{PICTURE} === window.before", 120)  # the picture goes by the slider, not by chance
        assert page.value(readout) == "1.50" and page.value(ERRORS) == []
