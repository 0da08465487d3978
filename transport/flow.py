"""How much may be sent, and how fast that goes: credit, rate and cap, without I/O.

All times are seconds of one monotonic clock given by the caller; all sizes are bytes of
STREAM payload as they go over the wire.
"""

from __future__ import annotations

from migrator.errors import TransportError

FLOOR = 256 << 10
QUEUE_SECONDS = 0.04
_SAMPLE_SECONDS = 0.02
_SAMPLE_BYTES = 1 << 20
_LONG_SECONDS = 0.2
_WEIGHT = 0.3


class SendWindow:
    """What one side of a link may still send of the stream.

    The receiver's window bounds its memory. We stay below it on purpose: what is in flight is
    kept to the measured rate times the round trip and `QUEUE_SECONDS`, because a control
    message waits behind everything that is already in flight.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.in_flight = 0
        self.rate = 0.0  # bytes/s the receiver takes; 0.0 until measured
        self.measured = False  # else `rate` is only a lower bound
        self._backlog = 0.0  # share of the grants under pressure that came from a receiver with a queue
        self._pressed_at: float | None = None  # since when somebody waits for room
        self._since = 0.0  # the last grant, or the first block after nothing was in flight
        self._under_pressure = _Tally()
        self._at_ease = _Tally()
        self._ever = _Tally()
        self._ease_whole = True  # it began with nothing in flight

    def limit(self, round_trip: float) -> int:
        """Bytes that may be in flight, for a `round_trip` in seconds."""
        if not self.measured:
            return min(self.window, 2 << 20)
        wanted = int(self.rate * (round_trip + QUEUE_SECONDS))
        return max(min(wanted, self.window), FLOOR)

    @property
    def estimate(self) -> float:
        """Bytes/s the receiver takes, from what there is; 0.0 after less than `FLOOR` bytes."""
        if self.rate or self._ever.size < FLOOR:
            return self.rate
        return self._ever.size / max(self._ever.seconds, 1e-6)

    @property
    def capacity(self) -> float:
        """Bytes/s of the link, 0.0 while it is not the bottleneck as far as we know.

        Where the receiver has a queue it is the receiver that is slow, and to compress more would
        not help it.
        """
        return self.rate if self.measured and self._backlog < 0.5 else 0.0

    def has_room(self, size: int, round_trip: float, now: float) -> bool:
        if self.in_flight == 0:
            return True
        room = self.limit(round_trip) - self.in_flight >= size
        if not room and self._pressed_at is None:
            self._pressed_at = now
        return room

    def sent(self, size: int, now: float) -> None:
        if self.in_flight == 0:
            self._since = now
        self.in_flight += size

    def granted(self, size: int, now: float, *, backlog: bool = False) -> None:
        """The receiver is done with `size` bytes; `backlog` if it has more.

        Raises `TransportError` if it never had them.
        """
        if size > self.in_flight:
            raise TransportError(f"the other end acknowledges {size} bytes, {self.in_flight} are in flight")
        self.in_flight -= size
        elapsed = now - self._since
        self._ever.add(size, elapsed)
        # Pressure counts if it was there from the start: else we were busy with something else.
        if self._pressed_at is not None and self._pressed_at - self._since <= 0.25 * elapsed:
            self._backlog += 0.1 * (backlog - self._backlog)
            self._under_pressure.add(size, elapsed)
            if self._under_pressure.enough:
                sample = self._under_pressure.rate()
                self.rate += (_WEIGHT if self.measured else 1.0) * (sample - self.rate)
                self.measured = True
        else:
            # The link was idle part of the time: a lower bound. Grants come in lumps, so it takes a
            # long time, or one from nothing in flight to nothing in flight.
            ease = self._at_ease
            ease.add(size, elapsed)
            whole = self.in_flight == 0 and self._ease_whole and ease.seconds >= 0.001
            if ease.size >= FLOOR and (whole or ease.seconds >= _LONG_SECONDS):
                self.rate = max(self.rate, ease.rate())
                self._ease_whole = self.in_flight == 0
            elif self.in_flight == 0 and not self._ease_whole:
                ease.clear()
                self._ease_whole = True
        self._since = now
        self._pressed_at = None


class _Tally:
    """Bytes acknowledged over a time in which something was in flight throughout."""

    def __init__(self) -> None:
        self.size = 0
        self.seconds = 0.0

    def add(self, size: int, seconds: float) -> None:
        self.size += size
        self.seconds += seconds

    @property
    def enough(self) -> bool:
        return self.seconds >= _SAMPLE_SECONDS or (self.size >= _SAMPLE_BYTES and self.seconds >= 0.002)

    def rate(self) -> float:
        """Bytes/s; begins anew."""
        rate = self.size / max(self.seconds, 1e-6)
        self.clear()
        return rate

    def clear(self) -> None:
        self.size, self.seconds = 0, 0.0


class ReceiveWindow:
    """What the other side may still send; the mirror of `SendWindow`.

    Grants are given in lumps, so that small blocks do not cost a frame each.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.outstanding = 0
        self._owed = 0

    def received(self, size: int) -> None:
        """Raises `TransportError` when the peer sends more than it was allowed to."""
        self.outstanding += size
        if self.outstanding > self.window:
            raise TransportError(f"the other end sent more than the {self.window} bytes it may")

    def consumed(self, size: int, *, idle: bool) -> int:
        """Bytes to grant now, 0 to wait for more. `idle` says that nothing else is queued."""
        self._owed += size
        if not idle and self._owed < self.window // 32:
            return 0
        grant, self._owed = self._owed, 0
        self.outstanding -= grant
        return grant


class TokenBucket:
    """A cap of `rate` bytes/s, over any time longer than that of one `burst`."""

    def __init__(self, rate: float, burst: float | None = None) -> None:
        if rate <= 0:
            raise ValueError(f"a cap of {rate} bytes/s")
        self.rate = rate
        self.burst = burst if burst is not None else rate * 0.05
        self._tokens = self.burst
        self._at: float | None = None

    def delay(self, now: float) -> float:
        """Seconds until something may be sent. A block may overdraw; the next one pays for it."""
        if self._at is not None:
            self._tokens = min(self.burst, self._tokens + (now - self._at) * self.rate)
        self._at = now
        return max(0.0, -self._tokens / self.rate)

    def take(self, size: int) -> None:
        self._tokens -= size


class RoundTrip:
    """The round trip in seconds: the least ever seen, and the last.

    The least, because a ping that waited behind stream blocks measures our own queue; and ever,
    because under constant load there is no other kind, and a queue sized by it would grow on.
    """

    def __init__(self) -> None:
        self.least = 0.0  # 0.0 before the first sample
        self.last = 0.0

    def add(self, seconds: float) -> None:
        self.last = max(seconds, 1e-9)
        self.least = min(self.least or self.last, self.last)
