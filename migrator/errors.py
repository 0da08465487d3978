"""Every error answers one question: where is the workload now?"""

from __future__ import annotations

from enum import Enum


class Fate(Enum):
    """Where the workload is once the error has been handled. Always known, always reported."""

    SOURCE = "running on the source, as if nothing had been asked"
    DESTINATION = "running on the destination; the source copy is gone"
    FROZEN = "stopped on the source; an operator must choose"
    ENDED = "over: its root process ended by itself, and no copy of it was started"
    UNTOUCHED = "not touched"


class MigratorError(Exception):
    """Base of all errors shown to the user.

    `hint` says what to do about it; `exit_code` is what a command line exits with.
    """

    exit_code = 1
    fate = Fate.UNTOUCHED

    def __init__(self, message: str, *, hint: str = "", fate: Fate | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if fate is not None:
            self.fate = fate


class UsageError(MigratorError):
    """What was asked makes no sense (no such pid, no such file, contradicting options)."""

    exit_code = 2


class Refused(MigratorError):
    """The workload cannot be carried. Raised before anything is stopped for good.

    `reasons` has one sentence per obstacle, each naming the pid, the object and the reason.
    """

    exit_code = 3

    def __init__(self, reasons: list[str], *, hint: str = "", fate: Fate | None = None) -> None:
        super().__init__("; ".join(reasons), hint=hint, fate=fate)
        self.reasons = reasons


class CheckpointFailed(MigratorError):
    """Saving failed half way; the workload runs on where it was."""

    exit_code = 4
    fate = Fate.SOURCE


class WorkloadEnded(CheckpointFailed):
    """The root process ended by itself, or was killed by somebody, before a copy was decided on: there is none."""

    fate = Fate.ENDED

    def __init__(self, pid: int) -> None:
        super().__init__(
            f"pid {pid} ended by itself, or was killed, while it was being saved",
            hint="see its log, and start it again",
        )


class RestartFailed(MigratorError):
    """Building the copy failed; what had been built is gone."""

    exit_code = 5


class ImageError(MigratorError):
    """The stream is broken, hostile, truncated, or of an unknown revision."""

    exit_code = 6


class TransportError(MigratorError):
    """The peer cannot be reached, is not who it should be, or went away."""

    exit_code = 7


class ReaderGone(TransportError):
    """Whoever reads a stream on this host closed it. The link is as it was; the cause is with the reader."""


class MigrationAborted(MigratorError):
    """A migration ended before COMMIT; the workload runs on the source."""

    exit_code = 8
    fate = Fate.SOURCE


class Overrun(MigrationAborted):
    """It stood still for longer than was allowed and was thawed before COMMIT; the workload runs on the source."""


class Undecided(MigratorError):
    """COMMIT was sent and the answer is not known: the source copy stays frozen until it is."""

    exit_code = 9
    fate = Fate.FROZEN
