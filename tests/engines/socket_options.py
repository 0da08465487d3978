"""A program that sets every option of its sockets that can be set, and what is to be the same in its copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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
    print("said", os.path.basename(path), flush=True)
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


def differences(
    before: Mapping[str, Mapping[str, str]], after: Mapping[str, Mapping[str, str]]
) -> Iterator[tuple[str, str | None, str | None]]:
    """Of each kind of socket the options that have another value in the copy: name, value before, value after."""
    for kind, options in before.items():
        left_out = TELLS | (OF_CONNECTIONS | {V6ONLY} if kind.startswith(("client", "server", "connected")) else set())
        if "AF_" not in kind:
            left_out = left_out | {"1.25", "1.62"}
        for name in {*options, *after[kind]} - left_out:
            if options.get(name) != after[kind].get(name):
                yield f"{kind}: {name}", options.get(name), after[kind].get(name)
