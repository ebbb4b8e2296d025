"""Compares answers with math-verify in a process of its own; `math_equality.py` starts it by its path.

One JSON line in, [gold, answer] as LaTeX without dollars; one out: true or false. SymPy can take any time and memory on
an odd answer, and math-verify's own time limits need the main thread and cannot interrupt long integer arithmetic: so
this process is limited, and killed where it is late.
"""

import contextlib
import json
import logging
import resource
import sys


def serve() -> None:
    from math_verify import parse, verify

    logging.disable()
    with contextlib.suppress(ValueError):  # macOS refuses
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            equal = verify(*(parse(f"\\boxed{{{latex}}}") for latex in json.loads(line)))
        except Exception:
            equal = False
        print(json.dumps(bool(equal)), file=answers, flush=True)


if __name__ == "__main__":
    serve()
