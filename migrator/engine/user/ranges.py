"""Arithmetic of half-open ranges (start, end), as page ranges and mappings are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

Span = tuple[int, int]


def merge(spans: Iterable[Span]) -> list[Span]:
    """The same addresses, sorted, in ranges that neither overlap nor touch."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and out[-1][1] >= start:
            if end > out[-1][1]:
                out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return out


def subtract(old: Sequence[Span], new: Sequence[Span]) -> list[Span]:
    """Parts of `old` that are not in `new`; both sorted and merged."""
    out = []
    i = 0
    for start, end in old:
        while i < len(new) and new[i][1] <= start:
            i += 1
        j = i
        while j < len(new) and new[j][0] < end:
            if new[j][0] > start:
                out.append((start, new[j][0]))
            start = max(start, new[j][1])
            j += 1
        if start < end:
            out.append((start, end))
    return out


def intersect(a: Sequence[Span], b: Sequence[Span]) -> list[Span]:
    """What is in both; both sorted and merged."""
    out = []
    i = 0
    for start, end in a:
        while i < len(b) and b[i][1] <= start:
            i += 1
        j = i
        while j < len(b) and b[j][0] < end:
            out.append((max(start, b[j][0]), min(end, b[j][1])))
            j += 1
    return out


def coarse(spans: Iterable[Span], gap: int) -> list[Span]:
    """Sorted spans, joined where at most `gap` lies between them."""
    out: list[Span] = []
    for start, end in spans:
        if out and start - out[-1][1] <= gap:
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return out


def windows(spans: Iterable[Span], size: int) -> Iterator[Span]:
    """`spans` cut into pieces of at most `size`."""
    for start, end in spans:
        while start < end:
            stop = min(end, start + size)
            yield start, stop
            start = stop
