"""The playbook: as Ansible reads it, and what it writes, read by the agents' own parsers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import asyncssh
import pytest

from transport.authorized_keys import parse

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOK = ROOT / "deploy/ansible/migrator.yml"
INVENTORY = ROOT / "deploy/ansible/inventory.example.ini"

# The tasks that write a file, with everything that other hosts would have said already known.
_RENDER = """
- hosts: {hosts}
  connection: local
  gather_facts: false
  become: false
  vars:
    ansible_python_interpreter: /usr/bin/python3
    agent_port: 7022
    others: "{{{{ groups['migrator_hosts'] | difference([inventory_hostname]) }}}}"
  tasks:
"""


def test_ansible_understands_the_playbook() -> None:
    done = subprocess.run(
        ["ansible-playbook", "-i", INVENTORY, "-e", "package=x.deb", "--syntax-check", PLAYBOOK],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def blocks(path: str) -> str:
    """The task that writes `path`, as it is in the playbook."""
    text = PLAYBOOK.read_text()
    start = text.index(f"        path: {path}\n        create: true")
    begin = text.rindex("    - name:", 0, start)
    ends = [at for mark in ("\n    - name:", "\n- name:") if (at := text.find(mark, start)) > 0]
    return text[begin : min(ends, default=len(text))] + "\n"


@pytest.fixture
def rendered(tmp_path: Path) -> Path:
    """What the playbook writes on three hosts and a controller, each below a directory of its own."""
    hosts = {f"h{number}": asyncssh.generate_private_key("ssh-ed25519") for number in (1, 2, 3)}
    public = {name: key.export_public_key().decode().strip() for name, key in hosts.items()}
    variables = {
        name: {
            "agent_address": f"10.0.0.{name[1]}",
            "host_key": {"stdout": line},
            "user_key": {"stdout": line},
            "tree": f"{tmp_path}/{name}",
        }
        for name, line in public.items()
    }
    controller = {"controller_key": {"stdout": public["h1"]}, "tree": f"{tmp_path}/ctl"}
    inventory = {
        "migrator_hosts": {"hosts": variables},
        "migrator_controllers": {"hosts": {"ctl": controller}},
    }
    (tmp_path / "inventory.json").write_text(json.dumps(inventory))
    (tmp_path / "render.yml").write_text(
        _RENDER.format(hosts="migrator_hosts")
        + blocks("/etc/migrator/authorized_keys")
        + blocks("/root/.config/migrator/known_hosts")
        + _RENDER.format(hosts="migrator_controllers")
        + blocks("/var/lib/migrator-controller/.config/migrator/known_hosts")
    )
    text = (tmp_path / "render.yml").read_text()
    for path in ("/etc/migrator/", "/root/.config/migrator/", "/var/lib/migrator-controller/.config/migrator/"):
        text = text.replace(f"path: {path}", 'path: "{{ tree }}/"')
    text = text.replace('"{{ tree }}/"authorized_keys', '"{{ tree }}/authorized_keys"')
    text = text.replace('"{{ tree }}/"known_hosts', '"{{ tree }}/known_hosts"')
    text = text.replace("owner: migrator", "owner: root").replace("group: migrator", "group: root")
    (tmp_path / "render.yml").write_text(text)
    for name in (*hosts, "ctl"):
        (tmp_path / name).mkdir()
    for _ in range(2):  # the second run must change nothing
        done = subprocess.run(
            ["ansible-playbook", "-i", tmp_path / "inventory.json", tmp_path / "render.yml"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "changed=0" in done.stdout and "changed=1" not in done.stdout
    return tmp_path


def test_what_it_writes_lets_in_the_others_and_the_controllers(rendered: Path) -> None:
    keys = parse((rendered / "h1/authorized_keys").read_text())
    assert not keys.void
    assert [entry.rights for entry in keys.entries] == [{"receive"}, {"receive"}, {"observe", "send"}]
    for host, address in (("h2", "10.0.0.2"), ("h3", "10.0.0.3")):
        known = asyncssh.read_known_hosts(str(rendered / "ctl/known_hosts"))
        (trusted,) = asyncssh.match_known_hosts(known, address, "", 7022)[0]
        assert keys.rights(trusted, address, 0.0) == {"receive"}, host
        assert keys.rights(trusted, "10.0.0.99", 0.0) == frozenset()
    assert (rendered / "h1/authorized_keys").stat().st_mode & 0o777 == 0o600


def test_what_it_writes_makes_the_others_known(rendered: Path) -> None:
    known = asyncssh.read_known_hosts(str(rendered / "h1/known_hosts"))
    for number in (2, 3):
        assert len(asyncssh.match_known_hosts(known, f"10.0.0.{number}", "", 7022)[0]) == 1
    assert not asyncssh.match_known_hosts(known, "10.0.0.1", "", 7022)[0]
