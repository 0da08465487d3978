"""The C header and the tables of the specification, derived from the records.

    python -m migrator.image.document kernel-patches/include/uapi/linux/checkpoint_hdr.h docs/image-format.md

brings both up to date after a change of the records: declarations and tables are replaced or added in
place, everything around them is written by hand and left alone. Comments of fields are those of the
Python source.
"""

from __future__ import annotations

import enum
import inspect
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from migrator.image import codec, records
from migrator.image.codec import REGISTRY, Record, Struct

_COLUMNS = 100  # of a line of the header
_C_TYPES = {"B": "__u8", "H": "__u16", "I": "__u32", "Q": "__u64", "i": "__s32", "q": "__s64"}


def snake(name: str) -> str:
    """`VmaItem` as the kernel writes it: `vma_item`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def c_name(cls: type[Struct]) -> str:
    """The name of the struct that mirrors `cls`."""
    return f"ckpt_{'hdr_' if issubclass(cls, Record) else ''}{snake(cls.__name__)}"


def record_classes() -> list[type[Record]]:
    """Every record that has fields, by number."""
    return [cls for _, cls in sorted(REGISTRY.items()) if cls._members]


def modules() -> list[ModuleType]:
    """The modules that define records."""
    names = dict.fromkeys(cls.__module__ for cls in REGISTRY.values())
    return [sys.modules[name] for name in names]


def enums() -> list[type[enum.IntEnum] | type[enum.IntFlag]]:
    """Every enumeration that the records use."""
    return [
        value
        for module in modules()
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, (enum.IntEnum, enum.IntFlag))
        and value.__module__ == module.__name__
    ]


def declarations() -> Iterator[tuple[str, str]]:
    """(name, text) of every declaration of the C header, in an order that compiles."""
    numbers = [f"\tCKPT_HDR_{snake(cls.__name__).upper()} = {n}," for n, cls in sorted(REGISTRY.items())]
    yield "enum ckpt_hdr_type", _block("enum ckpt_hdr_type", numbers)
    for names in enums():
        name = f"enum ckpt_{snake(names.__name__)}"
        comments = field_comments(names)
        lines = [
            _commented(
                f"\tCKPT_{snake(names.__name__).upper()}_{item.name} = {_number(names, item)},",
                comments.get(item.name or "", ""),
            )
            for item in names
        ]
        yield name, _block(name, lines)
    for cls in (*codec.items(), *record_classes()):
        name = f"struct {c_name(cls)}"
        comments = field_comments(cls)
        lines = ["\tstruct ckpt_hdr h;"] if issubclass(cls, Record) else []
        for member in cls._members:
            lines.append(_commented(f"\t{_C_TYPES[member.code]} {member.name};", comments.get(member.name, "")))
        yield name, _block(name, lines, " __attribute__((aligned(8)))")


def tables() -> Iterator[tuple[str, str]]:
    """(heading, text) of every section of the specification that describes fields or values."""
    for cls in record_classes():
        yield f"{cls.TYPE} {cls.__name__}", _field_table(cls)
    for item in codec.items():
        yield f"Item {item.__name__}", _field_table(item)
    for names in enums():
        comments = field_comments(names)
        rows = ["| Name | Value | Meaning |", "|---|---|---|"]
        for value in names:
            rows.append(f"| `{value.name}` | {_number(names, value)} | {comments.get(value.name or '', '')} |")
        yield f"Values {names.__name__}", "\n".join(rows)


def refresh_header(text: str) -> str:
    """`text` with every declaration as the records have it; what is not there goes ahead of the last line."""
    for name, block in declarations():
        found = re.compile(rf"^{name} \{{\n.*?^\}}[^;]*;\n", re.MULTILINE | re.DOTALL)
        if found.search(text):
            text = found.sub(lambda _, block=block: block, text, count=1)  # type: ignore[misc]
            continue
        comment = _kernel_comment(name)
        body, _, last = text.rstrip("\n").rpartition("\n")
        text = f"{body}\n{comment}{block}\n{last}\n"
    return text


def refresh_document(text: str) -> str:
    """`text` with every table as the records have it; sections that are not there go to the end."""
    for heading, table in tables():
        found = re.compile(rf"^### {re.escape(heading)}\n.*?^(\|.*?)\n(?!\|)", re.MULTILINE | re.DOTALL)
        match = found.search(text)
        if match and "\n### " not in match.group()[4:]:
            text = text[: match.start(1)] + _keep_meanings(match[1], table) + text[match.end(1) :]
        else:
            text = f"{text.rstrip()}\n\n### {heading}\n{_introduction(heading)}\n{table}\n"
    return text


def _keep_meanings(old: str, new: str) -> str:
    """`new` with the meanings that `old` has for the same rows; the last two cells are name and meaning."""
    meanings: dict[tuple[str, str], str] = {}
    for row in old.splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if cells[-1]:
            meanings[cells[0] if cells[0] == "tail" else "", cells[-2 if len(cells) == 4 else 0]] = cells[-1]
    lines = []
    for row in new.splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        key = (cells[0] if cells[0] == "tail" else "", cells[-2 if len(cells) == 4 else 0])
        lines.append("| " + " | ".join([*cells[:-1], meanings.get(key, cells[-1])]) + " |")
    return "\n".join(["|---" * row.count(" --- ") + "|" if set(row) <= set("|- ") else row for row in lines])


def field_comments(cls: type[Any]) -> dict[str, str]:
    """The comments that stand beside the fields of `cls` in its source."""
    source = textwrap.dedent(inspect.getsource(cls))
    found: dict[str, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        match = re.match(r"\s*(\w+)\s*[:=]", token.line)
        if token.type == tokenize.COMMENT and match and "#" not in token.line[: match.end()]:
            found[match[1]] = token.string.lstrip("# ").strip()
    return found


def _field_table(cls: type[Struct]) -> str:
    comments = field_comments(cls)
    kinds = dict(cls._tails)
    rows = ["| Offset | Type | Field | Meaning |", "|---|---|---|---|"]
    for member in cls._members:
        meaning = comments.get(member.name, "")
        rows.append(f"| {member.offset} | `{_C_TYPES[member.code][2:]}` | `{member.name}` | {meaning} |")
    for name, kind in kinds.items():
        shown = {bytes: "bytes", str: "text"}.get(kind) or f"array of {kind.__name__}"
        rows.append(f"| tail | {shown} | `{name}` | {comments.get(name, '')} |")
    return "\n".join(rows)


def _introduction(heading: str) -> str:
    name = heading.split()[-1]
    for module in modules():
        doc = getattr(vars(module).get(name), "__doc__", None)
        # a dataclass or an enum without a docstring has one made up by Python
        if doc and not doc.startswith((f"{name}(", "An enum", "Enum where")):
            return inspect.cleandoc(doc) + "\n"
    return ""


def _kernel_comment(name: str) -> str:
    for cls in record_classes():
        if name == f"struct {c_name(cls)}":
            lines = [
                part for line in _introduction(cls.__name__).splitlines() for part in textwrap.wrap(line, 76) or [""]
            ]
            return "/*\n" + "".join(f" * {line}".rstrip() + "\n" for line in lines) + " */\n" if lines else ""
    return ""


def _number(names: Any, item: Any) -> str:
    return f"{int(item):#x}" if issubclass(names, enum.IntFlag) else str(int(item))


def _commented(line: str, comment: str) -> str:
    """A line of a declaration, its comment behind it or, where that is too long for a line of the kernel, above."""
    if not comment:
        return line
    whole = f"{line} /* {comment} */"
    return whole if len(whole.expandtabs(8)) <= _COLUMNS else f"\t/* {comment} */\n{line}"


def _block(name: str, lines: list[str], attribute: str = "") -> str:
    return f"{name} {{\n" + "".join(f"{line}\n" for line in lines) + f"}}{attribute};\n"


def main(header: str, document: str) -> None:
    """Bring the files up to date."""
    for path, refresh in ((Path(header), refresh_header), (Path(document), refresh_document)):
        path.write_text(refresh(path.read_text()))


if __name__ == "__main__":
    import migrator.image  # noqa: F401 - registers every record

    assert records.REV
    main(sys.argv[1], sys.argv[2])
