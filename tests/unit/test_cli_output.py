"""What reaches a terminal: printable characters, whatever a process, a file or another host is called."""

from __future__ import annotations

import ast
import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from migrator import model
from migrator.cli import containers, output
from migrator.cli.output import Console, _PrintableFormatter, show_error
from migrator.cli.progress import Display, show_result
from migrator.container.describe import Row
from migrator.engine.base import Round
from migrator.errors import Fate, MigratorError, Refused, Undecided
from migrator.model import MigrationResult, Outcome, Phase, Timeline, Where
from migrator.text import duration, printable, size

HOSTILE = [
    "\x1b[2J\x1b[1;1Hroot@b:~# ",
    "\x1b]0;title\x07",
    "one\nerror: all is lost",
    "\rerror: all is lost",
    "\x9b31mred",
    "\u202egnp.exe",
    "a\x00b\x7fc\x08\x08\x08",
    "[red]not a style[/]",
    "[/]",
    "\\",
    "\\[red]",
    "{0} {} {name} %s",
    "\udcff\udc1b",
    "a\u2028b\u200b",
    "🐟 naïve 名前",
]
hostile = pytest.mark.parametrize("text", HOSTILE, ids=ascii)


class Screen(Console):
    """A console whose output can be looked at, as of a terminal that knows no colours."""

    def __init__(self) -> None:
        super().__init__()
        self.rich.file = io.StringIO()
        self.rich.width = 400

    @property
    def text(self) -> str:
        return self.rich.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    made = Screen()
    for module in (output, containers):
        monkeypatch.setattr(module, "err", made)
        monkeypatch.setattr(module, "out", made)
    return made


def check(screen: Screen, text: str, lines: int) -> None:
    """Only what is printable, on just so many lines, and the name is there: in full, as far as it can be shown."""
    shown = screen.text
    assert shown.endswith("\n")
    assert len(shown.splitlines()) == shown.count("\n") == lines, shown
    assert all(line.isprintable() for line in shown.split("\n")), ascii(shown)
    shown.encode()
    assert printable(text) in shown


@hostile
def test_a_value_of_a_line_is_shown_and_does_nothing(screen: Screen, text: str) -> None:
    screen.say("[green]{}[/] runs on [bold]{:<5}[/] ({:,})", text, text, 1234)
    check(screen, text, 1)
    assert f"{printable(text)} runs on {printable(text):<5} (1,234)\n" == screen.text


@hostile
def test_a_table_has_a_line_for_each_row(screen: Screen, text: str) -> None:
    screen.table(("NAME", "STATE"), [(text, "running"), ("other", text)])
    check(screen, text, 3)


@hostile
def test_lines_of_a_text_are_its_own_lines_and_nothing_else(screen: Screen, text: str) -> None:
    screen.lines(f"a {text} b\n")
    check(screen, text.split("\n")[0], 1 + text.count("\n"))


@hostile
def test_what_slips_through_is_still_only_a_text(screen: Screen, text: str) -> None:
    screen.show(Text(text))
    assert all(line.isprintable() for line in screen.text.split("\n")), ascii(screen.text)


@hostile
def test_json_is_ascii_and_says_the_same(screen: Screen, text: str) -> None:
    screen.json({"name": text})
    assert screen.text.isascii()
    assert all(line.isprintable() for line in screen.text.split("\n"))
    assert json.loads(screen.text) == {"name": text}


@hostile
def test_an_error_of_the_other_side_is_shown(screen: Screen, text: str) -> None:
    show_error(MigratorError(text, hint=text, fate=Fate.SOURCE))
    check(screen, text, 3)


@hostile
def test_reasons_of_a_refusal_are_a_line_each(screen: Screen, text: str) -> None:
    show_error(Refused([text, "pid 1: " + text], hint=text))
    check(screen, text, 4)


@pytest.mark.parametrize(
    "error",
    [
        lambda text: Undecided(text, hint=text),
        lambda text: PermissionError(1, text, text),
        lambda text: OSError(5, text, text),
    ],
)
@hostile
def test_every_error_that_ends_a_command_is_shown(screen: Screen, text: str, error: Callable[[str], Exception]) -> None:
    with pytest.raises(typer.Exit), output.reported():
        raise error(text)
    check(screen, text, len(screen.text.splitlines()))
    assert screen.text.startswith("error: ")


