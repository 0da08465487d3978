"""A real browser (Debian's `chromium`), driven over its debugging protocol, for tests of pages.

    async with Browser(tmp_path) as browser:
        await browser.open("http://127.0.0.1:9742/")
        await browser.until("document.querySelectorAll('#hosts tbody tr').length == 3")

See https://chromedevtools.github.io/devtools-protocol/. Needs `chromium`; as root it runs without its own sandbox.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

_UP_WITHIN = 60.0  # seconds


class Browser:
    """One page of one browser; `errors` has what went wrong on it: exceptions, and what it was refused to load."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.errors: list[str] = []

    async def __aenter__(self) -> Self:
        argv = [
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--no-proxy-server",
            "--disable-dev-shm-usage", "--disable-background-networking", "--remote-debugging-port=0",
            f"--user-data-dir={self._directory}", "about:blank",
        ]  # fmt: skip
        null = asyncio.subprocess.DEVNULL
        self._process = await asyncio.create_subprocess_exec(*argv, stdin=null, stdout=null, stderr=null)
        self._session = aiohttp.ClientSession()
        try:
            self._socket = await self._session.ws_connect(await self._page(), max_msg_size=64 << 20)
            self._listener = asyncio.create_task(self._listen())
            for domain in ("Page", "Runtime", "Log", "Network"):
                await self.call(f"{domain}.enable")
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.cancel()
        await asyncio.gather(self._listener, return_exceptions=True)
        await self._end()

    async def _end(self) -> None:
        await self._session.close()
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _page(self) -> str:
        file = self._directory / "DevToolsActivePort"
        deadline = time.monotonic() + _UP_WITHIN
        while time.monotonic() < deadline and self._process.returncode is None:
            if file.exists() and (text := file.read_text().split()):
                async with self._session.get(f"http://127.0.0.1:{text[0]}/json/list") as answer:
                    for target in await answer.json():
                        if target["type"] == "page":
                            return str(target["webSocketDebuggerUrl"])
            await asyncio.sleep(0.1)
        raise RuntimeError(f"chromium does not come up within {_UP_WITHIN:g} s")

    async def _listen(self) -> None:
        async for message in self._socket:
            told = message.json()
            if (waiting := self._waiting.pop(told.get("id", 0), None)) is not None:
                if not waiting.done():
                    waiting.set_result(told)
            elif told["method"] == "Runtime.exceptionThrown":
                self.errors.append(str(told["params"]["exceptionDetails"]))
            elif told["method"] == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.errors.append(told["params"]["entry"]["text"])

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; its result. Raises RuntimeError."""
        number = next(self._numbers)
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(90):
            told = await waiting
        if "error" in told:
            raise RuntimeError(f"{method}: {told['error']}")
        return dict(told["result"])

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState == 'complete'")

    async def value(self, expression: str) -> Any:
        """Of an expression of JavaScript on the page."""
        told = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(f"{expression}: {told['exceptionDetails']}")
        return told["result"].get("value")

    async def until(self, expression: str, *, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not await self.value(expression):
            if time.monotonic() > deadline:
                text = await self.value("document.body.innerText")
                raise AssertionError(f"{expression} does not come true; the page: {text[:1000]}")
            await asyncio.sleep(0.05)

    async def look(self, *, dark: bool = False, width: int = 1280, height: int = 900) -> None:
        """Colours and size of the screen; one below 600 is a phone's."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=scheme)
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    async def press(self, key: str, text: str = "") -> None:
        """A key, as by a person."""
        code = {"Tab": 9, "Enter": 13}.get(key, 0)
        more = {"text": text or ("\r" if key == "Enter" else "")} if text or key == "Enter" else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **more)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    async def write(self, text: str) -> None:
        """Into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def picture(self, path: Path) -> None:
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
