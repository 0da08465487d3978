"""The direction of imports: cli, agent -> api -> host -> session -> engine -> linux, image; session -> transport."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("migrator", "transport", "policies")

# What everybody may import: errors say where the workload is now, texts are for people.
COMMON = ("migrator.errors", "migrator.text")
# What each layer may import besides that and itself.
ALLOWED: dict[str, tuple[str, ...]] = {
    "migrator.errors": (),
    "migrator.text": (),
    "migrator.image": (),
    "migrator.linux": (),
    "migrator.container": ("migrator.linux",),
    "migrator.engine": ("migrator.image", "migrator.linux"),
    "migrator.host": (
        "migrator.container",
        "migrator.engine.base",
        "migrator.engine.select",
        "migrator.fleet.fencing",
        "migrator.linux",
        "migrator.protocol",
        "migrator.recovery",
        "migrator.session",
        "transport",
    ),
    "migrator.api": (
        "migrator.container",
        "migrator.engine.base",
        "migrator.engine.select",
        "migrator.host",
        "migrator.image",
        "migrator.linux",
        "migrator.model",
        "migrator.protocol",
        "migrator.recovery",
        "migrator.runtime",
        "migrator.session",
    ),
    "migrator.agent": (
        "migrator.api",
        "migrator.engine.select",
        "migrator.fleet",
        "migrator.host",
        "migrator.metrics",
        "migrator.model",
        "migrator.protocol",
        "migrator.recovery",
        "migrator.runtime",
        "migrator.session.serve",
        "transport",
    ),
    "migrator.cli": (
        "migrator.agent",
        "migrator.api",
        "migrator.fleet",
        "migrator.host",
        "migrator.image.render",
        "migrator.model",
        "policies",
        "transport.keys",
    ),
    "migrator.fleet": (
        "migrator.api",
        "migrator.host",
        "migrator.metrics",
        "migrator.model",
        "migrator.protocol",
        "migrator.runtime",
        "policies",
        "transport",
    ),
    "migrator.session": (
        "migrator.engine.base",
        "migrator.filesync",
        "migrator.linux",
        "migrator.model",
        "migrator.protocol",
        "migrator.recovery",
        "migrator.runtime",
    ),
    "migrator.filesync": ("migrator.engine.base", "migrator.linux", "migrator.protocol", "migrator.runtime"),
    "migrator.recovery": ("migrator.linux", "migrator.protocol"),
    "migrator.protocol": ("migrator.engine.base",),
    "migrator.runtime": ("migrator.linux",),
    "migrator.model": ("migrator.engine.base",),
    "migrator.metrics": ("migrator.metrics_port", "migrator.model"),
    "migrator.metrics_port": (),
    "transport": (),
    "policies": (),
}
# Everybody may be imported by these: the package's own door, and what is for tests.
NO_RULE = ("migrator", "migrator.__main__", "migrator.testing")
# These call the API by its public names, as other programs do: `import migrator`.
CALLERS = ("migrator.cli", "migrator.agent", "migrator.fleet", "migrator.testing")
# Pure layers: bytes and values in, bytes and values out.
NO_IO = ("migrator.image", "migrator.protocol", "policies")
IO_MODULES = {"asyncio", "socket", "subprocess", "threading", "mmap", "ctypes", "fcntl", "select"}


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, name: str) -> Iterator[str]:
    """The full names of all that a module imports, wherever in it, relative ones made absolute.

    What only a type checker sees counts too: a layer that needs to know the names of a higher one
    knows too much.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if base in PACKAGES or inner in modules() else base


def below(name: str, layers: tuple[str, ...] | dict[str, tuple[str, ...]]) -> str | None:
    """The layer that a module belongs to."""
    return next((layer for layer in layers if name == layer or name.startswith(f"{layer}.")), None)


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_only_its_own_layer_and_those_below(name: str) -> None:
    layer = below(name, ALLOWED)
    if layer is None:
        assert name in NO_RULE[:2] or below(name, NO_RULE[2:]), f"{name} belongs to no layer: give it a rule"
        return
    ours = {imported for imported in imports(modules()[name], name) if imported.split(".")[0] in PACKAGES}
    if below(name, CALLERS) is not None:
        ours.discard("migrator")
    wrong = [imported for imported in sorted(ours) if below(imported, (layer, *COMMON, *ALLOWED[layer])) is None]
    assert not wrong, f"{name} must not import {', '.join(wrong)}: {layer} knows {ALLOWED[layer]}"


@pytest.mark.parametrize("name", sorted(name for name in modules() if below(name, NO_IO)))
def test_a_pure_module_does_no_input_or_output(name: str) -> None:
    wrong = IO_MODULES.intersection(imported.split(".")[0] for imported in imports(modules()[name], name))
    assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


def test_the_session_does_not_know_who_drives_it() -> None:
    drivers = ("migrator.cli", "migrator.agent", "migrator.testing")
    for name, path in modules().items():
        if not name.startswith("migrator.session"):
            continue
        wrong = [imported for imported in imports(path, name) if below(imported, drivers)]
        assert not wrong, f"{name} imports {', '.join(wrong)}"


@pytest.mark.parametrize("package", ["session", "filesync", "recovery", "protocol", "runtime"])
def test_no_module_is_too_long_to_be_read_in_one_sitting(package: str) -> None:
    long = {
        path.name: lines
        for path in (ROOT / "migrator" / package).glob("*.py")
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long


def test_only_the_selector_names_an_engine() -> None:
    of_itself = tuple(f"migrator.engine.{path.name}" for path in (ROOT / "migrator/engine").iterdir() if path.is_dir())
    for name, path in modules().items():
        if name == "migrator.engine.select" or below(name, of_itself):
            continue
        wrong = [imported for imported in imports(path, name) if below(imported, of_itself)]
        assert not wrong, f"{name} imports {', '.join(wrong)}: only the contract is for all"


def test_no_engine_imports_another() -> None:
    """What more than one needs stands in migrator/engine itself."""
    engines = [f"migrator.engine.{path.name}" for path in (ROOT / "migrator/engine").iterdir() if path.is_dir()]
    for name, path in modules().items():
        own = below(name, tuple(engines))
        wrong = [one for one in imports(path, name) if own and below(one, tuple(engines)) not in (None, own)]
        assert not wrong, f"{name} imports {', '.join(wrong)}"


def test_only_tests_import_the_test_kit() -> None:
    for name, path in modules().items():
        if name.startswith("migrator.testing"):
            continue
        wrong = [imported for imported in imports(path, name) if imported.startswith("migrator.testing")]
        assert not wrong, f"{name} imports {', '.join(wrong)}"


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        name
        for name, path in modules().items()
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def test_nothing_needs_a_package_that_is_not_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {
        requirement.split(">")[0].split("[")[0].replace("-", "_").lower()
        for group in (project["dependencies"], *project["optional-dependencies"].values())
        for requirement in group
    }
    known = declared | set(sys.stdlib_module_names) | set(PACKAGES)
    for name, path in modules().items():
        wrong = {imported.split(".")[0] for imported in imports(path, name)} - known
        assert not wrong, f"{name} imports {', '.join(sorted(wrong))}, which pyproject.toml does not name"
