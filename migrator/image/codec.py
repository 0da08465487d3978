"""Records as bytes, and back.

Every record is `struct ckpt_hdr { __s32 type; __s32 len; }` followed by a payload; `len` counts both.
A payload is the record's fixed part, laid out as the C compiler lays out the same struct on a 64-bit
machine, followed by its tails: byte strings, texts and arrays of fixed structs, in the order of the
fields, each padded with zeros to a multiple of eight. The fixed part holds one u32 for every tail: its
length in bytes, or its number of items for an array.

    @record(401)
    class Mm(Record):
        objref: s32
        map_count: u32
        start_code: u64
        auxv: bytes

A record is a dataclass; `encode()` gives the whole record with its header, and `decode()` takes a
payload that it does not trust: every length is checked against what is there, paddings must be zero,
and nothing is allocated that the payload does not hold.
"""

from __future__ import annotations

import struct as _struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import (
    Annotated,
    Any,
    ClassVar,
    Self,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from migrator.errors import ImageError

u8 = Annotated[int, "B"]
u16 = Annotated[int, "H"]
u32 = Annotated[int, "I"]
u64 = Annotated[int, "Q"]
s32 = Annotated[int, "i"]
s64 = Annotated[int, "q"]

HEADER = _struct.Struct("<ii")
MAX_RECORD = 32 << 20  # bytes; a longer record is hostile or broken

_ZEROS = bytes(8)  # as much as there is of any padding
_SIZES = {"B": 1, "H": 2, "I": 4, "Q": 8, "i": 4, "q": 8}


@dataclass(frozen=True)
class Member:
    """One member of the fixed part: `code` is its struct code, `offset` in bytes from the payload's start."""

    name: str
    code: str
    offset: int


class Struct:
    """Base of fixed structs: array items, and the fixed part of records."""

    __slots__ = ()
    _members: ClassVar[tuple[Member, ...]]
    _packer: ClassVar[_struct.Struct]
    _gaps: ClassVar[tuple[tuple[int, int], ...]]  # (start, end) of the compiler's paddings in the fixed part
    _plain: ClassVar[tuple[str, ...]]  # fields in the fixed part, in order
    _tails: ClassVar[tuple[tuple[str, Any], ...]]  # (field, bytes | str | item class)
    _values: ClassVar[Callable[[Any], tuple[int, ...]]]  # those of the fixed part, in order
    _in_order: ClassVar[bool]  # the tails are the last fields


class Record(Struct):
    """Base of all records."""

    __slots__ = ()
    TYPE: ClassVar[int] = 0

    def encode(self) -> bytes:
        """The whole record, header included. Raises ImageError if a value does not fit its field."""
        payload = _encode_payload(self)
        if HEADER.size + len(payload) > MAX_RECORD:
            raise ImageError(f"{type(self).__name__}: {len(payload)} bytes are more than a record may have")
        return HEADER.pack(self.TYPE, HEADER.size + len(payload)) + payload

    @classmethod
    def decode(cls, payload: bytes | memoryview) -> Self:
        """The record in `payload` (without header). Raises ImageError on anything out of place."""
        return _decode_payload(cls, payload)


R = TypeVar("R", bound=Record)
S = TypeVar("S", bound=Struct)

REGISTRY: dict[int, type[Record]] = {}


@dataclass_transform()
def fixed(cls: type[S]) -> type[S]:
    """Class decorator: a fixed struct used as an item of an array tail."""
    made = dataclass(slots=True)(cls)
    _lay_out(made)
    if made._tails:
        raise TypeError(f"{cls.__name__}: an array item has no tails")
    if made._gaps:  # an item has no place where its paddings are checked
        raise TypeError(f"{cls.__name__}: an array item has gaps at {made._gaps}; name them `reserved`")
    return made


@dataclass_transform()
def record(number: int) -> Callable[[type[R]], type[R]]:
    """Class decorator: a record of type `number`, registered for decoding."""

    def decorate(cls: type[R]) -> type[R]:
        made = dataclass(slots=True)(cls)
        made.TYPE = number
        _lay_out(made)
        if number in REGISTRY:
            raise TypeError(f"record type {number} is {REGISTRY[number].__name__} already")
        REGISTRY[number] = made
        return made

    return decorate


def _lay_out(cls: Any) -> None:
    """Compute the C layout of the fixed part: natural alignment, size a multiple of eight."""
    hints = get_type_hints(cls, include_extras=True)
    members: list[Member] = []
    tails: list[tuple[str, Any]] = []
    plain: list[str] = []
    gaps: list[tuple[int, int]] = []
    offset = 0
    form = "<"

    def add(name: str, code: str) -> None:
        nonlocal offset, form
        size = _SIZES[code]
        gap = -offset % size
        if gap:
            form += f"{gap}x"
            gaps.append((offset, offset + gap))
        members.append(Member(name, code, offset + gap))
        form += code
        offset += gap + size

    for f in fields(cls):
        hint = hints[f.name]
        if get_origin(hint) is Annotated:
            add(f.name, get_args(hint)[1])
            plain.append(f.name)
        elif hint is bytes or hint is str:
            tails.append((f.name, hint))
        elif get_origin(hint) is list:
            tails.append((f.name, get_args(hint)[0]))
        else:
            raise TypeError(f"{cls.__name__}.{f.name}: cannot lay out {hint}")
    for name, kind in tails:
        add(f"{name}_len" if kind is bytes or kind is str else f"nr_{name}", "I")
    if -offset % 8:
        form += f"{-offset % 8}x"
        gaps.append((offset, offset + -offset % 8))
    cls._members, cls._plain, cls._tails, cls._gaps = tuple(members), tuple(plain), tuple(tails), tuple(gaps)
    cls._packer = _struct.Struct(form)
    cls._values = staticmethod(_getter(cls._plain))
    cls._in_order = [f.name for f in fields(cls)] == [*plain, *(name for name, _ in tails)]


def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[int, ...]]:
    if len(names) > 1:
        return attrgetter(*names)
    return lambda rec: tuple(getattr(rec, name) for name in names)


