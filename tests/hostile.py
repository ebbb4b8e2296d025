"""What a hostile folder may hold where a file is expected, and a limit on the time that a test waits for it."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

# What is put in a file's place, and the words that name it.
KINDS = {
    "pipe": "a named pipe",
    "socket": "a socket",
    "folder": "a folder",
    "device": "a device",
    "link to a pipe": "a named pipe",
}


def put(kind: str, path: Path) -> None:
    """One of KINDS in the place of a file, if there is one."""
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):  # its name must be short
                server.bind(path.name)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "link to a pipe":
            os.mkfifo(path.with_name("pipe"))
            path.symlink_to("pipe")


@contextlib.contextmanager
def time_limit(seconds: int = 20) -> Iterator[None]:
    """TimeoutError if the block takes longer: a test of what hung must not hang."""

    def late(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
