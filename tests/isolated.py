"""`python isolated.py FILE COMMAND...`: runs a command on a network of its own, on Linux.

The network has a loopback device and a name server that knows no name, and writes those that
were asked for into FILE, a line each. Run it in namespaces of its own: see `test_isolation`.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TextIO

_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1  # linux/sockios.h, linux/if.h
_NO_SUCH_NAME = b"\x81\x83"  # flags of an answer (RFC 1035)
_HEADER_BYTES = 12


def main() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        fcntl.ioctl(server, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
        server.bind(("127.0.0.1", 53))
        with tempfile.NamedTemporaryFile("w", dir="/dev/shm") as resolver:
            resolver.write("nameserver 127.0.0.1\n")
            resolver.flush()
            subprocess.run(["mount", "--bind", resolver.name, "/etc/resolv.conf"], check=True)
            with Path(sys.argv[1]).open("a") as file:
                threading.Thread(target=answer, args=[server, file], daemon=True).start()
                return subprocess.run(sys.argv[2:], check=False).returncode


def answer(server: socket.socket, file: TextIO) -> None:
    """Answers every query, and writes its name down."""
    while True:
        query, sender = server.recvfrom(4096)
        question = query[_HEADER_BYTES:]
        file.write(f"{name(question)}\n")
        file.flush()
        counts = query[4:6] + bytes(6)  # its question, and nothing else
        server.sendto(query[:2] + _NO_SUCH_NAME + counts + question, sender)


def name(question: bytes) -> str:
    labels = []
    while length := question[0]:
        labels.append(question[1 : length + 1].decode())
        question = question[length + 1 :]
    return ".".join(labels)


if __name__ == "__main__":
    sys.exit(main())
