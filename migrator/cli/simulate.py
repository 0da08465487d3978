"""simulate, record: what policies would do on a day."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from migrator.cli import interrupts
from migrator.cli.fleet import AsJson, StoreUrl
from migrator.cli.output import err, out, reported
from migrator.cli.parameters import logs_in, seconds
from migrator.errors import UsageError
from migrator.host import Login
from migrator.text import duration
from policies.consistency import ClusterError
from policies.day import Recording, decode


def simulate(
    recording: Annotated[
        Path | None,
        typer.Argument(metavar="[RECORDING]", help="Of `migrator record`; else a day from a seed."),
    ] = None,
    hosts: Annotated[int, typer.Option(min=2, max=100_000, help="Of the day from a seed.")] = 100,
    workloads: Annotated[int, typer.Option(min=1, max=2_000_000, help="Of the day from a seed.")] = 1000,
    hours: Annotated[float, typer.Option(min=0.1, max=1000.0, help="Of the day from a seed.")] = 24.0,
    every: Annotated[
        float, typer.Option(parser=seconds, metavar="DURATION", show_default="5m", help="Between two observations.")
    ] = 300.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same day, and the same result.")] = 1,
    failing: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of migrations that fail half way.")] = 0.01,
    vanishing: Annotated[float, typer.Option(min=0.0, max=1.0, help="The share of hosts that vanish in a day.")] = 0.0,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Replay a day under our policy and under the published rules of others, and compare what came of it.

    Below each of the others stands ours that evens out most without sending more: at some thrift, or with a budget of
    what the other has sent.
    """
    with reported():
        from policies.compare import compare, invented, pace_for, table
        from policies.day import Shape
        from policies.picture import svg as draw
        from policies.simulate import World

        world = World(seed=seed, failing=failing, vanishing=vanishing)
        if recording is not None:
            day = _read(recording)
            found = compare(day, msgspec.structs.replace(world, pace=pace_for(len(day.hosts))), done=_told)
        else:
            shape = Shape(hosts=hosts, workloads=workloads, hours=hours, interval=every, seed=seed)
            found = invented(shape, world, done=_told)
        if svg is not None:
            svg.write_text(draw(found))
        if as_json:
            out.json(msgspec.json.encode(found))
        else:
            out.lines(table(found) + "\n")
            if svg is not None:
                out.say("picture: {}", svg)


def _read(path: Path) -> Recording:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="a file made by `migrator record`") from error
    except ClusterError as error:
        raise UsageError(f"{path}: {error.message}", hint="a file made by `migrator record`") from error


def _told(run: object) -> None:
    if err.rich.is_terminal:
        err.say("[dim]{} is done[/]", getattr(run, "rule", ""))


@logs_in(unattended=True)
def record(
    login: Login,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Where the recording goes.")],
    length: Annotated[
        float, typer.Option("--for", parser=seconds, metavar="DURATION", show_default="24h", help="How long.")
    ] = 86400.0,
    every: Annotated[
        float, typer.Option(parser=seconds, metavar="DURATION", show_default="1m", help="Between two looks.")
    ] = 60.0,
    store: StoreUrl = "",
) -> None:
    """Record what the fleet's workloads want, for `migrator simulate`. Nothing is moved by it.

    Ctrl-C ends it, and what there is so far is kept.
    """
    with reported():
        if path.exists():
            raise UsageError(f"{path} is there already", hint="name another file")

        def told(number: int) -> None:
            if number == 1:
                err.say("recording for {}; Ctrl-C ends it and keeps what there is", duration(length))

        async def work() -> None:
            from migrator.fleet.membership import opened
            from migrator.fleet.recorder import record as recorded

            async with opened(store, login) as fleet:
                made = await recorded(fleet.observer, every=every, seconds=length, told=told)
            path.write_bytes(msgspec.json.encode(made))
            out.say(
                "{} observations of {} workloads on {} hosts: migrator simulate {}",
                len(made.recorded),
                len(made.workloads),
                len(made.hosts),
                path,
            )

        interrupts.run(lambda _: work())
