"""SSH keys and known hosts: who we are, and who the others are.

Files are those of OpenSSH, in its formats (sshd(8), ssh-keygen(1)), so that its tools work
on them. Nothing here talks to the network.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from migrator.errors import TransportError
from transport.library import asyncssh

DEFAULT_PORT = 22


def config_dir() -> Path:
    """Where our own keys and pinned hosts live: $XDG_CONFIG_HOME/migrator."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "migrator"


def pinned_file() -> Path:
    """The known_hosts file that `--accept-new-host-key` writes to."""
    return config_dir() / "known_hosts"


def default_known_hosts() -> list[Path]:
    return [pinned_file(), Path.home() / ".ssh" / "known_hosts", Path("/etc/ssh/ssh_known_hosts")]


def ensure_key(path: str | os.PathLike[str], comment: str = "") -> asyncssh.SSHKey:
    """The private key in `path`; a new ed25519 key, mode 0600, with a `.pub` beside it, if there is none.

    Raises `TransportError` if the file is not a key, or if others may read it.
    """
    path = Path(path)
    if not path.exists():
        key = asyncssh.generate_private_key("ssh-ed25519", comment or f"migrator@{socket.gethostname()}")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        _write(temporary, key.export_private_key(), 0o600)
        try:
            os.link(temporary, path)  # whoever is second keeps the key of whoever was first
            _write(path.with_name(path.name + ".pub"), key.export_public_key(), 0o644)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    if path.stat().st_mode & 0o077:
        raise TransportError(f"{path} can be read by others", hint=f"chmod 600 {path}")
    return load_key(path)


def host_key(path: str | os.PathLike[str]) -> asyncssh.SSHKey | tuple[asyncssh.SSHKey, asyncssh.SSHCertificate]:
    """What a server proves itself with: the key in `path`, made if missing, with its certificate, if `path`-cert.pub
    is there (ssh-keygen(1)). Raises `TransportError` for a certificate that is none, or not of that key."""
    key = ensure_key(path)
    file = f"{os.fspath(path)}-cert.pub"
    try:
        certificate = asyncssh.read_certificate(file)
    except FileNotFoundError:
        return key
    except (OSError, asyncssh.KeyImportError) as error:
        raise TransportError(
            f"cannot read the certificate {file}: {error}", hint="remove it, or have it made anew"
        ) from None
    if certificate.key.public_data != key.public_data:
        raise TransportError(f"{file} is of another key than {path}", hint="remove it, or have it made anew")
    return key, certificate


def load_key(path: str | os.PathLike[str]) -> asyncssh.SSHKey:
    """The private key in `path`. Raises `TransportError` saying what is wrong with it."""
    try:
        return asyncssh.read_private_key(str(path))
    except OSError as error:
        raise TransportError(f"cannot read the key {path}: {error.strerror}") from None
    except (asyncssh.KeyEncryptionError, asyncssh.KeyImportError) as error:
        if "passphrase" in str(error).lower() or isinstance(error, asyncssh.KeyEncryptionError):
            raise TransportError(
                f"the key {path} is protected by a passphrase",
                hint=f"load it into an agent (ssh-add {path}) and give no --identity",
            ) from None
        raise TransportError(f"{path} is not a private key: {error}") from None


def fingerprint(key: asyncssh.SSHKey) -> str:
    """As ssh-keygen -l shows it: `SHA256:…`."""
    return str(key.get_fingerprint())


def public_line(key: asyncssh.SSHKey) -> str:
    """One line for an authorized_keys or known_hosts file."""
    return str(key.export_public_key().decode().strip())


def host_pattern(host: str, port: int | None) -> str:
    """How known_hosts names a host: `host`, or `[host]:port` for another port than 22."""
    return host if port in (None, DEFAULT_PORT) else f"[{host}]:{port}"


@dataclass(frozen=True, slots=True)
class KnownKeys:
    """The keys that known_hosts files give for one host."""

    trusted: Sequence[asyncssh.SSHKey]
    authorities: Sequence[asyncssh.SSHKey]
    revoked: Sequence[asyncssh.SSHKey]


def known_keys(files: Iterable[str | os.PathLike[str]], host: str, addr: str, port: int | None) -> KnownKeys:
    """What `files` say about a host; files that do not exist say nothing.

    Raises `TransportError` where a file cannot be read or understood: to go on without it
    might be to trust a key that it revokes.
    """
    trusted: list[asyncssh.SSHKey] = []
    authorities: list[asyncssh.SSHKey] = []
    revoked: list[asyncssh.SSHKey] = []
    for file in files:
        try:
            text = Path(file).read_text()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise TransportError(f"cannot read {file}: {error}") from None
        try:
            found = asyncssh.match_known_hosts(asyncssh.import_known_hosts(text), host, addr, port)
        except ValueError as error:
            raise TransportError(f"cannot understand {file}: {error}") from None
        trusted += found[0]
        authorities += found[1]
        revoked += found[2]
    return KnownKeys(trusted, authorities, revoked)


def pin(file: str | os.PathLike[str], host: str, port: int | None, key: asyncssh.SSHKey) -> None:
    """Append a host's key to a known_hosts file, in one write, so that two at a time do not mix."""
    path = Path(file)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    algorithm, blob = public_line(key).split()[:2]
    line = f"{host_pattern(host, port)} {algorithm} {blob}\n"
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = "\n" + line
        os.write(fd, line.encode())
    finally:
        os.close(fd)


def _write(path: Path, data: bytes, mode: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
