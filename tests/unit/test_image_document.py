"""The C header and the specification say what the records are."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from migrator.image import codec, document
from migrator.image import records as r

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "kernel-patches/include/uapi/linux/checkpoint_hdr.h"
DOCUMENT = ROOT / "docs/image-format.md"


def ask_the_compiler(expressions: list[str], where: Path) -> list[int]:
    """The values of constant expressions, as gcc has them with our header."""
    program = '#include <stdio.h>\n#include <stddef.h>\n#include "linux/checkpoint_hdr.h"\n'

    lines = "".join(f'\tprintf("%llu\\n", (unsigned long long)({e}));\n' for e in expressions)
    source = where / "probe.c"
    source.write_text(f"{program}int main(void)\n{{\n{lines}\treturn 0;\n}}\n")
    include = f"-I{HEADER.parents[1]}"
    subprocess.run(["gcc", "-Wall", "-Werror", include, "-o", where / "probe", source], check=True)
    out = subprocess.run([where / "probe"], check=True, capture_output=True, text=True).stdout
    return [int(line) for line in out.split()]


def test_the_compiler_lays_out_every_struct_as_the_codec_does(tmp_path: Path) -> None:
    expected: dict[str, int] = {}
    for cls in (*document.record_classes(), *codec.items()):
        name = f"struct {document.c_name(cls)}"
        before = codec.HEADER.size if issubclass(cls, codec.Record) else 0
        expected[f"sizeof({name})"] = before + cls._packer.size
        for member in cls._members:
            expected[f"offsetof({name}, {member.name})"] = before + member.offset
            expected[f"sizeof((({name} *)0)->{member.name})"] = codec._SIZES[member.code]
            signed = member.code in "iq"
            expected[f"(typeof((({name} *)0)->{member.name}))-1 < 0"] = int(signed)
    assert dict(zip(expected, ask_the_compiler(list(expected), tmp_path), strict=True)) == expected


def test_the_structs_of_the_records_are_those_that_layouts_names() -> None:
    assert {name for name, *_ in codec.layouts()} == {cls.__name__ for cls in document.record_classes()}


def test_the_compiler_has_the_same_numbers(tmp_path: Path) -> None:
    expected = {
        "CKPT_MAGIC_HEADER": r.MAGIC,
        "CKPT_MAGIC_TRAILER": r.TRAILER_MAGIC,
        "CKPT_REV": r.REV,
        "CKPT_MAX_RECORD": codec.MAX_RECORD,
        "sizeof(struct ckpt_hdr)": codec.HEADER.size,
    }
    for number, cls in codec.REGISTRY.items():
        expected[f"CKPT_HDR_{document.snake(cls.__name__).upper()}"] = number
    for names in document.enums():
        for member in names:
            expected[f"CKPT_{document.snake(names.__name__).upper()}_{member.name}"] = int(member)
    assert dict(zip(expected, ask_the_compiler(list(expected), tmp_path), strict=True)) == expected


@pytest.mark.parametrize("standard", ["-std=gnu11", "-std=c++17"])
def test_the_header_stands_alone(standard: str, tmp_path: Path) -> None:
    source = tmp_path / ("alone.cc" if "++" in standard else "alone.c")
    source.write_text("#include <linux/checkpoint_hdr.h>\n")
    compiler = "g++" if "++" in standard else "gcc"
    include = f"-I{HEADER.parents[1]}"
    subprocess.run([compiler, standard, "-Wall", "-Werror", "-fsyntax-only", include, source], check=True)


def test_the_header_has_nothing_stale() -> None:
    hint = "run python -m migrator.image.document HEADER DOCUMENT"
    assert document.refresh_header(HEADER.read_text()) == HEADER.read_text(), hint
    declared = HEADER.read_text().count("\nstruct ckpt_") - 1
    assert declared == len([*document.record_classes(), *codec.items()]), "a struct of a record that is gone"


def test_the_specification_has_every_record_with_every_field() -> None:
    hint = "run python -m migrator.image.document HEADER DOCUMENT"
    written = DOCUMENT.read_text()
    assert document.refresh_document(written) == written, hint
    for heading, _ in document.tables():
        assert written.count(f"\n### {heading}\n") == 1


def test_a_new_record_is_added_to_both_files_and_prose_stays() -> None:
    assert "struct ckpt_hdr_fs {" in document.refresh_header("/* by hand */\n#endif\n")
    assert document.refresh_header("/* by hand */\n#endif\n").startswith("/* by hand */\n")
    fresh = document.refresh_document("# by hand\n")
    assert fresh.startswith("# by hand\n")
    assert document.refresh_document(fresh) == fresh


def test_a_meaning_written_by_hand_is_kept() -> None:
    fresh = document.refresh_document("# by hand\n")
    spoken = fresh.replace("| `umask` |  |", "| `umask` | as umask(2) takes it |")
    assert spoken != fresh
    assert document.refresh_document(spoken) == spoken
