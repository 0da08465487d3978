"""What a service passes on to what it restores."""

from __future__ import annotations

import os

import pytest

from migrator import host
from migrator.errors import UsageError
from migrator.linux import confinement

HOST = """\
29 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 29 0:21 / /proc rw,nosuid shared:2 - proc proc rw
31 29 0:30 / /tmp rw shared:3 - tmpfs tmpfs rw
"""
# the same with other ids, and as slaves: what a unit without any setting but PrivateMounts= has
SAME = "".join(f"1{line}" for line in HOST.replace(" 29 ", " 129 ").replace("shared:", "master:").splitlines(True))


@pytest.mark.parametrize(
    ("mounts", "differ"),
    [
        (SAME, []),
        (SAME + "150 131 254:0 /private/tmp /tmp rw,relatime master:1 - ext4 /dev/vda rw\n", ["/tmp"]),
        (SAME.replace("/ rw,relatime", "/ ro,relatime"), ["/"]),
        (SAME.replace("131 129 0:30 / /tmp", "131 129 0:99 / /tmp"), ["/tmp"]),
        ("".join(SAME.splitlines(keepends=True)[:2]), ["/tmp"]),
    ],
    ids=["the same", "one more", "read-only", "another", "one less"],
)
def test_mounts_that_differ_are_told_by_where_they_are(mounts: str, differ: list[str]) -> None:
    assert confinement.differing(HOST, mounts) == differ


def test_what_is_mounted_while_one_looks_makes_no_other_namespace() -> None:
    assert confinement.differing(HOST, HOST + "32 29 0:31 / /mnt rw shared:4 - tmpfs tmpfs rw\n") is None


def test_an_agent_that_somebody_starts_by_hand_may_have_mounts_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getppid", lambda: 4711)
    monkeypatch.setattr(confinement.procfs, "read_text", lambda path: HOST if path == "/proc/1/mountinfo" else SAME)
    assert confinement.own_mounts() is None


def test_a_service_with_mounts_of_its_own_is_refused_with_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getppid", lambda: 1)
    host.check_mounts()
    monkeypatch.setattr(confinement.procfs, "read_text", lambda path: HOST if path == "/proc/1/mountinfo" else "")
    with pytest.raises(UsageError, match=r"of its own: /, /proc, /tmp differ; .* not see the files of this host"):
        host.check_mounts()
