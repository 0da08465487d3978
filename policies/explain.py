"""A plan in words: for each move why, what it should gain, what it costs, and what may go wrong."""

from __future__ import annotations

from collections.abc import Iterator

from migrator.text import duration, printable, size

from .cost import Cost
from .plan import Move, Plan


def cost_text(cost: Cost) -> str:
    """Bytes, seconds, downtime and risk, all as predicted."""
    return (
        f"{size(cost.bytes)} in {duration(cost.seconds)}, {duration(cost.downtime)} of downtime predicted, "
        f"risk {cost.risk:.0%}"
    )


def move_text(move: Move) -> str:
    """One line."""
    gain = f"gain {move.gain:.3g}; " if move.gain else ""
    bundle = f", with all of {move.bundle}'s bundle" if move.bundle else ""
    text = f"{move.workload}: {move.source} -> {move.target}{bundle}, because {move.reason}; {gain}"
    return printable(text) + cost_text(move.cost)


def plan_lines(plan: Plan) -> Iterator[str]:
    """The whole, move by move in their order; then what explains it."""
    if plan.moves:
        downtime = duration(plan.downtime)
        yield (
            f"plan {plan.id}: {len(plan.moves)} moves, {size(plan.bytes)}, {downtime} of downtime in all; "
            f"imbalance {plan.imbalance:.3f} becomes {plan.predicted:.3f}"
        )
    else:
        yield f"plan {plan.id}: nothing to move; imbalance {plan.imbalance:.3f}"
    waves = len({move.wave for move in plan.moves})
    last = None
    for move in plan.moves:
        if waves > 1 and move.wave != last:
            yield f"wave {move.wave + 1}:"
            last = move.wave
        yield f"  {move_text(move)}"
    for note in plan.notes:
        yield f"note: {printable(note)}"
