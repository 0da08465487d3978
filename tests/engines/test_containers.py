"""Containers as their users and the ones who move them see them."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from migrator import container as ct
from migrator.container import mounts, network, state
from migrator.container.lifecycle import StartFailed
from migrator.container.sandbox import SandboxError
from migrator.container.spec import ContainerSpec, Route, Tmpfs
from migrator.errors import UsageError
from migrator.linux.cgroup import Cgroup
from migrator.linux.namespaces import NamespaceError, identity, run_in

pytestmark = pytest.mark.root

NAME = f"ct-test-{os.getpid()}"


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MIGRATOR_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("MIGRATOR_LOG_DIR", str(tmp_path / "log"))
    yield
    for container in ct.list_containers():
        ct.stop(container.name, timeout=0.5)


def offline(*argv: str, name: str = NAME, **more: object) -> ContainerSpec:
    return ContainerSpec(name=name, argv=argv, bridge="", **more)  # type: ignore[arg-type]


def output(spec: ContainerSpec) -> str:
    container = ct.run(spec)
    assert ct.wait(container, timeout=10) == 0
    return Path(container.spec.log).read_text()


def test_the_command_is_process_1_in_namespaces_of_its_own() -> None:
    container = ct.run(offline("sleep", "100"))
    for kind in ("pid", "mnt", "ipc", "uts", "net", "cgroup"):
        assert identity(container.init_pid, kind) != identity(os.getpid(), kind)
    fields = Path(f"/proc/{container.init_pid}/status").read_text()
    assert [line.split()[-1] for line in fields.splitlines() if line.startswith("NSpid")] == ["1"]
    with Cgroup.at(container.cgroup) as group:
        assert group.pids() == [container.init_pid]


def test_it_sees_its_own_proc_host_name_session_and_nothing_inherited() -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    try:
        said = output(offline("sh", "-c", "hostname; ls /proc/self/fd; ps -eo pid,sid,comm; env | sort"))
    finally:
        os.close(read_end)
        os.close(write_end)
    lines = said.splitlines()
    assert lines[0] == NAME
    assert lines[1:5] == ["0", "1", "2", "3"]  # 3 is the directory that ls reads
    assert lines[6].split()[:2] == ["1", "1"]
    assert "sshd" not in said and "container=migrator" in said
    assert "MIGRATOR_STATE_DIR" not in said


def test_signals_are_as_a_new_program_expects_them() -> None:
    said = output(offline("cat", "/proc/self/status"))
    masks = [line.split() for line in said.splitlines() if line[:6] in ("SigBlk", "SigIgn", "SigCgt")]
    assert {int(mask, 16) for _, mask in masks} == {0}


def test_its_exit_status_is_told_as_a_shell_tells_it() -> None:
    assert ct.wait(ct.run(offline("sh", "-c", "exit 7")), timeout=10) == 7
    container = ct.run(offline("sleep", "100"))
    os.kill(container.init_pid, signal.SIGKILL)
    assert ct.wait(container, timeout=10) == 128 + signal.SIGKILL


def test_a_command_that_does_not_exist_leaves_nothing_behind() -> None:
    with pytest.raises(StartFailed, match="no-such-command"):
        ct.run(offline("no-such-command"))
    assert ct.list_containers() == []
    assert not list(Path("/sys/fs/cgroup").glob(f"**/migrator/{state.cgroup_name(NAME)}"))


def test_a_name_is_given_once_and_free_again_when_its_container_has_exited() -> None:
    first = ct.run(offline("sleep", "100"))
    with pytest.raises(UsageError, match="already lives"):
        ct.run(offline("sleep", "100"))
    os.kill(first.init_pid, signal.SIGKILL)
    ct.wait(first, timeout=10)
    second = ct.run(offline("sleep", "100"))
    assert second.init_pid != first.init_pid


def test_stop_lets_a_handler_finish_and_kills_what_has_none() -> None:
    polite = ct.run(offline("sh", "-c", "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.02; done"))
    log = Path(polite.spec.log)
    while "up" not in log.read_text():
        time.sleep(0.01)
    ct.stop(NAME)
    assert "bye" in log.read_text()
    ct.run(offline("sleep", "100"))
    ct.stop(NAME)
    assert ct.find(NAME) is None
    with pytest.raises(UsageError, match="no container"):
        ct.stop(NAME)


def test_it_lives_on_when_its_starter_is_gone() -> None:
    code = f"""
