"""A SQLite database in WAL mode with a writer and two readers: `ledger.py OUT DATABASE`. Says "tick" as it goes on."""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from typing import TextIO

ACCOUNTS = 50


def connect(path: str) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=20, isolation_level=None)
    database.execute("pragma journal_mode=wal")
    database.execute("pragma synchronous=off")
    return database


def read(path: str, out: TextIO) -> None:
    database = connect(path)
    last = 0
    while True:
        database.execute("begin")
        (total,) = database.execute("select sum(balance) from accounts").fetchone()
        (moves,) = database.execute("select count(*) from moves").fetchone()
        database.execute("commit")
        if total != 0 or moves < last:
            print("FAIL", total, moves, last, file=out)
        last = moves
        time.sleep(0.002)


def main() -> None:
    out = open(sys.argv[1], "a", buffering=1)  # noqa: SIM115
    path = sys.argv[2]
    database = connect(path)
    database.execute("create table accounts (id integer primary key, balance integer)")
    database.execute("create table moves (id integer primary key, text text)")
    database.executemany("insert into accounts values (?, 0)", [(n,) for n in range(ACCOUNTS)])
    database.close()
    for _ in range(2):
        if not os.fork():
            read(path, out)
    database = connect(path)
    print("ready", file=out)
    n = 0
    while True:
        n += 1
        database.execute("begin immediate")
        database.execute("update accounts set balance = balance + ? where id = ?", (n, n % ACCOUNTS))
        database.execute("update accounts set balance = balance - ? where id = ?", (n, n * 7 % ACCOUNTS))
        database.execute("insert into moves values (?, ?)", (n, "x" * 100))
        database.execute("commit")
        if n % 50 == 0:
            (count,) = database.execute("select count(*) from moves").fetchone()
            (whole,) = database.execute("pragma integrity_check").fetchone() if n % 500 == 0 else ("ok",)
            if count != n or whole != "ok":
                print("FAIL", count, n, whole, file=out)
            print("tick", n, file=out)
        time.sleep(0.001)


if __name__ == "__main__":
    main()
