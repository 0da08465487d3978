"""The source side of the user engine: see migrator.engine.base for the life of it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from migrator.engine.adoption import Adoption
from migrator.engine.base import Phase, Round, SourceOptions, Survey
from migrator.engine.stream import RecordWriter
from migrator.engine.user.descriptors import DescriptorDump, PredumpedFiles, Standing, Transients
from migrator.engine.user.descriptors import Holder as DescriptorOwner
from migrator.engine.user.descriptors import begin as begin_descriptors
from migrator.engine.user.descriptors import make_room as make_room_for_descriptors
from migrator.engine.user.dump import header, survey_tasks
from migrator.engine.user.dump.asked import refuse_asked
from migrator.engine.user.dump.bystander import RESTRICTED, Bystanders
from migrator.engine.user.dump.mappings import SINCE
from migrator.engine.user.dump.memory import MemoryDump
from migrator.engine.user.dump.mqueues import MqueueDump
from migrator.engine.user.dump.process import Process, Thread, ask_all
from migrator.engine.user.dump.process_tree import ProcessTree
from migrator.engine.user.dump.restart_blocks import RestartBlocks
from migrator.engine.user.dump.survey import hierarchy
from migrator.engine.user.dump.survey import survey as survey_tree
from migrator.engine.user.dump.survey_tasks import CONFINED, NUMA_POLICY, UNDER_SECCOMP
from migrator.engine.user.dump.sysv import SysvDump
from migrator.engine.user.dump.tasks import TaskDump, list_timers
from migrator.engine.user.dump.tmpfs import OwnTmpfs
from migrator.engine.work import count as count_work
from migrator.errors import CheckpointFailed, MigratorError, Refused
from migrator.image.objhash import ObjHash
from migrator.image.records import PAGE_SIZE, Container, RoundFlag, RoundMark, TaskFlag, TaskPids
from migrator.linux import pidfd, procfs
from migrator.linux.cgroup import Cgroup
from migrator.linux.confinement import other_label
from migrator.linux.remote import RemoteError

_ACCEPT_SECONDS = 0.02
_RETRY_AFTER = (0.0005, 0.002, 0.005, 0.01, 0.02)  # seconds to run before the next attempt to find it quiet
_PASSING_SECONDS = 1.0  # for processes that cannot be carried
_PASSING_PAUSE = 0.005
_SURVEYS = 4


class UserSource:
    """Saves the tree below `pid` to the stream `fd`, stopping it only for the end of it."""

    def __init__(self, pid: int, fd: int, options: SourceOptions) -> None:
        self.pid = pid
        self.options = options
        self._writer = RecordWriter(fd, checksums=options.checksums)
        self._objhash = ObjHash()
        self._adoption = Adoption(pid, options)
        self.tree = ProcessTree(pid, self._list_pids)
        self._restart_blocks = RestartBlocks()
        self._bystanders = Bystanders()
        self._sysv = SysvDump(pid) if options.container else None
        self._mqueues = MqueueDump(pid, options.message_ledger, self._still) if options.container else None
        self._memory = MemoryDump(
            self._writer,
            self._objhash,
            self._restart_blocks,
            lambda: self.tree.processes,
            OwnTmpfs(pid, options.tmpfs),
            self._sysv,
        )
        self._tasks = TaskDump(self._writer, self._objhash, self._restart_blocks)
        self._predumped = PredumpedFiles(self._objhash, self._writer, pid)
        self._descriptors: DescriptorDump | None = None
        self._standing: Standing | None = None
        self._generation = 0
        self._hierarchy: list[TaskPids] = []  # as it was written last
        self._rounds: list[Round] = []
        self._phases: list[Phase] = []
        self._instrumented = self._held = self._done = self._seized = False
        self._transients: Transients | None = None
        self._surveyed: set[tuple[int, int]] = set()  # processes, by pid and start time

    # ------------------------------------------------------------------ what others may know

    @property
    def phases(self) -> list[Phase]:
        return self._phases

    @property
    def pids(self) -> list[int]:
        return list(self.tree.processes)

    @property
    def cgroup(self) -> str:
        """Its path; before instrument() has made it, its name."""
        return self._adoption.path

    @property
    def origins(self) -> list[tuple[int, str]]:
        """(pid, directory of the cgroup) of the tasks that instrument() moves to ours, or has moved; the root first."""
        return self._adoption.origins(list(self.tree.processes))

    @property
    def _cgroup(self) -> Cgroup:
        assert self._adoption.cgroup is not None
        return self._adoption.cgroup

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._held and not self._done:
            if value is not None:
                text = value.message if isinstance(value, MigratorError) else f"{type(value).__name__}: {value}"
                self._writer.error(text)
            self.thaw()

    # ------------------------------------------------------------------ while the workload runs

    def survey(self) -> Survey:
        """Look at the tree without stopping it. Raises Refused with every obstacle; the workload runs on."""
        self.tree.refresh()
        survey, reasons = self._survey()
        end = time.monotonic() + 2 * _PASSING_SECONDS
        for attempt in itertools.count():  # a child that comes or goes meanwhile looks like somebody outside
            if not reasons or (attempt >= _SURVEYS and not (self._has_young() and time.monotonic() < end)):
                break
            time.sleep(0.015)
            self.tree.refresh()
            survey, again = self._survey()
            reasons = [reason for reason in reasons if reason in again]
        self._surveyed = {(process.pid, process.start_time) for process in self.tree.living}
        if reasons:
            raise Refused(reasons, hint="nothing was stopped; see `migrator check` for the same report")
        return survey

    def _has_young(self) -> bool:
        """Whether a process has begun just now: what cannot be carried may be passing."""
        since = (time.clock_gettime(time.CLOCK_BOOTTIME) - _PASSING_SECONDS) * os.sysconf("SC_CLK_TCK")
        return any(process.start_time > since for process in self.tree.living)

    def _survey(self) -> tuple[Survey, list[str]]:
        return survey_tree(self.tree, self.options, self._memory.shared.tmpfs, self._sysv, self._mqueues)

    def instrument(self, reader: str = "") -> None:
        """Write the header and the hierarchy and start tracking writes: each process stops for under 1 ms."""
        # Pipes and connections that are not as they were sent ahead are dropped again by this engine alone.
        self._predumped.with_pipes_and_connections = reader == "user"
        with self._phase("instrument"):
            self._adopt()
            self.tree.refresh()
            header.write(self._writer, self.pid, self.options)
            if self.options.container:
                self._writer.write(Container(1, self.options.container, self.options.container_spec))
            self._write_tree()
            for process in self.tree.living:
                self._instrument(process)
            self._instrumented = True
            self._writer.flush()

    def _instrument(self, process: Process) -> None:
        """One that was born since the survey may deny it, as one without descriptors does: most have gone by the
        freeze, which sends the whole memory of the others."""
        try:
            self._memory.instrument(process)
        except CheckpointFailed:
            if not self._surveyed or (process.pid, process.start_time) in self._surveyed:
                raise

    def round(self) -> Round:
        """Send what was written since the last round (everything, the first time). The workload runs on."""
        start = time.monotonic_ns()
        before = self._memory.sender.pages, self._memory.sender.zero_pages, self._writer.bytes
        number = len(self._rounds) + 1
        _, gone = self.tree.refresh()
        for process in gone:
            self._memory.forget(process)
        for process in self.tree.living:
            try:
                self._memory.look(process)
            except OSError:
                continue  # it has ended: the next round knows
            if process.pid not in self._memory.trackers:
                self._instrument(process)
        self._write_tree()
        self._writer.write(RoundMark(number, 0, time.time_ns()))
        for process in self.tree.living:
            if process.pid in self._memory.trackers:
                try:
                    self._memory.look(process)
                    self._memory.send(process)
                except (FileNotFoundError, ProcessLookupError):
                    continue
        self._memory.shared.send(self._writer, self._memory.sender, final=False)
        self._predump()
        self._writer.write(RoundMark(number, RoundFlag.END, time.time_ns()))
        self._writer.flush()
        end = time.monotonic_ns()
        pages = self._memory.sender.pages - before[0]
        previous = self._rounds[-1] if self._rounds else None
        rate = pages / max(1e-9, (start - previous.start) / 1e9) if previous is not None else 0.0
        made = Round(
            number,
            pages,
            self._memory.sender.zero_pages - before[1],
            self._writer.bytes - before[2],
            start,
            end,
            rate,
            work=count_work(self.tree.living),
        )
        self._rounds.append(made)
        return made

    def dirty_rate(self, seconds: float) -> float:
        """Bytes per second that the tree writes to its private memory, over `seconds`. Sends nothing."""
        self.instrument()
        self._memory.sweep()
        start = time.monotonic()
        time.sleep(seconds)
        return self._memory.sweep() * PAGE_SIZE / (time.monotonic() - start)

    # ------------------------------------------------------------------ stopped

    def seize(self) -> None:
        """Attach to every task, without stopping any: what can be done ahead of the freeze. They run on."""
        with self._phase("seize"):
            self.tree.seize()
            for process in self.tree.living:
                with contextlib.suppress(OSError):  # it has ended, which stop() will tell
                    self._meet(process)
                self._memory.ahead(process)
                for tid in process.threads:
                    self._restart_blocks.observe(process.pid, tid)
            self._tasks.look(self.tree.living)
            self._transients = Transients(self._owners())
            with contextlib.suppress(OSError):  # one has ended: freeze() will know
                make_room_for_descriptors(self._owners())
        self._seized = True

    def quiesce(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self._passing():
            if time.monotonic() > end:
                return False
            time.sleep(_PASSING_PAUSE)
        return self._settle(max(0.0, end - time.monotonic()))

    def _settle(self, seconds: float) -> bool:
        return self._transients is None or self._transients.settle(seconds)

    def _passing(self) -> str:
        """Why a process that was born since the survey cannot be carried; "" if there is none.

        Such a process mostly ends soon, as one that talks to a client before it is known who that is."""
        if not self._surveyed:
            return ""
        if not self.tree.stopped:
            self.tree.refresh()
        for process in self.tree.living:
            if (process.pid, process.start_time) not in self._surveyed:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                    state = {**procfs.status(process.pid), "TracerPid": "0"}  # that is us
                    for reason in survey_tasks.of_process(self.tree, process, state, None):
                        return reason
                    for reason in survey_tasks.of_born(self.tree, process):
                        return reason
        return ""

    def freeze(self) -> None:
        if not self._seized:
            self.seize()
        self._settle(_ACCEPT_SECONDS)
        gc.disable()  # nothing but the freeze makes so much garbage, and nothing so little time for it
        with self._phase("freeze"), _killed_is_failed():
            patience = _PASSING_SECONDS
            for pause in (*_RETRY_AFTER, None):
                self.tree.stop()
                passing = self._passing()
                waits = self._transients.waiting() if self._transients is not None else ""
                if not (passing or waits) or pause is None or (passing and patience <= 0):
                    break
                self.tree.detach()
                begun = time.monotonic()
                time.sleep(pause)
                if passing:
                    self.quiesce(patience)
                    patience -= time.monotonic() - begun
                else:
                    self._settle(_ACCEPT_SECONDS)
                self.tree.seize()
        if self._transients is not None:
            self._transients.close()
            self._transients = None
        if passing:
            raise CheckpointFailed(passing, hint=SINCE)
        if waits:
            raise CheckpointFailed(waits, hint="try again: a moment later the program will have taken it")

    def final(self, silence: Callable[[], None] | None = None) -> None:
        """Write the last dirty pages, the state of all tasks and the trailer. The tasks stay stopped."""
        if not self._instrumented:
            raise CheckpointFailed("final() before instrument()")
        with _killed_is_failed():
            self._final(silence)

    def _final(self, silence: Callable[[], None] | None) -> None:
        living = self.tree.living
        locks = begin_descriptors(self._owners())
        with self._phase("memory"):  # first: it is sent while the parasite runs
            states = {}
            for process in living:
                self._restart_blocks.confirm(process.pid, process.threads)
                self._memory.look(process)
                self._memory.prepare(process)
                states[process.pid] = procfs.status(process.pid)
            for process in living:
                self._meet(process, states[process.pid])
            self._write_tree(states)
            self._restart_blocks.stopped()
            self._writer.write(RoundMark(len(self._rounds) + 1, RoundFlag.LAST, time.time_ns()))
            for process in living:
                self._memory.send(process, final=True)
        with self._phase("parasite"):
            others = {}
            timers = {process.pid: list_timers(process) for process in living}
            replies = ask_all(living, timers)
            for process in living:
                pid, leader, parasite = process.pid, process.leader, process.parasite
                assert parasite is not None
                others[pid] = parasite.threads([t for t in process.threads.values() if t is not leader])
                told = (replies[pid].leader, *others[pid])
                for thread, reply in zip(process.threads.values(), told, strict=True):
                    if reply.denied:
                        self._refuse_restricted(process, thread)
                if any(reply.seccomp for reply in told):
                    raise CheckpointFailed(f"pid {pid} ({states[pid]['Name']}) {UNDER_SECCOMP}", hint=SINCE)
                if label := other_label(pid):
                    raise CheckpointFailed(f"pid {pid} ({states[pid]['Name']}) {CONFINED.format(label)}", hint=SINCE)
                if any(reply.numa for reply in told):
                    raise CheckpointFailed(f"pid {pid} ({states[pid]['Name']}) {NUMA_POLICY}", hint=SINCE)
                refuse_asked(process, states[pid], replies[pid], told)
                self._memory.layout.end(pid, process.vpid, process.mm_objref, replies[pid].brk)
            self._bystanders.close()
        if silence is not None:
            silence()
        with self._phase("descriptors"):
            self._descriptors = DescriptorDump(
                self._owners(),
                self._objhash,
                self._writer,
                still=self._still,
                predumped=self._predumped,
                shared=self._memory.shared.objects,
                flags=self._descriptor_flags,
                locks=locks,
                standing=self._standing,
                own_netns=bool(self.options.container),
            )
            self._descriptors.collect()
            for memfd in self._descriptors.memfds:
                self._memory.shared.of_descriptor((memfd.dev, memfd.ino), memfd.fd, memfd.name, memfd.seals)
            self._memory.shared.send(self._writer, self._memory.sender, final=True)
            if self._mqueues is not None:
                self._mqueues.save(self._writer, self._objhash, self._descriptors.queues)
            tables = self._descriptors.write()
        with self._phase("tasks"):
            self._tasks.look(living)
            for process in self.tree.processes.values():
                pid = process.pid
                if process.zombie:
                    self._tasks.write_zombie(process)
                else:
                    thread_replies = [replies[pid].leader, *others[pid]]
                    self._tasks.write(process, states[pid], replies[pid], timers[pid], thread_replies, tables[pid])
            self._writer.trailer()

    def _meet(self, process: Process, state: dict[str, str] | None = None) -> None:
        """Have a process, with all its threads, asked for Landlock when it is asked next."""
        if process.parasite is not None:
            process.parasite.meet(self._bystanders.pid_for(state or procfs.status(process.pid)))

    def _refuse_restricted(self, process: Process, thread: Thread) -> None:
        """A stopped thread could not look at the bystander of its process: ask it with one of its own, as it may have
        other ids, or have got them since."""
        assert process.parasite is not None
        state = procfs.status(process.pid, thread.tid)
        process.parasite.meet(self._bystanders.pid_for(state))
        (reply,) = process.parasite.threads([thread])
        if reply.denied:
            which = f": its thread {thread.tid}" if thread.tid != process.pid else ""
            label = other_label(thread.tid)  # that may deny it the look, too
            why = CONFINED.format(label) if label else RESTRICTED
            raise CheckpointFailed(
                f"pid {process.pid} ({state['Name']}){which} {why}",
                hint="the workload runs on; start it without that, if it can be told to",
            )

    @contextmanager
    def _still(self) -> Iterator[None]:
        """Inside, the tasks stay where they are even if this program is killed: no call can be made in them."""
        self._cgroup.freeze(wait=False)
        try:
            yield
        finally:
            self._cgroup.thaw()

    def hold(self) -> None:
        """Freeze the tasks by their cgroup and let go of them: they stay frozen if this program dies."""
        with self._phase("hold"):
            self._cgroup.freeze(wait=False)
            self.tree.detach()
            self._held = True
        gc.enable()

    def leave_stopped(self) -> None:
        """Held, the tasks are left stopped, as by SIGSTOP; SIGCONT lets them run on."""
        for process in self.tree.living:  # none runs on before it stops: the signal waits in the frozen
            os.kill(process.pid, signal.SIGSTOP)
        self.thaw()

    def release(self) -> None:
        """Kill the frozen copy: the destination's runs. Its sockets end without a word."""
        if self._descriptors is not None:
            self._descriptors.release()
        pidfds = [p.pidfd for p in self.tree.living]
        self._cgroup.kill()
        if not self._held:
            self.tree.detach()
        _await_end(pidfds)
        self._reap()
        self._done = True
        self._close()
        self._adoption.remove()

    def thaw(self) -> None:
        """Let the workload run on, as if nothing had been asked. Can be called at any time, twice too."""
        if self._done:
            return
        self._done = True
        gc.enable()
        if self._descriptors is not None:
            self._descriptors.undo()
        if self._held:
            self._cgroup.thaw()
        else:
            if self.tree.stopped:
                self._memory.instruments.remove_stopped(self.tree.living)
                self.tree.detach()
            elif self._instrumented:
                self.tree.detach()
        self._memory.instruments.remove_running(self.tree.living)
        self._close()
        self._adoption.move_back()

    # ------------------------------------------------------------------ inside

    def _list_pids(self) -> list[int]:
        whole = self._instrumented or not self._adoption.own
        below = self._adoption.pids() if whole else procfs.descendants(self.pid)
        if os.getpid() in below:
            raise CheckpointFailed(
                f"pid {self.pid} is an ancestor of this very program",
                hint="run migrator from another session",
            )
        return below

    def _adopt(self) -> None:
        self._adoption.adopt()

    def _owners(self) -> list[DescriptorOwner]:
        return [DescriptorOwner(p.pid, p.vpid, p.pidfd) for p in self.tree.living]

    def _descriptor_flags(self, owner: DescriptorOwner, numbers: Sequence[int]) -> list[int]:
        process = self.tree.processes[owner.pid]
        assert process.parasite is not None
        return process.parasite.descriptor_flags(process.leader, numbers)

    def _write_tree(self, states: dict[int, dict[str, str]] | None = None) -> None:
        """Write the hierarchy, if it is not what was written last."""
        tree = hierarchy(self.tree, self._generation + 1, states or {})
        if tree.tasks != self._hierarchy:
            self._generation += 1
            self._hierarchy = tree.tasks
            self._writer.write(tree)
            self._tasks.keep({task.pid for task in tree.tasks if not task.flags & TaskFlag.ZOMBIE})

    def _predump(self) -> None:
        """Write the state of tasks that are new, as far as it can be known while they run."""
        known = {task.pid for task in self._hierarchy if not task.flags & TaskFlag.ZOMBIE}
        before = self._predumped.looks
        for process in self.tree.living:
            if process.vpid in known and process.pid in self._memory.trackers:
                try:
                    self._predump_process(process, known)
                except OSError:
                    continue  # it has ended, or does not stop: final() writes all of it
        self._bystanders.close()
        if self._predumped.looks > before:
            self._standing = self._predumped.standing(self._owners())

    def _predump_process(self, process: Process, known: set[int]) -> None:
        pid, parasite = process.pid, process.parasite
        new = [tid for tid in procfs.tids(pid) if tid not in process.predumped]
        owner = DescriptorOwner(pid, process.vpid, process.pidfd)
        if process.predumped and not new and self._predumped.has_grown(owner):
            self._predumped.predump(owner)
        if not new or parasite is None or not self._memory.layout.written(process.mm_objref):
            return  # what was mapped when it was looked at was not any more: the next round has it
        table = self._predumped.predump(owner)
        self._meet(process)
        with self._memory.instruments.stopped(process, pid) as leader:
            assert leader.regs is not None
            reply = parasite.process(leader.regs, leader.mask, (), leader.xstate)
            if reply.leader.denied:
                self._refuse_restricted(process, leader)
        threads = [(leader, reply.leader)]
        for tid in new:
            if tid != pid and procfs.stat(pid, tid)[3] != "D":
                with self._memory.instruments.stopped(process, tid) as thread:
                    (thread_reply,) = parasite.threads([thread])
                    if thread_reply.denied:
                        self._refuse_restricted(process, thread)
                if thread.vtid in known:
                    threads.append((thread, thread_reply))
        state = procfs.status(pid)
        if not self._surveyed or (pid, process.start_time) in self._surveyed:  # a new one may end before it matters
            refuse_asked(process, state, reply, [reply for _, reply in threads])
        self._tasks.predump(process, state, reply, threads, table)
        process.predumped.update(new)

    def _reap(self) -> None:
        for pid in self.tree.processes:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue

    def _close(self) -> None:
        self._bystanders.close()
        if self._transients is not None:
            self._transients.close()
            self._transients = None
        self.tree.close()
        self._memory.close()
        self._adoption.close()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start, size, pages = time.monotonic_ns(), self._writer.bytes, self._memory.sender.pages
        try:
            yield
        finally:
            self._phases.append(
                Phase(name, start, time.monotonic_ns(), self._writer.bytes - size, self._memory.sender.pages - pages)
            )


def _await_end(pidfds: list[int]) -> None:
    for fd in pidfds:
        if fd >= 0:
            pidfd.ends(fd, 5.0)


@contextmanager
def _killed_is_failed() -> Iterator[None]:
    """A stopped task can still be killed: what is asked of it then fails as of one that never was."""
    try:
        yield
    except (ProcessLookupError, FileNotFoundError, ChildProcessError, RemoteError) as error:
        raise CheckpointFailed(f"a task ended while it was stopped: {error}") from error
