"""Text for people: sizes, durations, and names that may hold anything.

Names of processes, files, hosts and containers come from others, and a terminal obeys what it is sent.
`printable()` is what makes a text that only shows something.
"""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def printable(text: object) -> str:
    """`text` with all that is not a printable character escaped: controls, line breaks, direction marks.

    Bytes of file names that are no UTF-8 (surrogates of os.fsdecode()) are shown as \\xNN."""
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def size(count: float) -> str:
    """A number of bytes in binary units: "512 B", "3.2 MiB", "120 GiB"."""
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError  # the last unit takes all


def duration(seconds: float) -> str:
    """Seconds as "5 us", "12.5 ms", "1.52 s", "3m 20s", "2h 5m" or "4d 3h"."""
    if 0 < seconds < 5e-5:
        return f"{seconds * 1e6:.2g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours}h" if days else f"{hours}h {minutes}m" if hours else f"{minutes}m {rest}s"
