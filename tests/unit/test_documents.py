"""What the documents name is there: files, tests, phases, fault points."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "kernel-patches").glob("*.md")]
ABBREVIATED = ("migrator", "migrator/engine/user", "migrator/engine", "migrator/image", "migrator/runtime", "")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md", "docs/adding-state.md", "docs/debugging.md"])
def test_paths_are_of_this_tree(name: str) -> None:
    text = (ROOT / name).read_text()
    for path in re.findall(r"`((?:[a-z_-]+/)+(?:[a-z_0-9-]+\.(?:py|c|h|md))?)`", text):
        assert any((ROOT / base / path).exists() for base in ABBREVIATED), path


def test_each_phase_is_measured_in_the_file_that_the_architecture_names() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| ([a-z, ]+) \| (?:source|destination) \| `([^`]+)` \|$", text, re.M)
    assert len(rows) >= 8
    for phases, path in rows:
        code = (ROOT / path).read_text()
        for phase in phases.split(", "):
            assert f'"{phase}"' in code, (phase, path)
