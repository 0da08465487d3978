"""rule: what the owner of a workload wants for it."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from migrator.cli import interrupts
from migrator.cli.fleet import AsJson, StoreUrl, labels_of
from migrator.cli.output import out, reported
from migrator.cli.parameters import seconds
from migrator.errors import UsageError
from migrator.fleet import records as r
from migrator.fleet.membership import opened
from migrator.host import Login
from migrator.text import duration


def rule(
    workload: Annotated[str, typer.Argument(metavar="WORKLOAD", help="A container, on whatever host it is.")],
    pin: Annotated[bool | None, typer.Option("--pin/--no-pin", help="It stays where it is.")] = None,
    together: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="GROUP", help="On one host with all of a group; repeatable."),
    ] = None,
    apart: Annotated[
        list[str] | None, typer.Option(metavar="GROUP", help="On no host with another of this group; repeatable.")
    ] = None,
    on: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only on hosts with this label; repeatable.")
    ] = None,
    max_downtime: Annotated[
        float | None, typer.Option(parser=seconds, metavar="DURATION", help="The longest stop it may be moved with.")
    ] = None,
    value: Annotated[
        float | None, typer.Option(min=0.0, max=1e9, help="What it is worth when not all can be saved; 1, if not told.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Forget all rules of it first.")] = False,
    as_json: AsJson = False,
    store: StoreUrl = "",
) -> None:
    """Set or show what a workload needs when it is placed: where it may be, with whom, and how long it may stop."""

    async def work() -> None:
        async with opened(store, Login()) as fleet:
            stored = await fleet.state.rules.get(workload)
            known = stored.record if stored is not None and not clear else r.Rule(workload=workload)
            changes = {
                "pinned": pin,
                "affinity": tuple(together) if together else None,
                "anti_affinity": tuple(apart) if apart else None,
                "host_labels": labels_of(on) if on else None,
                "downtime_budget": max_downtime,
                "value": value,
            }
            made = msgspec.structs.replace(known, **{name: new for name, new in changes.items() if new is not None})
            both = set(made.affinity) & set(made.anti_affinity)
            if both:
                raise UsageError(f"{workload} cannot be both with and apart from {', '.join(sorted(both))}")
            if made == r.Rule(workload=workload):
                if stored is not None:
                    await fleet.state.rules.delete(workload, expected=stored.revision)
            elif made != known or clear:
                await fleet.state.rules.put(workload, made, expected=stored.revision if stored is not None else 0)
            if as_json:
                out.json(msgspec.json.encode(made))
            else:
                out.say("{}: {}", workload, ", ".join(words(made)) or "no rules: it may go anywhere")

    with reported():
        interrupts.run(lambda _: work())


def words(rule: r.Rule) -> list[str]:
    """A rule for people."""
    found = ["pinned where it is"] if rule.pinned else []
    found += [f"on one host with all of {group}" for group in rule.affinity]
    found += [f"on no host with another of {group}" for group in rule.anti_affinity]
    found += [f"on hosts with {key}={value}" for key, value in sorted(rule.host_labels.items())]
    if rule.downtime_budget is not None:
        found.append(f"stops for {duration(rule.downtime_budget)} at most")
    if rule.value != 1.0:
        found.append(f"worth {rule.value:g}")
    return found
