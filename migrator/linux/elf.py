"""The build id of an ELF file: the identity that its linker gave it (elf(5), NT_GNU_BUILD_ID)."""

from __future__ import annotations

import struct

_PT_NOTE = 4
_NT_GNU_BUILD_ID = 3
_MAX_NOTES = 64 << 10
_MAX_TABLE = 1 << 20


def build_id(path: str) -> str:
    """The build id in hex; "" if the file is no 64-bit ELF file, has none, or cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
            if head[:6] != b"\x7fELF\x02\x01" or len(head) < 64:
                return ""
            offset, size, count = struct.unpack_from("<Q14xHH", head, 32)[0], *struct.unpack_from("<HH", head, 54)
            if size * count > _MAX_TABLE:
                return ""
            file.seek(offset)
            table = file.read(size * count)
            for i in range(count):
                if len(table) < (i + 1) * size or size < 56:
                    return ""
                kind, _, start, _, _, length = struct.unpack_from("<IIQQQQ", table, i * size)
                if kind == _PT_NOTE and length <= _MAX_NOTES:
                    file.seek(start)
                    found = _find(file.read(length))
                    if found:
                        return found
    except OSError:
        pass
    return ""


def _find(notes: bytes) -> str:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        at += 12
        name = notes[at : at + name_size]
        at += -(-name_size // 4) * 4
        if kind == _NT_GNU_BUILD_ID and name == b"GNU\0":
            return notes[at : at + size].hex()
        at += -(-size // 4) * 4
    return ""
