"""libtpu without a TPU: installed to compile for TPUs (`cdlm plan`), it would make JAX look for one, and complain.

Imported before the first import of JAX (`cdlm_jax/__init__.py`), for this is decided then.
"""

import importlib.util
import os
import sys
from pathlib import Path

# As PCI devices: Google's number as a vendor, and those of v2 to TPU7x (in `jax._src.hardware_utils`).
GOOGLE, TPUS = "0x1ae0", {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}


def has_tpu() -> bool:
    """Whether this machine has one."""
    devices = Path("/sys/bus/pci/devices").glob("*")
    numbers = ((each / name).read_text().strip() for each in devices for name in ("vendor", "device"))
    return any(vendor == GOOGLE and device in TPUS for vendor, device in zip(numbers, numbers, strict=True))


def skip_absent_tpu() -> None:
    """Keep JAX to the CPU where libtpu is installed, no TPU is there, and nobody chose otherwise."""
    if "jax" in sys.modules or "JAX_PLATFORMS" in os.environ:
        return
    if importlib.util.find_spec("libtpu") and not importlib.util.find_spec("jax_plugins") and not has_tpu():
        os.environ["JAX_PLATFORMS"] = "cpu"


skip_absent_tpu()