@hostile
def test_containers_are_listed(screen: Screen, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(text, text, text, 7, 1, 4096, 2.0, (text,), (text,))

    async def rows(*, rate: float) -> list[Row]:
        return [row]

    monkeypatch.setattr(containers.containers, "list", rows)
    containers.ps(as_json=False, rate=0.0)
    check(screen, text, 2)
    other = Screen()
    monkeypatch.setattr(containers, "out", other)
    containers.ps(as_json=True, rate=0.0)
    assert json.loads(other.text) == json.loads(json.dumps([asdict(row)]))
    assert other.text.isascii()


def events(text: str) -> list[tuple[model.Event, int]]:
    """Every kind of event with that text in it, and how many lines it is to be shown on."""
    made = Round(number=1, pages=2, zero_pages=0, bytes=8192, start=0, end=10**6, dirty_rate=3.0)
    phase = Phase(text, 0, 10**6)
    return [
        (model.Started(text, text, 0), 0),
        (model.PhaseStarted(text, text, 0), 0),
        (model.Transferred(text, text, 1, 1), 0),
        (model.PhaseEnded(text, phase), 0),
        (model.RoundDone(text, made, 0.1, 1.0, "freeze", text), 2),
        (model.Noted(text, text), 1),
        (model.Waiting(text, text), 1),
        (model.Settled(text, text, Fate.FROZEN.value), 2),
        (model.Ended(text, Where.SOURCE, MigrationResult(migration=text, outcome=Outcome.ABORTED, fate=text)), 0),
    ]


def test_every_kind_of_event_is_tried() -> None:
    assert {type(event) for event, _ in events("")} == set(model.Event.__args__)


@hostile
def test_events_of_a_migration_are_shown(text: str) -> None:
    for event, lines in events(text):
        screen = Screen()
        display = Display(screen)
        display(event)
        if lines:
            check(screen, text, lines)
        else:
            assert screen.text == ""
        screen.show(display._status())
        check(screen, "", lines + 1)


@hostile
def test_the_result_of_a_migration_is_shown(screen: Screen, text: str) -> None:
    spans = [Phase(text, 0, 10**6), Phase(text + "x", 10**6, 2 * 10**6)]
    result = MigrationResult(
        migration=text, outcome=Outcome.MIGRATED, fate=text, reason=text, source=text, destination=text,
        container=text, decision=text, engine=text, engine_reason=text, warnings=[text, text],
        timeline=Timeline(spans, 0, 2 * 10**6),
    )  # fmt: skip
    show_result(screen, result)
    assert all(line.isprintable() for line in screen.text.split("\n"))
    assert screen.text.count("\n") == 2 + 2 + 3 + 1 + 1 + 2
    assert screen.text.count(printable(text)) >= 6


@hostile
def test_a_log_line_holds_only_what_is_printable(text: str) -> None:
    formatter = _PrintableFormatter("%(name)s %(message)s")
    line = formatter.format(logging.LogRecord("migrator.agent", logging.INFO, "", 1, "peer %s: %s", (text, text), None))
    assert "\n" not in line
    assert line.isprintable()
    try:
        raise ValueError(text)
    except ValueError as error:
        record = logging.LogRecord("x", 40, "", 1, "failed", (), (type(error), error, error.__traceback__))
    assert all(line.isprintable() for line in formatter.format(record).split("\n"))


@hostile
def test_a_crash_is_shown_with_its_trace(screen: Screen, text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError as error:
        output.show_crash(error)
    assert screen.text.startswith("Traceback")
    assert "test_cli_output.py" in screen.text
    assert all(line.isprintable() for line in screen.text.split("\n"))


def test_a_command_that_crashes_or_warns_writes_only_what_is_printable() -> None:
    script = """
import logging, sys
import migrator.cli.containers as commands
from migrator.cli import main
def boom(*_):
    logging.getLogger("migrator.session").warning("of %s", "\\x1b[2J")
    raise ValueError("\\x1b[3J")
commands.interrupts.run = boom
sys.argv = ["migrator", "ps"]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "\\x1b[2J" in done.stderr
    assert "ValueError: \\x1b[3J" in done.stderr
    assert all(line.isprintable() for line in done.stderr.split("\n"))


@given(st.text())
def test_printable_text_is_printable_and_the_same_if_it_was(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()
    if text.isprintable():
        assert shown == text


def test_nothing_else_of_the_command_line_writes_to_a_stream() -> None:
    forbidden = {"print", "echo", "secho", "Console", "write"}
    for path in sorted(Path(output.__file__).parent.glob("*.py")):
        if path.name == "output.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func if isinstance(node, ast.Call) else None
            called = name.id if isinstance(name, ast.Name) else name.attr if isinstance(name, ast.Attribute) else ""
            assert called not in forbidden, f"{path.name}:{node.lineno} calls {called}()"  # type: ignore[attr-defined]


def test_no_package_prints_by_itself() -> None:
    root = Path(output.__file__).parents[2]
    for path in sorted(p for name in ("migrator", "transport", "policies") for p in (root / name).rglob("*.py")):
        if path.name == "output.py" or "testing" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path}:{node.lineno} prints"
            if isinstance(node, ast.Attribute) and node.attr == "write" and isinstance(node.value, ast.Attribute):
                assert node.value.attr not in ("stdout", "stderr"), f"{path}:{node.lineno} writes to a standard stream"


def test_libraries_do_not_log_each_message_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    output.log_to_stderr(logging.DEBUG)
    for library in ("asyncssh", "httpx", "pyroute2.netlink.nlsocket"):
        assert not logging.getLogger(library).isEnabledFor(logging.INFO)


def test_sizes_and_durations() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536, 300 << 20, 5 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "300 MiB", "5.0 TiB",
    ]  # fmt: skip
    assert [duration(s) for s in (0, 1e-6, 0.0125, 1.5, 130, 7500, 100 * 3600)] == [
        "0.0 ms", "1 us", "12.5 ms", "1.50 s", "2m 10s", "2h 5m", "4d 4h",
    ]  # fmt: skip


def test_of_many_rounds_the_first_are_shown_then_a_few_and_the_last() -> None:
    screen = Screen()
    display = Display(screen)
    for number in range(1, 500):
        verdict = "continue" if number < 499 else "give up"
        made = Round(number=number, pages=0, zero_pages=0, bytes=72, start=0, end=10**6, dirty_rate=0.0)
        display(model.RoundDone("m", made, 0.1, 1.0, verdict, "over the max downtime"))
    shown = [int(line.split()[1]) for line in screen.text.splitlines()]
    assert shown[:10] == list(range(1, 11))
    assert shown[-1] == 499
    assert len(shown) < 20