def _encode_payload(rec: Struct) -> bytes:
    cls = type(rec)
    values = cls._values(rec)
    parts: list[bytes] = []
    for name, kind in cls._tails:
        value = getattr(rec, name)
        if not value:  # as most are
            values += (0,)
            continue
        if kind is str:
            if "\0" in value:
                raise ImageError(f"{cls.__name__}.{name}: a text holds a NUL")
            value = value.encode("utf-8", "surrogateescape")
        values += (len(value),)
        if kind is not bytes and kind is not str:
            pack = kind._packer.pack
            get = kind._values
            value = b"".join([pack(*get(item)) for item in value])
        parts.append(value)
        if len(value) % 8:
            parts.append(_ZEROS[: -len(value) % 8])
    try:
        fixed_part = cls._packer.pack(*values)
    except _struct.error as error:
        raise ImageError(f"{cls.__name__}: {error} in {rec!r}") from error
    if not parts:
        return fixed_part
    return fixed_part + b"".join(parts)


def _decode_payload(cls: type[R], payload: bytes | memoryview) -> R:
    size, whole = cls._packer.size, len(payload)
    if whole < size:
        raise ImageError(f"{cls.__name__}: {whole} bytes, its fixed part alone has {size}")
    values = cls._packer.unpack_from(payload)
    for start, end in cls._gaps:
        if payload[start:end] != _ZEROS[: end - start]:
            raise ImageError(f"{cls.__name__}: padding is not zero")
    if not cls._tails and size == whole:
        return cls(*values)
    nr_plain = len(cls._plain)
    tails: list[Any] = []
    position = size
    for (name, kind), count in zip(cls._tails, values[nr_plain:], strict=True):
        if not count:  # as most are
            tails.append(b"" if kind is bytes else "" if kind is str else [])
            continue
        length = count if kind is bytes or kind is str else count * kind._packer.size
        end = position + length
        padded = end + (-length % 8)
        if padded > whole:
            raise ImageError(f"{cls.__name__}.{name}: claims {length} bytes, {whole - position} are left")
        raw = bytes(payload[position:end])
        if end < padded and payload[end:padded] != _ZEROS[: padded - end]:
            raise ImageError(f"{cls.__name__}.{name}: padding is not zero")
        if kind is bytes:
            tails.append(raw)
        elif kind is str:
            if b"\0" in raw:
                raise ImageError(f"{cls.__name__}.{name}: a text holds a NUL")
            try:
                tails.append(raw.decode("utf-8", "surrogateescape"))
            except UnicodeDecodeError as error:  # pragma: no cover - surrogateescape takes every byte
                raise ImageError(f"{cls.__name__}.{name}: {error}") from error
        else:
            tails.append([kind(*item) for item in kind._packer.iter_unpack(raw)])
        position = padded
    if position != whole:
        raise ImageError(f"{cls.__name__}: {whole - position} bytes too many")
    if cls._in_order:
        return cls(*values[:nr_plain], *tails)
    named = dict(zip(cls._plain, values[:nr_plain], strict=True))
    return cls(**named, **{name: value for (name, _), value in zip(cls._tails, tails, strict=True)})


def layouts() -> Iterator[tuple[str, int, tuple[Member, ...], int]]:
    """(name, type, members, size of the fixed part) of every record: for checks against the C header."""
    for number, cls in sorted(REGISTRY.items()):
        if not cls._members:  # the error record is a bare text
            continue
        yield cls.__name__, number, cls._members, cls._packer.size


def items() -> Iterator[type[Struct]]:
    """The fixed structs that the arrays of the records are made of, each once."""
    seen: set[type[Struct]] = set()
    for _, cls in sorted(REGISTRY.items()):
        for _, kind in cls._tails if cls._members else ():
            if kind is not bytes and kind is not str and kind not in seen:
                seen.add(kind)
                yield kind
