"""What may follow what: one whole stream is accepted, and every way to spoil it is told by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_samples import HEAP, body, closed, cpu, drafted, latest, mm, pages, pids, task, tree, vma, vmas

from migrator.errors import ImageError
from migrator.image import records as r
from migrator.image import records_files as f
from migrator.image import records_shared as s
from migrator.image.codec import Record
from migrator.image.order import MAX_PID, TASK_SIZE, Order

T = TypeVar("T", bound=Record)
DATA, ZERO = r.PageKind.DATA, r.PageKind.ZERO
Stream = list[Record]


def run(records: Stream, **options: bool) -> Order:
    order = Order(**options)
    for record in records:
        order.check(record)
    return order


def find(stream: Stream, kind: type[T], which: int = 0) -> T:
    return [record for record in stream if isinstance(record, kind)][which]


def index(stream: Stream, kind: type[Record], which: int = 0) -> int:
    return stream.index(find(stream, kind, which))


def put(kind: type[Record], which: int = 0, /, **values: Any) -> Callable[[Stream], None]:
    """Set fields of the record."""

    def change(stream: Stream) -> None:
        for name, value in values.items():
            setattr(find(stream, kind, which), name, value)

    return change


def item(kind: type[Record], tail: str, which: int, /, **values: Any) -> Callable[[Stream], None]:
    """Set fields of an item of the record's array."""

    def change(stream: Stream) -> None:
        for name, value in values.items():
            setattr(getattr(find(stream, kind), tail)[which], name, value)

    return change


def guard_in_shared_memory(stream: Stream) -> None:
    find(stream, r.Pages, 1).ranges[1].kind = r.PageKind.GUARD


def drop(kind: type[Record], which: int = 0) -> Callable[[Stream], None]:
    return lambda stream: stream.remove(find(stream, kind, which))


def add(record: Record, after: type[Record]) -> Callable[[Stream], None]:
    """Insert the record behind the last one of a kind."""

    def change(stream: Stream) -> None:
        last = [n for n, there in enumerate(stream) if isinstance(there, after)][-1]
        stream.insert(last + 1, record)

    return change


def swap(first: type[Record], second: type[Record]) -> Callable[[Stream], None]:
    def change(stream: Stream) -> None:
        a, b = index(stream, first), index(stream, second)
        stream[a], stream[b] = stream[b], stream[a]

    return change


def again(kind: type[Record], which: int = 0) -> Callable[[Stream], None]:
    return lambda stream: stream.insert(index(stream, kind, which) + 1, find(stream, kind, which))


def late_last_round(stream: Stream) -> None:
    """All state comes ahead of the mark that says that the tasks stand still."""
    last = find(stream, r.RoundMark, 1)
    stream.remove(last)
    stream.insert(-1, last)


def reopened(path: str) -> Callable[[Stream], None]:
    """The first file comes again, on another path."""

    def change(stream: Stream) -> None:
        file = copy.deepcopy(find(stream, f.File))
        file.path = path
        stream.insert(index(stream, f.File) + 1, file)

    return change


def tasks(*entries: r.TaskPids) -> Callable[[Stream], None]:
    return put(r.Tree, tasks=list(entries))


def other_handlers(stream: Stream) -> None:
    sighand = copy.deepcopy(find(stream, r.Sighand))
    sighand.objref = 777
    stream.insert(index(stream, r.Task), sighand)
    find(stream, r.Task, 2).sighand_objref = 777


def thread_first(stream: Stream) -> None:
    leader, thread = index(stream, r.Task, 1), index(stream, r.Task, 2)
    stream[leader], stream[thread] = stream[thread], stream[leader]


def task_missing(stream: Stream) -> None:
    for kind in (r.Task, r.Cpu):
        stream.remove(find(stream, kind))
    count(stream)


