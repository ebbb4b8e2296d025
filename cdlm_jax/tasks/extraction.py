"""Finding the answer in what a model said: numbers, boxed LaTeX, code."""

import ast
import re
import warnings
from collections.abc import Iterator
from decimal import Decimal

# A minus sign counts unless it subtracts; commas only between groups of three digits.
_NUMBER = re.compile(r"(?:(?<![\w)}])-\$?|(?<![\w.])\$?)(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)
_PHRASE = re.compile(r"\banswer\b\**(?:\s+is\b\s*:?|\s*:)", re.IGNORECASE)
_FORMULA = re.compile(r"\$\$?((?:\\.|[^$\n\\])+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_CODE_BEGINS = re.compile(r"^(?:import \w|from [\w.]+ import |def \w|class \w|@\w)", re.MULTILINE)
_FENCE = re.compile(r"```[ \t]*[\w+.-]*[ \t]*\r?\n?")
LONGEST_CODE = 1 << 16  # characters; longer responses are cut


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` or `\fbox{...}` holds, nested braces and all; None if there is none or no end."""
    found = [*re.finditer(r"\\(?:boxed|fbox)\s*", text)]
    if not found:
        return None
    start = found[-1].end()
    if not text.startswith("{", start):  # \boxed 5
        return re.split(r"[\s$.,]", text[start:], maxsplit=1)[0] or None
    depth = 0
    for at in range(start, len(text)):
        escaped = text[at - 1] == "\\"
        depth += not escaped and {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[start + 1 : at].strip()
    return None


def after_phrase(text: str) -> str | None:
    """What follows the last "answer is" or "answer:": a formula, else the rest of the sentence or line; else None."""
    found = [*_PHRASE.finditer(text)]
    if not found:
        return None
    rest = text[found[-1].end() :].lstrip("* \n")
    if formula := _FORMULA.match(rest):
        return formula[formula.lastindex or 0].strip()
    return re.split(r"\.(?:\s|$)|\n", rest, maxsplit=1)[0].strip(" *") or None


def number(text: str) -> Decimal | None:
    """The first number in a text: `$1,234.50`, `1{,}000`, `-3`, `.5`; the sign is kept, units and % are not."""
    return next(numbers(text), None)


def numbers(text: str) -> Iterator[Decimal]:
    """All numbers in a text."""
    plain = re.sub(r"\{,\}|,\\!", ",", text).replace("\\$", "$").replace("\u2212", "-")
    for match in _NUMBER.finditer(plain):
        yield Decimal(re.sub(r"[$,]", "", match[0]))


def final_number(text: str) -> Decimal | None:
    r"""The answer of a worked arithmetic solution: the number in the last \boxed{}, else after the last `####`, else
    after the last "answer is", else the last number of all."""
    marked = text.rpartition("####")[2].strip().partition("\n")[0] if "####" in text else None
    for part in (boxed(text), marked, after_phrase(text)):
        if part is not None and (found := number(part.rpartition("=")[2])) is not None:
            return found
    return [None, *numbers(text)][-1]


def code(response: str, defines: str, context: str = "") -> str:
    """The program in a response that was to define the function `defines`.

    context: code that the response may go on from (HumanEval's prompt, which ends inside the function). The response
    may begin inside a fence that the prompt has opened: its first piece ends at the next fence; further pieces are the
    fenced blocks. Taken is the first piece that defines the function by itself (before it then come imports and
    helpers of the context), else the first that goes on from the context. Lines before and after the code that are
    not Python are dropped. Where no piece fits, the first one, so that it fails as it is.
    """
    pieces = [piece for piece in _FENCE.split(response[:LONGEST_CODE]) if piece.strip()]
    definition = re.compile(rf"^def +{re.escape(defines)}\b|^{re.escape(defines)} *=(?!=)", re.MULTILINE)
    helpers = definition.split(context, maxsplit=1)[0]
    for piece in pieces:
        if definition.search(piece):
            code_begins = _CODE_BEGINS.search(piece)
            for start in dict.fromkeys([0, code_begins.start() if code_begins else 0]):
                if program := _parsable(helpers, piece[start:], definition):
                    return program
    for piece in pieces:
        if context and (program := _parsable(context, piece, definition)):
            return program
    return context + "".join(pieces[:1])


def _parsable(start: str, piece: str, definition: re.Pattern) -> str | None:
    """`start` and as many lines of `piece` as make Python that has the definition; None if not even one does."""
    lines = re.sub(r"^\s*\n", "", piece).rstrip().split("\n")
    above, end = start.count("\n"), len(lines)
    while end > 0:
        program = start + "\n".join(lines[:end]) + "\n"
        error = syntax_error(program)
        if error is None:
            return program if definition.search(program) else None
        end = min(end - 1, error - above - 1)  # what has an error in line n has it however it goes on
    return None


def syntax_error(source: str) -> int | None:
    """The line, from 1, at which Python stops to understand a text; 1 where it does not say; None if it is Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes and comparisons in the model's code
        try:
            ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return getattr(error, "lineno", None) or 1
    return None
