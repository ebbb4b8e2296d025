"""Preemption: a cluster that takes its machine back sends SIGTERM, and waits a little for the work to be saved."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command, run again, goes on


class Preempted(BaseException):
    """SIGTERM ended the work; the same command continues it. As KeyboardInterrupt, no handler of errors catches it."""

    def __init__(self, step: int | None = None):
        saved = "preempted" if step is None else f"preempted at step {step}, saved"
        super().__init__(f"{saved}; run the same command to continue")


class Notice:
    """Whether SIGTERM has come. As its handler it takes note and lets the work go on."""

    def __init__(self):
        self.received = False

    def __call__(self, signum, frame) -> None:
        self.received = True


@contextlib.contextmanager
def stops_at_once() -> Iterator[None]:
    """Within the block SIGTERM raises Preempted, but where the work inside of it wants to be told only (`noticed`)."""

    def stop(signum, frame) -> None:
        signal.signal(signal.SIGTERM, Notice())  # a second one does not disturb the way out
        raise Preempted

    with _handler(stop):
        yield


@contextlib.contextmanager
def noticed() -> Iterator[Notice]:
    """Within the block SIGTERM is only noted. After it Preempted is raised if there was one and the block did not.

    A block within such a block shares its notice, and leaves the end to it. So the processes of a cluster, which have
    to agree on when to stop, run a command as one such block.
    """
    current = signal.getsignal(signal.SIGTERM)
    if isinstance(current, Notice):
        with _handler(current):  # again, since `jax.distributed.initialize` may have taken its place
            yield current
        return
    notice = Notice()
    with _handler(notice):
        yield notice
    if notice.received:
        raise Preempted


def received() -> bool:
    """Whether SIGTERM has come within a `noticed` block around the caller; where there is none, it stopped at once."""
    handler = signal.getsignal(signal.SIGTERM)
    return isinstance(handler, Notice) and handler.received


@contextlib.contextmanager
def _handler(handler: Callable) -> Iterator[None]:
    """SIGTERM's handler within the block; Python lets only the main thread have one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