THREAD, ZOMBIE = r.TaskFlag.THREAD, r.TaskFlag.ZOMBIE
VIOLATIONS: list[tuple[str, Callable[[Stream], None], str]] = [
    ("no header", drop(r.Header), "record 1 .* begins with a header"),
    ("another magic", put(r.Header, magic=1), "this is no image"),
    ("a newer revision", put(r.Header, rev=r.REV + 1), "revision 8 is not known"),
    ("revision 0", put(r.Header, rev=0), "revision 0 is not known"),
    ("another architecture", put(r.Header, arch_id=r.Arch.AARCH64), "architecture 5 is not x86-64"),
    ("other pages", put(r.Header, page_shift=16), r"pages of 2\^16 bytes"),
    ("two headers", again(r.Header), "comes second"),
    ("a late header", add(find(body(), r.Header), r.Tree), "comes once, ahead of the tree"),
    ("no arch header", drop(r.HeaderX86), "header of the architecture comes second"),
    ("two arch headers", again(r.HeaderX86), "the tree comes ahead"),
    ("an impossible xstate", put(r.HeaderX86, xstate_size=1 << 20), "xstate of 1048576 bytes"),
    ("two containers", again(r.Container), "comes once, ahead of the tree"),
    ("a late container", swap(r.Container, r.Tree), "comes once, ahead of the tree"),
    ("a container without init", put(r.Container, init_pid=0), "impossible pid 0"),
    ("no tree", drop(r.Tree), "the tree comes ahead of everything about its tasks"),
    ("an empty tree", tasks(), "0 tasks"),
    ("a pid that is not positive", tasks(pids(0, tgid=0)), "impossible pid 0"),
    ("a pid beyond the limit", tasks(pids(MAX_PID + 1)), "impossible pid"),
    ("a pid twice", tasks(pids(1), pids(1)), "pid 1 comes twice"),
    ("a child first", tasks(pids(1), pids(3, ppid=2), pids(2)), "pid 3 comes ahead of its parent 2"),
    ("a thread first", tasks(pids(1), pids(3, tgid=2, flags=THREAD), pids(2)), "thread 3 comes ahead of"),
    ("a thread of a thread", tasks(pids(1), pids(1, tgid=1, flags=THREAD)), "pid 1 comes twice"),
    ("a thread not marked", tasks(pids(1), pids(2, tgid=1)), "is not marked as a thread"),
    ("a thread as the root", tasks(pids(1, flags=THREAD)), "ahead of its leader"),
    ("a thread as a parent", tasks(pids(1), pids(2, tgid=1, flags=THREAD), pids(3, ppid=2)), "its parent 2"),
    ("a negative session", item(r.Tree, "tasks", 1, sid=-1), "impossible parent, group or session"),
    ("unknown task flags", item(r.Tree, "tasks", 1, flags=64), "unknown flags 0x40"),
    ("an older tree", add(r.Tree(generation=0, tasks=tree().tasks), r.Name), "generation 0 after 1"),
    ("a tree behind tasks", add(tree(), r.Cpu), "after the state of its tasks began"),
    ("objref 0 defined", put(r.Name, objref=0), "objref 0 is not positive"),
    ("a negative objref", put(r.Name, objref=-4), "objref -4 is not positive"),
    ("an object twice", again(r.Cred), "objref 7 comes twice"),
    ("an objref of two kinds", put(r.Name, objref=1), "objref 1 is a MappedFile already"),
    ("a reference ahead", swap(r.MappedFile, r.Mm), "exe_objref 1 is not defined"),
    ("a reference to another kind", put(r.Task, mm_objref=8), "mm_objref 8 is a Fs, not a Mm"),
    ("a negative reference", put(r.Task, fs_objref=-1), "fs_objref -1 is not defined"),
    ("mappings of nothing", put(r.Vmas, mm_objref=4), "mm_objref 4 is a Shm, not a Mm"),
    ("a reserved field", put(r.Vmas, reserved=1), "reserved field is not zero"),
    ("mappings not sorted", lambda s: find(s, r.Vmas).vmas.reverse(), "overlaps the one ahead"),
    ("mappings overlap", item(r.Vmas, "vmas", 0, end=HEAP + 4096), "overlaps the one ahead"),
    ("an empty mapping", item(r.Vmas, "vmas", 1, end=HEAP), "empty or outside of user space"),
    ("a mapping backwards", item(r.Vmas, "vmas", 1, end=HEAP - 4096), "empty or outside of user space"),
    ("a mapping too high", item(r.Vmas, "vmas", 2, end=TASK_SIZE + 4096), "outside of user space"),
    ("a mapping not aligned", item(r.Vmas, "vmas", 1, start=HEAP + 8), "not aligned"),
    ("an offset not aligned", item(r.Vmas, "vmas", 0, offset=1), "not aligned"),
    ("an offset that overflows", item(r.Vmas, "vmas", 0, offset=(1 << 64) - 4096), "impossible offset"),
    ("an unknown kind", item(r.Vmas, "vmas", 1, kind=77), "unknown kind 77"),
    ("kind 0", item(r.Vmas, "vmas", 1, kind=0), "unknown kind 0"),
    ("unknown mapping flags", item(r.Vmas, "vmas", 1, flags=1 << 31), "unknown flags 0x80000000"),
    ("a file mapping of memory", item(r.Vmas, "vmas", 0, objref=4), "objref 4 is a Shm, not a MappedFile"),
    ("shared memory of nothing", item(r.Vmas, "vmas", 2, objref=0), "objref 0 is not defined"),
    ("heap with an object", item(r.Vmas, "vmas", 1, objref=4), "memory of its own, yet objref 4"),
    ("a name that is a file", item(r.Vmas, "vmas", 1, name_objref=1), "not a Name"),
    ("pages of nothing", put(r.Pages, objref=8), "objref 8 is neither an Mm nor a Shm"),
    ("pages not aligned", item(r.Pages, "ranges", 0, start=HEAP + 1), "not aligned"),
    ("a range of no pages", item(r.Pages, "ranges", 1, nr_pages=0), "empty or out of bounds"),
    ("pages too high", item(r.Pages, "ranges", 0, start=TASK_SIZE - 4096), "out of bounds"),
    ("pages past the end of the shm", put(r.Shm, size=2 * 4096), "range at 0x1000 of 2 pages"),
    ("more pages than contents", item(r.Pages, "ranges", 0, nr_pages=3), "3 pages announced, 8192 bytes"),
    ("contents of zero pages", item(r.Pages, "ranges", 0, kind=ZERO), "0 pages announced, 8192 bytes"),
    ("an unknown kind of page", item(r.Pages, "ranges", 1, kind=4), "unknown kind 4"),
    ("a guard in shared memory", guard_in_shared_memory, "a guard outside of an address space"),
    ("memory of a thread", put(r.Mm, pid=3), "pid 3 is no process that lives"),
    ("memory that changes hands", put(r.Mm, 1, objref=3), "was that of pid 1, now of pid 2"),
    ("memory of another process", put(r.Task, mm_objref=5), "address space 5 is not that of pid 1"),
    ("memory of a stranger", put(r.Mm, pid=77), "pid 77 is not in the tree"),
    ("an unknown kind of shm", put(r.Shm, kind=9), "unknown kind 9"),
    ("an impossible shm", put(r.Shm, size=1 << 63), "impossible size"),
    ("rounds backwards", put(r.RoundMark, 1, number=1), "round 1 after round 1"),
    ("a round without end", put(r.RoundMark, 1, number=1 << 20), "round 1048576 after"),
    ("unknown round flags", put(r.RoundMark, flags=4), "unknown flags 0x4"),
    ("the end of no round", put(r.RoundMark, flags=2), "round 1 ends, which is not open"),
    ("the end of another round", put(r.RoundMark, 1, number=2, flags=2), "round 2 ends, which is not open"),
    ("a round behind the last", put(r.RoundMark, flags=1), "the last round was announced"),
    ("a task that is not in the tree", put(r.Task, pid=77), "pid 77 is not in the tree"),
    ("a task after its registers", lambda s: s.insert(-1, find(s, r.Task)), "pid 1 comes again after its registers"),
    ("registers of a task that runs", late_last_round, "pid 2: comes while the tasks still run"),
    ("a path file that becomes another", reopened("/elsewhere"), "file 21 comes again as another one"),
    ("a pipe opened twice", again(f.File, 1), "of kind PIPE comes twice"),
    ("an unknown state", put(r.Task, state=9), "unknown state 9"),
    ("a zombie that lives", put(r.Task, 3, state=0), "differ on whether it is a zombie"),
    ("a zombie unknown to the tree", put(r.Task, 1, state=2), "differ on whether it is a zombie"),
    ("unknown task bits", put(r.Task, flags=1 << 20), "unknown flags"),
    ("an impossible signal", put(r.Task, pdeath_signal=65), "impossible signal"),
    ("a process without memory", put(r.Task, mm_objref=0), "pid 1 lives, and has no mm_objref"),
    ("a task without rights", put(r.Task, 2, cred_objref=0), "pid 3 lives, and has no cred_objref"),
    ("a thread with other handlers", other_handlers, "thread 3 has another sighand_objref"),
    ("a thread's state first", thread_first, "thread 3 comes ahead of its leader 2"),
    ("registers ahead of the task", swap(r.Task, r.Cpu), "pid 1: comes ahead of its task"),
    ("registers of a stranger", put(r.Cpu, pid=9), "pid 9 is not in the tree"),
    ("registers twice", again(r.Cpu), "pid 1 comes twice"),
    ("registers of another cpu", put(r.Cpu, arch_id=5), "registers of architecture 5"),
    ("too few registers", put(r.Cpu, regs=bytes(208)), "registers of 208"),
    ("an endless xstate", put(r.Cpu, xstate=bytes(1 << 17)), "131072 bytes"),
    ("two restart blocks", again(r.RestartBlock), "pid 2 comes twice"),
    ("a negative rest", put(r.RestartBlock, remaining=-2), "-2 ns remain"),
    ("a part of a siginfo", put(r.SigPending, infos=bytes(100)), "100 bytes of siginfo"),
    ("pending signals twice", again(r.SigPending), "pid 3 comes twice"),
    ("shared neither way", put(r.SigPending, shared=2), "shared is 2"),
    ("too few actions", put(r.Sighand, actions=bytes(8)), "8 bytes of actions instead of 2048"),
    ("too many timers", put(r.Signal, itimers=[r.Itimer(value=0, interval=0)] * 4), "4 interval timers"),
    ("another trailer", put(r.Trailer, magic=r.MAGIC), "Trailer"),
    ("a record lost", put(r.Trailer, nr_records=9), "counts 9 records"),
    ("a task missing", task_missing, "pid 1 is in the tree, its state never"),
    ("registers missing", lambda s: [drop(r.Cpu)(s), count(s)], "pid 1: its registers never came"),
    ("mappings missing", lambda s: [drop(r.Vmas)(s), count(s)], "mappings of its address space 3 never came"),
    ("descriptors not sorted", item(f.FileTable, "descriptors", 3, fd=1), "fd 1 after fd 2"),
    ("a negative descriptor", item(f.FileTable, "descriptors", 0, fd=-1), "fd -1 after fd -1"),
    ("a huge descriptor", item(f.FileTable, "descriptors", 11, fd=(1 << 30) + 1), "after fd 10"),
    ("a descriptor of nothing", item(f.FileTable, "descriptors", 0, file_objref=0), "fd 0: objref 0 is not"),
    ("a descriptor of no file", item(f.FileTable, "descriptors", 0, file_objref=12), "a Pipe, not a File"),
    ("unknown descriptor flags", item(f.FileTable, "descriptors", 0, cloexec=2), "fd 0: unknown flags"),
    ("an unknown kind of file", put(f.File, kind=99), "unknown kind 99"),
    ("a pipe that is an eventfd", put(f.File, 1, inode_objref=13), "13 is a EventFd, not a Pipe"),
    ("a file on an object", put(f.File, inode_objref=13), "REGULAR has no object of its own"),
    ("a relative path", put(f.File, path="etc/passwd"), "'etc/passwd' is not absolute"),
    ("a negative offset", put(f.File, pos=-1), "impossible offset -1"),
    ("an impossible lock", put(f.File, lock=3), "unknown lock 3"),
    ("an impossible owner", put(f.File, owner_type=4), "owner of type 4"),
    ("an owner without a pid", put(f.File, owner_pid=-1), "impossible pid -1"),
    ("contents of no pipe", put(f.PipeBuffer, pipe_objref=3), "pipe_objref 3 is a Mm, not a Pipe"),
    ("contents of nothing", put(f.PipeBuffer, pipe_objref=0), "objref 0 is not defined"),
    ("unknown contents", put(f.PipeBuffer, flags=2), "unknown flags 0x2"),
    ("contents in one piece", put(f.PipeBuffer, data=bytes(2 << 20)), "2097152 bytes in one piece"),
    ("unknown timer flags", put(f.TimerFd, flags=4), "unknown flags 0x4"),
    ("contents beyond the end", put(f.FileData, offset=4097), "beyond the end of the file"),
    ("an endless deleted file", put(f.DeletedFile, size=1 << 63), "impossible size"),
    ("a pidfd of a stranger", put(f.PidFd, pid=77), "pid 77 is not in the tree"),
    ("an unknown socket state", put(f.Socket, state=0), "unknown state 0"),
    ("a socket shut too much", put(f.Socket, shutdown=4), "shutdown 4"),
    ("a long address", put(f.Socket, local=bytes(200)), "addresses of 200"),
    ("a long sender", put(f.SocketBuffer, address=bytes(200)), "an address of 200"),
    ("a peer that never comes", put(f.Socket, peer_objref=777), "peer_objref 777 never came"),
    ("a peer that is a file", put(f.Socket, peer_objref=21), "peer_objref 21 is a File, not a Socket"),
    ("a connection twice", again(f.SocketTcp), "socket 19 comes twice"),
    ("more unsent than there is", put(f.SocketTcp, unsent=9), "9 bytes not sent, of 5"),
    ("a window scaled away", put(f.SocketTcp, snd_wscale=15), "scaled by 15"),
    ("epoll of a stranger", put(f.EpollItems, pid=77), "pid 77 is not in the tree"),
    ("epoll of nothing", put(f.EpollItems, epoll_objref=0), "the epoll instance: objref 0"),
    ("epoll on nothing", item(f.EpollItems, "items", 0, file_objref=0), "item of fd 2: objref 0"),
    ("epoll with a negative fd", item(f.EpollItems, "items", 0, fd=-2), "item of fd -2"),
    ("a task without descriptors", put(r.Task, files_objref=0), "pid 1 lives, and has no files_objref"),
    ("something behind the trailer", lambda s: s.append(cpu(1)), r"\(Cpu\) follows the trailer"),
    ("a trailer twice", again(r.Trailer), r"\(Trailer\) follows the trailer"),
    ("an error", add(r.Error("pid 3: a tty"), r.Cpu), "gave up: pid 3: a tty"),
]  # fmt: skip


