"""Containers: commands in namespaces and a cgroup of their own, so that they can always be moved."""

from migrator.container.describe import Row, describe, obstacles, rows, tmpfs_paths
from migrator.container.lifecycle import remove, run, stop, wait
from migrator.container.sandbox import Sandbox, prepare
from migrator.container.spec import ContainerSpec, Route, Tmpfs, spec_for
from migrator.container.state import Container, find, get, list_containers

__all__ = [
    "Container",
    "ContainerSpec",
    "Route",
    "Row",
    "Sandbox",
    "Tmpfs",
    "describe",
    "find",
    "get",
    "list_containers",
    "obstacles",
    "prepare",
    "remove",
    "rows",
    "run",
    "spec_for",
    "stop",
    "tmpfs_paths",
    "wait",
]
