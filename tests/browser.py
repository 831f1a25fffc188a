"""A headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
START_S, WAIT_S = 60, 30
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
QUIET = ("--disable-component-update", "--disable-sync", "--no-proxy-server", "--remote-debugging-port=0")


class Page:
    """One tab. `complaints` are what its console and its policy had to say."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket = socket
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []

    async def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=WAIT_S)
            if message.get("method") == "Log.entryAdded":
                self.complaints.append(message["params"]["entry"]["text"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(str(message["params"]["exceptionDetails"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    async def value(self, expression: str) -> Any:
        """Of a JavaScript expression, as JSON."""
        result = await self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait for the expression to be true."""
        end = time.monotonic() + WAIT_S
        while not await self.value(expression):
            assert time.monotonic() < end, f"{expression} is still false; the page says: {self.complaints}"
            await asyncio.sleep(0.05)

    async def open(self, url: str, width: int, height: int = 900) -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.command("Emulation.setDeviceMetricsOverride", **screen)
        await self.command("Page.navigate", url=url)
        await self.until(f"document.readyState === 'complete' && location.href.startsWith({url!r})")

    async def type(self, selector: str, text: str) -> None:
        """As the keyboard would, in place of what is there."""
        await self.value(f"document.querySelector({selector!r}).focus(); document.querySelector({selector!r}).select()")
        await self.command("Input.insertText", text=text)


@contextlib.asynccontextmanager
async def open_page() -> AsyncIterator[Page]:
    """A new browser with one empty page."""
    profile = tempfile.mkdtemp()
    try:
        command = [CHROMIUM, *FLAGS, *QUIET, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = await _port(Path(profile, "DevToolsActivePort"))
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    address = next(one for one in await answer.json() if one["type"] == "page")["webSocketDebuggerUrl"]
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    page = Page(socket)
                    for domain in ("Page", "Runtime", "Log"):
                        await page.command(f"{domain}.enable")
                    yield page
        finally:
            process.terminate()
            process.wait(WAIT_S)
    finally:
        shutil.rmtree(profile, ignore_errors=True)  # the browser's helpers may write for a moment still


async def _port(file: Path) -> int:
    end = time.monotonic() + START_S
    while not (file.exists() and file.read_text().count("\n")):
        assert time.monotonic() < end, "the browser did not start"
        await asyncio.sleep(0.05)
    return int(file.read_text().split()[0])
