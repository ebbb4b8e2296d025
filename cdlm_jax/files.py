"""Files at paths that a user gave. Only regular files are opened: a pipe or a device may never end, or never begin."""

import os
import stat
from pathlib import Path

from cdlm_jax.config import InputError

MAX_SETTINGS = 1 << 28  # bytes of one file of settings; the largest vocabularies take a tenth of it
MAX_DATA = 1 << 32  # bytes of one file of prompts or problems

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_bytes(path: str | Path, limit: int = MAX_SETTINGS) -> bytes:
    """The content of a regular file, or of a link to one.

    The file that is checked is the file that is read, whatever takes its place meanwhile. InputError, in one line: it
    is absent, may not be read, is no regular file, or has more than `limit` bytes.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for somebody who writes into it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            _refuse_others(path, found.st_mode)
            # Not limit + 1 bytes at once: Python would ask for that much memory, however small the file.
            data = file.read() if found.st_size <= limit else None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        check_regular(path)  # a socket cannot even be opened: say what it is
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if data is None or len(data) > limit:
        raise InputError(f"cannot read {path}: it has more than {limit:,} bytes")
    return data


def read_text(path: str | Path, limit: int = MAX_SETTINGS) -> str:
    """The same as text, line ends as they are. InputError also for bytes that are not UTF-8."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: not UTF-8 text ({error})") from error


def check_regular(path: str | Path) -> None:
    """InputError unless it is a regular file or a link to one: for files that a library opens by itself."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    _refuse_others(path, mode)


def check_tree(folder: str | Path) -> None:
    """InputError if the folder holds, at any depth, what is neither a folder nor a regular file: for folders whose
    files a library opens by itself."""
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if path.exists():  # a file that is being written may be gone
                check_regular(path)


def _refuse_others(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise InputError(f"cannot read {path}: it is {kind}; only regular files, and links to them, are read")