from migrator.container import ContainerSpec, run
print(run(ContainerSpec(name={NAME!r}, argv=("sleep", "100"), bridge="")).init_pid)
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    container = ct.get(NAME)
    assert container.init_pid == int(said)
    assert container.alive


def test_listings_tell_running_frozen_and_exited() -> None:
    container = ct.run(offline("sh", "-c", "sleep 100 & wait"))
    time.sleep(0.1)
    (row,) = ct.rows()
    assert (row.name, row.state, row.pids) == (NAME, "running", 2)
    assert row.memory > 100_000
    assert 0 <= row.age < 30
    with Cgroup.at(container.cgroup) as group:
        group.freeze()
        assert ct.rows()[0].state == "frozen"
        group.thaw()
    os.kill(container.init_pid, signal.SIGKILL)
    ct.wait(container, timeout=10)
    assert (ct.rows()[0].state, ct.rows()[0].pids) == ("exited", 0)
    ct.remove(NAME)
    assert ct.rows() == []


def test_a_reused_pid_is_not_taken_for_the_container() -> None:
    container = ct.run(offline("sleep", "100"))
    assert not state.is_alive(container.init_pid, container.start_time + 1)
    assert state.of_pid(container.init_pid) is not None
    assert state.of_pid(os.getpid()) is None


def host_mounts() -> list[str]:
    """Of this host, but for networks of other tests: they come and go meanwhile, and `offline()` makes none."""
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if " /run/netns/" not in line]


def test_mounts_of_the_container_do_not_show_on_the_host(tmp_path: Path) -> None:
    before = host_mounts()
    place = tmp_path / "own"
    container = ct.run(offline("sh", "-c", f"echo x > {place}/file; sleep 100", tmpfs=(Tmpfs(str(place)),)))
    time.sleep(0.1)
    assert host_mounts() == before
    assert run_in(container.init_pid, {"mnt"}, (place / "file").read_text) == "x\n"
    assert not list(place.iterdir())


