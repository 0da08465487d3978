"""The runbooks: every command in them exists, with the options that it is given."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer import Context
from typer.main import get_command

from migrator.cli.app import make

ROOT = Path(__file__).resolve().parents[2]
RUNBOOKS = sorted((ROOT / "docs/runbooks").glob("*.md"))
SITUATIONS = {"aborted.md", "undecided.md", "lost-host.md", "full-disk.md", "no-leader.md"}


def commands() -> Iterator[tuple[str, list[str]]]:
    """Our own commands in a runbook, in blocks and in the text, without what leads to another host."""
    for runbook in RUNBOOKS:
        text = runbook.read_text()
        lines = re.findall(r"^    (.+)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
        for line in lines:
            words = shlex.split(re.sub(r"^ssh \S+ ", "", line))
            if words and words[0] == "migrator" and len(words) > 1:
                yield runbook.name, words[1:]


def test_there_is_a_runbook_for_each_situation() -> None:
    assert {runbook.name for runbook in RUNBOOKS} >= SITUATIONS


@pytest.mark.parametrize(("runbook", "words"), list(commands()), ids=lambda value: "-".join(value).replace("/", "_"))
def test_a_command_in_a_runbook_is_one_that_the_program_understands(runbook: str, words: list[str]) -> None:
    command: Any = get_command(make())
    context = Context(command, info_name="migrator")
    while hasattr(command, "get_command"):
        found = command.get_command(context, words[0])
        assert found is not None, f"{runbook}: migrator {' '.join(words)}"
        command, context = found, Context(found, parent=context, info_name=words[0])
        words = words[1:]
    filled = [word.replace("DESTINATION", "other").replace("NAME", "shop") for word in words]
    needs = any(one.param_type_name == "argument" and one.required for one in command.params)
    if needs and all(word.startswith("-") for word in filled):
        return  # it is only spoken of: that it exists is all there is to see
    command.parse_args(context, filled)


@pytest.mark.parametrize("runbook", RUNBOOKS, ids=lambda runbook: runbook.stem)
def test_a_runbook_says_where_the_workload_is_and_its_links_lead_somewhere(runbook: Path) -> None:
    text = runbook.read_text()
    assert re.search(r"^\*\*Where (the|its) workloads? (is|are):\*\*", text, re.MULTILINE)
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (runbook.parent / link).exists(), link
