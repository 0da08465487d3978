"""The ground on which messages stand: bounds of what they may hold, and what all of them are made of."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from migrator.errors import TransportError

_LARGEST = (1 << 63) - 1

Id = Annotated[str, Meta(min_length=8, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
Name = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=4096)]
Path = Annotated[str, Meta(min_length=1, max_length=4096)]
Count = Annotated[int, Meta(ge=0, le=_LARGEST)]
Nanoseconds = Annotated[int, Meta(ge=0, le=_LARGEST)]
Stamp = Annotated[int, Meta(ge=-(1 << 62), le=(1 << 62))]  # ns since 1970
Seconds = Annotated[float, Meta(ge=0.0, le=1e15)]
Rate = Annotated[float, Meta(ge=0.0, le=1e17)]  # per second
Pid = Annotated[int, Meta(ge=1, le=1 << 22)]  # PID_MAX_LIMIT
Owner = Annotated[int, Meta(ge=0, le=(1 << 32) - 2)]
Mode = Annotated[int, Meta(ge=0, le=0o177777)]
FileName = Annotated[bytes, Meta(max_length=255)]
FilePath = Annotated[bytes, Meta(max_length=4095)]
Features = Annotated[frozenset[Annotated[str, Meta(max_length=64)]], Meta(max_length=512)]
XattrValue = Annotated[bytes, Meta(max_length=1 << 16)]  # XATTR_SIZE_MAX

MAX_MESSAGE = 1 << 20  # bytes, as the transport allows
FILE_CHUNK = 512 << 10  # bytes of a file in one message
LISTED = 2048  # entries of a list in one message
MOST_PIDS = 1 << 16
MOST_FILES = 1 << 14  # that a workload has open or mapped
MOST_NOTES = 1024
MOST_PHASES = 256


class MessageError(TransportError):
    """The peer said something that is not in the protocol."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="type"):
    """Base of all messages."""


class Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of what is part of messages, and may be there often."""
