"""A web application that takes files, and clients that upload them slowly and believe nothing.

    gunicorn --chdir tests/workloads uploads:application
    python uploads.py 10.77.0.73 8000          # until standard input ends; then what was done, as JSON

The application keeps what it is sent in a temporary file without a name, and answers with its digest and its count.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

CLIENTS, PIECES, PIECE = 4, 12, 16 << 10
PATIENCE = 20.0


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    with tempfile.TemporaryFile(dir=os.environ["UPLOADS"]) as kept:
        left = int(environ["CONTENT_LENGTH"])
        while left and (part := environ["wsgi.input"].read(min(left, 4096))):
            kept.write(part)
            left -= len(part)
        kept.seek(0)
        answer = f"{hashlib.sha256(kept.read()).hexdigest()} {left}".encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(answer)))])
    return [answer]


def upload(host: str, port: int) -> str:
    """What was wrong with one upload; "" for nothing."""
    pieces = [os.urandom(PIECE) for _ in range(PIECES)]
    link = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    try:
        link.putrequest("POST", "/")
        link.putheader("Content-Length", str(PIECES * PIECE))
        link.endheaders()
        for piece in pieces:
            link.send(piece)
            time.sleep(0.02)
        response = link.getresponse()
        body = response.read().decode()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        link.close()
    wanted = f"{hashlib.sha256(b''.join(pieces)).hexdigest()} 0"
    return "" if (response.status, body) == (200, wanted) else f"{response.status} {body}"


def main() -> None:
    host, port = sys.argv[1], int(sys.argv[2])
    over = threading.Event()
    found: list[str] = []

    def client() -> None:
        while not over.is_set():
            found.append(upload(host, port))

    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in clients:
        thread.start()
    sys.stdin.read()
    over.set()
    for thread in clients:
        thread.join()
    failures = [text for text in found if text]
    print(json.dumps({"uploads": len(found) - len(failures), "failures": failures}), flush=True)


if __name__ == "__main__":
    main()
