"""What an engine must know of the container that it saves."""

from __future__ import annotations

from migrator import container
from migrator.engine.base import SourceOptions
from migrator.errors import Refused


def source_options(found: container.Container | None) -> SourceOptions:
    """The options for a container, or for none. Raises Refused for what would be lost silently."""
    if found is None:
        return SourceOptions()
    reasons = container.obstacles(found)
    if reasons:
        raise Refused(reasons, hint="the container runs on")
    return SourceOptions(
        container=found.name,
        container_spec=container.describe(found).to_json(),
        container_cgroup=found.cgroup,
    )
