"""A headless Chromium, driven by its DevTools protocol over a pipe: what a page asks for, reports and measures.

The pipe needs no package and no port.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--hide-scrollbars",
)
_ERROR_LEVELS = ("error", "warning", "assert")

Message = dict[str, Any]


@dataclass
class Visit:
    """One page in a tab of its own, and what happened in it so far."""

    browser: "Browser"
    session_id: str
    requests: list[str] = field(default_factory=list)
    """Addresses that the page asked for, whether or not it was allowed to; without the page's own."""
    complaints: list[str] = field(default_factory=list)
    """Errors and warnings in the console, among them what the page's security policy forbade, and exceptions."""

    def call(self, method: str, **params: object) -> Message:
        return self.browser.call(method, self.session_id, **params)

    def value(self, expression: str) -> Any:
        """A JavaScript expression's value. It runs in the debugger's name: the page's policy does not forbid it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def resize(self, width: int, height: int = 800) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True)

    def emulate(self, colour_scheme: str = "light", media: str = "screen") -> None:
        features = [{"name": "prefers-color-scheme", "value": colour_scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def screenshot(self, path: Path, whole_page: bool = False) -> None:
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole_page)
        path.write_bytes(base64.b64decode(answer["data"]))


class Browser:
    """The connection: NUL-terminated JSON messages, commands to descriptor 3 of the browser, answers from 4."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands = os.fdopen(commands, "wb")
        self._answers = os.fdopen(answers, "rb")
        self._buffer = b""
        self._last_id = 0
        self._visits: dict[str, Visit] = {}

    def call(self, method: str, session_id: str | None = None, **params: object) -> Message:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if session_id is not None:
            message["sessionId"] = session_id
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            answer = self._next_message()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, (method, answer["error"])
                result: Message = answer["result"]
                return result

    def open(self, page: Path) -> Visit:
        """Load a page from a file and wait until it, and all that it asks for, has come or failed."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session_id = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        visit = self._visits[session_id] = Visit(self, session_id)
        for domain in ("Page", "Network", "Log", "Runtime"):
            visit.call(f"{domain}.enable")
        address = page.absolute().as_uri()
        visit.call("Page.navigate", url=address)
        while self._next_message().get("method") != "Page.loadEventFired":
            pass
        # what the page does after it has loaded: two frames, and a moment for the network
        visit.call(
            "Runtime.evaluate",
            expression="new Promise(done => requestAnimationFrame(() => setTimeout(done, 300)))",
            awaitPromise=True,
        )
        visit.requests = [request for request in visit.requests if request != address]
        return visit

    def _next_message(self) -> Message:
        while b"\0" not in self._buffer:
            received = self._answers.read1(1 << 16)
            assert received, "the browser ended"
            self._buffer += received
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: Message = json.loads(line)
        self._note(message)
        return message

    def _note(self, message: Message) -> None:
        visit = self._visits.get(message.get("sessionId", ""))
        if visit is None:
            return
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                visit.requests.append(params["request"]["url"])
            case "Network.webSocketCreated":
                visit.requests.append(params["url"])
            case "Runtime.consoleAPICalled" if params["type"] in _ERROR_LEVELS:
                visit.complaints.append(str([part.get("value") for part in params["args"]]))
            case "Runtime.exceptionThrown":
                visit.complaints.append(params["exceptionDetails"]["text"])
            case "Log.entryAdded" if params["entry"]["level"] in _ERROR_LEVELS:
                visit.complaints.append(params["entry"]["text"])


def _runs(program: str) -> bool:
    """Whether it is there and starts; Ubuntu's package is a script that asks for another one."""
    found = shutil.which(program)
    return found is not None and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile; skips the test, saying so, where there is none."""
    program = next(filter(_runs, _NAMES), None)
    if program is None:
        pytest.skip(f"no Chromium found (looked for {', '.join(_NAMES)} on PATH); .ci/setup dev installs it")
    arguments = [program, *_ARGUMENTS, f"--user-data-dir={profile}"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")
    commands_out, commands_in = os.pipe()
    answers_out, answers_in = os.pipe()
    # bash gives the pipes the numbers that the browser expects, and becomes the browser
    script = f'exec "$@" 3<&{commands_out} 4>&{answers_in}'
    process = subprocess.Popen(
        ["bash", "-c", script, "browser", *arguments],
        pass_fds=(commands_out, answers_in),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_out)
    os.close(answers_in)
    browser = Browser(commands_in, answers_out)
    try:
        yield browser
        browser.call("Browser.close")
    finally:
        process.terminate()
        process.wait(timeout=60)
