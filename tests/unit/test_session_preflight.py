"""What stands in the way is found before anything is done, with the object, the reason and the remedy."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from migrator.engine.base import Capability, FileFact, Survey
from migrator.protocol import facts
from migrator.protocol import messages as m
from migrator.protocol.trees import SyncTree
from migrator.session.file_facts import collect_files, with_digests
from migrator.session.preflight import (
    collect_host,
    compare,
    file_problem,
    taken,
    without_congestion,
)

A = m.HostFacts("a", "6.18", "x86_64", "Intel", "Xeon", frozenset({"avx2", "avx512f"}), 2696, "user")
B = msgspec.structs.replace(A, host="b")
FILE = FileFact("/usr/bin/redis", 100, 0o100755, 5, "ab" * 20, False)
LOG = FileFact("/var/log/x", 100, 0o100644, 5, "", True)
SURVEY = Survey([7], 1, 1 << 30, [], frozenset({"avx2", "avx512f", "ibrs"}), 2696, "wp-async", 0, [])


def judge(
    here: m.HostFacts = B,
    files: dict[str, FileFact | None] | None = None,
    pids: list[int] | None = None,
    told: list[FileFact] | None = None,
    **survey: Any,
) -> list[m.Reason]:
    proposal = m.Propose("test-0001", A, facts.Survey.of(replace(SURVEY, files=told or SURVEY.files, **survey)))
    return compare(proposal, here, files or {}, pids or [])[0]


def only(reasons: list[m.Reason]) -> m.Reason:
    (reason,) = reasons
    return reason


def test_an_equal_host_has_nothing_against_it() -> None:
    assert judge() == []


def test_what_will_not_be_quite_the_same_is_said_and_blocks_nothing() -> None:
    reason = only(judge(notes=[("pid 7 fd 3", "unix connections …")]))
    assert str(reason) == "pid 7 fd 3: unix connections …" and not reason.blocking


def test_a_processor_that_lacks_instructions_is_named_with_them() -> None:
    reason = only(judge(msgspec.structs.replace(B, cpu_features=frozenset({"avx2"}))))
    assert reason.blocking and "avx512f" in reason.problem and "ibrs" not in reason.problem


def test_another_size_of_the_extended_state_blocks() -> None:
    assert "2696" in only(judge(msgspec.structs.replace(B, xstate_size=832))).problem


def test_an_agent_that_would_confine_the_copy_blocks() -> None:
    every = (1 << 41) - 1
    assert judge(msgspec.structs.replace(B, cap_bounding=every), cap_bounding=every) == []
    reason = only(judge(msgspec.structs.replace(B, cap_bounding=every & ~(1 << 16)), cap_bounding=every))
    assert reason.blocking and "cap_sys_module" in reason.problem
    reason = only(judge(msgspec.structs.replace(B, confined="no_new_privs")))
    assert reason.blocking and "no_new_privs" in reason.problem


def test_a_directory_that_is_missing_or_a_file_blocks_unless_it_is_carried_along() -> None:
    folder = FileFact("/srv/data", 0, stat.S_IFDIR | 0o755, 0, "", False)
    file = FileFact("/srv/data/a", 3, stat.S_IFREG | 0o644, 1, "", False)
    other_mode, plain = replace(folder, mode=stat.S_IFDIR | 0o700), replace(folder, mode=stat.S_IFREG | 0o755)
    assert judge(files={"/srv/data": other_mode}, told=[folder]) == []
    assert "is missing on b" in str(only(judge(told=[folder])))
    assert "is something else" in only(judge(files={"/srv/data": plain}, told=[folder])).problem
    proposal = m.Propose("test-0001", A, facts.Survey.of(replace(SURVEY, files=[folder, file])), copy_files=True)
    assert compare(proposal, B, {}) == ([], ["/srv/data/a"])
    tree = [SyncTree("/srv")]
    proposal = msgspec.structs.replace(proposal, survey=facts.Survey.of(replace(SURVEY, files=[folder])), trees=tree)
    assert compare(proposal, B, {}) == ([], [])
    assert only(compare(msgspec.structs.replace(proposal, trees=[]), B, {})[0]).object == "/srv/data"


def test_a_kernel_with_another_vdso_blocks() -> None:
    a, b = msgspec.structs.replace(A, vdso="00"), msgspec.structs.replace(B, vdso="01")
    proposal = m.Propose("test-0001", a, facts.Survey.of(SURVEY))
    assert "vdso" in only(compare(proposal, b, {})[0]).problem
    assert compare(proposal, msgspec.structs.replace(b, vdso="00"), {})[0] == []
    assert compare(proposal, B, {})[0] == []  # nobody has looked


def test_a_limit_of_open_files_that_cannot_be_set_there_blocks() -> None:
    here = msgspec.structs.replace(B, nr_open=1 << 20)
    assert judge(here, most_files=1 << 20) == []
    assert "fs.nr_open" in only(judge(here, most_files=1 << 30)).problem


def test_a_congestion_control_that_is_not_there_blocks() -> None:
    assert without_congestion(["reno"], "b") == []
    reason = only(without_congestion(["reno", "none-such"], "b"))
    assert reason.blocking and "none-such" in reason.object


def test_another_architecture_is_all_that_needs_to_be_said() -> None:
    assert "aarch64" in only(judge(msgspec.structs.replace(B, machine="aarch64", xstate_size=1))).problem


def test_another_kernel_is_worth_knowing_but_no_obstacle() -> None:
    assert not only(judge(msgspec.structs.replace(B, kernel="6.12"))).blocking


def test_too_little_memory_is_told_in_mebibytes() -> None:
    reason = only(judge(msgspec.structs.replace(B, memory_available=512 << 20)))
    assert reason.blocking and "512 MiB available" in reason.problem


def test_a_taken_pid_is_told_with_the_remedy() -> None:
    reason = only(judge(pids=[7]))
    assert reason.object == "pid 7" and "container" in reason.remedy


def test_a_pid_beyond_the_limit_is_told_with_the_sysctl() -> None:
    reason = only(judge(msgspec.structs.replace(B, pid_max=32768), wanted_pids=[40000]))
    assert reason.remedy == "sysctl kernel.pid_max=40001 there"


def test_a_differing_file_blocks_unless_files_are_copied() -> None:
    proposal = m.Propose("test-0001", A, facts.Survey.of(replace(SURVEY, files=[FILE, LOG])))
    there: dict[str, FileFact | None] = {FILE.path: None, LOG.path: LOG}
    reasons, wanted = compare(proposal, B, there)
    assert only(reasons).object == FILE.path and wanted == []
    proposal = msgspec.structs.replace(proposal, copy_files=True)
    assert compare(proposal, B, there) == ([], [FILE.path])


@pytest.mark.parametrize(
    ("there", "here", "problem"),
    [
        (FILE, FILE, ""),
        (FILE, None, "is missing"),
        (FILE, replace(FILE, mtime_ns=9), ""),
        (FILE, replace(FILE, mode=0o100644), "has mode"),
        (FILE, replace(FILE, build_id="cd" * 20), "another build"),
        (FILE, replace(FILE, build_id=""), "another file"),
        (FILE, replace(FILE, size=99), "has 99 bytes"),
        (replace(LOG, writable=False, digest="x"), replace(LOG, writable=False, digest="y"), "other contents"),
        (LOG, replace(LOG, size=150, mtime_ns=9), ""),  # the same file, written to meanwhile
        (LOG, replace(LOG, size=50), "is older"),
        (LOG, replace(LOG, mtime_ns=1), "is older"),
    ],
)
def test_files_are_compared_by_what_identifies_them(there: FileFact, here: FileFact | None, problem: str) -> None:
    found = file_problem(there, here)
    assert found.startswith(problem) if problem == "" else problem in found
    assert bool(found) == bool(problem)


def test_facts_of_files_come_from_this_host(tmp_path: Path) -> None:
    program = tmp_path / "bin/program"
    program.parent.mkdir()
    shutil.copy(os.path.realpath(sys.executable), program)
    plain = tmp_path / "plain"
    plain.write_text("text")
    facts = [FileFact(path, 0, 0, 0, "", False, "wanted") for path in ("/bin/program", "/plain", "/gone")]
    found = collect_files(facts, root=str(tmp_path))
    assert found["/gone"] is None
    copied, text = found["/bin/program"], found["/plain"]
    assert copied is not None and copied.size == program.stat().st_size
    assert text is not None and (text.size, text.build_id, len(text.digest)) == (4, "", 64)


def test_only_files_that_nothing_else_identifies_get_a_digest(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("text")
    plain = FileFact("/f", 4, 0o100644, 0, "", False)
    same, elf, written, large = with_digests(
        [plain, replace(plain, build_id="ab"), replace(plain, writable=True), replace(plain, size=1 << 30)],
        root=str(tmp_path),
    )
    assert same.digest and not elf.digest and not written.digest and not large.digest


def test_pids_in_use_are_found() -> None:
    assert taken([1, os.getpid(), 2**22 + 5]) == [1, os.getpid()]


def test_the_facts_of_this_host_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIGRATOR_HOST", "here")
    facts = collect_host("user", [Capability("fly", False, "no wings")], 2696)
    assert facts.host == "here" and facts.abilities == {"fly": False}
    assert facts.memory_available > 0 and facts.pid_max > 0 and "sse2" in facts.cpu_features
    assert m.decode(m.encode(m.Verdict(facts))) == m.Verdict(facts)
