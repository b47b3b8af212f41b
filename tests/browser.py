"""Headless Chromium by its DevTools protocol: what a page reports while it loads, and pictures of it."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--remote-debugging-port=0", "about:blank"),
)
FAULTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed")
"""Events that say that something is wrong; of those of the console only warnings and errors count."""
START_SECONDS = 30
LOAD_SECONDS = 20


def find_browser() -> str | None:
    """Path of an installed Chromium or Chrome."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab of a browser. `faults` has what went wrong in it since `open` was called last."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.count = 0
        self.faults: list[str] = []
        self.is_loaded = False
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are taken note of."""
        self.count += 1
        self.connection.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while True:
            message = self._receive(LOAD_SECONDS)
            if message.get("id") == self.count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]

    def _receive(self, timeout: float) -> dict[str, Any]:
        message = json.loads(self.connection.recv(timeout=timeout))
        event, parameters = message.get("method"), message.get("params", {})
        if event == "Page.loadEventFired":
            self.is_loaded = True
        elif event in FAULTS and self._is_fault(parameters):
            self.faults.append(f"{event}: {json.dumps(parameters)[:500]}")
        return message

    @staticmethod
    def _is_fault(parameters: dict[str, Any]) -> bool:
        level = parameters.get("type") or parameters.get("entry", {}).get("level") or "error"
        return level in ("error", "warning", "assert") or "errorText" in parameters

    def open(self, url: str, width: int = 1280, height: int = 800, is_dark: bool = False) -> None:
        """Load a page in a window of this size and wait until everything in it is there."""
        self.faults, self.is_loaded = [], False
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        # If the browser only moves to another anchor of the same page, it names no loader and sends no load event.
        self.is_loaded |= "loaderId" not in self.call("Page.navigate", url=url)
        end = time.monotonic() + LOAD_SECONDS
        while not self.is_loaded:
            self._receive(end - time.monotonic())
        # This waits for scripts that the load event starts, and for pictures that are decoded after it.
        self.call("Runtime.evaluate", expression="new Promise(done => setTimeout(done, 150))", awaitPromise=True)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)["result"]
        return result.get("value")

    def screenshot(self, path: str | Path, is_whole: bool = False) -> None:
        """Write a PNG of what the window shows, or of the whole page."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=is_whole)
        Path(path).write_bytes(base64.b64decode(picture["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Run a browser with its profile in `folder`, and give a tab of it."""
    program = find_browser()
    if program is None:
        raise FileNotFoundError(f"none of {', '.join(NAMES)} is installed")
    with (folder / "browser.log").open("w") as log:
        process = subprocess.Popen([program, f"--user-data-dir={folder}", *FLAGS], stdout=log, stderr=log)
    try:
        with connect(_address(folder, process), max_size=None, origin=None) as connection:
            yield Page(connection)
    finally:
        process.terminate()
        process.wait(timeout=START_SECONDS)


def _address(folder: Path, process: "subprocess.Popen[bytes]") -> str:
    """The WebSocket of the first tab: Chromium writes its port into a file, and lists its tabs there."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        with_port = folder / "DevToolsActivePort"
        if with_port.exists() and (lines := with_port.read_text().splitlines()):
            with urlopen(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
                tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
            if tabs:
                return tabs[0]["webSocketDebuggerUrl"]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"{process.args[0]} did not start: {(folder / 'browser.log').read_text()[-2000:]}")
