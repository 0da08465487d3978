"""Every option that a program can set of a socket and read back is the same in the copy, by whichever engine."""

from __future__ import annotations

import json

import pytest

from tests.engines.socket_options import NOT_SET, PROGRAM, differences
from tests.vm.machine import Machine

# What can be set and not read again, and the kernel engine refuses: SO_BUSY_POLL_BUDGET, IPV6_MTU, UDP_ENCAP.
REFUSED = ["1.70", "41.24", "17.100"]
LONG = 300


@pytest.mark.parametrize(("saves", "restarts"), [("kernel", "kernel"), ("kernel", "user"), ("user", "kernel")])
def test_what_can_be_set_is_the_same_in_the_copy(guest: Machine, saves: str, restarts: str) -> None:
    guest.put("/tmp/options.py", PROGRAM.encode())
    guest.run("rm -rf /tmp/options; mkdir /tmp/options")
    but = json.dumps(NOT_SET + REFUSED)
    pid = guest.spawn(f"$PYTHON /tmp/options.py /tmp/options '{but}' < /dev/null > /tmp/options/log 2>&1")
    guest.run(f"until [ -e /tmp/options/before ]; do [ -e /proc/{pid} ] || exit 1; sleep 0.05; done", seconds=LONG)
    guest.run(f"migrator checkpoint {pid} --engine {saves} --kill -o /tmp/image", seconds=LONG)
    guest.run(f"migrator restart --engine {restarts} --detach -i /tmp/image && touch /tmp/options/go", seconds=LONG)
    guest.run(f"until [ -e /tmp/options/after ]; do [ -e /proc/{pid} ] || exit 1; sleep 0.05; done", seconds=LONG)
    guest.run(f"kill -KILL {pid}")
    changed, before = json.loads(guest.get("/tmp/options/before"))
    _, after = json.loads(guest.get("/tmp/options/after"))
    assert all(len(names) > (60 if "AF_" in kind else 15) for kind, names in changed.items())
    assert list(differences(before, after)) == []
