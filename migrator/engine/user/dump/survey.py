"""What is in a tree, and what of it cannot be carried: looked at while it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from migrator.engine import files, processor, work
from migrator.engine.base import FileFact, SourceOptions, Survey
from migrator.engine.user import descriptors
from migrator.engine.user.dump import survey_notes, survey_tasks
from migrator.engine.user.dump.mqueues import MqueueDump
from migrator.engine.user.dump.process import Process
from migrator.engine.user.dump.process_tree import ProcessTree
from migrator.engine.user.dump.shm import is_shm
from migrator.engine.user.dump.sysv import SYSV, SysvDump, parts_obstacle
from migrator.engine.user.dump.tmpfs import OwnTmpfs
from migrator.image.records import TaskFlag, TaskPids, Tree
from migrator.linux import procfs


def hierarchy(tree: ProcessTree, generation: int, states: dict[int, dict[str, str]]) -> Tree:
    """The tree as a record, in its own pid namespace. `states`: /proc/PID/status, where read already."""
    tasks = []
    for process in tree.processes.values():
        try:
            state = states.get(process.pid) or procfs.status(process.pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if not process.zombie and (state["State"][0] in "ZX" or not procfs.ns_pid(state)):
            continue  # it is just ending: the next tree knows
        parent = tree.processes.get(int(state["PPid"]))
        flags = TaskFlag.ZOMBIE if process.zombie else TaskFlag(0)
        if parent is None and process.pid != tree.root:
            flags |= TaskFlag.ORPHAN
        pgid, sid = procfs.ns_pid(state, "NSpgid"), procfs.ns_pid(state, "NSsid")
        ppid = parent.vpid if parent is not None else 0
        tasks.append(TaskPids(process.vpid, process.vpid, ppid, pgid, sid, int(flags)))
        if process.zombie:
            continue
        for vtid in _vtids(process, state):
            if vtid != process.vpid:
                tasks.append(TaskPids(vtid, process.vpid, ppid, pgid, sid, int(TaskFlag.THREAD)))
    return Tree(generation, tasks)


def _vtids(process: Process, state: dict[str, str]) -> list[int]:
    if process.threads:
        return [t.vtid for t in process.threads.values()]
    try:
        tids = procfs.tids(process.pid)
        if process.vpid == process.pid:
            return tids
        if len(tids) == 1:
            return [process.vpid]
        return [procfs.ns_pid(procfs.status(process.pid, tid)) for tid in tids]
    except (FileNotFoundError, ProcessLookupError):
        return []


def survey(
    tree: ProcessTree, options: SourceOptions, tmpfs: OwnTmpfs, sysv: SysvDump | None, mqueues: MqueueDump | None
) -> tuple[Survey, list[str]]:
    """(what was found, one sentence per obstacle)."""
    reasons = list(survey_tasks.of_tree(tree, container=bool(options.container)))
    reasons += tmpfs.obstacles()
    if sysv is not None:
        reasons += sysv.obstacles(p.pid for p in tree.living)
    segments = {item.id: item.size for item in sysv.segments()} if sysv is not None else {}
    found_files: dict[str, FileFact] = {}
    threads = rss = cap_bounding = most_files = 0
    congestion: set[str] = set()
    for process in tree.living:
        try:
            state = procfs.status(process.pid)
            threads += int(state["Threads"])
            rss += int(state.get("VmRSS", "0").split()[0]) * 1024
            cap_bounding |= int(state["CapBnd"], 16)
            most_files = max(most_files, procfs.open_files_limits(process.pid)[1])
            reasons += survey_tasks.of_process(tree, process, state, tmpfs.devices)
            who = f"pid {process.pid} ({state['Name']})"
            reasons += [f"{who}: {text}" for text in _ipc_obstacles(process.pid, segments)]
            files.mapped(process.pid, found_files, lambda vma: is_shm(vma, tmpfs.devices))
            files.opened(process.pid, found_files, tmpfs.devices, names=True)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended: nothing to carry
    owners = [descriptors.Holder(p.pid, p.vpid, p.pidfd) for p in tree.living]
    queues: dict[tuple[int, int], descriptors.MessageQueue] = {}
    watched: set[str] = set()
    reasons += descriptors.survey(
        owners, own_netns=bool(options.container), congestion=congestion, queues=queues, watched=watched
    )
    files.named(tree.root, watched, found_files, tmpfs.devices)
    if mqueues is not None:
        reasons += mqueues.obstacles(queues.values(), set(tree.processes))
    _, xsize = processor.xstate_facts()
    own_pids = os.readlink(f"/proc/{tree.root}/ns/pid") != os.readlink("/proc/self/ns/pid")
    wanted = [] if own_pids else sorted({t.pid for t in hierarchy(tree, 0, {}).tasks})
    found = Survey(
        pids=list(tree.processes),
        threads=threads,
        rss_bytes=rss,
        files=sorted(found_files.values(), key=lambda f: f.path),
        cpu_features=frozenset(processor.cpu_facts()["flags"].split()),
        xstate_size=xsize,
        tracker="wp-async",
        tcp_connections=0,
        wanted_pids=wanted,
        notes=[*survey_notes.notes(tree.living), *descriptors.notes(owners)],
        cap_bounding=cap_bounding,
        most_files=most_files,
        congestion=frozenset(congestion),
        work=work.count(tree.living),
    )
    return found, reasons


def _ipc_obstacles(pid: int, segments: Mapping[int, int]) -> Iterator[str]:
    text = procfs.read_text(f"/proc/{pid}/maps")
    if SYSV not in text:
        return
    vmas = procfs.parse_maps(text)
    for vma in vmas:
        if vma.path.startswith(SYSV) and vma.inode not in segments:
            yield f"mapping {vma.start:#x} is System V shared memory of the host, which cannot be carried"
    if reason := parts_obstacle(vmas, segments):
        yield f"{reason}, which cannot be carried"
