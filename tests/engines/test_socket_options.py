"""Every option that a program can set of a socket and read back is the same in the copy, or is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli import migrator

pytestmark = pytest.mark.root

PROGRAM = r"""
import ctypes, json, os, signal, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
LEVELS = (1, 0, 41, 6, 17)
def get(fd, level, option):
    answer, size = ctypes.create_string_buffer(64), ctypes.c_uint32(64)
    if libc.getsockopt(fd, level, option, answer, ctypes.byref(size)):
        return None
    return answer.raw[: size.value].hex()
def every(fd):
    return {f"{level}.{option}": value for level in LEVELS for option in range(128)
            if (value := get(fd, level, option)) is not None}
def change(fd, but):
    changed = []
    for level in LEVELS:
        for option in range(128):
            if f"{level}.{option}" in but:
                continue
            before = get(fd, level, option)
            for value in (1, 2, 3, 5, 100, 4096, 0):
                done = libc.setsockopt(fd, level, option, struct.pack("i", value), 4) == 0
                if done and get(fd, level, option) != before:
                    changed.append(f"{level}.{option}")
                    break
    return changed
sockets = {}
for family, address in (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"):
    listener = socket.socket(family)
    listener.bind((address, 0))
    listener.listen(5)
    client = socket.create_connection(listener.getsockname()[:2])
    server, _ = listener.accept()
    datagrams = socket.socket(family, socket.SOCK_DGRAM)
    datagrams.bind((address, 0))
    to_it = socket.socket(family, socket.SOCK_DGRAM)
    to_it.bind((address, 0))
    to_it.connect(datagrams.getsockname())
    made = {"listener": listener, "client": client, "server": server, "bound": datagrams, "connected": to_it,
            "new TCP": socket.socket(family), "new UDP": socket.socket(family, socket.SOCK_DGRAM)}
    sockets.update({f"{name} {family.name}": sock for name, sock in made.items()})
for kind in socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET:
    a, b = socket.socketpair(socket.AF_UNIX, kind)
    sockets.update({f"a {kind.name}": a, f"b {kind.name}": b, f"new {kind.name}": socket.socket(socket.AF_UNIX, kind)})
out, but = sys.argv[1], json.loads(sys.argv[2])
changed = {name: change(sock.fileno(), but) for name, sock in sockets.items()}
def say(path):
    with open(path + ".new", "w") as file:
        json.dump([changed, {name: every(sock.fileno()) for name, sock in sockets.items()}], file)
    os.rename(path + ".new", path)
say(out + "/before")
while not os.path.exists(out + "/go"):
    time.sleep(0.01)
say(out + "/after")
time.sleep(1000)
"""

# By level and number. What nobody sets with an int, what ends or begins something, and what is refused, by name:
# SO_PEEK_OFF of TCP, filters, IP_OPTIONS, numbers of interfaces. SO_SNDBUFFORCE, SO_RCVBUFFORCE set others.
# A device has no effect on a unix socket, and is left out there.
NOT_SET = ["1.32", "1.33", "1.42", "1.26", "1.27", "1.50", "1.51", "1.52", "0.4", "0.32", "41.17", "6.19", "6.31"]
TELLS = {  # what is measured, or an identity
    "1.4", "1.17", "1.55", "1.56", "1.57", "1.71", "1.77", "0.9", "0.14", "41.6", "41.24", "41.61",
    "6.11", "6.12", "6.24", "6.26",
}  # fmt: skip
OF_CONNECTIONS = {  # the segment size as it is known by now, and what only a new or listening socket has an effect of
    "6.2", "6.9", "6.10", "6.23", "6.27", "1.49", "0.33", "41.17", "41.18",
}  # fmt: skip
V6ONLY = "41.26"  # what is bound to an address has it, and the copy of what never was is bound


def await_json(path: Path, child: subprocess.Popen[bytes] | None = None) -> Any:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline and (child is None or child.poll() is None)
        time.sleep(0.01)
    return json.loads(path.read_text())


def test_what_can_be_set_is_the_same_in_the_copy(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(NOT_SET)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    copy = 0
    try:
        changed, before = await_json(tmp_path / "before", child)
        assert all(len(names) > (60 if "AF_" in kind else 15) for kind, names in changed.items())
        migrator("checkpoint", child.pid, "--kill", "-o", tmp_path / "image")
        child.wait()
        copy = int(migrator("restart", "-d", "-i", tmp_path / "image").stdout)
        (tmp_path / "go").touch()
        _, after = await_json(tmp_path / "after")
    finally:
        for pid in (child.pid, copy):
            if pid and Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        child.wait()
    differ = {}
    for kind, options in before.items():
        left_out = TELLS | (OF_CONNECTIONS | {V6ONLY} if kind.startswith(("client", "server", "connected")) else set())
        if "AF_" not in kind:
            left_out = left_out | {"1.25", "1.62"}
        for name in {*options, *after[kind]} - left_out:
            if options.get(name) != after[kind].get(name):
                differ[f"{kind}: {name}"] = options.get(name), after[kind].get(name)
    assert differ == {}


SIGNED = (
    "s = socket.socket(); key = struct.pack('HH4s120x', 2, 0, socket.inet_aton('127.0.0.1'))"
    " + struct.pack('BBHI80s', 0, 0, 3, 0, b'key'); s.setsockopt(6, 14, key); s.bind(('127.0.0.1', 0)); s.listen(1)"
)
REFUSED = [
    (SIGNED, "with keys (TCP_MD5SIG)"),
    ("s.setsockopt(0, 4, b'\\1\\1\\1\\1')", "options of IP of its own"),
    ("s.setsockopt(0, 50, struct.pack('!i', int(open('/sys/class/net/' + name + '/ifindex').read())))", "of number"),
    ("s.setsockopt(1, 37, struct.pack('ii', 0x82, 0))", "numbers its time stamps"),
    ("s = socket.socket(10, 2); s.setsockopt(41, 59, bytes([0, 0, 1, 4, 0, 0, 0, 0]))", "options of IP of its own"),
]


@pytest.mark.parametrize(("code", "reason"), REFUSED)
def test_what_cannot_be_set_again_is_refused(code: str, reason: str, tmp_path: Path) -> None:
    name = f"so{os.getpid()}"
    subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
    begin = f"import socket, struct, time; name = {name!r}; s = socket.socket(2, 2);"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{begin} {code}; open({str(tmp_path / 'ready')!r}, 'w'); time.sleep(1000)"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "log").open("wb"),
    )
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline and child.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        assert reason in migrator("checkpoint", child.pid, "--kill", "-o", tmp_path / "image", code=3).stderr
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
        subprocess.run(["ip", "link", "del", name], check=True)
