"""A real Chromium, driven through its DevTools protocol: keys are pressed and pages are drawn as a person's are."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.debian import program

_LISTENING = re.compile(r"DevTools listening on ws://([^/]+)/")
# What `Input.dispatchKeyEvent` wants to know of keys that are no letters.
_KEY_CODES = {
    "Enter": 13, "Escape": 27, "Home": 36, "End": 35, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
    "Tab": 9,
}  # fmt: skip
_PROBLEMS = ("Runtime.exceptionThrown", "Log.entryAdded")


class Browser:
    """One tab.

    Attributes:
        requests: every request the page has sent, as the protocol tells of it.
        problems: exceptions and errors the page has met.
    """

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0
        self.requests: list[dict[str, Any]] = []
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come before it are noted."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"])
        elif event["method"] in _PROBLEMS:
            self.problems.append(json.dumps(event["params"]))

    def open(self, url: str) -> None:
        """Load a page and wait until it has talked to its server."""
        self.do("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && document.getElementById('pool')?.textContent")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.do("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, *, seconds: float = 30.0) -> None:
        """Look again and again until an expression is true."""
        end = time.monotonic() + seconds
        while not self.js(f"Boolean({expression})"):
            assert time.monotonic() < end, f"{expression} did not come true; problems: {self.problems}"
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """What an element says; empty where there is none."""
        return str(self.js(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''"))

    def focus(self, selector: str) -> None:
        self.js(f"document.querySelector({json.dumps(selector)}).focus()")

    def type(self, text: str) -> None:
        """Text into what has the focus, as if pasted."""
        self.do("Input.insertText", text=text)

    def press(self, *keys: str) -> None:
        """Keys, one after another."""
        for key in keys:
            code = _KEY_CODES.get(key, ord(key.upper()) if len(key) == 1 else 0)
            kind = "rawKeyDown" if len(key) > 1 and key != "Enter" else "keyDown"
            said = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
            self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **said)
            self.do("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def look_like(self, *, width: int, height: int, is_dark: bool) -> None:
        """Another screen."""
        is_mobile = width < 600
        self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if is_mobile else 1, mobile=is_mobile,
        )  # fmt: skip
        value = "dark" if is_dark else "light"
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    """Chromium with a profile of its own, without a window and without a word to anybody else."""
    chromium = program("chromium", package="chromium")
    websocket = pytest.importorskip("websocket", reason="needs pip install websocket-client")
    profile = tempfile.mkdtemp(prefix="trimkv-chromium-")
    process = subprocess.Popen(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--no-first-run", f"--user-data-dir={profile}", "--remote-debugging-port=0", "--remote-allow-origins=*",
            "about:blank",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        address = next(found[1] for line in process.stderr if (found := _LISTENING.search(line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        with urllib.request.urlopen(f"http://{address}/json", timeout=30) as answer:
            tab = next(tab for tab in json.load(answer) if tab["type"] == "page")
        with contextlib.closing(websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=60)) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=20)
        shutil.rmtree(profile, ignore_errors=True)