def count(stream: Stream) -> None:
    find(stream, r.Trailer).nr_records = len(stream)


def test_a_whole_stream_is_accepted() -> None:
    order = run(closed(body()))
    assert order.done
    assert order.records == len(body()) + 1


@pytest.mark.parametrize(("spoil", "message"), [case[1:] for case in VIOLATIONS], ids=[case[0] for case in VIOLATIONS])
def test_a_stream_out_of_order_is_refused(spoil: Callable[[Stream], None], message: str) -> None:
    stream = closed(body())
    spoil(stream)
    with pytest.raises(ImageError, match=message):
        run(stream)


def test_no_stream_is_done_ahead_of_its_trailer() -> None:
    order = Order()
    for record in body():
        order.check(record)
        assert not order.done


@pytest.mark.parametrize("kind", [r.Mm, r.Shm, r.Vmas, r.Tree])
def test_what_changes_while_tasks_run_may_come_again(kind: type[Record]) -> None:
    stream = body()
    stream.insert(index(stream, r.RoundMark, 1), find(stream, kind))
    assert run(closed(stream)).done


@pytest.mark.parametrize("kind", [r.Fs, r.Sighand, r.Signal, r.Task, f.File, f.FileTable])
def test_what_was_drafted_may_come_again_and_need_not(kind: type[Record]) -> None:
    stream = closed(drafted())
    assert run(stream).done
    stream.insert(index(stream, r.Cpu), find(stream, kind))
    count(stream)
    assert run(stream).done


