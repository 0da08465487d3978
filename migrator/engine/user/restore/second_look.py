"""A second look: a copy that stands and has not run yet is saved again, and compared with what it was made from.

Nothing of the stream that comes of it is kept. The copy is as it was afterwards: what its calls leave behind in it
(registers, masks, the scratch area) is put back as for any tree that is saved.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence

from migrator.engine.base import Move
from migrator.engine.stream import RecordReader, RecordWriter
from migrator.engine.user.descriptors import DescriptorDump
from migrator.engine.user.descriptors import Holder as DescriptorOwner
from migrator.engine.user.descriptors.private_root import PREFIX
from migrator.engine.user.dump.memory import MemoryDump
from migrator.engine.user.dump.mqueues import MqueueDump
from migrator.engine.user.dump.process import Process, Thread
from migrator.engine.user.dump.process_tree import ProcessTree
from migrator.engine.user.dump.restart_blocks import RestartBlocks
from migrator.engine.user.dump.survey import hierarchy
from migrator.engine.user.dump.sysv import SysvDump
from migrator.engine.user.dump.tasks import TaskDump, list_timers
from migrator.engine.user.dump.tmpfs import OwnTmpfs
from migrator.engine.user.restore.process_tree import StubTree
from migrator.image.compare import Contents
from migrator.image.objhash import ObjHash
from migrator.image.records import Trailer
from migrator.image.records_files import Socket
from migrator.linux import procfs, ptrace
from migrator.linux import x86_64 as arch


def look_again(
    stubs: StubTree, stop_signals: Mapping[int, int], moves: Sequence[Move], tmpfs: Sequence[str], *, contained: bool
) -> Contents:
    """What a copy is that stands complete, all its tasks in a ptrace stop with their final registers.

    `stop_signals`: by pid of the tree, of processes that are to be stopped by a signal. `moves`: files that
    have still to be moved to their places. `tmpfs`: the mounts of a container's own.
    `contained`: the copy has an IPC namespace of its own. Raises CheckpointFailed, OSError."""
    reader, writer = os.pipe()
    found = Contents()
    failure: list[BaseException] = []
    collector = threading.Thread(target=_collect, args=(reader, found, failure), name="second look")
    collector.start()
    try:
        _save(stubs, stop_signals, tmpfs, contained, writer)
    finally:
        os.close(writer)
        collector.join()
        os.close(reader)
    if failure:
        raise failure[0]
    _settle_paths(found, moves)
    return found


def _collect(fd: int, found: Contents, failure: list[BaseException]) -> None:
    try:
        reader = RecordReader(fd)
        while True:
            record = reader.next()
            found.add(record)
            if isinstance(record, Trailer):
                return
    except BaseException as error:
        failure.append(error)
        while os.read(fd, 1 << 16):  # the writer must not wait for us
            pass


def _save(stubs: StubTree, stop_signals: Mapping[int, int], tmpfs: Sequence[str], contained: bool, fd: int) -> None:
    assert stubs.root is not None
    writer, objhash, blocks = RecordWriter(fd), ObjHash(), RestartBlocks()
    tree = ProcessTree(stubs.root.pid, lambda: [])
    own_tmpfs, sysv = OwnTmpfs(stubs.root.pid, tmpfs), SysvDump(stubs.root.pid) if contained else None
    memory = MemoryDump(writer, objhash, blocks, lambda: tree.processes, own_tmpfs, sysv)
    tasks = TaskDump(writer, objhash, blocks)
    descriptors: DescriptorDump | None = None
    try:
        for stub in stubs.stubs.values():
            threads = {t.tid: _thread(t.tid, t.vtid, stop_signals.get(stub.vpid, 0)) for t in stub.threads.values()}
            tree.processes[stub.pid] = Process(stub.pid, stub.vpid, os.dup(stub.pidfd), _start_time(stub.pid), threads)
        for vpid, stub in stubs.zombies.items():
            code = int(procfs.stat(stub.pid)[52])
            tree.processes[stub.pid] = Process(stub.pid, vpid, -1, _start_time(stub.pid), zombie=True, exit_code=code)
        states = {p.pid: procfs.status(p.pid) for p in tree.living}
        writer.write(hierarchy(tree, 1, states))
        for process in tree.living:
            memory.look(process)
            memory.name(process)
            memory.send(process, final=True)
            memory.prepare(process)  # which leaves something below the stack pointer
        replies, others, timers = {}, {}, {}
        for process in tree.living:
            leader, parasite = process.leader, process.parasite
            assert parasite is not None and leader.regs is not None
            timers[process.pid] = list_timers(process)
            replies[process.pid] = reply = parasite.process(
                leader.regs, leader.mask, timers[process.pid], leader.xstate
            )
            others[process.pid] = parasite.threads([t for t in process.threads.values() if t is not leader])
            memory.layout.end(process.pid, process.vpid, process.mm_objref, reply.brk)
        owners = [DescriptorOwner(p.pid, p.vpid, p.pidfd) for p in tree.living]
        descriptors = DescriptorDump(owners, objhash, writer, shared=memory.shared.objects)
        descriptors.collect()
        for memfd in descriptors.memfds:
            memory.shared.of_descriptor((memfd.dev, memfd.ino), memfd.fd, memfd.name, memfd.seals)
        memory.shared.send(writer, memory.sender, final=True)
        if contained:
            MqueueDump(stubs.root.pid).save(writer, objhash, descriptors.queues)
        tables = descriptors.write()
        for process in tree.processes.values():
            if process.zombie:
                tasks.write_zombie(process)
            else:
                pid = process.pid
                tasks.write(
                    process, states[pid], replies[pid], timers[pid], [replies[pid].leader, *others[pid]], tables[pid]
                )
        writer.trailer()
    finally:
        if descriptors is not None:
            descriptors.undo()
        memory.instruments.remove_stopped(tree.living)
        memory.close()
        for process in tree.processes.values():
            process.threads.clear()
        tree.close()


def _thread(tid: int, vtid: int, stop_signal: int) -> Thread:
    return Thread(
        tid,
        vtid,
        arch.get_regs(tid),
        arch.get_xstate(tid),
        ptrace.get_sigmask(tid),
        stop_signal=stop_signal,
        rseq=ptrace.rseq_configuration(tid),
    )


def _start_time(pid: int) -> int:
    return int(procfs.stat(pid)[22])


def _settle_paths(found: Contents, moves: Sequence[Move]) -> None:
    """Files of unix sockets get their names when the copy runs: here they count as moved, or as removed where the
    name of the original had been."""
    names = {os.path.join(folder, private, path): os.path.join(folder, name) for folder, private, path, name in moves}
    for record in found.objects.values():
        if isinstance(record, Socket):
            record.path = names.get(record.path, record.path)
            if f"/{PREFIX}" in record.path:
                record.path, record.mode, record.uid, record.gid = "", 0, 0, 0
    for where in [w for w in found.named if f"/{PREFIX}" in w.replace(" ", "/")]:
        del found.named[where]
