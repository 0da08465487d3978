"""Whatever the freeze refuses is said by the survey before, or is about what can come into being after it."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from pathlib import Path

ENGINE = Path(__file__).parents[2] / "migrator/engine/user"
SURVEY = (
    *(
        "descriptors/survey.py",
        "descriptors/survey_sockets.py",
        "descriptors/survey_links.py",
        "descriptors/sockets.py",
    ),
    *("dump/survey.py", "dump/survey_tasks.py", "dump/tmpfs.py", "descriptors/classify.py"),
)
# What is refused in other words than those of the survey (given), or cannot be known by it (told why).
OTHERWISE = {
    "\0: \0": "survey: an Obstacle, of the same code",
    "\0: the pipe is \0 by a process outside of the tree": "survey: outside of the tree; start it with its input and",
    "\0: the other end of this unix socket is outside of the tree": "survey: a unix socket whose other end is held by",
    "\0: the kernel does not list this unix socket (CONFIG_UNIX_DIAG?)": "survey: the partners of unix sockets cannot",
    "pid \0: mapping \0 is \0, which cannot be carried": "survey: an obstacle, of the same code",
    "pid \0: mapping \0 is of System V memory of the host": "survey: is System V shared memory of the host",
    "pid \0 shares its address space with its parent": "survey:  shares ",
    "the main thread of pid \0 has ended while others run": "survey: its main thread has ended while others run",
    "\0: more than \0 files in tmpfs cannot be carried": "survey:  files lie in tmpfs, ",
    "descriptors cannot be saved: \0": "later: a call that failed",
    "descriptors cannot be collected: \0": "later: a call that failed",
    "\0: a connection of \0 in TCP state \0": "later: states of a moment, of a socket that nobody accepted",
    "\0: \0 connections to \0 wait to be accepted": "later: they are accepted in a moment",
    "\0: \0 connections wait to be accepted": "later: they are accepted in a moment",
    "\0: packets keep coming in": "later: of the connection as it is then",
    "\0: \0 bytes wait in this connection and \0 are not acknowledged, but \0 and \0 could be read": "later: as above",
    "\0: \0 bytes wait in this connection": "later: as above",
    "\0: descriptors are on their way through this unix socket (SCM_RIGHTS)": "later: they are taken in a moment",
    "\0: credentials are on their way through this unix socket (SCM_CREDENTIALS)": "later: they are taken in a moment",
    "\0: a message of more than \0 bytes is on its way": "later: it is taken in a moment",
    "pid \0 has ended": "later: it ends when it likes",
    "pid \0: userfaultfd(2) fails inside it: \0": "later: before the freeze; the workload runs on",
    "pid \0: \0": "later: a call that failed",
    "pid \0 was stopped by signal \0 meanwhile, which is not carried": "later: it says so",
    "pid \0 (tid \0) does not stop within \0 s": "later: an uninterruptible sleep has no end that is known",
    "final() before instrument()": "later: a mistake of the caller's",
    "pid \0 is an ancestor of this very program": "later: before the freeze; the workload runs on",
    "a task ended while it was stopped: \0": "later: it was killed",
    "waits": "later: what is transient, as it is then",
    "pid \0 cannot be moved to a cgroup of its own: \0": "later: before the freeze; the workload runs on",
    "pid \0 cannot be traced (tid \0)": "later: a debugger has come meanwhile",
}


def text_of(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)


def refusals() -> Iterator[str]:
    for path in sorted((*ENGINE.rglob("*.py"), *ENGINE.parent.glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "CheckpointFailed":
                yield text_of(node.args[0])


def said_by_the_survey() -> list[str]:
    out = []
    for name in SURVEY:
        for node in ast.walk(ast.parse((ENGINE / name).read_text())):
            if isinstance(node, ast.JoinedStr | ast.Constant) and isinstance(text := text_of(node), str):
                out.append(text)
    return out


def test_every_refusal_of_the_freeze_has_its_check_in_the_survey() -> None:
    said, there = said_by_the_survey(), set(refusals())
    assert len(there) > 30
    for text in there - set(OTHERWISE):
        words = max(text.split("\0"), key=len)
        assert any(words in one or one in words for one in said if len(one) > 12), f"the survey does not know: {text!r}"
    for text, how in OTHERWISE.items():
        assert text in there, f"refused no more: {text!r}"
        kind, _, words = how.partition(": ")
        assert kind == "later" or words.startswith("an ") or any(words in one for one in said), (text, how)


def test_a_refusal_that_nobody_has_thought_of_is_noticed() -> None:
    text = "\0: a file of a kind that was invented today"
    near = difflib.get_close_matches(text, said_by_the_survey(), cutoff=0.9)
    assert not near and text not in OTHERWISE
