"""What `make demo-web` shows: nobody of thousands fails, and the picture tells both hosts' part in the pause."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]


def test_the_demonstration_of_short_connections_ends_with_its_picture(tmp_path: Path) -> None:
    picture = tmp_path / "web.svg"
    argv = [sys.executable, str(ROOT / "tools/demo_web.py"), "--clients", "4", "--picture", str(picture)]
    told = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    assert " 0 failed; " in told.stdout
    words = [e.text or "" for e in ElementTree.parse(picture).iter() if e.tag.endswith("text")]
    assert "A web server moves to another host: nobody waits longer than" in " ".join(words)
    assert {"on the source", "on the destination", "The whole migration", "The longest wait, magnified"} <= set(words)
