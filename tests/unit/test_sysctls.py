"""Sysctls come with a specification, which is hostile: whatever it says stays within the namespaces of the copy."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from migrator.container import sysctls
from migrator.container.spec import ContainerSpec
from migrator.errors import UsageError
from migrator.linux.namespaces import run_in

pytestmark = pytest.mark.root


def _all() -> dict[str, str]:
    return sysctls._read_here(sysctls._names_here())


@pytest.fixture
def namespaces() -> Iterator[int]:
    with subprocess.Popen(
        ["unshare", "--net", "--ipc", "--uts", "sh", "-c", "echo; exec sleep 1000"], stdout=-1
    ) as one:
        assert one.stdout is not None
        one.stdout.readline()
        yield one.pid
        one.kill()


def _write_all() -> int:
    """Give each of them another value, where the kernel takes one; how many."""
    written = 0
    for name, value in _all().items():
        first, *rest = value.split() or [""]
        more = [" ".join([str(int(first) + 1), *rest])] if first.isdigit() else []
        for other in ("other", "1" if value == "0" else "0", *more):
            try:
                sysctls._put_here({name: other})
            except OSError:
                continue
            written += 1
            break
    return written


def test_none_of_them_reaches_another_namespace(namespaces: int) -> None:
    before = _all()
    theirs = run_in(namespaces, sysctls.KINDS, _all)
    assert run_in(namespaces, sysctls.KINDS, _write_all) > 150
    after = run_in(namespaces, sysctls.KINDS, _all)
    assert sum(theirs[name] != after.get(name) for name in theirs) > 150
    assert _all() == before


@pytest.mark.parametrize(
    "name",
    [
        "kernel/core_pattern",
        "kernel/hostname",
        "vm/overcommit_memory",
        "fs/protected_symlinks",
        "net/netfilter/nf_conntrack_max",
        "net/ipv4/../../kernel/core_pattern",
        "net/ipv4/conf/../../../kernel/core_pattern",
        "net/ipv4/conf/eth1/forwarding",
        "net/ipv4/neigh/eth0/../../conf/all/forwarding",
        "net/ipv4/neigh/default/gc_thresh1",
        "/proc/sys/kernel/core_pattern",
        "net/core/somaxconn\n",
        "net/core/",
        "net/core/..",
        "",
    ],
)
def test_what_is_no_sysctl_of_a_namespace_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="sysctl"):
        ContainerSpec(name="x", sysctls={name: "|/bin/sh"})
