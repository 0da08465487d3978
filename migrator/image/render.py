"""An `ImageInfo` as text and as JSON.

Paths and names come from a stream that nobody vouches for: whatever could drive a terminal is shown
escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from migrator.image.info import ImageInfo, MemoryInfo, TaskInfo
from migrator.text import printable, size


def to_json(info: ImageInfo) -> str:
    """All of it, as one JSON object whose keys are the fields of `ImageInfo`."""
    return json.dumps(asdict(info), indent=2)


def render_text(info: ImageInfo, *, errors: bool = False, tree: bool = False, verbose: bool = False) -> str:
    """Lines for people. `errors` or `tree` alone show just those; `verbose` adds mappings and all fields."""
    lines: list[str] = []
    if errors:
        lines += [f"error: {printable(message)}" for message in info.errors]
    if tree:
        lines += _tree(info)
    if not errors and not tree:
        lines += _head(info)
        lines += ["", "tasks", *_tree(info)]
        lines += ["", "memory", *_memory(info, verbose)]
        if info.rounds:
            lines += ["", "rounds", *_rounds(info)]
        if info.tables:
            lines += ["", "descriptors", *_descriptors(info)]
        if info.objects and (verbose or not info.tables):
            lines += ["", "files, pipes and sockets", *_objects(info, verbose)]
        if info.errors:
            lines += ["", *(f"error: {printable(message)}" for message in info.errors)]
        if verbose:
            lines += ["", "records", *(f"  {name:<16} {count}" for name, count in info.counts.items())]
        lines.append("")
    if not tree or not info.whole:
        lines.append(_verdict(info))
    return "\n".join(lines) + "\n"


def _verdict(info: ImageInfo) -> str:
    read = f"{info.records} records, {info.bytes} bytes"
    return f"whole: {read}" if info.whole else f"BROKEN after {read}: {printable(info.cause)}"


def _head(info: ImageInfo) -> Iterator[str]:
    head = info.header
    if not head:
        yield "no header"
        return
    kernel = f"{printable(head['sysname'])} {printable(head['release'])} {printable(head['machine'])}"
    yield (
        f"image revision {head['rev']} by {printable(head['engine']) or 'an unnamed engine'}, flags {head['uflags']:#x}"
    )
    yield f"host {printable(head['nodename'])}, {kernel}"
    if info.arch:
        yield f"cpu {printable(info.arch['cpu_model'])}, xstate of {info.arch['xstate_size']} bytes"
    if info.container:
        yield f"container {printable(info.container['name'])}, init {info.container['init_pid']}"


def _tree(info: ImageInfo) -> Iterator[str]:
    """Processes indented below their parents, threads below their leaders."""
    depth: dict[int, int] = {}
    for task in info.tasks:
        above = task.tgid if task.thread else task.ppid
        # a stream that is broken may name any parent: one that was not shown yet counts as none
        depth[task.pid] = 0 if task.orphan else depth.get(above, -1) + 1
        yield "  " * (depth[task.pid] + 1) + _task(task)


def _task(task: TaskInfo) -> str:
    state = task.state or ("zombie" if task.zombie else "state missing")
    parts = [f"{task.pid}", printable(task.comm) or "?", state]
    if task.thread:
        parts.append("thread")
    else:
        parts.append(f"group {task.pgid} session {task.sid}")
    if task.orphan:
        parts.append(f"parent {task.ppid} outside")
    if task.mm_objref and not task.thread:
        parts.append(f"mm {task.mm_objref} files {task.files_objref}")
    if task.pending_signals:
        parts.append(f"{task.pending_signals} signals pending")
    return "  ".join(parts)


def _memory(info: ImageInfo, verbose: bool) -> Iterator[str]:
    for memory in info.memory:
        yield f"  {memory.kind} {memory.objref}  {printable(memory.what)}  {_amount(memory)}"
        if verbose:
            for number, part in sorted(memory.rounds.items()):
                yield f"      round {number}: {part.data} data  {part.zero} zero  {part.absent} absent" + (
                    f"  {part.guard} guard" if part.guard else ""
                )
            for vma in memory.mappings:
                yield f"      {vma.start:012x}-{vma.end:012x} {vma.perms} {vma.offset:08x} {printable(vma.what)}"


def _amount(memory: MemoryInfo) -> str:
    mapped = f"{size(memory.size)} in {len(memory.mappings)} mappings" if memory.kind == "mm" else size(memory.size)
    return f"{mapped}; sent {memory.data} pages with data, {memory.zero} zero, {memory.absent} absent" + (
        f", {memory.guard} guard" if memory.guard else ""
    )


def _rounds(info: ImageInfo) -> Iterator[str]:
    for part in info.rounds:
        mark = "  last, tasks stopped" if part.last else ""
        guard = f", {part.guard} guard" if part.guard else ""
        yield (
            f"  {part.number:>3}  {part.data} pages with data ({size(part.bytes)}), "
            f"{part.zero} zero, {part.absent} absent{guard}{mark}"
        )


def _descriptors(info: ImageInfo) -> Iterator[str]:
    for objref, table in info.tables.items():
        users = [str(task.pid) for task in info.tasks if task.files_objref == objref and not task.thread]
        yield f"  files {objref}  of pid {', '.join(users) or '?'}"
        for fd in table:
            cloexec = "  cloexec" if fd.cloexec else ""
            at = f"  at {fd.pos}" if fd.pos else ""
            yield f"    {fd.fd:>4}  {fd.kind:<9}  {printable(fd.what)}{at}  flags {fd.flags:#o}{cloexec}"


def _objects(info: ImageInfo, verbose: bool) -> Iterator[str]:
    for thing in info.objects:
        shown = " ".join(f"{name}={_value(value, verbose)}" for name, value in thing.fields.items() if value or verbose)
        yield f"  {thing.record}  {shown}"


def _value(value: object, verbose: bool) -> str:
    match value:
        case str():
            return printable(value)
        case {"length": int(length), "hex": str(shown), **rest} if not rest:
            return f"<{length} bytes{': ' + shown if verbose and shown else ''}>"
        case dict():
            return "(" + " ".join(f"{k}={_value(v, verbose)}" for k, v in value.items()) + ")"
        case list():
            if not verbose and len(value) > 8:
                return f"<{len(value)} items>"
            return "[" + ", ".join(_value(item, verbose) for item in value) + "]"
        case _:
            return str(value)
