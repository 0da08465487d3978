"""How long each part of a migration may take, as its source sees it."""

from __future__ import annotations

from collections.abc import Callable

from migrator.errors import MigrationAborted, Overrun, TransportError
from migrator.protocol.states import SourceAction, SourceEvent, SourceState
from migrator.session.driver import Driver
from migrator.session.prediction import latest
from migrator.session.settings import SourceSettings
from migrator.text import duration

ROUND_GRACE = 5.0  # seconds after the timeout, for the round that is under way
_SOON = 0.0005  # seconds
ANSWER_SECONDS = 5.0  # after COMMIT, until the destination is asked over a new link
_STANDING = (SourceState.SAVING, SourceState.SAVING_READY, SourceState.SAVED)  # from the freeze to COMMIT


class Deadlines:
    """Each is begun by a call and becomes an event, unless the session has gone on by then."""

    def __init__(
        self,
        settings: SourceSettings,
        driver: Driver[SourceState, SourceEvent, SourceAction],
        stood: Callable[[], float],
    ) -> None:
        """`stood`: seconds since the workload was stopped, 0.0 while it runs."""
        self._settings, self._driver, self._stood = settings, driver, stood

    def proposed(self) -> None:
        """A verdict must come, and then the decision to freeze."""
        self._driver.after(self._settings.timeout, self._timed_out)

    def freezing(self) -> None:
        """The destination must be ready."""
        self._driver.after(self._settings.freeze_limit, self._too_long_frozen)
        if self._settings.thaw_overrun and self._settings.max_downtime is not None:
            self._watch(latest(self._settings.max_downtime))

    def commits(self, event: SourceEvent) -> bool:
        """Whether `event` would have COMMIT sent."""
        return self._in(*_STANDING) and self._driver.machine.look(event).state is SourceState.COMMITTED

    def overrun(self) -> bool:
        """Whether the workload has stood still for too long."""
        settings = self._settings
        limited = settings.thaw_overrun and settings.max_downtime is not None
        return limited and self._stood() > latest(settings.max_downtime or 0.0)

    def too_long(self) -> Overrun:
        limit = self._settings.max_downtime or 0.0
        return Overrun(
            f"it has stood still for {duration(self._stood())}, over the max downtime of {duration(limit)} by more than"
            f" {duration(latest(limit) - limit)}",
            hint="the workload runs on; try again, with a longer --max-downtime, or with --on-overrun continue",
        )

    def _watch(self, limit: float) -> None:
        """Give up once it has stood still for longer."""

        def look() -> None:
            if not self._in(*_STANDING):
                return
            if self.overrun():
                self._driver.post(SourceEvent.CANCEL, self.too_long())
            else:
                self._driver.after(max(limit - self._stood(), _SOON), look)

        self._driver.after(limit, look)

    def asked(self) -> None:
        """The destination must say what it has decided."""
        self._driver.after(ANSWER_SECONDS, self._no_answer)

    def _in(self, *states: SourceState) -> bool:
        return self._driver.machine.state in states

    def _give_up(self, why: str, hint: str = "") -> None:
        self._driver.post(SourceEvent.CANCEL, MigrationAborted(why, hint=hint))

    def _timed_out(self) -> None:
        if self._in(SourceState.PREFLIGHT):
            self._give_up(f"no verdict within {self._settings.timeout:g} s, the timeout")
        elif self._in(SourceState.PRECOPY):
            # At its end a round knows the timeout by itself, and whether to freeze or to give up.
            self._driver.after(ROUND_GRACE, self._round_too_long)

    def _round_too_long(self) -> None:
        if self._in(SourceState.PRECOPY):
            self._give_up(
                f"{self._settings.timeout:g} s, the timeout, have passed in the middle of a round",
                "the link or the other host is slow for this workload: give it a longer --timeout",
            )

    def _too_long_frozen(self) -> None:
        if self._in(*_STANDING):
            self._give_up(f"the destination was not ready within {self._settings.freeze_limit:g} s of the freeze")

    def _no_answer(self) -> None:
        if self._in(SourceState.COMMITTED):
            why = f"no answer from {self._settings.peer} within {ANSWER_SECONDS:g} s"
            self._driver.post(SourceEvent.LINK_LOST, TransportError(why))
