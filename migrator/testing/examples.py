"""The programs in the documents, to be run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

DOCUMENTS = Path(__file__).resolve().parents[2] / "docs"


def example(document: str, name: str, folder: Path) -> Path:
    """Write the program `name` of docs/`document` to `folder`: the block whose first line says `: NAME …`."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", (DOCUMENTS / document).read_text(), re.DOTALL)
    (code,) = (block for block in blocks if f": {name} " in block.split("\n", 1)[0])
    path = folder / name
    path.write_text(code)
    return path
