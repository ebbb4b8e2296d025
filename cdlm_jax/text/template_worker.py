"""The process that renders chat templates, which are programs of strangers: Jinja's sandbox, and limits of the system.

It is run as a file, beside nothing but Jinja, and serves one request a line until its input ends:
{"template": source, "variables": {...}} gives {"text": ...}, {"refused": why} or {"failed": why}. A template that takes
longer than it may ends the process.
"""

import contextlib
import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache

SETTINGS = json.loads(sys.argv[1])  # packages: where Jinja is; seconds (of CPU), characters, memory_bytes
sys.path[:0] = SETTINGS["packages"]

from jinja2.exceptions import SecurityError, TemplateError  # noqa: E402
from jinja2.ext import loopcontrols  # noqa: E402
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402


def main() -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends a process, wherever it is
    for name, most in (("AS", SETTINGS["memory_bytes"]), ("FSIZE", 0), ("CORE", 0)):
        with contextlib.suppress(ValueError, OSError):  # not every system lets an address space be limited
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SETTINGS["seconds"])
        reply = json.dumps(render(request["template"], request["variables"]))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)


def render(template: str, variables: dict) -> dict[str, str]:
    try:
        return {"text": bounded_join(compiled(template).generate(variables))}
    except SecurityError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"refused": f"it takes more than {SETTINGS['memory_bytes'] >> 20} MiB of memory"}
    except Exception as error:  # a template can raise anything Python can
        return {"failed": f"{type(error).__name__}: {error}"}


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, strict: an unsafe attribute fails at once."""

    def unsafe_undefined(self, obj, attribute):
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r}")


@lru_cache(maxsize=8)
def compiled(source: str):
    """The environment that Hugging Face's chat templates are written for (transformers `apply_chat_template`)."""
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment.from_string(source)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Unlike Jinja's own filter, without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    raise TemplateError(message)


def bounded_join(pieces) -> str:
    kept, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > SETTINGS["characters"]:
            raise SecurityError(f"it produces more than {SETTINGS['characters']:,} characters")
        kept.append(piece)
    return "".join(kept)


if __name__ == "__main__":
    main()
