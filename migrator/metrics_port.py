"""The HTTP port that Prometheus reads, as anybody may reach it who reaches the address.

A connection has `SECONDS` for all of it, request and answer, however slowly it speaks; there are at most
`CONNECTIONS`, and a new one puts an end to the oldest. So neither silence nor a crowd keeps Prometheus out for
long, and what it costs is bounded. A request line or header beyond 64 KiB is refused by http.server.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import _SilentHandler

SECONDS = 5.0
CONNECTIONS = 16


class MetricsServer(ThreadingMixIn, WSGIServer):
    """A thread for each connection. `open_connections`: accept times by socket."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.open_connections: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(*arguments, **options)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self.open_connections[request] = time.monotonic()
            extra = list(self.open_connections)[:-CONNECTIONS]
            for connection in extra:
                self._end(connection)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Called twice a second (socketserver)."""
        late = time.monotonic() - SECONDS
        with self._lock:
            for connection in [at for at, since in self.open_connections.items() if since < late]:
                self._end(connection)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self.open_connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: whoever was ended, or has gone away, is none of ours."""

    def _end(self, connection: socket.socket) -> None:
        # Its thread still has the descriptor, and closes it.
        del self.open_connections[connection]
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def listen(host: str, port: int, registry: CollectorRegistry) -> MetricsServer:
    """Serve `registry` from a daemon thread. Raises OSError or OverflowError where that cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = type("", (MetricsServer,), {"address_family": family})
    httpd: MetricsServer = make_server(host, port, make_wsgi_app(registry), server, _SilentHandler)
    threading.Thread(target=httpd.serve_forever, name="metrics", daemon=True).start()
    return httpd
