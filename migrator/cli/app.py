"""All commands under one name."""

from __future__ import annotations

import typer

from migrator.cli import containers, image

LOCAL = ("run", "ps", "stop", "thaw", "checkpoint", "restart", "image")


def make(*, local: bool = False) -> typer.Typer:
    """The command line. `local`: only the commands of one host (LOCAL); what talks to others, which takes as long
    to load as all the rest, is left out."""
    app = typer.Typer(
        name="migrator",
        help="Move running processes and containers between hosts.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.command(no_args_is_help=True)(containers.run)
    app.command()(containers.ps)
    app.command(no_args_is_help=True)(containers.stop)
    app.command(no_args_is_help=True)(containers.thaw)
    if not local:
        from migrator.cli import agent, balance, controller, drain, fleet, init, migrate, rule, simulate, snapshots

        app.command(no_args_is_help=True)(migrate.migrate)
        app.command(no_args_is_help=True)(migrate.check)
        app.command()(agent.agent)
        app.command()(agent.settle)
        app.command()(agent.keygen)
        app.command(no_args_is_help=True)(init.init)
        app.command(no_args_is_help=True)(fleet.join)
        app.command(no_args_is_help=True)(fleet.leave)
        app.command()(fleet.hosts)
        app.command(no_args_is_help=True)(rule.rule)
        app.command()(balance.balance)
        app.command()(balance.plans)
        app.command(no_args_is_help=True)(drain.drain)
        app.command(no_args_is_help=True)(drain.cordon)
        app.command(no_args_is_help=True)(drain.uncordon)
        app.command()(controller.controller)
        app.command(no_args_is_help=True)(snapshots.snapshot)
        app.command()(snapshots.snapshots)
        app.command(no_args_is_help=True)(snapshots.revive)
        app.command(no_args_is_help=True)(snapshots.recover)
        app.command()(simulate.simulate)
        app.command(no_args_is_help=True)(simulate.record)
    app.command(no_args_is_help=True)(image.checkpoint)
    app.command()(image.restart)
    app.add_typer(image.images, name="image")
    return app
