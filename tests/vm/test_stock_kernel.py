"""Debian's own kernel of the same source: it has no such calls."""

from __future__ import annotations

from pathlib import Path

from tests.vm.lab import Lab
from tests.vm.program import Program, numbers

CALLS = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for number in (548, 549):
    assert libc.syscall(number, 1, 1, 0) == -1
    print(errno.errorcode[ctypes.get_errno()])
"""


def test_a_kernel_without_the_calls_says_so_and_the_user_engine_works(folder: Path) -> None:
    with Lab(folder).guest("stock") as guest:
        assert guest.python(CALLS).split() == ["ENOSYS", "ENOSYS"]
        assert "Function not implemented" in guest.run("rstr < /dev/null", status=1).stderr
        with Program(guest, "counter") as counter:
            guest.run(
                f"migrator checkpoint {counter.pid} --kill -o /tmp/image && migrator restart --detach -i /tmp/image"
            )
            counter.check_progress()
            lines = counter.finish()
        assert numbers(lines) == list(range(1, len(numbers(lines)) + 1))
