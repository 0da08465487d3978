"""The kernel engine in guests: what it refuses, and images that lie."""

from __future__ import annotations

import pytest

from migrator.testing.workloads import SOURCES
from tests.vm.machine import CommandFailed, Machine
from tests.vm.program import Program

# A child waits for a semaphore until the program finds /tmp/go-on; EINTR would be told.
SYSTEM_V = """
import ctypes, os, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
out = open(sys.argv[1], "w", buffering=1)
def semop(change):
    ended = libc.semop(sem, struct.pack("Hhh", 0, change, 0), 1)
    print("semop", change, ended and os.strerror(ctypes.get_errno()), file=out)
sem, queue = libc.semget(0x77, 1, 0o1600), libc.msgget(0x77, 0o1600)
memory = libc.shmat(libc.shmget(0x77, 8192, 0o1600), None, 0)
ctypes.memmove(memory, b"segment", 8)
libc.msgsnd(queue, struct.pack("q8s", 5, b"message"), 8, 0)
if not os.fork():
    semop(-1)
    os._exit(0)
print("ready", file=out)
while not os.path.exists("/tmp/go-on"):
    time.sleep(0.05)
semop(1)
os.wait()
text = ctypes.create_string_buffer(16)
print(libc.msgrcv(queue, text, 8, 0, 0), text.raw[8:15], ctypes.string_at(memory), file=out)
time.sleep(1000)
"""
# Has a descriptor of another process, until it is killed.
HOLDS = """
import os, sys, time
from migrator.linux.sys import pidfd_getfd
fd = pidfd_getfd(os.pidfd_open(int(sys.argv[1])), int(sys.argv[2]))
open("/tmp/holds", "w").close()
time.sleep(1000)
"""
# Has a file and both ends of a connection until it finds /tmp/closes.
CLOSES = """
import os, socket, sys, time
out = open(sys.argv[1], "w", buffering=1)
file = open("/tmp/closed", "w")
listener = socket.create_server(("127.0.0.1", 0))
ends = [socket.create_connection(listener.getsockname()), listener.accept()[0]]
print("ready", file=out)
while not os.path.exists("/tmp/closes"):
    time.sleep(0.05)
ends[0].close(), ends[1].close(), listener.close(), file.close(), os.unlink("/tmp/closed")
while True:
    print("closed", file=out)
    time.sleep(0.05)
"""
# Has a terminal, in which a program runs.
TERMINAL = """
import os, pty, time
pid, master = pty.fork()
if not pid:
    os.execv("/bin/sleep", ["sleep", "1000"])
time.sleep(0.5)
open("/tmp/terminal.pid", "w").write(str(pid))
time.sleep(1000)
"""
# The user engine sends it ahead, as for a reader of its own, and saves it when all that is closed.
SAVES = """
import os, sys, time
from migrator.engine.base import SourceOptions
from migrator.engine.user.dump.source import UserSource
with open("/tmp/image", "w+b") as image, UserSource(int(sys.argv[1]), image.fileno(), SourceOptions()) as source:
    source.survey()
    source.instrument("user")
    source.round()
    open("/tmp/closes", "w").close()
    while "closed" not in open(sys.argv[2]).read():
        time.sleep(0.05)
    source.round()
    source.freeze()
    source.final()
    source.hold()
    source.release()
"""
# Waits for what is written to a FIFO, by a call that answers a mere stop with EINTR.
WAITS = """
import ctypes, os, select, sys
libc = ctypes.CDLL(None, use_errno=True)
out = open(sys.argv[1], "w", buffering=1)
os.mkfifo("/tmp/waits.fifo")
fifo, epoll = os.open("/tmp/waits.fifo", os.O_RDWR), select.epoll()
epoll.register(fifo, select.EPOLLIN)
print("ready", file=out)
ended = libc.epoll_wait(epoll.fileno(), ctypes.create_string_buffer(12), 1, -1)
print(ended, os.strerror(ctypes.get_errno()) if ended < 0 else "", file=out)
"""
# Freezes a tree, and changes its mind.
THAWS = """
import os
from migrator.engine.base import SourceOptions
from migrator.engine.kernel.source import KernelSource
with open(os.devnull, "wb") as nowhere, KernelSource({pid}, nowhere.fileno(), SourceOptions()) as source:
    source.instrument()
    source.freeze()
    source.thaw()
"""
RECORDS = """
from migrator.engine.stream import RecordReader
with open("/tmp/image", "rb") as image:
    reader, name = RecordReader(image.fileno()), ""
    while name != "Trailer":
        record = reader.next()
        name = type(record).__name__
        print(record.path if name == "File" else name)
"""
LONG = 240.0  # seconds that a command may take where guests share a processor with much else


