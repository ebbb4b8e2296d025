"""Programs on other devices than the suite's own: their number is fixed when JAX starts, so each is a process."""

import os
import socket
from pathlib import Path

TESTS = Path(__file__).parent


def environment(count: int, *, optimized: bool = False) -> dict[str, str]:
    """For a process with so many CPU devices. Compiling is most of the time: it is done fast, unless `optimized`."""
    quick = {} if optimized else {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return (
        os.environ
        | quick
        | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        }
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
