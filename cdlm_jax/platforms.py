"""libtpu without a TPU: installed to compile for TPUs (`cdlm plan`), it would make JAX look for one, and complain.

Imported before the first import of JAX (`cdlm_jax/__init__.py`), for this is decided then.
"""

import importlib.util
import os
import sys
from pathlib import Path

GOOGLE = "0x1ae0"  # as a vendor of PCI devices: a machine has TPUs where JAX finds one of these, too


def has_tpu() -> bool:
    """Whether this machine has one."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == GOOGLE for vendor in vendors)


def skip_absent_tpu() -> None:
    """Keep JAX to the CPU where libtpu is installed, no TPU is there, and nobody chose otherwise."""
    if "jax" in sys.modules or "JAX_PLATFORMS" in os.environ:
        return
    if importlib.util.find_spec("libtpu") and not importlib.util.find_spec("jax_plugins") and not has_tpu():
        os.environ["JAX_PLATFORMS"] = "cpu"


skip_absent_tpu()