def test_what_the_kernel_refuses_is_named_and_the_program_runs_on(guest: Machine) -> None:
    pid = guest.spawn("sleep 1000 < /dev/kmsg")
    where = guest.run(f"cat /proc/{pid}/cgroup").stdout
    with pytest.raises(CommandFailed, match=rf"exit status 3[^$]*task {pid}, descriptor 0"):
        guest.run(f"migrator checkpoint {pid} --engine kernel --kill -o /tmp/image", seconds=LONG)
    assert guest.run(f"cat /proc/{pid}/cgroup").stdout == where
    guest.run(f"kill {pid} && while [ -e /proc/{pid} ]; do sleep 0.1; done")


def test_an_image_that_was_cut_restarts_nothing(guest: Machine) -> None:
    with Program(guest, "counter") as program:
        guest.run(f"migrator checkpoint {program.pid} --engine kernel --kill -o /tmp/image", seconds=LONG)
        program.await_end()
        with pytest.raises(CommandFailed, match="exit status 6"):
            guest.run("head -c 20000 /tmp/image | migrator restart --engine kernel --detach", seconds=LONG)
        assert guest.run(f"ls -d /proc/{program.pid} /sys/fs/cgroup/migrator/restart-*", status=None).stdout == ""
        guest.run("migrator restart --engine kernel --detach -i /tmp/image", seconds=LONG)
        program.check_progress()
        program.finish()


def test_a_link_that_a_user_has_planted_is_refused(guest: Machine) -> None:
    guest.run(
        "mkdir -p /tmp/planted/home/deep && cd /tmp/planted && mkdir -m 700 root && echo secret > root/file && "
        "chown -R 4321 home"
    )
    pid = guest.spawn(
        "setpriv --reuid 4321 --regid 4321 --clear-groups sh -c 'exec sleep 1000 >> /tmp/planted/home/deep/file'"
    )
    guest.run("until [ -e /tmp/planted/home/deep/file ]; do sleep 0.05; done")
    guest.run(f"migrator checkpoint {pid} --engine kernel --kill -o /tmp/image", seconds=LONG)
    guest.run("cd /tmp/planted/home/deep && rm file && ln -s ../../root/file file && chown -h 4321 file")
    with pytest.raises(CommandFailed, match=r"exit status 5[^$]*a symbolic link of user 4321 leads to"):
        guest.run("migrator restart --engine kernel --detach -i /tmp/image", seconds=LONG)
    # The user's own file by another way is opened.
    guest.run("cd /tmp/planted/home/deep && : > other && chown 4321 other && ln -sf other file && chown -h 4321 file")
    guest.run("migrator restart --engine kernel --detach -i /tmp/image", seconds=LONG)
    assert guest.run(f"readlink /proc/{pid}/fd/1").stdout == "/tmp/planted/home/deep/other\n"
    guest.run(f"kill {pid} && while [ -e /proc/{pid} ]; do sleep 0.1; done; rm -r /tmp/planted")


def test_system_v_objects_of_a_container_go_along_and_a_wait_for_one_goes_on(guest: Machine) -> None:
    guest.put("/tmp/sysv.py", SYSTEM_V.encode())
    guest.run("migrator run -d --name sysv -- $PYTHON /tmp/sysv.py /tmp/sysv.out", seconds=LONG)
    guest.run("until grep -q ready /tmp/sysv.out; do sleep 0.05; done", seconds=LONG)
    guest.run("migrator checkpoint sysv --engine kernel --kill -o /tmp/image", seconds=LONG)
    guest.run("migrator restart --engine kernel --detach -i /tmp/image", seconds=LONG)
    guest.run("touch /tmp/go-on; until grep -q segment /tmp/sysv.out; do sleep 0.05; done", seconds=LONG)
    lines = guest.run("cat /tmp/sysv.out").stdout.splitlines()
    assert sorted(lines) == sorted(["ready", "semop 1 0", "semop -1 0", "8 b'message' b'segment'"])
    guest.run("migrator stop sysv; rm /tmp/go-on", seconds=LONG)


def test_a_shell_in_a_terminal_of_a_container_goes_on(guest: Machine) -> None:
    ticks = "grep -c tick /tmp/shell.out"
    guest.run(f"migrator run -d --name shell -- $PYTHON {SOURCES}/shell.py /tmp/shell.out", seconds=LONG)
    guest.run(f"until [ $({ticks}) -gt 3 ]; do sleep 0.05; done", seconds=LONG)
    for _ in range(2):
        guest.run("migrator checkpoint shell --engine kernel --kill -o /tmp/image", seconds=LONG)
        before = int(guest.run(ticks).stdout)
        guest.run("migrator restart --engine kernel --detach -i /tmp/image", seconds=LONG)
        guest.run(f"until [ $({ticks}) -gt {before + 3} ]; do sleep 0.05; done", seconds=LONG)
    assert "FAIL" not in guest.run("cat /tmp/shell.out").stdout
    guest.run("migrator stop shell", seconds=LONG)


