"""What a fuzzer has done, and what it has found."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """`ends`: how many inputs came to which end. `found`: what must not be, with the seed that makes it again."""

    inputs: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    found: list[str] = field(default_factory=list)

    def note(self, end: str) -> None:
        self.inputs += 1
        self.ends[end] += 1

    def json(self) -> str:
        return json.dumps({"inputs": self.inputs, "ends": dict(self.ends.most_common()), "found": self.found})

    @classmethod
    def of(cls, text: str) -> Counts:
        read = json.loads(text)
        return cls(read["inputs"], Counter(read["ends"]), read["found"])

    def __str__(self) -> str:
        ends = ", ".join(f"{end} {count}" for end, count in self.ends.most_common())
        return "\n".join([f"{self.inputs} inputs: {ends}", *(f"FOUND {one}" for one in self.found)])
