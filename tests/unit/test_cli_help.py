"""Help, manual pages and completion: all of them say what the commands take."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from migrator.cli.app import make
from migrator.cli.parameters import Address, address, seconds, size
from migrator.container import ContainerSpec
from migrator.container.state import Container

ROOT = Path(__file__).resolve().parents[2]
MAIN = "import sys; sys.argv[0] = 'migrator'; from migrator.cli import main; main()"


def commands(group: Any, path: str = "migrator") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        below = commands(command, f"{path}-{name}") if hasattr(command, "commands") else {f"{path}-{name}": command}
        found.update(below)
    return found


COMMANDS = commands(get_command(make()))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, str(ROOT / "tools" / "man.py"), str(folder)], check=True, cwd=ROOT)
    return {path.stem: path.read_text() for path in folder.glob("*.1")}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_parameter_has_a_help(name: str) -> None:
    assert COMMANDS[name].help
    for parameter in COMMANDS[name].params:
        assert parameter.help, f"{name}: {parameter.name}"


def test_there_is_a_page_for_every_command_and_one_for_all(pages: dict[str, str]) -> None:
    assert set(pages) == {"migrator", *COMMANDS}
    for name in COMMANDS:
        assert name.replace("-", "\\-") in pages["migrator"]
    assert "MIGRATOR_JOURNAL_DIR" in pages["migrator"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_names_every_parameter(name: str, pages: dict[str, str]) -> None:
    for parameter in COMMANDS[name].params:
        for shown in parameter.opts if parameter.param_type_name == "option" else [parameter.metavar or ""]:
            assert shown.upper().replace("-", "\\-") in pages[name].upper(), f"{name}: {shown}"


@pytest.mark.parametrize("name", ["migrator", *COMMANDS])
def test_a_page_is_formatted_without_a_warning(name: str, pages: dict[str, str]) -> None:
    done = subprocess.run(
        ["groff", "-man", "-Kutf8", "-Tutf8", "-ww", "-P-cbu"],
        input=pages[name], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert all(heading in done.stdout for heading in ("NAME", "SYNOPSIS", "SEE ALSO"))


def completed(words: str, index: int, **environment: str) -> list[str]:
    """What bash is told when the word `index` of a line is completed."""
    asked = {"_MIGRATOR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(index)}
    done = subprocess.run(
        [sys.executable, "-c", MAIN], env={**os.environ, **asked, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("migrator mig", {"migrate"}),
        ("migrator che", {"checkpoint", "check"}),
        ("migrator migrate --max", {"--max-downtime"}),
        ("migrator image inf", {"info"}),
    ],
)
def test_a_shell_completes_commands_and_options(typed: str, offered: set[str]) -> None:
    assert set(completed(typed, len(typed.split()) - 1)) == offered


@pytest.mark.parametrize("command", ["checkpoint", "migrate", "check", "stop", "thaw"])
def test_a_shell_completes_names_of_containers(command: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MIGRATOR_STATE_DIR", str(tmp_path))
    for name in ("shop", "shelf", "other"):
        spec = ContainerSpec(name=name)
        Container(spec=spec, init_pid=1, start_time=0, cgroup="", ifindex=0, created=0.0).save()
    assert set(completed(f"migrator {command} sh", 2)) == {"shop", "shelf"}


def test_a_shell_is_given_the_script_that_asks() -> None:
    # It is found out from the processes above which shell that is.
    asked = f"{shlex.quote(sys.executable)} -c {shlex.quote(MAIN)} --show-completion; exit $?"
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    assert "complete -o default -F" in done.stdout
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


@pytest.mark.parametrize("name", ["migrate", "ps", "image", "keygen"])
def test_one_command_is_loaded_without_the_others_and_is_the_same(name: str) -> None:
    alone = get_command(make([name]))
    assert list(alone.commands) == [name]  # type: ignore[attr-defined]
    assert commands(alone).keys() == {one for one in COMMANDS if one.split("-")[1] == name}
    for one, command in commands(alone).items():
        assert [p.opts for p in command.params] == [p.opts for p in COMMANDS[one].params]


def test_what_is_no_command_is_looked_for_among_all() -> None:
    assert list(get_command(make(["--help"])).commands) == list(get_command(make()).commands)  # type: ignore[attr-defined]


def test_moving_a_process_loads_neither_pyroute2_nor_what_serves() -> None:
    asked = "import sys; from migrator.cli.app import make; make(['migrate']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"pyroute2", "migrator.agent", "migrator.session.destination", "migrator.fleet.controller"}


def test_saving_to_a_file_loads_nothing_of_ssh() -> None:
    asked = "import sys; import migrator.api.local; from migrator.cli.app import make; make(['checkpoint'])"
    done = subprocess.run(
        [sys.executable, "-c", f"{asked}; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert not set(done.stdout.split()) & {"asyncssh", "cryptography", "transport.ssh", "migrator.host"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("20ms", 0.02), ("1.5s", 1.5), ("10m", 600.0), ("1h", 3600.0), ("3", 3.0), ("250us", 0.00025), (".5s", 0.5)],
)
def test_a_duration_is_seconds(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("50MB", 50e6), ("1GiB", 2**30), ("800k", 800e3), ("4096", 4096.0), ("1.5MiB", 1.5 * 2**20), ("50MB/s", 50e6)],
)
def test_a_size_is_bytes(text: str, value: float) -> None:
    assert size(text) == value


def test_an_address_has_a_host_and_a_port() -> None:
    assert address("0.0.0.0:7022") == Address("0.0.0.0", 7022)
    assert address("[::1]:22") == Address("::1", 22)


@pytest.mark.parametrize(
    ("parse", "text"),
    [(seconds, t) for t in ("", "soon", "-1s", "1 day", "1e3", "ms", "1s2", "٣s")]
    + [(size, t) for t in ("", "much", "-5", "5X", "MB", "1 000", "1.2.3")]
    + [(address, t) for t in ("", "here", "1.2.3.4", "h:99999", "h:-1", "h:²")],
)
def test_what_is_none_is_refused_with_what_it_should_be(parse: Any, text: str) -> None:
    with pytest.raises(Exception, match="is no "):
        parse(text)


def test_a_command_ends_although_threads_wait_for_work() -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor; from migrator.cli import _leave\n"
        "workers = ThreadPoolExecutor(1); print(workers.submit(int, 7).result()); _leave(5)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (5, "7\n")
