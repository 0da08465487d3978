"""Starting a container, waiting for it, ending it.

The command itself is process 1 of the container: there is no init of ours around it, so nothing of ours
has to be moved with it. It pays for that with what the kernel asks of every process 1
(pid_namespaces(7)): signals from inside without a handler are ignored, and orphans are its children. A
command that needs an init brings its own (`migrator run … -- tini -- CMD`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import time
from dataclasses import replace
from typing import NoReturn

from migrator.container import state
from migrator.container.sandbox import Sandbox, prepare, take_down
from migrator.container.spec import DEFAULT_ENV, ContainerSpec
from migrator.container.state import Container
from migrator.errors import MigratorError, UsageError
from migrator.linux import keyrings, pidfd, procfs, sys
from migrator.linux import namespaces as ns
from migrator.linux.x86_64 import NR

BEFORE = ns.CLONE_NEWNS | ns.CLONE_NEWIPC | ns.CLONE_NEWUTS | ns.CLONE_NEWNET


class StartFailed(MigratorError):
    """The command could not be started; nothing of the container is left."""

    exit_code = 127


def run(spec: ContainerSpec) -> Container:
    """Start the command of `spec` as a container and return once it has been executed.

    It is a child of the caller, which collects its exit status with `wait()`; should the caller go away,
    the container lives on. Raises UsageError, SandboxError or StartFailed; nothing is left behind then.
    """
    if not spec.argv:
        raise UsageError(f"container {spec.name}: no command to run")
    spec = replace(spec, log=spec.effective_log)
    there = state.find(spec.name)
    if there is not None and there.alive:
        raise UsageError(
            f"a container {spec.name!r} already lives on this host (pid {there.init_pid})",
            hint=f"choose another name, or end it: migrator stop {spec.name}",
        )
    go_read, go_write = os.pipe2(os.O_CLOEXEC)
    report_read, report_write = os.pipe2(os.O_CLOEXEC)
    try:
        pid = _fork_into_pid_namespace()
        if pid == 0:
            os.close(go_write)
            _become(spec, go_read, report_write)
        os.close(report_write)
        report_write = -1
        try:
            return _oversee(spec, pid, go_write, report_read)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            raise
    finally:
        for fd in (go_read, go_write, report_read, report_write):
            if fd >= 0:
                os.close(fd)


def _oversee(spec: ContainerSpec, pid: int, go: int, report: int) -> Container:
    """The parent's part: once the child has its namespaces, build the sandbox, and let it go."""
    if (said := os.read(report, 4096)) != b"ready\n":
        raise StartFailed(f"container {spec.name}: {said.decode(errors='replace') or 'died early'}")
    with prepare(spec, pid) as sandbox:
        os.write(go, b"go")
        # The descriptor closes when the command is executed; text before that is why it was not.
        if failure := os.read(report, 4096):
            raise StartFailed(
                f"container {spec.name}: {failure.decode(errors='replace')}",
                hint="both are looked up inside the container, the command in its PATH",
            )
        return _opened(sandbox)


def _opened(sandbox: Sandbox) -> Container:
    sandbox.open_port()
    container = sandbox.settled()
    sandbox.cgroup.close()
    return container