def test_a_root_of_its_own_hides_the_hosts(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name in ("bin", "usr", "lib", "lib64"):
        if Path("/", name).exists():
            (root / name).symlink_to("/host/" + name)
    (root / "host").mkdir()
    # The container's programs come from the host by a bind mount below its root.
    subprocess.run(["mount", "--bind", "/", str(root / "host")], check=True)
    try:
        said_by = ct.run(
            offline("sh", "-c", "ls /; ls /dev; echo $$; mount; echo done", root=str(root), log="/log/out")
        )
        assert ct.wait(said_by, timeout=10) == 0
        said = (root / "log" / "out").read_text()
    finally:
        subprocess.run(["umount", str(root / "host")], check=True)
    words = said.split()
    assert "done" in words and "null" in words and "1" in words
    assert str(tmp_path) not in said.split("\n1\n")[0]


def test_the_same_spec_gives_the_same_addresses_everywhere(two_hosts: object) -> None:
    spec = ContainerSpec(
        name="ct-net",
        argv=("sleep", "100"),
        bridge="br0",
        addresses=("10.77.0.60/24", "10.77.0.61/32", "fd77::60/64"),
        routes=(Route("10.5.0.0/16"), Route("default", "10.77.0.1"), Route("default", "fd77::1", 7)),
        loopback=("10.9.9.9/32",),
        hostname="the-name",
    )
    seen = []
    for host in (two_hosts.a, two_hosts.b):  # type: ignore[attr-defined]
        with host.inside():
            container = ct.run(spec)
            assert len(container.spec.veth) <= 15
            seen.append((network.read(container.init_pid), ct.describe(container)))
    (one, described), (two, _) = seen
    assert replace(one, neighbours=()) == replace(two, neighbours=())
    assert set(one.addresses) == set(spec.addresses)
    assert set(one.routes) == set(spec.routes)
    assert described.hostname == "the-name"
    again = ContainerSpec.from_json(described.to_json())
    assert again == described


@pytest.mark.parametrize("read", [ct.describe, ct.obstacles, ct.tmpfs_paths])
def test_a_container_that_ends_while_it_is_described_is_said_to_have_ended(
    read: Callable[[ct.Container], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    container = ct.run(offline("sleep", "100"))
    genuine = mounts.mounts

    def exiting(pid: int | str = "self") -> list[mounts.Mount]:
        if pid == container.init_pid:
            os.kill(container.init_pid, signal.SIGKILL)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), f"/proc/{pid}/mountinfo")
        return genuine(pid)

    monkeypatch.setattr(mounts, "mounts", exiting)
    with pytest.raises(UsageError, match=f"container {NAME} has ended"):
        read(container)


def test_what_cannot_be_read_of_a_living_container_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    container = ct.run(offline("sleep", "100"))

    def failing(pid: int | str = "self") -> list[mounts.Mount]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(mounts, "mounts", failing)
    with pytest.raises(OSError, match="Too many open files"):
        ct.describe(container)


def test_a_container_is_described_as_it_is_now(two_hosts: object) -> None:
    with two_hosts.a.inside():  # type: ignore[attr-defined]
        spec = ct.spec_for("ct-now", ["sleep", "100"], bridge="br0", ip=["10.77.0.62/24"])
        container = ct.run(spec)

        def change() -> None:
            for command in (
                "ip addr del 10.77.0.62/24 dev eth0",
                "ip addr add 10.77.0.63/24 dev eth0",
                "ip route add default via 10.77.0.2",
                "ip link set eth0 mtu 1400",
                "hostname renamed",
            ):
                subprocess.run(command.split(), check=True)

        run_in(container.init_pid, {"net", "uts"}, change)
        now = ct.describe(container.init_pid)
        assert ct.obstacles(container) == []
        run_in(
            container.init_pid,
            {"net"},
            lambda: subprocess.run(["ip", "link", "add", "extra", "type", "bridge"], check=True) and None,
        )
        assert any("extra" in reason for reason in ct.obstacles(container))
    assert (now.addresses, now.hostname, now.mtu) == (("10.77.0.63/24",), "renamed", 1400)
    assert now.routes == (Route("default", "10.77.0.2"),)


def test_the_address_of_a_bridge_stays_whatever_is_plugged_into_it(two_hosts: object) -> None:
    """Its peers know it; of random addresses one in 64 is greater than those of our ports."""
    with two_hosts.a.inside():  # type: ignore[attr-defined]
        subprocess.run(["ip", "link", "set", "uplink", "address", "fe:ff:ff:00:00:01"], check=True)
        assert address_of("br0") == "fe:ff:ff:00:00:01"
        ct.run(ct.spec_for("ct-plug", ["sleep", "100"], bridge="br0", ip=["10.77.0.66/24"]))
        assert address_of("br0") == "fe:ff:ff:00:00:01"


def address_of(link: str) -> str:
    shown = subprocess.run(["ip", "-o", "link", "show", link], capture_output=True, text=True, check=True).stdout
    return shown.split("link/ether ")[1].split()[0]


def test_a_port_is_shut_until_the_sandbox_is_opened(two_hosts: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ct.Sandbox, "open_port", lambda self: None)
    with two_hosts.b.inside():  # type: ignore[attr-defined]
        spec = ct.spec_for("ct-shut", ["sleep", "100"], bridge="br0", ip=["10.77.0.64/24", "fd77::64/64"])
        ct.run(spec)
        time.sleep(1.2)  # IPv6 has had the time to speak up
        seen = subprocess.run(["bridge", "fdb", "show"], capture_output=True, text=True, check=True).stdout
        link = subprocess.run(["bridge", "link"], capture_output=True, text=True, check=True).stdout
    assert spec.effective_mac not in seen, "the switch has learned an address that is not here yet"
    assert any("ve-ct-shut" in line and "state disabled" in line for line in link.splitlines())


def test_a_bad_address_leaves_nothing_behind(two_hosts: object) -> None:
    with two_hosts.a.inside():  # type: ignore[attr-defined]
        spec = ct.spec_for("ct-bad", ["sleep", "100"], bridge="br0", ip=["10.77.0.65/24"], gateway="172.30.0.1")
        with pytest.raises((network.NetworkError, SandboxError), match=r"172\.30\.0\.1"):
            ct.run(spec)
        with pytest.raises(UsageError, match="no bridge"):
            ct.run(ct.spec_for("ct-bad", ["sleep", "100"], bridge="br7"))
        assert ct.list_containers() == []
        links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert "ve-ct-bad" not in links


def test_a_container_needs_an_init_of_its_own_to_be_prepared() -> None:
    child = subprocess.Popen(["sleep", "100"])
    try:
        with pytest.raises(UsageError, match="shares its pid namespace"):
            ct.prepare(offline("x"), child.pid)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_what_fails_in_another_namespace_is_raised_here() -> None:
    container = ct.run(offline("sleep", "100"))

    def missing() -> None:
        raise FileNotFoundError(2, "nothing", "there")

    class Odd(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__("odd")

    def odd() -> None:
        raise Odd(1, 2)

    with pytest.raises(FileNotFoundError):
        run_in(container.init_pid, {"mnt"}, missing)
    with pytest.raises(NamespaceError, match="odd"):
        run_in(container.init_pid, {"net"}, odd)
    with pytest.raises(NamespaceError, match="died"):
        run_in(container.init_pid, {"uts"}, lambda: os._exit(3))
    assert run_in(container.init_pid, {"pid", "mnt"}, os.getppid) == 0


def test_starting_leaves_the_caller_where_it_was() -> None:
    before = {kind: identity(os.getpid(), kind) for kind in ("pid", "mnt", "net", "uts", "ipc", "cgroup")}
    ct.run(offline("sleep", "100"))
    assert {kind: identity(os.getpid(), kind) for kind in before} == before
    assert os.readlink("/proc/self/ns/pid_for_children") == os.readlink("/proc/self/ns/pid")


def test_a_command_that_ends_at_once_takes_its_network_along_and_is_no_error(two_hosts: object) -> None:
    with two_hosts.a.inside():  # type: ignore[attr-defined]
        for status in (0, 3):
            container = ct.run(ct.spec_for("ct-brief", ["sh", "-c", f"exit {status}"], bridge="br0"))
            assert ct.wait(container, timeout=10) == status
        links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
        assert "ve-ct-brief" not in links or ct.find("ct-brief") is not None


def test_a_port_that_cannot_be_opened_of_a_living_container_is_an_error(
    two_hosts: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanished(ip: object, index: int, state: int) -> None:
        raise OSError(errno.ENODEV, "open bridge port", "link 7")

    with two_hosts.a.inside():  # type: ignore[attr-defined]
        shut = network.set_port
        monkeypatch.setattr(network, "set_port", lambda *given: (vanished if given[2] else shut)(*given))
        with pytest.raises(OSError, match="open bridge port"):
            ct.run(ct.spec_for("ct-lives", ["sleep", "100"], bridge="br0"))
        assert ct.list_containers() == []


def test_neighbours_of_an_address_that_was_used_before_learn_whose_it_is_now(two_hosts: object) -> None:
    client = two_hosts.client  # type: ignore[attr-defined]
    addresses = ("10.77.0.67", "fd77::67")
    client.run(["ip", "addr", "replace", "fd77::100/64", "dev", "uplink", "nodad"])

    def await_neighbour(address: str, mac: str) -> None:
        deadline = time.monotonic() + 10
        while mac not in (known := client.run(["ip", "neigh", "show", address]).stdout):
            assert time.monotonic() < deadline, known
            time.sleep(0.01)

    for name in ("ct-old", "ct-new"):
        with two_hosts.a.inside():  # type: ignore[attr-defined]
            container = ct.run(ct.spec_for(name, ["sleep", "100"], bridge="br0", ip=["10.77.0.67/24", "fd77::67/64"]))
        for address in addresses:
            if name == "ct-old":
                with client.inside(), socket.socket(AF[":" in address], socket.SOCK_DGRAM) as peer:
                    peer.sendto(b"who is it?", (address, 7))
            # The new one is known without a question.
            await_neighbour(address, container.spec.effective_mac)
        with two_hosts.a.inside():  # type: ignore[attr-defined]
            ct.stop(name, timeout=0.5)


AF = {False: socket.AF_INET, True: socket.AF_INET6}
