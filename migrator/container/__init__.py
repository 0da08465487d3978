"""Containers: commands in namespaces and a cgroup of their own, so that they can always be moved."""

from migrator.container.run import remove, run, stop, wait
from migrator.container.sandbox import Sandbox, prepare
from migrator.container.spec import ContainerSpec, Route, Tmpfs, spec_for
from migrator.container.state import Container, find, get, list_containers

__all__ = [
    "Container",
    "ContainerSpec",
    "Route",
    "Sandbox",
    "Tmpfs",
    "find",
    "get",
    "list_containers",
    "prepare",
    "remove",
    "run",
    "spec_for",
    "stop",
    "wait",
]