def _fork_into_pid_namespace() -> int:
    """fork(2) with the child as process 1 of a new pid namespace. The caller stays where it is."""
    home = os.open("/proc/thread-self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        ns.unshare(ns.CLONE_NEWPID)  # for children born from now on, of this thread only
        try:
            pid = os.fork()
        except BaseException:
            ns.setns(home, ns.CLONE_NEWPID)
            raise
        if pid:
            ns.setns(home, ns.CLONE_NEWPID)
        return pid
    finally:
        os.close(home)


def _become(spec: ContainerSpec, go: int, report: int) -> NoReturn:
    """The child's part, up to the execution of the command."""
    try:
        ns.unshare(BEFORE)
        os.setsid()
        keyrings.leave_session()
        os.write(report, b"ready\n")
        if os.read(go, 2) != b"go":
            os._exit(1)  # the parent has died or given up
        # Only now that it is in its cgroup: that becomes the root which it sees.
        ns.unshare(ns.CLONE_NEWCGROUP)
        try:
            os.chdir(spec.cwd)
        except OSError as error:
            raise UsageError(f"working directory {spec.cwd}: {error.strerror}") from None
        os.umask(0o022)
        report = _wire(spec, report)
        _reset_signals()
        env = {**DEFAULT_ENV, **spec.env}
        os.environ["PATH"] = env["PATH"]
        os.execvpe(spec.argv[0], list(spec.argv), env)
    except BaseException as error:
        why = f"{spec.argv[0]}: {error.strerror}" if isinstance(error, OSError) else str(error)
        with contextlib.suppress(OSError):
            os.write(report, why.encode(errors="replace"))
    os._exit(127)


def _wire(spec: ContainerSpec, keep: int) -> int:
    """Descriptors 0 to 2, and no other: nothing inherited may tie the container to this host. Returns the
    new number of `keep`, which is closed by execve(2)."""
    null = os.open("/dev/null", os.O_RDONLY)
    log = os.open(spec.effective_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    saved = fcntl.fcntl(keep, fcntl.F_DUPFD_CLOEXEC, 10)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, saved)
    os.closerange(saved + 1, os.sysconf("SC_OPEN_MAX"))
    return saved


def _reset_signals() -> None:
    """Ignoring is inherited through execve(2): Python ignores some signals, a shell others for its background."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    default = ctypes.create_string_buffer(32)  # struct sigaction of the kernel, all zero
    for internal in (32, 33):  # the C library's own two, which it lets nobody touch
        sys.call(NR["rt_sigaction"], internal, ctypes.addressof(default), 0, 8, name="rt_sigaction")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def wait(container: Container, *, timeout: float | None = None) -> int | None:
    """Wait for the end of a container; its exit status as a shell counts (128 + signal), None if the time
    is up or if it is not a child of ours, so that nobody tells its status."""
    try:
        fd = os.pidfd_open(container.init_pid)
    except ProcessLookupError:
        return None
    try:
        if not container.alive and not _is_zombie(container):
            return None  # the pid is somebody else's by now
        if not pidfd.ends(fd, timeout):
            return None
        result = os.waitid(os.P_PIDFD, fd, os.WEXITED)
    except ChildProcessError:
        return None
    finally:
        os.close(fd)
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status


def _is_zombie(container: Container) -> bool:
    try:
        fields = procfs.stat(container.init_pid)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(fields[22]) == container.start_time


def stop(name: str, *, timeout: float = 10.0) -> None:
    """End a container: SIGTERM to its process 1, and after `timeout` seconds SIGKILL to all of it.

    The kernel withholds SIGTERM from a process 1 that has no handler for it; then it is killed at once.
    """
    container = state.get(name)
    if container.alive and _handles(container.init_pid, signal.SIGTERM):
        fd = os.pidfd_open(container.init_pid)
        try:
            if container.alive:
                signal.pidfd_send_signal(fd, signal.SIGTERM)
                pidfd.ends(fd, timeout)
        finally:
            os.close(fd)
    take_down(container)


def _handles(pid: int, number: int) -> bool:
    return bool(int(procfs.status(pid).get("SigCgt", "0"), 16) >> (number - 1) & 1)


def remove(name: str) -> None:
    """Remove a container that has exited and what was set up for it. UsageError if it lives."""
    container = state.get(name)
    if container.alive:
        raise UsageError(f"container {name!r} is running", hint=f"migrator stop {name}")
    take_down(container)


def follow(container: Container, out: int = 1) -> int | None:
    """Copy the container's log from its beginning to descriptor `out` until it exits; as `wait()`."""
    path = f"/proc/{container.init_pid}/root{container.spec.effective_log}"
    with open(path, "rb", buffering=0) as log:
        while True:
            alive = container.alive
            while data := log.read(65536):
                os.write(out, data)
            if not alive:
                return wait(container, timeout=0)
            time.sleep(0.05)
