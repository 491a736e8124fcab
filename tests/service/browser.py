"""A headless Chromium, driven over the pipe of its DevTools protocol. Every wait is bounded."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATIENCE = 60.0  # far above what anything here takes

_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--no-default-browser-check", "--disable-extensions", "--disable-sync", "--mute-audio"),
    *("--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-breakpad"),
    *("--disable-features=Translate,OptimizationHints,MediaRouter,DialMediaRouteProvider", "--password-store=basic"),
    *("--remote-debugging-pipe", "--lang=en-GB"),
)

# Where the protocol speaks.
_ON_3_AND_4 = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """The program, wherever the distribution keeps it."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name)) is not None), None)


class RefusedError(AssertionError):
    """Chromium cannot do what it is asked to, perhaps because the page is just changing."""


class Browser:
    """One Chromium; for one thread. Use it in a `with`."""

    def __init__(self, program: str, directory: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._log = (directory / "chromium.log").open("w+")
        # Killed, Chromium leaves its temporary files; and the path of a socket among them has to be short.
        self._temporary = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", _ON_3_AND_4, str(theirs_in), str(theirs_out)),
                *(program, *_FLAGS, f"--user-data-dir={directory / 'profile'}"),
            ],
            pass_fds=(theirs_in, theirs_out),
            env={**os.environ, "TZ": "UTC", "TMPDIR": self._temporary.name},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number = 0
        self._read = b""
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._log.close()
        self._temporary.cleanup()

    @contextlib.contextmanager
    def page(self, url: str, width: int = 1360, height: int = 900, dark: bool = False) -> Iterator[Page]:
        """A page of its own, with no cookies and no cache from others."""
        context = self.call("Target.createBrowserContext", {})["browserContextId"]
        target = self.call("Target.createTarget", {"url": "about:blank", "browserContextId": context})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = Page(self, session)
        page.size(width, height)
        page.prefer("dark" if dark else "light")
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=url)
        try:
            yield page
        finally:
            self.call("Target.disposeBrowserContext", {"browserContextId": context})

    def call(self, method: str, parameters: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._out, json.dumps({**message, "sessionId": session} if session else message).encode() + b"\0")
        give_up = time.monotonic() + PATIENCE
        while True:
            answer = self._next(give_up)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RefusedError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._events.append(answer)

    def events(self, session: str, *methods: str) -> list[dict[str, Any]]:
        """What was told so far of these kinds."""
        return [
            event["params"]
            for event in self._events
            if event.get("sessionId") == session and event.get("method") in methods
        ]

    def _next(self, give_up: float) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._in], [], [], max(0.0, give_up - time.monotonic()))
            data = os.read(self._in, 1 << 20) if ready else b""
            if not data:
                self._log.seek(0)
                raise AssertionError(f"Chromium does not answer (exit code {self._process.poll()}): {self._log.read()}")
            self._read += data
        line, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, parameters, self._session)

    def size(self, width: int, height: int) -> None:
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def prefer(self, scheme: str) -> None:
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise AssertionError(f"{expression}: {told['exceptionDetails']}")
        return told["result"].get("value")

    def text(self, selector: str) -> str:
        """What a reader sees there; empty where nothing is."""
        return str(self.ask(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def wait_for(self, expression: str) -> None:
        """Until it is true."""
        give_up = time.monotonic() + PATIENCE
        while not self._is(expression):
            assert time.monotonic() < give_up, f"{expression}; the page says: {self.text('body')}; {self.complaints()}"
            time.sleep(0.05)

    def _is(self, expression: str) -> bool:
        try:
            return bool(self.ask(f"document.readyState === 'complete' && Boolean({expression})"))
        except RefusedError:
            return False

    def wait_for_text(self, selector: str, text: str) -> None:
        wanted = f"document.querySelector({json.dumps(selector)})?.innerText.includes({json.dumps(text)})"
        self.wait_for(wanted)

    def type(self, selector: str, text: str) -> None:
        """By the keyboard, in place of what is there."""
        self.ask(f"document.querySelector({json.dumps(selector)}).focus()")
        self.ask(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """By the mouse, where it is on the screen."""
        where = f"document.querySelector({json.dumps(selector)})"
        self.ask(f"{where}.scrollIntoView({{block: 'center'}})")
        box = self.ask(f"{where}.getBoundingClientRect().toJSON()")
        spot = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **spot)

    def go_offline(self) -> None:
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def complaints(self) -> list[Any]:
        """Exceptions, refused requests, violations of the policy."""
        told = self._browser.events(self._session, "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in told if event.get("entry", {}).get("level") not in ("info", "verbose")]

    def addresses(self) -> set[str]:
        """Of everything that was asked for."""
        asked = self._browser.events(self._session, "Network.requestWillBeSent")
        return {event["request"]["url"] for event in asked}

    def screenshot(self, path: Path, whole: bool = True) -> None:
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(told["data"]))
