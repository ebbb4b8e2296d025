"""How many examples a property is tried on: few in every run, many in the slow one."""

import os

import pytest
from hypothesis import settings

FULL = os.environ.get("CDLM_FULL") == "1"  # set by `make test-slow`


def examples(fast: int, full: int):
    """Over @given: `fast` examples, always the same. `make test-slow` runs the test again, with `full` of them."""

    def decorate(test):
        test = settings(max_examples=full if FULL else fast, derandomize=True, deadline=None, database=None)(test)
        return again(test)

    return decorate


def again(test):
    """Over a test whose search is a function inside it: `make test-slow` runs it again."""
    return pytest.mark.slow(test) if FULL else test
