"""The command line."""

from __future__ import annotations

import sys

import typer

from migrator.cli import containers, image, migrate

app = typer.Typer(
    name="migrator",
    help="Move running processes and containers between hosts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command(no_args_is_help=True)(containers.run)
app.command()(containers.ps)
app.command(no_args_is_help=True)(containers.stop)
app.command(no_args_is_help=True)(containers.thaw)
app.command(no_args_is_help=True)(migrate.migrate)
app.command(no_args_is_help=True)(migrate.check)
app.command()(migrate.agent)
app.command()(migrate.settle)
app.command()(migrate.keygen)
app.command(no_args_is_help=True)(image.checkpoint)
app.command()(image.restart)
app.add_typer(image.images, name="image")


def main() -> None:
    """Entry point of the `migrator` command."""
    sys.setswitchinterval(0.0005)  # threads hand over quickly: a freeze must not wait for one that computes
    app()
