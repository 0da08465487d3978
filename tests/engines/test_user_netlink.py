"""Sockets through which a container tells the audit subsystem what it has done (dbus-daemon, PAM)."""

from __future__ import annotations

from pathlib import Path

import pytest
from contained import await_ticks, move, own_directories, run

__all__ = ["own_directories"]
pytestmark = pytest.mark.root

PROGRAM = r"""
import os, socket, struct, time
audit = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9)
audit.bind((0, 0))
audit.settimeout(5)
def tell(n):
    # struct nlmsghdr: AUDIT_FIRST_USER_MSG, NLM_F_REQUEST | NLM_F_ACK; the answer is a struct nlmsgerr
    text = b"op=test\0"
    audit.sendto(struct.pack("<IHHII", 16 + len(text), 1100, 5, n, 0) + text, (0, 0))
    length, kind, _, number, port, error = struct.unpack_from("<IHHIIi", audit.recv(999))
    return kind, number, port, error
name = audit.getsockname()
first = tell(1)
assert first[:3] == (2, 1, name[0]), first
print("ready")
n = 1
while True:
    n += 1
    assert audit.getsockname() == name, n
    assert tell(n) == (2, n, *first[2:]), n
    print("tick", n)
    time.sleep(0.01)
"""


def test_a_socket_to_the_audit_subsystem_is_carried(tmp_path: Path) -> None:
    run(tmp_path, PROGRAM)
    for _ in range(2):
        await_ticks(tmp_path)
        move()
    await_ticks(tmp_path)
