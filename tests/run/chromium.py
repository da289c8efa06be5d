"""A headless Chromium, driven by its DevTools protocol (https://chromedevtools.github.io/devtools-protocol)."""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time

import pytest
import websocket

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needed = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium (Debian: apt install chromium)")
START = 120  # seconds until the browser has to be up on a busy machine


@contextlib.contextmanager
def browser(folder):
    """A `Page` of a browser whose profile is in `folder`."""
    port = folder / "DevToolsActivePort"
    # the sandbox cannot be had by root, nor in most containers; only pages of this project are opened
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
               "--no-first-run", "--disable-background-networking", "--remote-debugging-port=0",
               f"--user-data-dir={folder}", "about:blank"]  # fmt: skip
    process = subprocess.Popen([PROGRAM, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + START
        while not (port.exists() and port.read_text().count("\n")):
            assert process.poll() is None and time.monotonic() < end, "Chromium does not start"
            time.sleep(0.1)
        number, path = port.read_text().split()
        socket = websocket.create_connection(f"ws://127.0.0.1:{number}{path}", timeout=START, suppress_origin=True)
        with contextlib.closing(socket):
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(START)


class Page:
    """One tab. `problems` are the errors that its console, its scripts and its requests have had so far."""

    def __init__(self, socket):
        self.socket, self.session, self.numbers, self.events = socket, None, itertools.count(), []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """The answer to a command of the protocol; the events that come before it are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while (answer := json.loads(self.socket.recv())).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, address, width=1280, height=900):
        """Open an address in a window of that size (CSS pixels) and wait until it has loaded."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)  # fmt: skip
        self.call("Page.navigate", url=address)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(json.loads(self.socket.recv()))

    def value(self, expression):
        """The value of a JavaScript expression, a promise's when it is kept."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression, seconds):
        """The first value of a JavaScript expression that counts as true (True for an element); or TimeoutError."""
        look = f"""new Promise(done => {{
            const end = Date.now() + 5000;
            const look = () => {{
                const value = {expression};
                if (value || Date.now() > end) done(value instanceof Element || value);
                else setTimeout(look, 100);
            }};
            look();
        }})"""
        end = time.monotonic() + seconds
        while not (value := self.value(look)):
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds} s: {expression}")
        return value

    def drag(self, element, by=0, seconds=30):
        """Press the left button on the middle of an element (a JavaScript expression), move `by` pixels to the right,
        and let go: with 0 a click. TimeoutError where no such element shows up in time."""
        x, y = self.until(f"""(element => {{
            element?.scrollIntoView({{block: "nearest"}});
            const box = element?.getBoundingClientRect();
            return box?.width && [box.x + box.width / 2, box.y + box.height / 2];
        }})({element})""", seconds)
        moved = [("Moved", x + by * share, 1) for share in (0.5, 1) if by]
        for kind, place, down in [("Moved", x, 0), ("Pressed", x, 1), *moved, ("Released", x + by, 0)]:
            self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=place, y=y, buttons=down, clickCount=1,
                      button="none" if kind == "Moved" and not down else "left")  # fmt: skip

    def screenshot(self, path, height=None):
        """Write the window, or the page's uppermost `height` pixels, as a PNG."""
        width = self.value("innerWidth")
        clip = {"clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}} if height else {}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=bool(height), **clip)["data"]
        path.write_bytes(base64.b64decode(data))

    @property
    def problems(self):
        found = []
        for event in self.events:
            method, about = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(about["exceptionDetails"]["text"])
            elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning"):
                found.append(str(about["args"]))
            elif method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
                found.append(about["entry"]["text"])
            elif method == "Network.loadingFailed":
                found.append(about["errorText"])
        return found
