"""All commands under one name. Only the one that is asked for is loaded: all of them take most of a second."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import dataclass

import typer


@dataclass(frozen=True)
class _Command:
    module: str  # of migrator.cli; the function is named like the command
    needs_arguments: bool = False


# In the order of the help.
_COMMANDS = {
    "run": _Command("containers", needs_arguments=True),
    "ps": _Command("containers"),
    "stop": _Command("containers", needs_arguments=True),
    "thaw": _Command("containers", needs_arguments=True),
    "migrate": _Command("migrate", needs_arguments=True),
    "check": _Command("migrate", needs_arguments=True),
    "agent": _Command("agent"),
    "settle": _Command("agent"),
    "keygen": _Command("agent"),
    "init": _Command("init", needs_arguments=True),
    "join": _Command("fleet", needs_arguments=True),
    "leave": _Command("fleet", needs_arguments=True),
    "hosts": _Command("fleet"),
    "rule": _Command("rule", needs_arguments=True),
    "balance": _Command("balance"),
    "plans": _Command("balance"),
    "drain": _Command("drain", needs_arguments=True),
    "cordon": _Command("drain", needs_arguments=True),
    "uncordon": _Command("drain", needs_arguments=True),
    "controller": _Command("controller"),
    "snapshot": _Command("snapshots", needs_arguments=True),
    "snapshots": _Command("snapshots"),
    "revive": _Command("snapshots", needs_arguments=True),
    "recover": _Command("snapshots", needs_arguments=True),
    "simulate": _Command("simulate"),
    "record": _Command("simulate", needs_arguments=True),
    "checkpoint": _Command("image", needs_arguments=True),
    "restart": _Command("image"),
}
_GROUP = "image"  # of commands


def make(only: Collection[str] = ()) -> typer.Typer:
    """The command line: with all commands, or with those of `only` that there are, if there is one."""
    app = typer.Typer(
        name="migrator",
        help="Move running processes and containers between hosts.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    wanted = set(only) & {*_COMMANDS, _GROUP} or {*_COMMANDS, _GROUP}
    for name, command in _COMMANDS.items():
        if name in wanted:
            function = getattr(importlib.import_module(f"migrator.cli.{command.module}"), name)
            app.command(name, no_args_is_help=command.needs_arguments)(function)
    if _GROUP in wanted:
        from migrator.cli import image

        app.add_typer(image.images, name=_GROUP)
    if len(wanted) == 1:
        app.callback()(lambda: None)  # else the one command would be the whole program, without its name
    return app
