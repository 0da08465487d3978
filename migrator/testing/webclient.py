"""Clients of a web server that open a connection for each request, believe nothing, and measure every wait.

    python -m migrator.testing.webclient 10.77.0.50 80 /file SHA256 --clients 16 --samples FILE

Each client asks (HTTP/1.0), reads to the end of the connection and compares the digest, again and again until
standard input ends. Then one line of JSON is printed: `Tally`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import sys
import time
from pathlib import Path

import msgspec

PATIENCE = 15.0  # seconds after which a client calls it waiting for ever


class Tally(msgspec.Struct):
    """requests: answered rightly. failures: in words, with the time (s of CLOCK_MONOTONIC). longest: seconds."""

    requests: int = 0
    longest: float = 0.0
    failures: list[str] = []


class WebClients:
    """`run()` until `stop()`. `samples` has (asked, answered) of each request, in ns of CLOCK_MONOTONIC."""

    def __init__(self, host: str, port: int, path: str, digest: str, clients: int, *, pause: float = 0.0) -> None:
        self.tally = Tally()
        self.samples: list[tuple[int, int]] = []
        self._address = host, port
        self._request = f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode()
        self._digest = digest
        self._clients = clients
        self._pause = pause
        self._over = False

    async def run(self) -> Tally:
        await asyncio.gather(*(self._client() for _ in range(self._clients)))
        return self.tally

    def stop(self) -> None:
        self._over = True

    async def _client(self) -> None:
        while not self._over:
            began = time.monotonic_ns()
            try:
                async with asyncio.timeout(PATIENCE):
                    problem = await self._ask()
            except TimeoutError:
                problem = f"no end of the answer within {PATIENCE:g} s"
            except OSError as error:
                problem = f"{type(error).__name__}: {error}"
            ended = time.monotonic_ns()
            if problem:
                self.tally.failures.append(f"{began / 1e9:.3f}: {problem}")
            else:
                self.tally.requests += 1
            self.tally.longest = max(self.tally.longest, (ended - began) / 1e9)
            self.samples.append((began, ended))
            if self._pause:
                await asyncio.sleep(self._pause)

    async def _ask(self) -> str:
        """What is wrong with the answer; "" for nothing."""
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            writer.write(self._request)
            answer = await reader.read(-1)
        finally:
            writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            return f"answered {head[:60]!r}"
        if hashlib.sha256(body).hexdigest() != self._digest:
            return f"{len(body)} bytes that are not the file"
        return ""


async def _main(arguments: argparse.Namespace) -> None:
    clients = WebClients(
        arguments.host, arguments.port, arguments.path, arguments.digest, arguments.clients, pause=arguments.pause
    )
    running = asyncio.create_task(clients.run())
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    clients.stop()
    tally = await running
    if arguments.samples:
        arguments.samples.write_text("".join(f"{asked} {answered}\n" for asked, answered in clients.samples))
    print(msgspec.json.encode(tally).decode(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("digest")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--samples", type=Path)
    asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
