"""Manual pages from the help of the commands themselves: tools/man.py [DIRECTORY], build/man by default.

One page for each command, migrator-COMMAND(1), and one for all of them, migrator(1), in the macros of man(7). What
they say is what `--help` says, so they cannot tell something else.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from migrator.cli.app import make

USAGE = Path(__file__).resolve().parents[1] / "docs" / "usage.md"


def table(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of docs/usage.md, without its title."""
    section = USAGE.read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


def escaped(text: str) -> str:
    """For man(7): a dash is a dash, a backslash is one, and no line begins a macro."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"(?m)^([.'])", r"\\&\1", text)


def prose(text: str) -> str:
    """Paragraphs of a help text; what is in backquotes is bold."""
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n")]
    return "\n.PP\n".join(re.sub(r"`([^`]*)`", r"\\fB\1\\fR", escaped(part)) for part in paragraphs)


def header(name: str) -> str:
    version = importlib.metadata.version("migrator")
    return f'.TH "{name.upper()}" "1" "" "migrator {version}" "Live migration"\n'


def name_of(parameter: Any) -> str:
    """An argument as it is called in the synopsis."""
    return str(parameter.metavar or parameter.name.upper())


def option(parameter: Any) -> Iterator[str]:
    """One entry of the list of options."""
    flag = getattr(parameter, "is_flag", False)
    names = sorted(parameter.opts, key=len)
    value = "" if flag else f" \\fI{escaped(name_of(parameter))}\\fR"
    yield ".TP"
    yield ", ".join(f"\\fB{escaped(one)}\\fR" for one in names) + value
    text = parameter.help or ""
    shown = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    if shown not in (None, False, "", [], ()) and not callable(shown):
        text += f" Default: {shown}."
    if parameter.envvar:
        text += f" Environment: {parameter.envvar}."
    yield prose(text)


def page(path: list[str], command: Any) -> str:
    """The page of one command."""
    name = "-".join(path)
    first, _, rest = inspect.cleandoc(command.help or "").partition("\n\n")
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    synopsis = [f"\\fB{escaped(' '.join(path))}\\fR", "[\\fIOPTION\\fR]..."]
    for one in arguments:
        shown = f"\\fI{escaped(name_of(one))}\\fR"
        synopsis.append(shown if one.required else f"[{shown}]")
    sentence = " ".join(first.split())
    parts = [header(name), ".SH NAME", f"{escaped(name)} \\- {prose(sentence.rstrip('.'))}", ".SH SYNOPSIS"]
    parts.append(" ".join(synopsis))
    parts += [".SH DESCRIPTION", prose(first)]
    if rest:
        parts += [".PP", prose(rest)]
    for one in arguments:
        parts += [".TP", f"\\fI{escaped(name_of(one))}\\fR", prose(one.help or "")]
    parts.append(".SH OPTIONS")
    for one in options:
        parts += option(one)
    parts += [".SH EXIT STATUS", "See \\fBmigrator\\fR(1).", ".SH SEE ALSO", "\\fBmigrator\\fR(1)"]
    return "\n".join(part.rstrip("\n") for part in parts) + "\n"


def overview(group: Any, pages: list[tuple[list[str], Any]]) -> str:
    """The page of all of them."""
    parts = [header("migrator"), ".SH NAME", f"migrator \\- {prose((group.help or '').rstrip('.'))}", ".SH SYNOPSIS"]
    parts += ["\\fBmigrator\\fR \\fICOMMAND\\fR [\\fIARGUMENT\\fR]...", ".SH COMMANDS"]
    for path, command in pages:
        first = inspect.cleandoc(command.help or "").partition("\n\n")[0]
        parts += [".TP", f"\\fB{escaped('-'.join(path))}\\fR(1)", prose(first)]
    parts.append(".SH EXIT STATUS")
    for code, meaning, workload in table("Exit codes"):
        after = f" The workload: {workload}." if workload else ""
        parts += [".TP", f"\\fB{escaped(code)}\\fR", prose(f"{meaning[:1].upper()}{meaning[1:]}.{after}")]
    parts.append(".SH ENVIRONMENT")
    for variables, default, text in table("Environment"):
        parts += [".TP", prose(variables), prose(f"{text[:1].upper()}{text[1:]}. Default: {default}.")]
    parts += [".SH SEE ALSO", ", ".join(f"\\fB{escaped('-'.join(path))}\\fR(1)" for path, _ in pages)]
    return "\n".join(part.rstrip("\n") for part in parts) + "\n"


def commands(group: Any, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    """Every command with its own help, those of groups too."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, [*path, name])
        else:
            yield [*path, name], command


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/man")
    folder.mkdir(parents=True, exist_ok=True)
    group = get_command(make())
    found = list(commands(group, ["migrator"]))
    (folder / "migrator.1").write_text(overview(group, found))
    for path, command in found:
        (folder / f"{'-'.join(path)}.1").write_text(page(path, command))
    print(f"{len(found) + 1} pages in {folder}")


if __name__ == "__main__":
    main()
