"""The Debian package: built here, installed without a network into a copy of this system, used, and removed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.timeout(500)]

# In a mount and network namespace of its own: the system is an overlay that is thrown away, and there is no network.
_INSIDE = """
set -eu
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o lowerdir=/,upperdir="$1/upper",workdir="$1/work" "$1/root"
cp "$2" "$1/root/migrator.deb"
for part in proc sys dev; do mount --rbind /$part "$1/root/$part"; done
mount -t tmpfs tmpfs "$1/root/run"
mount -t tmpfs tmpfs "$1/root/tmp"
exec chroot "$1/root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root sh -eu -c "$3"
"""


def inside(package: Path, tmp_path: Path, script: str) -> str:
    """Run a script as root where the package lies in /migrator.deb; what it prints."""
    done = subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-c", _INSIDE, "sh", str(tmp_path), str(package), script],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def life(package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What is seen as the package is installed, used and purged: lines, by the part of its life."""
    text = inside(
        package,
        tmp_path_factory.mktemp("root"),
        """
        dpkg -i /migrator.deb >&2
        echo == started
        find /etc/systemd -name 'migrator*'
        echo == installed
        dpkg -s migrator | grep '^Status'
        migrator --help | grep -c 'migrate\\|settle\\|agent'
        migrator keygen /etc/migrator/host_key 2> /dev/null
        migrator settle
        PYTHONPATH=/nonexistent /usr/bin/python3 -IS -c '
import sys; sys.path.insert(0, "/opt/migrator/lib")
import httpx, migrator.fleet.etcd, migrator.fleet.prometheus
print(migrator.__file__)'
        getent passwd migrator | cut -d: -f1
        systemd-analyze verify --man=no /usr/lib/systemd/system/migrator-*.service
        ls /usr/share/man/man1/migrator-agent.1.gz
        mkdir -p /var/lib/migrator/journal; : > /var/lib/migrator/journal/x.source.journal
        dpkg --purge migrator >&2
        echo == purged
        find /opt /usr/bin /usr/lib/systemd /usr/lib/sysusers.d -name 'migrator*'
        ls /etc/migrator /var/lib/migrator/journal
        """,
    )
    parts = (part.partition("\n") for part in text.split("== ")[1:])
    return {name: seen.splitlines() for name, _, seen in parts}


def test_it_installs_without_a_network_and_all_commands_are_there(life: dict[str, list[str]]) -> None:
    found = life["installed"]
    assert found[0] == "Status: install ok installed"
    assert int(found[1]) >= 3
    assert found[2].startswith("ssh-ed25519 ")
    assert found[3] == "nothing is open"
    assert found[4] == "/opt/migrator/lib/migrator/__init__.py"
    assert found[5] == "migrator"
    assert "migrator-agent.1" in found[-1]


def test_installing_starts_nothing(life: dict[str, list[str]]) -> None:
    assert life["started"] == []


def test_removing_leaves_keys_and_journals_and_no_program(life: dict[str, list[str]]) -> None:
    found = [line for line in life["purged"] if line]
    assert found == ["/etc/migrator:", "host_key", "host_key.pub", "/var/lib/migrator/journal:", "x.source.journal"]


def test_everything_in_the_package_belongs_to_root_and_nobody_else_may_write_it(package: Path) -> None:
    listing = subprocess.run(
        ["dpkg-deb", "-c", package], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(listing) > 500
    for line in listing:
        mode, owner, *_ = line.split()
        assert owner == "root/root", line
        assert mode[0] == "l" or (mode[5] != "w" and mode[8] != "w" and "s" not in mode), line


def test_the_test_kit_is_not_in_it(package: Path) -> None:
    listing = subprocess.run(["dpkg-deb", "-c", package], capture_output=True, text=True, check=True).stdout
    assert "migrator/testing" not in listing
    assert "migrator/fleet/store.py" in listing
