"""eventfd, timerfd, signalfd and pidfd: saved from fdinfo, made anew."""

from __future__ import annotations

import fcntl
import os
import struct
import time

from migrator.engine.user.descriptors import fdinfo
from migrator.engine.user.descriptors.description import Description
from migrator.errors import ImageError, RestartFailed
from migrator.image.records_files import EventFd, SignalFd, TimerFd
from migrator.linux import descriptors

_ABSTIME = 1  # TFD_TIMER_ABSTIME
_CANCEL_ON_SET = 2
_MAX_NS = (1 << 63) - 1
_CLOCKS = {0: "CLOCK_REALTIME", 1: "CLOCK_MONOTONIC", 7: "CLOCK_BOOTTIME", 8: "CLOCK_REALTIME_ALARM", 9: ""}
_REALTIME = {0, 8}


def save_eventfd(objref: int, description: Description) -> EventFd:
    fields = description.info.fields
    return EventFd(objref, int(fields["eventfd-semaphore"]), int(fields["eventfd-count"], 16))


def save_timerfd(objref: int, description: Description) -> TimerFd:
    # Parasite lets an expired periodic timer go on, as a read would: only then are its ticks whole.
    remaining, interval = descriptors.timerfd_gettime(description.fd)
    process, number = description.holders[0]
    fields = fdinfo.read(process.pid, number).fields
    flags = int(fields["settime flags"], 8)
    clock = int(fields["clockid"])
    if remaining and flags & _ABSTIME and clock in _REALTIME:
        remaining += time.clock_gettime_ns(time.CLOCK_REALTIME)
    return TimerFd(objref, clock, flags, 0, int(fields["ticks"]), remaining, interval)


def save_signalfd(objref: int, description: Description) -> SignalFd:
    return SignalFd(objref, 0, int(description.info.fields["sigmask"], 16))


def make_eventfd(rec: EventFd) -> int:
    if rec.semaphore > 1 or rec.count == (1 << 64) - 1:
        raise ImageError(f"eventfd {rec.objref}: impossible count or kind")
    fd = os.eventfd(0, os.EFD_CLOEXEC | (os.EFD_SEMAPHORE if rec.semaphore else 0))
    if rec.count:
        os.write(fd, struct.pack("<Q", rec.count))
    return fd


def make_timerfd(rec: TimerFd) -> int:
    """The timer runs from this moment: it is set again by start_timerfd()."""
    if rec.clock not in _CLOCKS or rec.flags & ~(_ABSTIME | _CANCEL_ON_SET):
        raise ImageError(f"timerfd {rec.objref}: unknown clock {rec.clock} or flags {rec.flags:#x}")
    if rec.value > _MAX_NS or rec.interval > _MAX_NS:
        raise ImageError(f"timerfd {rec.objref}: impossible time")
    try:
        return descriptors.timerfd_create(rec.clock)
    except OSError as error:
        raise RestartFailed(f"timerfd {rec.objref}: {error}") from error


def start_timerfd(fd: int, rec: TimerFd) -> None:
    """Let the timer run on for what remained of it, with the expirations that were not read yet."""
    if rec.value or rec.interval:
        flags = rec.flags if rec.flags & _ABSTIME and rec.clock in _REALTIME else 0
        # expired and periodic: what remains is nothing, but 0 would disarm it
        descriptors.timerfd_settime(fd, flags, rec.value or (1 if rec.ticks else 0), rec.interval)
    if rec.ticks:
        fcntl.ioctl(fd, descriptors.TFD_IOC_SET_TICKS, struct.pack("<Q", rec.ticks))


def make_pidfd_of_gone(flags: int = 0) -> int:
    """A pidfd of a process that has ended and was waited for: a child of ours."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    try:
        return os.pidfd_open(pid, flags)
    finally:
        os.waitpid(pid, 0)


def make_signalfd(rec: SignalFd) -> int:
    return descriptors.signalfd(rec.mask)
