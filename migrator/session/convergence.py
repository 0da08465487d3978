"""When to stop copying and freeze: a pure function of what the rounds showed.

    predicted downtime = standing + residual bytes / throughput + round trips

The residual is what would have to be sent if the workload were frozen now. The engine may know it; else it
follows from the last two rounds: round n sent what was dirtied while round n-1 took place, so while round n
took place about `pages(n) * duration(n) / duration(n-1)` pages became dirty, if the workload goes on as it
did. Rounds shrink as long as pages are sent faster than they are dirtied (Clark et al., "Live migration of
virtual machines", NSDI 2005); when they no longer do, another round costs time and gains nothing.
"""

from __future__ import annotations

import enum
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from migrator.engine.base import Round

PAGE = 4096
MAX_ROUNDS = 30  # as a last resort: the workload's habits do not change any more
# Round trips between the freeze and the copy's first instruction: last block there, READY back, COMMIT there.
ROUND_TRIPS = 1.5
# A last round that gets shorter than this by another round is not worth that round.
NEGLIGIBLE = 0.0005  # seconds
GAIN = 0.85  # a round is better than the one before if it leaves less than this part of it
_LEAST_SENDING = 0.25  # part of a round's time that is taken for sending in any case
# Where what no round can shorten is too long, it is given up after so many seconds and rounds: there may be less to
# stop a moment later, but not for want of rounds.
HOPELESS_SECONDS, HOPELESS_ROUNDS = 5.0, 3


class NextStep(enum.Enum):
    CONTINUE = "continue"
    FREEZE = "freeze"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Decision:
    """What to do now, the downtime if the workload were frozen now (seconds), and why."""

    verdict: NextStep
    predicted_downtime: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the rule weighs besides the rounds.

    throughput:   bytes/s of stream, before compression, that would flow without a cap; 0.0 if unknown
    rtt:          seconds
    standing:     seconds to stop the tasks, save their state, restore and resume them, without memory
    max_downtime: longest downtime wanted, seconds; None for the best that can be had
    elapsed:      seconds since the migration began
    timeout:      seconds after which it must have been decided
    """

    throughput: float
    rtt: float
    standing: float = 0.004
    max_downtime: float | None = None
    elapsed: float = 0.0
    timeout: float = 600.0


def residual_pages(rounds: Sequence[Round]) -> int:
    """Pages that would have to be sent if the workload were frozen after these rounds."""
    last = rounds[-1]
    if last.remaining >= 0:
        return last.remaining
    if len(rounds) == 1:
        return last.pages  # nothing is known of its habits yet: all of it may be dirty again
    before = max(_seconds(rounds[-2]), 1e-6)
    return round(last.pages * min(_seconds(last) / before, 4.0))


def predicted_downtime(rounds: Sequence[Round], conditions: Conditions) -> float:
    """In seconds, if the workload were frozen now; infinite while nothing is known of the throughput."""
    fixed = _fixed(conditions)
    residual = residual_pages(rounds) * PAGE
    if not residual:
        return fixed
    throughput = conditions.throughput or measured_throughput(rounds)
    return fixed + residual / throughput if throughput > 0 else float("inf")


def measured_throughput(rounds: Sequence[Round], looking: float = 0.0) -> float:
    """Bytes/s of stream in the rounds so far, from those long enough to tell; 0.0 if none was. `looking`: seconds of
    each that went into looking for what to send, as there are many mappings to look at."""
    rates = [
        r.bytes / max(_seconds(r) - looking, _LEAST_SENDING * _seconds(r))
        for r in rounds
        if r.bytes >= 1 << 20 and r.end > r.start
    ]
    return statistics.median(rates[-3:]) if rates else 0.0


def least_throughput(rounds: Sequence[Round]) -> float:
    """Bytes/s of stream that flow at least: the best that any round has shown, however short. A round of few pages
    takes the time that it takes to look for them."""
    return max((r.bytes / _seconds(r) for r in rounds if r.end > r.start), default=0.0)


def decide(rounds: Sequence[Round], conditions: Conditions) -> Decision:
    """What to do after these rounds (one at least). Never CONTINUE once the timeout has passed."""
    predicted = predicted_downtime(rounds, conditions)
    limit, throughput = conditions.max_downtime, conditions.throughput or measured_throughput(rounds)
    transfer = residual_pages(rounds) * PAGE / throughput if throughput else 0.0

    def verdict(what: NextStep, why: str) -> Decision:
        return Decision(what, predicted, why)

    if limit is not None and predicted <= limit:
        return verdict(NextStep.FREEZE, f"{_ms(predicted)} predicted, within the max downtime of {_ms(limit)}")
    if conditions.elapsed >= conditions.timeout:
        spent = f"{conditions.timeout:g} s have passed"
        if limit is None:
            return verdict(NextStep.FREEZE, f"{spent}, the timeout")
        return verdict(
            NextStep.GIVE_UP,
            f"{spent} and {_ms(predicted)} predicted is still over the max downtime of {_ms(limit)}: "
            + _obstacle(rounds, conditions, throughput),
        )
    hopeless = limit is not None and _fixed(conditions) > limit
    if hopeless and conditions.elapsed >= HOPELESS_SECONDS and len(rounds) >= HOPELESS_ROUNDS:
        return verdict(
            NextStep.GIVE_UP,
            f"{_ms(predicted)} predicted is over the max downtime of {_ms(limit or 0.0)}, whatever is sent before: "
            + _obstacle(rounds, conditions, throughput),
        )
    if limit is not None:
        return verdict(NextStep.CONTINUE, f"{_ms(predicted)} predicted, over the max downtime of {_ms(limit)}")
    if transfer <= NEGLIGIBLE and (len(rounds) > 1 or rounds[-1].remaining >= 0):
        return verdict(NextStep.FREEZE, "what is left takes no time to send")
    if len(rounds) >= MAX_ROUNDS:
        return verdict(NextStep.FREEZE, f"{MAX_ROUNDS} rounds have been made")
    if converged(rounds):
        return verdict(NextStep.FREEZE, "another round would not leave less to send")
    return verdict(NextStep.CONTINUE, "each round leaves less to send")


def converged(rounds: Sequence[Round]) -> bool:
    """Whether the last two rounds no longer brought the residual down. The first one tells nothing: it sends
    everything, whatever was dirtied."""
    if len(rounds) < 4:
        return False
    residuals = [residual_pages(rounds[:n]) for n in range(len(rounds) - 2, len(rounds) + 1)]
    return residuals[1] > GAIN * residuals[0] and residuals[2] > GAIN * min(residuals[:2])


def _obstacle(rounds: Sequence[Round], conditions: Conditions, throughput: float) -> str:
    assert conditions.max_downtime is not None
    fixed = _fixed(conditions)
    if fixed >= conditions.max_downtime:
        return f"stopping, restoring and the round trips alone take {_ms(fixed)}; ask for a longer downtime"
    dirty = rounds[-1].dirty_rate * PAGE / 1e6
    return (
        f"the workload dirties {dirty:.0f} MB/s and the link takes {throughput / 1e6:.0f} MB/s; "
        "ask for a longer downtime, or slow the workload down"
    )


def _fixed(conditions: Conditions) -> float:
    """Seconds that no round makes less."""
    return conditions.standing + ROUND_TRIPS * conditions.rtt


def _seconds(one: Round) -> float:
    return (one.end - one.start) / 1e9


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
