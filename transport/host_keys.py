"""Whether the host that answers is the one that was meant: its key, and known_hosts files."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from migrator.errors import TransportError
from transport import keys
from transport.library import asyncssh


class HostKeyCheck:
    """Decides about one host's key, and remembers what it saw for the error message."""

    def __init__(self, files: list[Path], accept_new: bool) -> None:
        self.files = files
        self.offered: asyncssh.SSHKey | None = None
        self.found: keys.KnownKeys | None = None
        self.error: TransportError | None = None
        self.host = ""
        self._port: int | None = None
        self._accept_new = accept_new
        self._accepted = False

    def known(self, host: str, addr: str, port: int | None) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """asyncssh's known_hosts hook; it also picks the algorithms by the keys that are known."""
        self.host, self._port = host, port
        try:
            self.found = keys.known_keys(self.files, host, addr, port)
        except TransportError as error:
            self.error = error
            return [], [], []
        return self.found.trusted, self.found.authorities, self.found.revoked

    def decide(self, key: asyncssh.SSHKey) -> bool:
        """Called for a key that is not known."""
        self.offered = key
        never_seen = self.found is not None and not self.found.trusted and not self.found.authorities
        self._accepted = self._accept_new and never_seen
        return self._accepted

    def pin_accepted(self) -> None:
        if self._accepted and self.offered is not None:
            keys.pin(self.files[0], self.host, self._port, self.offered)

    def refusal(self, reason: str) -> TransportError:
        """Why the key was not accepted, and what to do."""
        if self.error is not None:
            return self.error
        name = keys.host_pattern(self.host, self._port)
        file = self.files[0]
        seen = keys.fingerprint(self.offered) if self.offered else "a key of another type"
        if "revoked" in reason:
            return TransportError(
                f"the host key of {name} is marked as revoked",
                hint="do not trust this host; ask its operator",
            )
        if self.found is not None and (self.found.trusted or self.found.authorities):
            expected = ", ".join(sorted({keys.fingerprint(key) for key in self.found.trusted}))
            return TransportError(
                f"THE HOST KEY OF {name} HAS CHANGED: it offers {seen}, known is "
                f"{expected or 'an authority'}. Somebody may be in between, or it was installed anew",
                hint=f"find out which; then remove the old key: ssh-keygen -R {shlex.quote(name)} -f FILE, "
                f"for each of {', '.join(str(f) for f in self.files if f.exists())}",
            )
        scan = f"ssh-keyscan{f' -p {self._port}' if self._port else ''} {self.host} >> {file}"
        return TransportError(
            f"the host key of {name} is not known: it offers {seen}, which is not in {file}",
            hint=f"compare the fingerprint, then run again with --accept-new-host-key, or: {scan}",
        )
