"""The file of a run's answers: JSON lines that are there as soon as they are known, and that the same run continues.

While a run lasts they stand in FILE.partial, which takes the name FILE when all are there. FILE.settings.json says what
they were made from. The lines of a run are known beforehand, in their order, so the number of those that are there is
all that a continuation needs.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cdlm_jax.config import InputError, difference
from cdlm_jax.files import check_regular
from cdlm_jax.mesh.distributed import agreed, is_main


class AnswerFile:
    """The first process reads and writes the file; the others know how many of its records are there.

    total: how many records it will have. settings: whatever must be equal for a continuation to make sense (JSON-able).
    complete: all were there already.
    """

    def __init__(self, path: Path, total: int, settings: dict[str, Any]):
        """InputError: the file cannot be written, another process writes it, or its settings differ (one is named)."""
        self.path, self.total, self.complete = path, total, False
        self._partial, self._sidecar = (path.with_name(path.name + end) for end in (".partial", ".settings.json"))
        self._records: list[dict] = []
        self._file: BinaryIO | None = None
        refused = None
        try:
            if is_main():
                self._open(json.loads(json.dumps(settings)))  # as they will be read back: tuples become lists
        except InputError as error:
            refused = error
        left, complete = agreed(np.array([-1 if refused else len(self._records), self.complete]))
        self._left, self.complete = int(left), bool(complete)
        if self._left < 0:
            self.close()
            raise refused or InputError(f"the first process cannot write {path}")

    def take(self, count: int) -> tuple[int, list[dict]]:
        """(how many of the next `count` records are there, those records): the latter in the first process only."""
        taken = min(count, self._left)
        self._left -= taken
        records, self._records = self._records[:taken], self._records[taken:]
        return taken, records

    def write(self, record: dict[str, Any]) -> None:
        """Add a record; it outlives this process."""
        if self._file is not None:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()

    def finish(self) -> None:
        """All records are there: the file takes its name."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._partial.replace(self.path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self, settings: dict[str, Any]) -> None:
        try:
            if self.path.is_dir():
                raise InputError(f"cannot write {self.path}: it is a folder")
            for each in (self.path, self._partial, self._sidecar):
                if each.exists():
                    check_regular(each)
            if self.path.exists() and self.path.stat().st_size:
                self._refuse_other(self.path, settings)
                self._records, self.complete = self._read(self.path.read_bytes())[0], True
                if len(self._records) != self.total:
                    found = f"{len(self._records)} of {self.total} answers"
                    raise InputError(f"{self.path} was changed by hand: it holds {found}; {_ELSEWHERE}")
                return
            if self._partial.exists():
                self._refuse_other(self._partial, settings)
            self._continue(settings)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from error

    def _continue(self, settings: dict[str, Any]) -> None:
        """Open the partial file behind its last whole line, for this process alone."""
        self._file = file = open(self._partial, "a+b")  # noqa: SIM115  closed by `close`
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"cannot write {self.path}: another process is at work on it") from error
        file.seek(0)
        self._records, size = self._read(file.read())
        file.truncate(size)
        if not self._records:  # the settings are there before the first record is
            self._sidecar.write_text(json.dumps(settings, indent=2) + "\n")

    def _read(self, data: bytes) -> tuple[list[dict], int]:
        try:
            return _whole_lines(data)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error

    def _refuse_other(self, found: Path, settings: dict[str, Any]) -> None:
        if not found.stat().st_size:  # nothing would be lost
            return
        try:
            theirs = json.loads(self._sidecar.read_bytes())
        except (OSError, ValueError):
            theirs = None
        if not isinstance(theirs, dict):
            raise InputError(f"{found} exists, and no {self._sidecar.name} says how it was made; {_ELSEWHERE}")
        if different := difference(theirs, settings):
            raise InputError(f"{found} holds answers of another run: {different}; {_ELSEWHERE}")


_ELSEWHERE = "remove it or give another --output"


def _whole_lines(data: bytes) -> tuple[list[dict], int]:
    """The records, without a last one that is torn (the machine stopped while it was written), and their bytes.

    InputError for another line that is no record: this program did not write it, and what follows must not be lost.
    """
    *whole, torn = data.split(b"\n")
    records = []
    for number, line in enumerate(whole, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"line {number} is no answer; {_ELSEWHERE}")
        records.append(row)
    return records, len(data) - len(torn)


@contextlib.contextmanager
def answer_file(
    path: str | Path | None, total: int, settings: Callable[[], dict[str, Any]]
) -> Iterator[AnswerFile | None]:
    """The file within the block, complete after it; what an interrupted block wrote stays. None without a path."""
    if path is None:
        yield None
        return
    file = AnswerFile(Path(path), total, settings())
    try:
        yield file
        file.finish()
    finally:
        file.close()
