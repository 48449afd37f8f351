"""A headless Chromium, driven by its debugging protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from guard import popen
from websockets.sync.client import ClientConnection, connect

_SECONDS = 60
_OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--remote-debugging-port=0"),
)


def chromium() -> str | None:
    """The path of the program, if it is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Page:
    """A tab. `complaints` are what the browser reported: errors of the script, refused assets."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count()
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(_SECONDS))
            if message.get("method") == "Log.entryAdded":
                self.complaints.append(message["params"]["entry"]["text"])
            elif message.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(str(message["params"]["exceptionDetails"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in JavaScript; a promise is awaited."""
        done = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait_for(self, expression: str) -> None:
        deadline = time.monotonic() + _SECONDS
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, (expression, self.complaints)
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """The text that is shown in the first element."""
        shown = self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")
        assert isinstance(shown, str)
        return shown

    def type(self, selector: str, text: str) -> None:
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.evaluate("document.activeElement.select()")
        self.call("Input.insertText", text=text)

    def choose(self, selector: str, *files: Path) -> None:
        """Chooses files, as the dialog of a file field does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        field = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=list(map(str, files)), nodeId=field)

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key,
                windowsVirtualKeyCode=code, **text,
            )  # fmt: skip

    def resize(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def darken(self, scheme: str = "dark") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(taken["data"])


@contextmanager
def open_page(folder: Path) -> Iterator[Page]:
    """A tab of a new browser. folder: for its profile."""
    program = chromium()
    assert program is not None
    command = [program, *_OPTIONS, f"--user-data-dir={folder}", "about:blank"]
    environment = {**os.environ, "HOME": str(folder)}
    with (folder / "log").open("wb") as log:
        browser = popen(command, stdout=log, stderr=log, env=environment)
    try:
        active = folder / "DevToolsActivePort"
        deadline = time.monotonic() + _SECONDS
        while not (active.exists() and active.read_text()):
            assert browser.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        port = active.read_text().split()[0]
        tabs = requests.get(f"http://127.0.0.1:{port}/json", timeout=_SECONDS).json()
        address = next(tab for tab in tabs if tab["type"] == "page")["webSocketDebuggerUrl"]
        with connect(address, max_size=None, proxy=None) as connection:
            yield Page(connection)
    finally:
        browser.terminate()
        browser.wait(_SECONDS)
