"""Headless Chromium over its debugging pipe: no package, no port. Pages report every request, dialog and exception."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)
#: name -> (code, virtual key, text)
KEYS: dict[str, tuple[str, int, str]] = {
    "Tab": ("Tab", 9, ""),
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    " ": ("Space", 32, " "),
    "PageUp": ("PageUp", 33, ""),
    "PageDown": ("PageDown", 34, ""),
    "End": ("End", 35, ""),
    "Home": ("Home", 36, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
}
SHIFT = 8


def find_chromium() -> str | None:
    """The path of a browser, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A browser with a profile of its own; close it, or use `with`."""

    def __init__(self, path: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="sapwood-browser-", ignore_cleanup_errors=True)
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # The browser reads from descriptor 3 and writes to 4, whatever numbers the pipes have here.
        ours = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_read, to_write)]

        def place() -> None:
            os.dup2(ours[0], 3)
            os.dup2(ours[1], 4)

        self._process = subprocess.Popen(
            [path, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=place,
        )
        for fd in (to_read, to_write, *ours):
            os.close(fd)
        self._rest = b""
        self._number = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(BrokenPipeError, TimeoutError, RuntimeError):
            self.ask("Browser.close", timeout=5)
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def ask(self, method: str, session: str | None = None, timeout: float = 60, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and wait for its answer."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        self._send(message)
        end = time.monotonic() + timeout
        while number not in self._answers:
            self._take(end - time.monotonic(), method)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error'].get('message')}")
        return answer["result"]

    def _send(self, message: dict[str, Any]) -> None:
        rest = memoryview(json.dumps(message).encode() + b"\0")
        while rest:
            rest = rest[os.write(self._write, rest) :]

    def wait(self, seconds: float) -> None:
        """Take in what the browser says meanwhile."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                self._take(left, "waiting")

    def _take(self, left: float, what: str) -> None:
        if left <= 0 or not select.select([self._read], [], [], left)[0]:
            raise TimeoutError(f"{what}: the browser did not answer")
        block = os.read(self._read, 2**20)
        if not block:
            raise RuntimeError(f"{what}: the browser has ended")
        *messages, self._rest = (self._rest + block).split(b"\0")
        for raw in messages:
            message = json.loads(raw)
            if "id" in message:
                self._answers[message["id"]] = message
            elif message.get("sessionId") in self._pages:
                self._pages[message["sessionId"]].take(message["method"], message["params"])

    def page(self, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """A new page."""
        context = self.ask("Target.createBrowserContext")["browserContextId"]
        target = self.ask("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        made = Page(self, session, target)
        self._pages[session] = made
        for domain in ("Page", "Runtime", "Network", "Log"):
            made.ask(f"{domain}.enable")
        made.size(width, height)
        made.media(dark=dark)
        return made


class Page:
    """A page. dialogs, errors, refused: what it did since it was made."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self.browser = browser
        self._asked: dict[str, str] = {}
        self.dialogs: list[str] = []
        self.errors: list[str] = []
        self.refused: list[str] = []
        self._session = session
        self._target = target
        self._loaded = False

    @property
    def requests(self) -> list[str]:
        """Addresses that were asked for; those that the policy refused were not."""
        return list(self._asked.values())

    def ask(self, method: str, timeout: float = 60, **params: Any) -> dict[str, Any]:
        """A command to this page."""
        return self.browser.ask(method, self._session, timeout, **params)

    def close(self) -> None:
        """Close it."""
        self.browser.ask("Target.closeTarget", targetId=self._target)

    def take(self, event: str, params: dict[str, Any]) -> None:
        """An event of the protocol."""
        if event == "Network.requestWillBeSent":
            self._asked[params["requestId"]] = params["request"]["url"]
        elif event == "Network.loadingFailed" and params.get("blockedReason"):
            self._asked.pop(params["requestId"], None)
        elif event == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])
            self.browser._send(
                {
                    "id": 0,
                    "method": "Page.handleJavaScriptDialog",
                    "params": {"accept": True},
                    "sessionId": self._session,
                }
            )
        elif event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            kind = self.refused if "Content Security Policy" in params["entry"]["text"] else self.errors
            kind.append(params["entry"]["text"])
        elif event == "Page.loadEventFired":
            self._loaded = True

    def size(self, width: int, height: int, scale: float = 1) -> None:
        """The window."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def media(self, dark: bool = False, kind: str = "") -> None:
        """What the system prefers."""
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.ask("Emulation.setEmulatedMedia", media=kind, features=features)

    def open(self, url: str | Path, ready: bool = True, timeout: float = 60) -> Page:
        """Go to a file or an address; ready: wait until the report has its samples."""
        self._loaded = False
        self.ask("Page.navigate", url=url.resolve().as_uri() if isinstance(url, Path) else url)
        end = time.monotonic() + timeout
        while not self._loaded and time.monotonic() < end:
            self.browser.wait(0.02)
        if ready:
            self.until("document.documentElement.dataset.ready === 'true'", timeout)
        return self

    def js(self, expression: str, timeout: float = 60) -> Any:
        """The value of an expression; a promise is awaited. Raises RuntimeError for what it throws."""
        answer = self.ask("Runtime.evaluate", timeout, expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    def until(self, expression: str, timeout: float = 20) -> None:
        """Wait until an expression is true. Raises TimeoutError."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.js(f"Boolean({expression})"):
                return
            self.browser.wait(0.03)
        raise TimeoutError(f"never true: {expression}")

    def text(self, selector: str) -> str:
        """What is seen of an element."""
        return self.js(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector: str) -> list[str]:
        """What is seen of all elements."""
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.innerText)")

    def press(self, key: str, times: int = 1, modifiers: int = 0) -> None:
        """Press a key."""
        code, number, text = KEYS.get(key, (f"Key{key.upper()}", ord(key.upper()[0]), key))
        for _ in range(times):
            common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
            self.ask("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
            self.ask("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.ask("Input.insertText", text=text)

    def click(self, selector: str, index: int = 0, modifiers: int = 0) -> None:
        """Click into the middle of an element, with a real mouse event."""
        where = self.js(
            f"(() => {{ const node = document.querySelectorAll({json.dumps(selector)})[{index}];"
            "node.scrollIntoView({block: 'center', behavior: 'instant'}); const box = node.getBoundingClientRect();"
            "return [box.left + box.width / 2, box.top + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.ask(
                "Input.dispatchMouseEvent",
                type=kind,
                x=where[0],
                y=where[1],
                button="left",
                clickCount=1,
                modifiers=modifiers,
            )

    def move(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path: Path, whole: bool = False, selector: str | None = None) -> Path:
        """A PNG of what is in sight, of the whole page, or of an element."""
        options: dict[str, Any] = {"format": "png"}
        if whole:
            size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
            options |= {
                "captureBeyondViewport": True,
                "clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1},
            }
        if selector:
            box = self.js(
                f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
                "return [box.left + scrollX, box.top + scrollY, box.width, box.height]; })()"
            )
            options |= {
                "captureBeyondViewport": True,
                "clip": dict(zip(("x", "y", "width", "height"), box, strict=True)) | {"scale": 1},
            }
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", **options)["data"]))
        return path

    def pdf(self, path: Path) -> Path:
        """The page as it is printed."""
        path.write_bytes(base64.b64decode(self.ask("Page.printToPDF", printBackground=True)["data"]))
        return path


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """The machine's browser. Raises FileNotFoundError where there is none."""
    path = find_chromium()
    if path is None:
        raise FileNotFoundError("no Chromium or Chrome on this machine: apt-get install chromium")
    with Browser(path) as made:
        yield made
