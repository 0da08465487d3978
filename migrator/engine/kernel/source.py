"""The source side of the kernel engine: checkpoint() saves the tree, which a cgroup holds frozen for it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from migrator.engine.adoption import Adoption
from migrator.engine.base import Phase, Round, SourceOptions, Survey
from migrator.engine.kernel import calls, survey
from migrator.engine.kernel.passage import Passage
from migrator.engine.phases import Phases
from migrator.engine.spawn import spawn
from migrator.engine.stream import RecordWriter
from migrator.errors import CheckpointFailed, MigratorError, Refused
from migrator.image.records import PAGE_SIZE, Container
from migrator.linux import pidfd, procfs, repair, sys
from migrator.linux import x86_64 as arch
from migrator.linux.cgroup import Cgroup, CgroupError

_SURVEYS = 4
_PAUSE = 0.0005
_RETRY_AFTER = (0.0005, 0.002, 0.005, 0.01, 0.02)  # seconds to run before the next attempt to find it quiet
_AGAIN_AFTER = 0.015  # seconds: what was on its way has been taken by then
_CHUNK = 1 << 20


class KernelSource:
    """Saves the tree below `pid` to the stream `fd`: in one go, or round by round and then the rest."""

    def __init__(self, pid: int, fd: int, options: SourceOptions) -> None:
        self.pid = pid
        self.options = options
        self._fd = fd
        self._adoption = Adoption(pid, options)
        self._phases = Phases()
        self._pids = procfs.descendants(pid)
        self._apart: set[int] = set()
        self._prepared = self._frozen = self._muted = self._held = self._done = self._ended = False
        # The kernel keeps what rounds have begun with the thread that called it, and drops it with that thread.
        self._thread: ThreadPoolExecutor | None = None
        self._passage = self._new_passage()
        self._rounds: list[Round] = []

    @property
    def phases(self) -> list[Phase]:
        return self._phases

    @property
    def pids(self) -> list[int]:
        return list(self._pids)

    @property
    def cgroup(self) -> str:
        return self._adoption.path

    @property
    def origins(self) -> list[tuple[int, str]]:
        return self._adoption.origins(self._pids)

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
            if value is not None and not self._ended:
                text = value.message if isinstance(value, MigratorError) else f"{type(value).__name__}: {value}"
                RecordWriter(self._fd).error(text)
            self.thaw()

    # ------------------------------------------------------------------ while the workload runs

    def survey(self) -> Survey:
        """Look at the tree, and have the kernel save it to nowhere, which tells what it would refuse: its memory while
        it runs, and the rest frozen. Raises Refused; the workload runs on."""
        self._pids = self._list_pids()
        reasons = list(survey.obstacles(self.pid, self._pids, self.options))
        if not reasons and not self.options.surveyed:
            reasons = self._rehearse()
        if reasons:
            raise Refused(reasons, hint="the workload runs on; another engine may carry it: --engine user")
        found = survey.look(self.pid, self._pids)
        if not found.threads:
            raise Refused([f"pid {self.pid} has ended"])
        return found

    def _rehearse(self) -> list[str]:
        """What checkpoint() says, if anything. A program that waits for us thaws the tasks if we are killed."""
        for attempt in range(_SURVEYS):
            adoption = Adoption(self.pid, self.options)
            try:
                group = adoption.adopt()
                self._save_to_nowhere(calls.ROUND)
                with _guarded(group):
                    group.freeze()
                    if waits := self._borrowed(adoption.pids()):
                        raise calls.NotNow(waits)
                    self._save_to_nowhere(calls.LAST)
                return []
            except CgroupError as error:
                return [error.message]
            except CheckpointFailed as error:
                # What is on its way is taken in a moment, and much that is not carried is there for a moment only.
                if attempt == _SURVEYS - 1:
                    return [error.message]
            finally:
                if adoption.cgroup is not None:
                    self._thaw(adoption.cgroup)
                adoption.move_back()
                adoption.close()
                self._drop()
            time.sleep(_AGAIN_AFTER)
        return []

    @property
    def _flags(self) -> int:
        # of a whole container the kernel looks for what it shares with the outside
        return calls.SUBTREE if self.options.subtree and not self.options.container else 0

    def instrument(self, reader: str = "") -> None:
        """Put the tree into the cgroup that will hold it. Nothing is written: the kernel begins with the header, in the
        first round."""
        with self._phases.step("instrument"):
            self._adoption.adopt()
            self._prepared = True

    def round(self) -> Round:
        """Have the kernel write what has changed since the last round. No task is stopped for it."""
        start = time.monotonic_ns()
        passed, absent = self._passage.bytes, self._passage.absent
        pages = self._save_through(self._pass_on, self._flags | calls.ROUND)
        previous = self._rounds[-1] if self._rounds else None
        self._pids = self._list_pids()
        made = Round(
            len(self._rounds) + 1,
            pages,
            self._passage.absent - absent,
            self._passage.bytes - passed,
            start,
            time.monotonic_ns(),
            pages * 1e9 / max(start - previous.start, 1) if previous is not None else 0.0,
            work=survey.count(self._pids),
        )
        self._rounds.append(made)
        return made

    def dirty_rate(self, seconds: float) -> float:
        """Bytes per second that the tree writes to its private memory, over `seconds`. Nothing is written."""
        with open(os.devnull, "wb", buffering=0) as nowhere:

            def sweep() -> int:
                return self._call(nowhere.fileno(), self._flags | calls.ROUND).result()

            try:
                sweep()
                start = time.monotonic()
                time.sleep(seconds)
                return sweep() * PAGE_SIZE / (time.monotonic() - start)
            finally:
                self._drop()

    def seize(self) -> None:
        """Nothing to attach to."""

    def quiesce(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self._waits():
            if time.monotonic() > end:
                return False
            time.sleep(_PAUSE)
        return True

    # ------------------------------------------------------------------ stopped

    def freeze(self) -> None:
        if not self._prepared:
            self.instrument()
        with self._phases.step("freeze"):
            self._frozen = True
            for pause in _RETRY_AFTER:
                self._stop()
                waits = self._waits()
                if not waits:
                    return
                self._thaw(self._cgroup)
                time.sleep(pause)
            raise calls.NotNow(waits, hint="try again: a moment later the program will have taken it")

    def _stop(self) -> None:
        try:
            self._cgroup.freeze()
        except CgroupError as error:
            raise CheckpointFailed(error.message, hint=error.hint) from error
        if self._cgroup.has_nested:
            self._pids = self._list_pids()
            return
        # All that live are in it: one file is read in the place of one for each thread. A zombie that is new is in no
        # list, and one that is gone in none any more, as another process may have its pid.
        living = self._cgroup.pids()
        inside, known = set(living), set(self._pids)
        self._pids = [pid for pid in self._pids if pid in inside or _is_child(pid, known)]
        self._pids += [pid for pid in living if pid not in known]

    def final(self, silence: Callable[[], None] | None = None) -> None:
        """Have the kernel write all of it. The tasks stay frozen."""
        if not self._frozen:
            raise CheckpointFailed("final() before freeze()")
        if silence is not None:
            silence()
        flags = self._flags | (calls.LAST if self._rounds else 0)
        flags |= calls.CHECKSUMS if self.options.checksums else 0
        with self._phases.step("checkpoint"):
            if self.options.container:
                self._save_through(self._pass_on, flags)
            else:
                self._ended = True  # also where it fails: it writes the cause itself
                self._call(self._fd, flags).result()

    def _new_passage(self) -> Passage:
        """The kernel knows nothing of what stands around a container: its record is put in on the way."""
        options = self.options
        record = Container(1, options.container, options.container_spec).encode() if options.container else b""
        return Passage(insert=record)

    def _pass_on(self, fd: int) -> bool:
        data = os.read(fd, _CHUNK)
        for part in self._passage.feed(data):
            _write(self._fd, part)
        self._ended = self._passage.done
        return bool(data)

    def _save_to_nowhere(self, flags: int) -> None:
        with open(os.devnull, "wb", buffering=0) as nowhere:
            self._call(nowhere.fileno(), self._flags | flags).result()

    def _save_through(self, take: Callable[[int], bool], flags: int) -> int:
        """Have the kernel write into a pipe; `take` gets its other end, until it says that there is no more. What the
        call has returned."""
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # a limit of pipe-user-pages: slower
            fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, _CHUNK)
        saving = self._call(write_fd, flags, close=True)
        try:
            while take(read_fd):
                pass
        finally:
            os.close(read_fd)  # before we wait: it may be writing
        return saving.result()

    def _call(self, fd: int, flags: int, *, close: bool = False) -> Future[int]:
        """checkpoint() on the one thread that makes these calls; `fd` is closed after it if so asked."""

        def save() -> int:
            try:
                return calls.checkpoint(self.pid, fd, flags)
            finally:
                if close:
                    os.close(fd)

        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        return self._thread.submit(save)

    def _drop(self) -> None:
        """End the thread, and with it what the kernel keeps of the rounds."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def hold(self) -> None:
        """They are frozen by their cgroup already. Their connections get silent, as whoever ends the tasks from here
        on may not be us."""
        with self._phases.step("hold"):
            self._muted = True  # some of them, where it fails
            calls.mute(self.pid, self._flags)
            self._held = True

    def leave_stopped(self) -> None:
        for pid in self._pids:  # none runs on before it stops: the signal waits in the frozen
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        self.thaw()

    def release(self) -> None:
        """Kill the frozen copy: the destination's runs. Its connections end without a word."""
        fds = []
        for pid in self._pids:
            with contextlib.suppress(OSError):
                fds.append(os.pidfd_open(pid))
        self._cgroup.kill()
        for fd in fds:
            pidfd.ends(fd, 5.0)
            os.close(fd)
        for pid in self._pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        self._done = True
        self._drop()
        self._adoption.remove()
        self._adoption.close()

    def thaw(self) -> None:
        """Let the workload run on, as if nothing had been asked. Can be called at any time, twice too."""
        if self._done:
            return
        self._done = True
        self._drop()
        if self._frozen:
            if self._muted:
                repair.revive(self._pids)
            self._thaw(self._cgroup)
        self._adoption.move_back()
        self._adoption.close()

    # ------------------------------------------------------------------ inside

    def _thaw(self, group: Cgroup) -> None:
        """Whoever was frozen and not saved would learn of it by EINTR."""
        calls.forget_stop(self.pid, self._flags)
        group.thaw()

    def _waits(self) -> str:
        """What will not be so in a moment, in words; "" for nothing."""
        return survey.waiting(self.pid, self._pids) or self._borrowed(self._pids)

    def _borrowed(self, pids: Sequence[int]) -> str:
        """Who has its parent's memory, as between vfork(2) and execve(2). Whoever was seen without never has it again,
        so that in the freeze only those born since then are looked at."""
        for pid in pids:
            if pid in self._apart:
                continue
            try:
                parent = int(procfs.stat(pid)[4])
                if parent in pids and sys.same(pid, parent, sys.KCMP_VM):
                    return f"pid {pid} shares its memory with pid {parent} (vfork in progress?)"
            except (FileNotFoundError, ProcessLookupError):
                continue
            self._apart.add(pid)
        return ""

    def _list_pids(self) -> list[int]:
        pids = self._adoption.pids() if self._prepared or not self._adoption.own else procfs.descendants(self.pid)
        if os.getpid() in pids:
            raise CheckpointFailed(
                f"this very program is below pid {self.pid}, and the kernel engine cannot leave it out",
                hint="run migrator from another session, or with --engine user",
            )
        return pids


def _is_child(pid: int, of: Collection[int]) -> bool:
    try:
        return int(procfs.stat(pid)[4]) in of
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def _guarded(group: Cgroup) -> Iterator[None]:
    """Inside, another process waits for our end, and thaws the cgroup then."""
    waits, ours = os.pipe2(os.O_CLOEXEC)
    try:
        fd, text = group.release
        pid, guard = spawn([], code=arch.guard_code(waits, fd, text), keep=(waits, fd))
        try:
            yield
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(guard)
    finally:
        os.close(waits)
        os.close(ours)


def _write(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