def test_the_draft_of_a_process_that_ended_is_no_state() -> None:
    stream = drafted()
    at = index(stream, r.RoundMark, 2)
    stream[at:at] = [without(5), tree(), mm(41, pid=5), vmas(41)]
    with pytest.raises(ImageError, match="pid 5 is in the tree, its state never"):
        run(closed([record for record in stream if not (isinstance(record, r.Cpu) and record.pid == 5)]))


def test_a_draft_that_another_program_has_made_old_does_not_pass() -> None:
    stream = drafted()
    at = index(stream, r.RoundMark, 2)
    stream[at:at] = [mm(41, pid=5), vmas(41)]
    with pytest.raises(ImageError, match="address space 6 is not that of pid 5"):
        run(closed(stream))


def test_a_later_tree_replaces_the_earlier_one() -> None:
    stream = body()
    grown = tree()
    grown.generation = 2
    grown.tasks = [*grown.tasks[:4], pids(6, ppid=2)]
    at = index(stream, r.RoundMark, 1)
    stream[at:at] = [grown, mm(40, pid=6), vmas(40)]
    with pytest.raises(ImageError, match="pid 5 is not in the tree"):
        run(closed(stream))
    stream.remove(find(stream, r.Task, 4))
    stream.remove(find(stream, r.Cpu, 3))
    stream += [task(6, mm=40), cpu(6)]
    assert run(closed(stream)).done