def test_a_program_in_a_terminal_of_the_outside_is_refused(guest: Machine) -> None:
    guest.put("/tmp/terminal.py", TERMINAL.encode())
    terminal = guest.spawn("$PYTHON /tmp/terminal.py < /dev/null")
    guest.run("until [ -s /tmp/terminal.pid ]; do sleep 0.05; done")
    pid = int(guest.run("cat /tmp/terminal.pid").stdout)
    with pytest.raises(
        CommandFailed, match=rf"task {pid}, descriptor 0: the terminal /dev/pts/\d+ has its master outside"
    ):
        guest.run(f"migrator checkpoint {pid} --engine kernel --kill -o /tmp/image", seconds=LONG)
    # With whoever has the master it goes along.
    guest.run(f"migrator checkpoint {terminal} --engine kernel --kill -o /tmp/image", seconds=LONG)
    guest.run("migrator restart --engine kernel --detach -i /tmp/image", seconds=LONG)
    assert guest.run(f"cat /proc/{pid}/comm").stdout == "sleep\n"
    guest.run(f"kill -KILL {terminal}; while [ -e /proc/{pid} ]; do sleep 0.1; done", seconds=LONG)  # hung up


def test_what_a_container_shares_with_the_outside_is_refused(guest: Machine) -> None:
    guest.put("/tmp/holds.py", HOLDS.encode())
    guest.run("migrator run -d --name shares -- sleep 1000", seconds=LONG)
    pid = int(guest.run("pgrep -x sleep | tail -n 1").stdout)
    holder = guest.spawn(f"$PYTHON /tmp/holds.py {pid} 1")
    guest.run("until [ -e /tmp/holds ]; do sleep 0.05; done")
    with pytest.raises(CommandFailed, match=r"exit status 3[^$]*descriptor 1: an open file that somebody outside"):
        guest.run("migrator checkpoint shares --engine kernel --kill -o /tmp/image", seconds=LONG)
    guest.run(f"kill -KILL {holder}; while [ -e /proc/{holder} ]; do sleep 0.1; done")
    guest.run("migrator checkpoint shares --engine kernel --kill -o /tmp/image", seconds=LONG)
    guest.run("migrator restart --engine kernel --detach -i /tmp/image && migrator stop shares", seconds=LONG)


def test_a_program_that_was_frozen_and_not_saved_learns_nothing_of_it(guest: Machine) -> None:
    guest.put("/tmp/waits.py", WAITS.encode())
    pid = guest.spawn("$PYTHON /tmp/waits.py /tmp/waits.out < /dev/null")
    guest.run("until [ -s /tmp/waits.out ]; do sleep 0.05; done")
    guest.run(f"until grep -q '^232 ' /proc/{pid}/syscall; do sleep 0.05; done")
    guest.python(THAWS.format(pid=pid))
    guest.run(f"echo on > /tmp/waits.fifo; while [ -e /proc/{pid} ]; do sleep 0.05; done")
    assert guest.run("cat /tmp/waits.out; rm /tmp/waits.fifo").stdout.split() == ["ready", "1"]


def test_what_the_user_engine_has_sent_ahead_and_is_closed_by_the_end_is_done_without(guest: Machine) -> None:
    guest.put("/tmp/closes.py", CLOSES.encode())
    guest.put("/tmp/saves.py", SAVES.encode())
    pid = guest.spawn("$PYTHON /tmp/closes.py /tmp/closes.out < /dev/null")
    guest.run("until [ -s /tmp/closes.out ]; do sleep 0.05; done")
    guest.run(f"$PYTHON /tmp/saves.py {pid} /tmp/closes.out", seconds=LONG)
    sent = guest.python(RECORDS).splitlines()
    assert "/tmp/closed" in sent, "it was sent ahead"
    assert ("Socket" in sent, "SocketTcp" in sent) == (True, False), "and so was the connection, without its end"
    guest.run("migrator restart --engine kernel --detach -i /tmp/image", seconds=LONG)
    lines = int(guest.run("wc -l < /tmp/closes.out").stdout)
    guest.run(f"until [ $(wc -l < /tmp/closes.out) -gt {lines + 3} ]; do sleep 0.05; done; kill -KILL {pid}")
