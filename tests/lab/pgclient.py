#!/usr/bin/env python3
"""A PostgreSQL client of its own, small enough to be believed: what it calls acknowledged was acknowledged by the server.

    pgclient.py write ADDRESS PORT LOG      inserts numbered rows until SIGTERM, one commit each
    pgclient.py await ADDRESS PORT SECONDS  polls until a query is answered; prints the monotonic time of the answer
    pgclient.py query ADDRESS PORT SQL      prints the rows, columns separated by tabs

`write` appends `N SECONDS` (CLOCK_REALTIME) to LOG after the acknowledgement of row N, and at its end prints
{"acknowledged": N, "sent": N, "seconds": S, "end": "why it ended"}. It must run outside the host whose power is cut: then
LOG needs no flush per row to survive the cut, and the flushes would slow the disk that is being measured.
Startup, trust authentication and the simple query protocol only.
"""
import json
import os
import signal
import socket
import struct
import sys
import time

TABLE = "CREATE TABLE ledger (n bigint PRIMARY KEY, payload text NOT NULL)"
# The payload follows from the number, so that a page from another time or place is noticed.
PAYLOAD = "repeat(md5({n}::text), 16)"


class ServerError(Exception):
    """What the server refused, in its words."""


class Connection:
    """One connection, user and database `postgres`. An address that is a path is a Unix socket's; it has no port."""

    def __init__(self, address, port, timeout):
        if address.startswith("/"):
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.settimeout(timeout)
            self.socket.connect(address)
        else:
            self.socket = socket.create_connection((address, port), timeout=timeout)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""
        body = struct.pack("!i", 196608) + b"user\0postgres\0database\0postgres\0application_name\0lab\0\0"
        self.socket.sendall(struct.pack("!i", len(body) + 4) + body)
        self._until_ready()

    def close(self):
        self.socket.close()

    def _read(self, count):
        while len(self.buffer) < count:
            piece = self.socket.recv(65536)
            if not piece:
                raise ConnectionError("the server closed the connection")
            self.buffer += piece
        piece, self.buffer = self.buffer[:count], self.buffer[count:]
        return piece

    def _message(self):
        kind, length = struct.unpack("!ci", self._read(5))
        if not 4 <= length <= 1 << 24:
            raise ConnectionError(f"a message of {length} bytes: this is no PostgreSQL server")
        return kind, self._read(length - 4)

    def _until_ready(self):
        """Reads up to ReadyForQuery; only then is a statement's commit acknowledged."""
        rows, refused = [], None
        while True:
            kind, body = self._message()
            if kind == b"Z":
                if refused:
                    raise ServerError(refused)
                return rows
            if kind == b"E":
                fields = {piece[:1]: piece[1:].decode(errors="replace") for piece in body.split(b"\0") if piece}
                refused = f"{fields.get(b'S', '')}: {fields.get(b'M', '')} ({fields.get(b'C', '')})"
                if fields.get(b"S") in ("FATAL", "PANIC"):
                    raise ServerError(refused)
            elif kind == b"R" and struct.unpack("!i", body[:4])[0] != 0:
                raise ServerError("the server asks for a password; only trust is spoken here")
            elif kind == b"D":
                rows.append(self._row(body))

    @staticmethod
    def _row(body):
        (count,), at, row = struct.unpack("!h", body[:2]), 2, []
        for _ in range(count):
            (length,) = struct.unpack("!i", body[at:at + 4])
            at += 4
            if length < 0:
                row.append(None)
            else:
                row.append(body[at:at + length].decode())
                at += length
        return row

    def query(self, sql):
        text = sql.encode() + b"\0"
        self.socket.sendall(b"Q" + struct.pack("!i", len(text) + 4) + text)
        return self._until_ready()


def connect_until(address, port, seconds, timeout=1.0):
    """A connection that answers a query, polled every 10 ms."""
    end, last = time.monotonic() + seconds, "nothing was tried"
    while time.monotonic() < end:
        try:
            connection = Connection(address, port, timeout)
            connection.query("SELECT 1")
            return connection
        except (OSError, ServerError) as error:
            last = str(error)
        time.sleep(0.01)
    raise ConnectionError(f"no answer from {address}:{port} within {seconds} s: {last}")


def write(address, port, log):
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    connection = connect_until(address, port, 60, timeout=3.0)
    connection.query(TABLE)
    began, acknowledged, sent, end = time.monotonic(), 0, 0, "asked to"
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        while not stopped:
            sent += 1
            connection.query(f"INSERT INTO ledger VALUES ({sent}, {PAYLOAD.format(n=sent)})")
            os.write(out, b"%d %.6f\n" % (sent, time.time()))
            acknowledged = sent
    except (OSError, ServerError) as error:
        end = str(error)
    os.fsync(out)
    print(json.dumps({"acknowledged": acknowledged, "sent": sent, "seconds": round(time.monotonic() - began, 3), "end": end}))


def main():
    if len(sys.argv) != 5 or sys.argv[1] not in ("write", "await", "query"):
        print(__doc__, file=sys.stderr)
        return 2
    verb, address, port, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    if verb == "write":
        write(address, port, last)
    elif verb == "await":
        connect_until(address, port, float(last)).close()
        print(f"{time.monotonic():.6f}")
    else:
        connection = Connection(address, port, 60)
        for row in connection.query(last):
            print("\t".join("\\N" if value is None else value for value in row))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ServerError) as failure:
        print(f"pgclient: {failure}", file=sys.stderr)
        sys.exit(1)