def without(pid: int) -> r.Tree:
    smaller = tree()
    smaller.tasks = [entry for entry in smaller.tasks if entry.pid != pid]
    return smaller


@pytest.mark.parametrize("late", [vmas(6), pages(6)], ids=["Vmas", "Pages"])
def test_nothing_is_said_about_the_memory_of_a_process_that_ended(late: Record) -> None:
    stream = body()
    at = index(stream, r.RoundMark, 1)
    stream[at:at] = [without(5), late]
    with pytest.raises(ImageError, match="of a process that ended"):
        run(stream)


def test_a_pid_that_is_given_out_again_has_memory_of_its_own() -> None:
    stream = body()
    at = index(stream, r.RoundMark, 1)
    stream[at:at] = [without(5), tree(), mm(41, pid=5), vmas(41)]
    with pytest.raises(ImageError, match="address space 6 is not that of pid 5"):
        run(closed(stream))
    find(stream, r.Task, 4).mm_objref = 41
    assert run(closed(stream)).done


def test_memory_that_grew_takes_pages_further_out() -> None:
    stream = body()
    shm = find(closed(body()), r.Shm)
    shm.size = 64 * 4096
    stream += [shm, pages(4, (63 * 4096, 1, DATA))]
    assert run(closed(stream)).done


def test_contents_left_out_by_the_decoder_are_not_missed() -> None:
    stream = body()
    for record in stream:
        if isinstance(record, r.Pages):
            record.data = b""
    assert run(closed(stream), contents=False).done


