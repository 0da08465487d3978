"""docs/state.md says of each state what becomes of it; the survey of tasks refuses nothing that no test reaches."""

from __future__ import annotations

import ast
import difflib
import re
from pathlib import Path

import pytest

from migrator.engine.user.dump import survey_tasks
from migrator.image.codec import REGISTRY

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs/state.md").read_text().split("\n")
    if line.startswith("| ") and not line.startswith("| State |")
]
VERDICTS = {"carried", "refused", "told", "unseen"}
UNREACHED = {  # reasons of the survey of tasks that take other hardware or another kernel
    "switched off (PR_SET_SPECULATION_CTRL)": "this processor, or host, lets nobody",
    "is a 32-bit program": "no 32-bit compiler",
    "is there to write out memory (PR_SET_IO_FLUSHER)": "takes CAP_SYS_RESOURCE: shown with another stat",
    "is in another time namespace than the root task": "its parent's time_for_children is refused first",
}


def texts(folder: str) -> str:
    """All string constants of the code, one to a line; what is put into them at run time is left out."""
    out = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                out.append("".join(str(v.value) for v in node.values if isinstance(v, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                out.append(node.value)
    return "\n".join(out)


CODE = texts("migrator/engine") + texts("migrator/container")
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
RECORDS = {kind.__name__ for kind in REGISTRY.values()}


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_says_what_is_so(row: list[str]) -> None:
    _, verdict, words, test = row
    assert verdict in VERDICTS
    quoted = re.fullmatch(r"`(.+)`", words)
    if verdict == "carried":
        assert quoted and quoted[1] in RECORDS
        assert test
    elif verdict in ("refused", "told"):
        assert quoted and quoted[1] in CODE
    if test:
        assert f"def {test.strip('`')}(" in TESTS


def test_every_reason_of_the_survey_of_tasks_is_reached_by_a_test() -> None:
    source = ast.parse((ROOT / "migrator/engine/user/dump/survey_tasks.py").read_text())
    reached = re.findall(r'^    "([^"]+)": ', (ROOT / "tests/engines/test_user_refused.py").read_text(), re.M)
    for what in survey_tasks.SHARED.values():
        assert any(reason in f"shares {what}" for reason in reached) or what.startswith("its signal handlers"), what
    reached.append("wait to be taken, one of which is needed")
    # of mappings: why is said by migrator.engine.user.dump.mappings
    reached += [
        " shares \0 with pid \0",
        "is \0, which cannot be carried",
        " has \0 of its own (unshare(2))",
        *UNREACHED,
    ]
    for node in ast.walk(source):
        if isinstance(node, ast.Yield) and isinstance(node.value, ast.JoinedStr):
            text = "".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.value.values)
            if text.strip("\0 "):
                assert any(_may_be(text, reason) for reason in reached), text


def _may_be(text: str, reason: str) -> bool:
    """Whether a reason may be of `text`, in which a zero stands for anything: much of it, or all, is there."""
    common = difflib.SequenceMatcher(None, text, reason, autojunk=False).find_longest_match().size
    return common >= min(17, len(reason))
