"""The two walk-throughs of the calls' documentation, typed as they stand there."""

from __future__ import annotations

import re
import time

from tests.vm import image
from tests.vm.machine import Machine

TOOLS = image.ROOT / "build" / "guest"


def counts(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^(?:count|xxxxx) (\d+)", text, re.MULTILINE)]


def sums(text: str) -> list[str]:
    return re.findall(r"\d+ \((\d+\.\d\d)\)!$", text, re.MULTILINE)


def await_count(guest: Machine, count: int, *, file: str = "/tmp/cr-test.out") -> str:
    """The file, once it has counted that far."""
    deadline = time.monotonic() + 30
    while count not in counts(text := guest.run(f"cat {file}", status=None).stdout):
        assert time.monotonic() < deadline, text
        time.sleep(0.1)
    return text


def test_a_stopped_counter_is_saved_from_outside(guest: Machine) -> None:
    """./test & kill -STOP; ./ckpt > image; keep what it wrote; kill -CONT; ./rstr < image; compare."""
    pid = guest.spawn(f"{TOOLS}/test")
    await_count(guest, 1)
    guest.run(f"kill -STOP {pid}")
    guest.run(f"{TOOLS}/ckpt {pid} > /tmp/ckpt.image")
    guest.run("mv /tmp/cr-test.out /tmp/cr-test.out.orig && cp /tmp/cr-test.out.orig /tmp/cr-test.out")
    saved = counts(guest.run("cat /tmp/cr-test.out").stdout)[-1]
    guest.run(f"kill -CONT {pid}")
    copy = guest.spawn(f"{TOOLS}/rstr < /tmp/ckpt.image")
    original = await_count(guest, saved + 3, file="/tmp/cr-test.out.orig")
    text = await_count(guest, saved + 3)
    assert guest.run(f"cat /proc/{copy}/comm").stdout == "test\n", "rstr has become the program"
    guest.run(f"kill -KILL {pid} {copy}; rm /tmp/cr-test.out*")
    assert counts(text) == list(range(len(counts(text)))), text
    assert sums(text)[: saved + 4] == sums(original)[: saved + 4]


def test_a_program_saves_itself(guest: Machine) -> None:
    """./self > self.image; keep what it wrote, mark it; ./rstr < image: checkpoint() returns 0 in the copy."""
    pid = guest.spawn(f"{TOOLS}/self > /tmp/self.image")
    original = await_count(guest, 3)
    ret = re.search(r"^checkpoint ret: (\d+)$", original, re.MULTILINE)
    assert ret and int(ret[1]) > 0, original
    guest.run("mv /tmp/cr-test.out /tmp/cr-test.out.orig && cp /tmp/cr-test.out.orig /tmp/cr-test.out")
    guest.run("sed -i s/count/xxxxx/g /tmp/cr-test.out")
    copy = guest.spawn(f"{TOOLS}/rstr < /tmp/self.image")
    text = await_count(guest, 5)
    guest.run(f"kill -KILL {pid} {copy}")
    original = guest.run("cat /tmp/cr-test.out.orig").stdout
    # What the original wrote after it had saved itself is overwritten, from where it stood.
    assert "checkpoint ret: 0\n" in text, text
    assert re.search(r"^xxxxx 2 .*\ncheckpoint ret: 0\ncount 3 ", text, re.MULTILINE), text
    assert sums(text)[:4] == sums(original)[:4]
