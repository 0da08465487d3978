"""A Redis client that believes nothing: it verifies every reply and measures every wait.

One connection for its whole life, never opened again: a migration that breaks it has failed. The
client knows what the database must hold, because every key it writes is its own; a reply that
is wrong, missing or repeated is found at once, and at the end everything acknowledged is read back.

    client = VerifyingClient("10.0.0.1", 6379, rate=2000)
    client.start()
    ...                                    # the server moves
    report = client.stop()
    assert report.flawless, report

As a program (`python -m migrator.testing.redisclient OUTFILE HOST PORT`) it behaves as the workloads
do: lines to OUTFILE, "SENT_NS RECEIVED_NS" per exchange to OUTFILE.samples, and the report as JSON
on standard output when it is told to stop by SIGTERM.

RESP2 as in https://redis.io/docs/latest/develop/reference/protocol-spec/. All times are
CLOCK_MONOTONIC in nanoseconds.
"""

from __future__ import annotations

import gc
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

Reply = int | bytes | None | list["Reply"]

GAP_NS = 5_000_000
FILL_VALUE = 8192


class RedisError(Exception):
    """An error reply of the server, or a reply that is no RESP."""


class Connection:
    """One connection to a Redis server; blocking; `timeout` in seconds for each wait."""

    def __init__(self, host: str, port: int, *, timeout: float = 60.0) -> None:
        self._socket = socket.create_connection((host, port), timeout=timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray()
        self._start = 0
        self.received_ns = 0  # when the last bytes came in

    def close(self) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def command(self, *words: str | bytes | int) -> Reply:
        """Sends one command, waits for its reply. Raises `RedisError`, `OSError`."""
        self.send(encode(*words))
        return self.reply()

    def reply(self) -> Reply:
        """The next reply. Raises `ConnectionError` where the server closes instead."""
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            raise RedisError(rest.decode(errors="replace"))
        if kind == b":":
            return int(rest)
        if kind == b"$":
            length = int(rest)
            return None if length < 0 else self._bytes(length)
        if kind == b"*":
            return [self.reply() for _ in range(int(rest))]
        raise RedisError(f"not RESP: {line[:40]!r}")

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n", self._start)) < 0:
            self._more()
        line = bytes(self._buffer[self._start : end])
        self._start = end + 2
        return line

    def _bytes(self, length: int) -> bytes:
        while len(self._buffer) < self._start + length + 2:
            self._more()
        data = bytes(self._buffer[self._start : self._start + length])
        self._start += length + 2
        return data

    def _more(self) -> None:
        if self._start:
            del self._buffer[: self._start]
            self._start = 0
        data = self._socket.recv(262144)
        if not data:
            raise ConnectionError("the server closed the connection")
        self.received_ns = time.monotonic_ns()
        self._buffer += data


def encode(*words: str | bytes | int) -> bytes:
    """One command as an array of bulk strings."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        raw = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%s\r\n" % (len(raw), raw))
    return b"".join(parts)


@dataclass(frozen=True)
class Gap:
    """A wait above 5 ms: requests were outstanding and no reply came for `ms` milliseconds."""

    at_ns: int
    ms: float


@dataclass
class ClientReport:
    """What the client saw.

    requests:        commands sent
    replies:         replies received, right or wrong
    lost_replies:    commands sent whose reply never came
    wrong_replies:   replies that are not what the database must hold
    reconnects:      connections opened after the first one: none, ever
    verified_keys:   keys read back at the end and found right
    longest_gap_ms:  longest time without any reply while one was due
    gaps:            all such times above 5 ms
    error:           what broke the connection, or the first wrong reply
    """

    requests: int = 0
    replies: int = 0
    lost_replies: int = 0
    wrong_replies: int = 0
    reconnects: int = 0
    verified_keys: int = 0
    seconds: float = 0.0
    longest_gap_ms: float = 0.0
    gaps: list[Gap] = field(default_factory=list)
    error: str = ""

    @property
    def flawless(self) -> bool:
        """No reply lost or wrong, one connection from start to end."""
        return not (self.lost_replies or self.wrong_replies or self.reconnects or self.error)


class VerifyingClient:
    """Writes and verifies all the time, on a thread of its own.

    rate:      exchanges per second at most; 0 for as many as the server answers
    pipeline:  commands per exchange, sent at once
    keys:      how many counters and how many values it owns
    value:     bytes per value
    prefix:    of all its keys, so that several clients share a server

    `samples` grows by (sent_ns, received_ns) per exchange and may be read at any time.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        rate: float = 1000.0,
        pipeline: int = 3,
        keys: int = 200,
        value: int = 100,
        prefix: str = "client",
        timeout: float = 60.0,
    ) -> None:
        self.samples: list[tuple[int, int]] = []
        self.report = ClientReport()
        self._rate = rate
        self._pipeline = pipeline
        self._keys = keys
        self._value = value
        self._prefix = prefix
        self._counters: dict[int, int] = {}
        self._values: dict[int, bytes] = {}
        self._stop = threading.Event()
        self._began = time.monotonic_ns()
        self._thread = threading.Thread(target=self._run, name="redis-client", daemon=True)
        self._connection = Connection(host, port, timeout=timeout)
        self._connection.command("DEL", *self._names())

    def start(self) -> VerifyingClient:
        self._thread.start()
        return self

    def stop(self, *, seconds: float = 90.0) -> ClientReport:
        """Ends the load, reads everything back, closes; returns the report.

        Raises `TimeoutError` where the server owes a reply for more than `seconds`.
        """
        self._stop.set()
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise TimeoutError("the Redis client still waits for a reply")
        return self.report

    @property
    def broken(self) -> bool:
        return bool(self.report.error)

    def longest_gap_ms(self, since_ns: int = 0) -> float:
        """Longest gap that ended after `since_ns`."""
        ends = (received - sent for sent, received in list(self.samples) if received > since_ns)
        return max(ends, default=0) / 1e6

    def _names(self) -> Iterator[str]:
        for key in range(self._keys):
            yield f"{self._prefix}:counter:{key}"
            yield f"{self._prefix}:value:{key}"

    def _run(self) -> None:
        self._began = time.monotonic_ns()
        try:
            self._load()
            self._read_back()
        except (OSError, RedisError) as error:
            self.report.error = self.report.error or f"{type(error).__name__}: {error}"
        finally:
            self.report.lost_replies = self.report.requests - self.report.replies
            self.report.seconds = (time.monotonic_ns() - self._began) / 1e9
            self._connection.close()

    def _load(self) -> None:
        period = 1e9 / self._rate if self._rate else 0.0
        due = float(time.monotonic_ns())
        number = 0
        while not self._stop.is_set():
            commands, wanted = self._exchange(number)
            number += len(wanted)
            self._exchange_and_verify(commands, wanted)
            # What was missed in a gap is not made up for: it would be a burst no user asked for.
            due = max(due + period, time.monotonic_ns() - 50e6)
            rest = (due - time.monotonic_ns()) / 1e9
            if rest > 0:
                time.sleep(rest)

    def _exchange(self, number: int) -> tuple[bytes, list[Reply]]:
        """The commands of one exchange and the replies they must get."""
        commands: list[bytes] = []
        wanted: list[Reply] = []
        for n in range(number, number + self._pipeline):
            key = n // 3 % self._keys
            if n % 3 == 0:
                self._counters[key] = self._counters.get(key, 0) + 1
                commands.append(encode("INCR", f"{self._prefix}:counter:{key}"))
                wanted.append(self._counters[key])
            elif n % 3 == 1:
                self._values[key] = (b"%d:" % n).ljust(self._value, b"%d" % (n % 10))
                commands.append(encode("SET", f"{self._prefix}:value:{key}", self._values[key]))
                wanted.append(b"OK")
            else:
                commands.append(encode("GET", f"{self._prefix}:value:{key}"))
                wanted.append(self._values.get(key))
        return b"".join(commands), wanted

    def _exchange_and_verify(self, commands: bytes, wanted: Sequence[Reply]) -> None:
        sent = last = time.monotonic_ns()
        self.report.requests += len(wanted)
        self._connection.send(commands)
        for right in wanted:
            reply = self._connection.reply()
            self.report.replies += 1
            if reply != right:
                self.report.wrong_replies += 1
                self.report.error = self.report.error or f"got {reply!r:.80}, not {right!r:.80}"
            gap = self._connection.received_ns - last
            if gap > GAP_NS:
                self.report.gaps.append(Gap(at_ns=last, ms=gap / 1e6))
            self.report.longest_gap_ms = max(self.report.longest_gap_ms, gap / 1e6)
            last = max(last, self._connection.received_ns)
        self.samples.append((sent, last))

    def _read_back(self) -> None:
        expected: dict[str, Reply] = {
            f"{self._prefix}:counter:{key}": b"%d" % count for key, count in self._counters.items()
        }
        expected |= {f"{self._prefix}:value:{key}": value for key, value in self._values.items()}
        if not expected:
            return
        found = self._connection.command("MGET", *expected)
        assert isinstance(found, list)
        for (name, right), reply in zip(expected.items(), found, strict=True):
            if reply == right:
                self.report.verified_keys += 1
            else:
                self.report.wrong_replies += 1
                self.report.error = self.report.error or f"{name} is {reply!r:.80}, not {right!r:.80}"


