"""Live migration of running Linux processes and containers between hosts.

    import migrator

    result = await migrator.migrate("shop", "root@10.0.0.2", settings=migrator.MigrateSettings(max_downtime=0.02))

The names below are loaded when they are first used: `import migrator` itself takes no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from migrator.api import containers
    from migrator.api.image import checkpoint, restart, wait
    from migrator.api.image_convert import Converted, convert_image
    from migrator.api.image_info import read_info
    from migrator.api.local import Restarted, Saved
    from migrator.api.migration import check, migrate
    from migrator.api.recovery import decide, settle
    from migrator.api.results import CheckResult, SettleResult
    from migrator.api.settings import MigrateSettings
    from migrator.container.describe import Row
    from migrator.container.spec import ContainerSpec
    from migrator.engine.base import AfterCheckpoint
    from migrator.errors import (
        CheckpointFailed,
        Fate,
        ImageError,
        MigrationAborted,
        MigratorError,
        Refused,
        RestartFailed,
        TransportError,
        Undecided,
        UsageError,
    )
    from migrator.host import Login
    from migrator.model import Event, MigrationResult, Outcome

_HOMES = {
    "migrator.api": ("containers",),
    "migrator.api.image": ("checkpoint", "restart", "wait"),
    "migrator.api.image_convert": ("Converted", "convert_image"),
    "migrator.api.local": ("Restarted", "Saved"),
    "migrator.api.migration": ("check", "migrate"),
    "migrator.api.recovery": ("decide", "settle"),
    "migrator.api.results": ("CheckResult", "SettleResult"),
    "migrator.api.settings": ("MigrateSettings",),
    "migrator.container.describe": ("Row",),
    "migrator.container.spec": ("ContainerSpec",),
    "migrator.engine.base": ("AfterCheckpoint",),
    "migrator.errors": (
        "CheckpointFailed",
        "Fate",
        "ImageError",
        "MigrationAborted",
        "MigratorError",
        "Refused",
        "RestartFailed",
        "TransportError",
        "Undecided",
        "UsageError",
    ),
    "migrator.host": ("Login",),
    "migrator.api.image_info": ("read_info",),
    "migrator.model": ("Event", "MigrationResult", "Outcome"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AfterCheckpoint",
    "CheckResult",
    "CheckpointFailed",
    "ContainerSpec",
    "Converted",
    "Event",
    "Fate",
    "ImageError",
    "Login",
    "MigrateSettings",
    "MigrationAborted",
    "MigrationResult",
    "MigratorError",
    "Outcome",
    "Refused",
    "RestartFailed",
    "Restarted",
    "Row",
    "Saved",
    "SettleResult",
    "TransportError",
    "Undecided",
    "UsageError",
    "check",
    "checkpoint",
    "containers",
    "convert_image",
    "decide",
    "migrate",
    "read_info",
    "restart",
    "settle",
    "wait",
]


def __getattr__(name: str) -> Any:
    import importlib

    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if home == "migrator.api":
        return importlib.import_module(f"{home}.{name}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
