"""One side of a migration as its table moves it: the state, and the actions that are still to be done. No I/O.

    machine = Machine(source_step, SourceState.START)
    machine.take(event)
    for action in machine:
        outcome = do(action)         # finished before the next one begins
        if outcome is not None:
            machine.take(outcome)    # the actions of that step replace those that were left

Sessions drive it with messages, recovery with what a journal says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic

from migrator.protocol.states import Action, Event, State, Step


class Machine(Generic[State, Event, Action]):
    """`table` says what an event does in a state: `source_step` or `destination_step`."""

    def __init__(self, table: Callable[[State, Event], Step[State, Action]], state: State) -> None:
        self.state = state
        self._table = table
        self._todo: deque[Action] = deque()

    def look(self, event: Event) -> Step[State, Action]:
        """What take() would do."""
        return self._table(self.state, event)

    def take(self, event: Event) -> None:
        """Move on. Actions of the step before that were not done yet are dropped."""
        self.follow(self.look(event))

    def follow(self, step: Step[State, Action]) -> None:
        """As take(), for a step that a journal names."""
        self.state = step.state
        self._todo = deque(step.actions)

    def drop(self) -> None:
        """Leave the actions undone that are left: the one before them has failed."""
        self._todo.clear()

    def __iter__(self) -> Machine[State, Event, Action]:
        return self

    def __next__(self) -> Action:
        if not self._todo:
            raise StopIteration
        return self._todo.popleft()
