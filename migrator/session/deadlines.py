"""How long each part of a migration may take, as its source sees it."""

from __future__ import annotations

from migrator.errors import MigrationAborted, TransportError
from migrator.protocol.states import SourceAction, SourceEvent, SourceState
from migrator.session.driver import Driver
from migrator.session.settings import SourceSettings

ROUND_GRACE = 5.0  # seconds after the timeout, for the round that is under way
ANSWER_SECONDS = 5.0  # after COMMIT, until the destination is asked over a new link


class Deadlines:
    """Each is begun by a call and becomes an event, unless the session has gone on by then."""

    def __init__(self, settings: SourceSettings, driver: Driver[SourceState, SourceEvent, SourceAction]) -> None:
        self._settings, self._driver = settings, driver

    def proposed(self) -> None:
        """A verdict must come, and then the decision to freeze."""
        self._driver.after(self._settings.timeout, self._timed_out)

    def freezing(self) -> None:
        """The destination must be ready."""
        self._driver.after(self._settings.freeze_limit, self._too_long_frozen)

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
        if self._in(SourceState.SAVING, SourceState.SAVING_READY, SourceState.SAVED):
            self._give_up(f"the destination was not ready within {self._settings.freeze_limit:g} s of the freeze")

    def _no_answer(self) -> None:
        if self._in(SourceState.COMMITTED):
            why = f"no answer from {self._settings.peer} within {ANSWER_SECONDS:g} s"
            self._driver.post(SourceEvent.LINK_LOST, TransportError(why))