def test_the_last_page_of_user_space_is_in_bounds() -> None:
    stream = body()
    find(stream, r.Vmas).vmas.append(vma(TASK_SIZE - 4096, 1, kind=r.VmaKind.STACK))
    stream += [pages(3, (TASK_SIZE - 4096, 1, ZERO))]
    assert run(closed(stream)).done


@given(data=st.data())
def test_any_shuffle_is_accepted_or_refused_but_never_crashes(data: st.DataObject) -> None:
    stream = closed(body())
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, len(stream) - 1))
        match data.draw(st.sampled_from(["move", "drop", "repeat"])):
            case "move":
                stream.insert(data.draw(st.integers(0, len(stream) - 1)), stream.pop(position))
            case "drop" if len(stream) > 1:
                stream.pop(position)
            case _:
                stream.insert(position, stream[position])
    try:
        run(stream)
    except ImageError:
        pass


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "a/b"}, "no name of a queue"),
        ({"name": ""}, "no name of a queue"),
        ({"name": ".."}, "no name of a queue"),
        ({"name": "jobs"}, "comes twice"),
        ({"removed": 2}, "removed is 2"),
        ({"max_messages": 0}, "0 messages of"),
        ({"max_messages": 65537}, "65537 messages of"),
        ({"message_size": (1 << 24) + 1}, "messages of 16777217 bytes"),
    ],
)
def test_a_message_queue_that_cannot_be_is_refused(changed: dict[str, object], message: str) -> None:
    stream = closed(latest())
    at = next(at for at, record in enumerate(stream) if isinstance(record, s.MqQueue))
    stream[at] = replace(stream[at], **changed)  # type: ignore[type-var]
    with pytest.raises(ImageError, match=message):
        run(stream)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"queue_objref": 50}, "is a Shm, not a MqQueue"),
        ({"queue_objref": 0}, "which did not come"),
        ({"priority": 32768}, "a message of priority 32768"),
        ({"text": bytes(8193)}, "of priority 0 and 8193 bytes"),
    ],
)
def test_a_message_that_its_queue_does_not_take_is_refused(changed: dict[str, object], message: str) -> None:
    stream = closed(latest())
    at = next(at for at, record in enumerate(stream) if isinstance(record, s.MqMessage))
    stream[at] = replace(stream[at], **changed)  # type: ignore[type-var]
    with pytest.raises(ImageError, match=message):
        run(stream)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"wd": 0}, "watch 0 after watch 0"),
        ({"wd": 77}, "watch 77 after watch 77"),
        ({"mask": 0}, "unknown mask 0x0"),
        ({"mask": 0x1001}, "unknown mask 0x1001"),
        ({"path": "etc"}, "is not absolute"),
        ({"inotify_objref": 61}, "is a MqQueue, not a Inotify"),
    ],
)
def test_a_watch_that_cannot_be_is_refused(changed: dict[str, object], message: str) -> None:
    stream = closed(latest())
    at = next(at for at, record in enumerate(stream) if isinstance(record, f.InotifyWatch))
    stream[at] = replace(stream[at], **changed)  # type: ignore[type-var]
    with pytest.raises(ImageError, match=message):
        run(stream)


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        (f.Pty, {"index": 1 << 20}, "terminal 1048576"),
        (f.Pty, {"flags": 128}, "flags 0x80"),
        (f.Pty, {"status": 0x80}, "status 0x80"),
        (f.Pty, {"flags": 0}, "status 0x4 without packet mode"),
        (f.Pty, {"mode": 0o10000}, "mode 10000"),
        (f.Pty, {"session": -1}, "session -1"),
        (f.Pty, {"session": 0}, "terminal 3 of session 0 has group 2"),
        (f.Pty, {"session": 77}, "pid 77 is not in the tree"),
        (f.Pty, {"flags": 64, "status": 0}, "terminal 3 of session 1"),
        (f.Pty, {"flags": 96, "status": 0, "session": 0, "foreground": 0}, "both ends are closed"),
        (f.Pty, {"flags": 64, "status": 0, "session": 0, "foreground": 0}, "was hung up"),
        (f.Pty, {"flags": 34}, "a slave that is closed"),
        (f.Pty, {"termios": bytes(43)}, "43 bytes of termios"),
        (f.PtyData, {"direction": 0}, "direction 0"),
        (f.PtyData, {"direction": 3}, "direction 3"),
        (f.PtyData, {"end": 3}, "end 3"),
        (f.PtyData, {"direction": 2}, "direction 2, end 1"),
        (f.PtyData, {"data": b""}, "nothing waits"),
        (f.PtyData, {"data": bytes(2 << 20)}, "2097152 bytes in one piece"),
        (f.PtyData, {"end": 0}, "a line behind the one that is being typed"),
        (f.PtyData, {"pty_objref": 61}, "is a MqQueue, not a Pty"),
    ],
)
def test_a_terminal_that_cannot_be_is_refused(kind: type[Record], changed: dict[str, object], message: str) -> None:
    stream = closed(latest())
    at = next(at for at, record in enumerate(stream) if isinstance(record, kind))
    stream[at] = replace(stream[at], **changed)
    with pytest.raises(ImageError, match=message):
        run(stream)


def test_a_terminal_has_one_master() -> None:
    stream = closed(latest())
    at = next(i for i, rec in enumerate(stream) if isinstance(rec, f.File) and rec.kind == f.FileKind.PTY_SLAVE)
    stream[at] = replace(stream[at], kind=int(f.FileKind.PTY_MASTER))
    with pytest.raises(ImageError, match="another one has it"):
        run(stream)
