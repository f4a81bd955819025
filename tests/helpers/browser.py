"""A headless Chromium that tests steer by its own protocol through two pipes: no driver, no port."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
_VIRTUAL_KEYS = {"Enter": 13, "Tab": 9, "Escape": 27}


class Browser:
    """One page of a Chromium of our own.

    Args:
        folder: for its profile and for what it downloads (`folder/downloads`).
        size: of the window, pixels. ratio: screen pixels a CSS pixel.

    Attributes:
        errors: what the console was told, violations of the policy and the script's exceptions among it.
    """

    def __init__(self, folder: Path, size: tuple[int, int] = (1400, 1000), ratio: float = 1.0) -> None:
        self.errors: list[str] = []
        self.downloads = folder / "downloads"
        self.downloads.mkdir()
        ours, theirs = os.pipe(), os.pipe()  # (read, write): to the browser, from it
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (ours[0], theirs[1])]  # out of the way of 3 and 4
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}/profile", f"--window-size={size[0]},{size[1]}",
                   f"--force-device-scale-factor={ratio}", "--remote-debugging-pipe", "about:blank"]

        def join() -> None:  # Chromium reads file 3 and writes file 4
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        log = (folder / "chromium.log").open("wb")
        self._process = subprocess.Popen(command, preexec_fn=join, pass_fds=(3, 4), stdout=log, stderr=log)
        log.close()
        for fd in (*ends, ours[0], theirs[1]):
            os.close(fd)
        self._out, self._in, self._rest, self._number = ours[1], theirs[0], b"", 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(30)
        os.close(self._out)
        os.close(self._in)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Raises RuntimeError where the browser refuses, TimeoutError after a minute."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            got = self._next()
            if got.get("id") == self._number:
                if "error" in got:
                    raise RuntimeError(f"{method}: {got['error']}")
                return got["result"]
            told = got.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
            if told and got["params"].get("entry", {}).get("level") != "warning":  # of speed, say
                self.errors.append(json.dumps(got["params"])[:500])

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + 60
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise RuntimeError("the browser has gone")
            self._rest += piece
        one, _, self._rest = self._rest.partition(b"\0")
        return json.loads(one)

    def open(self, url: str) -> None:
        """And wait until it is loaded."""
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def js(self, expression: str) -> Any:
        """The value of an expression, a promise's among them."""
        got = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in got:
            raise RuntimeError(json.dumps(got["exceptionDetails"])[:500])
        return got["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> None:
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.js(expression):
            if time.monotonic() > end:
                raise TimeoutError(expression)
            time.sleep(0.02)

    def screenshot(self, file: Path) -> None:
        """Of the window, as a PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def key(self, key: str) -> None:
        """Press and release a key, as a person does: a character, or `Enter`."""
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        code = _VIRTUAL_KEYS.get(key, ord(key[0].upper()))
        about = {"key": key, "text": text, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of an element."""
        box = self.js(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
                      "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect(); "
                      "return [b.x + b.width / 2, b.y + b.height / 2]; })()")  # fmt: skip
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def downloaded(self, seconds: float = 20) -> Path:
        """The one file that was downloaded, when it is whole."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = list(self.downloads.iterdir())
            if len(found) == 1 and found[0].suffix != ".crdownload" and found[0].stat().st_size:
                return found[0]
            time.sleep(0.05)
        raise TimeoutError("no download")
