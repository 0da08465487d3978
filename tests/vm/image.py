"""The two file systems of a guest, as erofs images.

The base has the Python that runs this, its packages, Redis, OpenSSH and busybox, each at the path that it has here;
the project has this checkout with its workloads compiled. Both are read-only: a guest writes to tmpfs.
They are kept by what they are made of, so that a second run finds them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from migrator.testing.workloads import build_all

ROOT = Path(__file__).resolve().parents[2]
GUEST = Path(__file__).parent / "guest"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "migrator" / "guest"
IN_USE = 2 * 3600.0  # seconds that a run with guests takes at most
KERNEL_PATCHES = ROOT / "kernel-patches"

PROGRAMS = (
    "redis-server", "redis-cli", "sshd", "ssh", "nginx", "setpriv", "nsenter", "unshare", "setsid", "taskset",
    "prlimit", "ip", "ss", "nft", "ps", "pgrep", "pkill", "bash", "sed", "cat", "sleep", "timeout", "tail", "date",
)  # fmt: skip
# The parts of a checkout that are of use in a guest.
PROJECT = ("migrator", "transport", "policies", "tests", "kernel-patches/include", "build/workloads")
# The dynamic loader and what glibc opens by name.
LIBRARIES = ("ld-linux-x86-64.so.2", "libnss_files.so.2", "libgcc_s.so.1")
DEVELOPMENT = re.compile(
    r"(__editable__|_?ruff|mypy|mypyc|[0-9a-f]+__mypyc|pip|setuptools|_distutils_hack|distutils-prec|hypothesis)"
)
VENV = "/venv"
UNUSED_STDLIB = ("test", "idlelib", "tkinter", "lib2to3", "ensurepip", "turtledemo", "site-packages", "pydoc_data")


def base_image() -> Path:
    """The image with everything but the project. Made once for a set of packages; half a minute the first time."""
    stdlib, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    parts = [sys.version, str(ROOT), *sorted(path.name for path in packages.iterdir())]
    for file in (Path(__file__), *sorted(GUEST.iterdir())):
        parts.append(file.read_text())
    for program in PROGRAMS:
        if found := _which(program):
            parts.append(f"{found} {found.stat().st_mtime_ns}")

    def fill(tree: Path) -> None:
        _copy(Path(os.path.realpath(sys.executable)), tree)
        _link(tree / sys.executable[1:], os.path.realpath(sys.executable))
        _copy(Path(sys.prefix) / "pyvenv.cfg", tree)
        _copy_tree(stdlib, tree, lambda name: name in UNUSED_STDLIB)
        _copy_tree(packages, tree, lambda name: bool(DEVELOPMENT.match(name)) or name.endswith("nspkg.pth"))
        subprocess.run(
            [sys.executable, "-m", "compileall", "-q", "-j0", *(f"{tree}{path}" for path in (stdlib, packages))],
            check=False, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        _busybox(tree)
        for program in PROGRAMS:
            if found := _which(program):
                _copy(found, tree)
        _link(tree / "bin" / "bash", "/usr/bin/bash")
        _libraries(tree)
        _etc(tree)
        if _venv_is_hidden():
            (tree / sys.prefix[1:]).rename(tree / VENV[1:])

    return _image("base", "\n".join(parts).encode(), fill)


def project_image(programs: Path) -> Path:
    """The image of this checkout, mounted at its own path; `programs` (ckpt, rstr, ...) are in its build/guest."""
    build_all()
    sources = [
        path
        for name in PROJECT
        for path in sorted((ROOT / name).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]
    extra = sorted(path for path in programs.rglob("*") if path.is_file())
    content = hashlib.sha256()
    for path in (*sources, *extra):
        content.update(f"{path} {path.stat().st_mode}\n".encode() + path.read_bytes())

    def fill(tree: Path) -> None:
        for path in sources:
            _copy_to(path, tree / path.relative_to(ROOT))
        for path in extra:
            _copy_to(path, tree / "build" / "guest" / path.relative_to(programs))
        if _venv_is_hidden():
            _link(tree / Path(sys.prefix).relative_to(ROOT), VENV)
        # With the path that it will have: what a traceback shows.
        subprocess.run(
            [sys.executable, "-m", "compileall", "-q", "-j0", "-s", str(tree), "-p", str(ROOT), str(tree)], check=True
        )

    return _image("project", content.digest(), fill)


def _venv_is_hidden() -> bool:
    """A virtual environment in the checkout would be below the mount of the project: that has a link to it."""
    return Path(sys.prefix).is_relative_to(ROOT)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Who makes a file of the cache makes it alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def forget_old(folder: Path, pattern: str, *, keep: int) -> None:
    """Only the youngest `keep` files of that name stay, as they are large, and those that a run of now may use."""
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found[keep:]:
        if path.stat().st_mtime < time.time() - IN_USE:
            path.unlink(missing_ok=True)


def _image(kind: str, content: bytes, fill: Callable[[Path], None]) -> Path:
    target = CACHE / f"{kind}-{hashlib.sha256(content).hexdigest()[:12]}.erofs"
    with locked(CACHE / kind):
        if target.exists():
            os.utime(target)
            return target
        with tempfile.TemporaryDirectory(prefix=f"{kind}-", dir=CACHE) as folder:
            tree = Path(folder) / "tree"
            tree.mkdir(mode=0o755)
            fill(tree)
            made = Path(folder) / "image"
            subprocess.run(["mkfs.erofs", "--all-root", str(made), str(tree)], check=True, capture_output=True)
            made.rename(target)
        forget_old(CACHE, f"{kind}-*.erofs", keep=4)
    return target


def _which(program: str) -> Path | None:
    found = shutil.which(program, path="/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin")
    return Path(os.path.realpath(found)).parent / program if found else None


def _copy_to(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def _copy(source: Path, tree: Path) -> None:
    _copy_to(source, tree / str(source)[1:])


def _link(path: Path, to: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() and not path.is_symlink():
        path.symlink_to(to)


def _copy_tree(source: Path, tree: Path, unwanted: Callable[[str], bool]) -> None:
    def ignore(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if folder == str(source) and unwanted(name)} | {"__pycache__"} & set(names)

    shutil.copytree(source, tree / str(source)[1:], symlinks=True, ignore=ignore, dirs_exist_ok=True)


def _busybox(tree: Path) -> None:
    _copy_to(Path("/bin/busybox"), tree / "bin" / "busybox")
    for name in subprocess.run(["/bin/busybox", "--list"], check=True, capture_output=True, text=True).stdout.split():
        _link(tree / "bin" / name, "busybox")


def _libraries(tree: Path) -> None:
    """What the ELF files of the tree are linked with, at the paths that the loader finds them at."""
    wanted = {f"/lib/x86_64-linux-gnu/{name}" for name in LIBRARIES} | {"/lib64/ld-linux-x86-64.so.2"}
    objects = [str(path) for path in tree.rglob("*") if path.is_file() and not path.is_symlink() and _is_elf(path)]
    done = subprocess.run(["ldd", *objects], check=False, capture_output=True, text=True)
    wanted |= {line.split("=>")[1].split()[0] for line in done.stdout.splitlines() if "=> /" in line}
    for name in wanted:
        if os.path.exists(name) and not (tree / name[1:]).exists():
            _copy_to(Path(os.path.realpath(name)), tree / name[1:])


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _etc(tree: Path) -> None:
    for folder in ("dev", "proc", "sys", "tmp", "run", "var", "mnt", str(ROOT)[1:]):
        (tree / folder).mkdir(parents=True, exist_ok=True)
    _copy_to(GUEST / "setup.sh", tree / "etc" / "setup.sh")
    _copy_to(GUEST / "commands.sh", tree / "etc" / "commands.sh")
    for name in ("setup.sh", "commands.sh"):
        (tree / "etc" / name).chmod(0o755)
    path = f"{ROOT}/build/guest:{Path(sys.executable).parent}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    for name, text in {
        "inittab": "::sysinit:/etc/setup.sh\n::respawn:/etc/commands.sh\n",
        "passwd": (
            "root:x:0:0:root:/var/root:/bin/sh\nsshd:x:74:74::/run/sshd:/bin/false\n"
            "nobody:x:65534:65534::/:/bin/false\n"
        ),
        "group": "root:x:0:\ntty:x:5:\nsshd:x:74:\nnogroup:x:65534:\n",
        "hosts": "127.0.0.1 localhost\n10.77.0.1 a\n10.77.0.2 b\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
        "project": f"{ROOT}\n",
        "profile": (
            f"export PATH={path} HOME=/var/root PYTHONPATH={ROOT} PYTHONDONTWRITEBYTECODE=1 TERM=${{TERM:-linux}}\n"
            f"export LANG=C.UTF-8 PYTHON={sys.executable}\n"
        ),
        "sshd_config": (
            "HostKey /var/root/.ssh/host_key\nPermitRootLogin yes\nUseDNS no\nStrictModes no\nPidFile none\n"
            f"SetEnv PATH={path} PYTHONPATH={ROOT} PYTHONDONTWRITEBYTECODE=1\n"
        ),
    }.items():
        (tree / "etc" / name).write_text(text)
    _ssh(tree / "etc" / "skel" / ".ssh")
    launcher = tree / "usr" / "local" / "bin" / "migrator"
    launcher.parent.mkdir(parents=True, exist_ok=True)
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} -m migrator "$@"\n')
    launcher.chmod(0o755)


def _ssh(folder: Path) -> None:
    """One key for all guests, and one for whoever looks after them: they are alone in their network."""
    folder.mkdir(parents=True, mode=0o700)
    lab = CACHE / "id_ed25519"
    for key in (folder / "id_ed25519", folder / "host_key", lab):
        if not key.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(key)], check=True)
    public = " ".join((folder / "host_key.pub").read_text().split()[:2])
    names = ("10.77.0.1", "10.77.0.2", "a", "b", "[10.77.0.1]:7022", "[10.77.0.2]:7022")
    (folder / "known_hosts").write_text("".join(f"{name} {public}\n" for name in names))
    keys = (folder / "id_ed25519.pub", lab.with_suffix(".pub"))
    (folder / "authorized_keys").write_text("".join(key.read_text() for key in keys))
