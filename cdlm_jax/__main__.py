"""`python -m cdlm_jax`: the same as the console script `cdlm`."""

import sys

from cdlm_jax.cli import entry

if __name__ == "__main__":
    sys.exit(entry())
