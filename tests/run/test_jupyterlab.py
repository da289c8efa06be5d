"""A real JupyterLab in a real browser: all of notebook 05 runs, and the slider of its panel is moved by the mouse."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import chromium
import pytest

from vitlab.run.notebooks import prepare

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
STEM = "05_token_pruning"
needs_lab = pytest.mark.skipif(importlib.util.find_spec("jupyterlab") is None, reason="needs JupyterLab")


@contextlib.contextmanager
def lab(folder):
    """The address, with its token, of a JupyterLab server on a free port whose files and settings are in `folder`."""
    # no question about news over the notebook, and cells that are out of sight stay in the page
    settings = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
                "notebook-extension/tracker": {"windowingMode": "none"}}  # fmt: skip
    for name, values in settings.items():
        path = folder / "lab_settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
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
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(p => p.textContent)"


@chromium.needed
@needs_lab
@pytest.mark.timeout(1200)
def test_the_panel_answers_to_the_slider(tmp_path):
    prepare(ROOT, tmp_path / "notebooks")
    with lab(tmp_path) as address, chromium.browser(tmp_path / "profile") as page:
        page.open(address, 1280, 1000)
        page.until("document.querySelector('#jp-main-statusbar')?.textContent.includes('| Idle')", 180)
        page.drag("[...document.querySelectorAll('.lm-MenuBar-item')].find(i => i.textContent === 'Run')")
        page.drag("document.querySelector('.lm-Menu-item[data-command=\"runmenu:run-all\"]')")
        page.until(f"{ERRORS}.length || {PROMPTS}.every(p => /\\d/.test(p))", 900)
        assert page.value(ERRORS) == []
        assert page.value(f"{PROMPTS}.length") > 30 and page.until(PICTURE, 60)
        page.value(f"{ALPHA}.scrollIntoView(), window.before = {PICTURE}, 0")
        page.screenshot(tmp_path / "before.png")
        handle, readout = (f"{ALPHA}.querySelector('{part}')" for part in (".noUi-handle", ".widget-readout"))
        readout += ".textContent"
        assert page.value(readout) == "1.50"
        page.drag(handle, 20)
        page.until(f"{PICTURE} && {PICTURE} !== window.before", 120)
        page.screenshot(Path(os.environ.get("VITLAB_SCREENSHOT") or tmp_path / "after.png"))
        assert float(page.value(readout)) > 1.6
        page.drag(handle, -20)
        page.until(f"{PICTURE} === window.before", 120)  # the picture goes by the slider, not by chance
        assert page.value(readout) == "1.50" and page.value(ERRORS) == []
