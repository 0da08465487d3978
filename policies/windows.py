"""Windows of time in which moves may be made."""

from __future__ import annotations

import msgspec

DAY = 86400.0


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """From `start` to `end`, seconds since midnight UTC, on `days` (0: Monday). An earlier end is the next day's."""

    start: float = 0.0
    end: float = DAY
    days: frozenset[int] = frozenset(range(7))

    def left(self, time: float) -> float:
        """Seconds until it closes; 0 outside of it."""
        day, second = divmod(time, DAY)
        weekday = (int(day) + 3) % 7  # 1970-01-01 was a Thursday
        if self.start < self.end:
            return self.end - second if weekday in self.days and self.start <= second < self.end else 0.0
        if weekday in self.days and second >= self.start:
            return DAY - second + self.end
        if (weekday - 1) % 7 in self.days and second < self.end:
            return self.end - second
        return 0.0


def left(windows: tuple[Window, ...], time: float) -> float:
    """Seconds for which moves may go on from `time`; infinite where there are no windows."""
    return max((window.left(time) for window in windows), default=float("inf"))