def fill_value(number: int) -> bytes:
    """The value of key `fill:NUMBER`: half random, half not, as much real data is."""
    return random.Random(number).randbytes(FILL_VALUE // 2) + b"%08d" % number * (FILL_VALUE // 16)


def fill(host: str, port: int, mib: int) -> int:
    """Writes `mib` MiB of values in keys `fill:0` and on; returns how many keys."""
    count = mib * (1 << 20) // FILL_VALUE
    connection = Connection(host, port)
    try:
        for first in range(0, count, 64):
            batch = range(first, min(first + 64, count))
            connection.send(b"".join(encode("SET", f"fill:{n}", fill_value(n)) for n in batch))
            for _ in batch:
                if (reply := connection.reply()) != b"OK":
                    raise RedisError(f"SET: {reply!r}")
    finally:
        connection.close()
    return count


def verify_fill(host: str, port: int, count: int, *, step: int = 1) -> None:
    """Reads back every `step`-th of the `count` keys of `fill`. Raises `RedisError` at a wrong one."""
    connection = Connection(host, port)
    try:
        for number in range(0, count, step):
            if connection.command("GET", f"fill:{number}") != fill_value(number):
                raise RedisError(f"fill:{number} is not what was written")
    finally:
        connection.close()


def main() -> None:
    """The client as a workload; see the module's docstring."""
    import argparse
    import json
    import os
    import signal
    from pathlib import Path

    parser = argparse.ArgumentParser(description="A verifying Redis client.")
    parser.add_argument("out", type=Path)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, default=1000.0, help="exchanges per second, 0 for all it can")
    parser.add_argument("--pipeline", type=int, default=3, help="commands per exchange")
    parser.add_argument("--keys", type=int, default=200)
    parser.add_argument("--value", type=int, default=100, help="bytes per value")
    parser.add_argument("--prefix", default="client")
    parser.add_argument("--seconds", type=float, default=0.0, help="0: until SIGTERM")
    arguments = parser.parse_args()

    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    gc.disable()  # a collection is a gap of the client's own making
    client = VerifyingClient(
        arguments.host,
        arguments.port,
        rate=arguments.rate,
        pipeline=arguments.pipeline,
        keys=arguments.keys,
        value=arguments.value,
        prefix=arguments.prefix,
    ).start()
    began = time.monotonic()
    ticks = 0
    with arguments.out.open("a", buffering=1) as out:
        out.write(f"ready pid={os.getpid()}\n")
        while not told.wait(0.1) and not client.broken:
            ticks += 1
            report = client.report
            out.write(f"tick {ticks} replies {report.replies} longest_gap_ms {report.longest_gap_ms:.3f}\n")
            if arguments.seconds and time.monotonic() - began > arguments.seconds:
                break
        report = client.stop()
        with Path(f"{arguments.out}.samples").open("w") as samples:
            samples.writelines(f"{sent} {received}\n" for sent, received in client.samples)
        print(json.dumps({"flawless": report.flawless, **asdict(report)}), flush=True)
        out.write("ok\n" if report.flawless else f"FAIL pid={os.getpid()} {report.error or report}\n")
    raise SystemExit(0 if report.flawless else 1)


if __name__ == "__main__":
    main()
