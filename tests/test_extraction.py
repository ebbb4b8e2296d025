"""Finding answers: numbers, boxed LaTeX and code, in responses that are right, odd or broken."""

from decimal import Decimal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cdlm_jax.tasks.extraction import (
    LONGEST_CODE,
    after_phrase,
    boxed,
    code,
    final_number,
    number,
    numbers,
    syntax_error,
)

ODD_TEXT = st.text(alphabet="ab19.,-$\\{}()[]#=*`: \n\"'", max_size=80) | st.text(max_size=40)


# ---------------------------------------------------------------- boxed, phrase


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{5}.", "5"),
        (r"first \boxed{4}, no: \boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\frac{\sqrt{\frac{1}{2}}}{3}} and {more}", r"\frac{\sqrt{\frac{1}{2}}}{3}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x \mid x > 0\right\}}", r"\left\{x \mid x > 0\right\}"),
        (r"\fbox{12}", "12"),
        (r"\boxed {8}", "8"),
        (r"$\boxed 5$", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{5", None),  # cut off
        (r"\boxed", None),
        ("boxed{5}", None),
        ("", None),
    ],
)
def test_boxed(text, expected):
    assert boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 8.", "8"),
        ("Final Answer: The final answer is $[2,5)$. I hope it is correct.", "[2,5)"),
        (r"The answer is \(\frac{1}{2}\), so", r"\frac{1}{2}"),
        ("The answer is:\n\\[ x = 4 \\]", "x = 4"),
        (r"the answer is $\$18.90$.", r"\$18.90"),
        ("The answer is 3.5 cm. Good.", "3.5 cm"),
        ("**Answer:** 42", "42"),
        ("Answer: 3\nAnswer: 4\nDone", "4"),
        ("The answer is $18 in all.", "$18 in all"),
        ("The answer is", None),
        ("nothing here", None),
    ],
)
def test_after_phrase(text, expected):
    assert after_phrase(text) == expected


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18", "18"),
        ("$18", "18"),
        (r"\$18.50", "18.5"),
        ("1,234,567.25 dollars", "1234567.25"),
        ("12{,}000", "12000"),
        (r"12,\!000", "12000"),
        ("-3", "-3"),
        ("-$3", "-3"),
        ("\u22127 degrees", "-7"),
        (".5", "0.5"),
        ("18%", "18"),
        ("18.", "18"),
        ("12,34", "12"),  # not thousands
        ("abc", None),
        ("x2", None),
        ("", None),
    ],
)
def test_number(text, expected):
    assert number(text) == (expected and Decimal(expected))


def test_a_minus_that_subtracts_is_no_sign():
    assert [int(value) for value in numbers("5-3=2, (5)-3, x = -3, 5 - 3, 10-12")] == [5, 3, 2, 5, 3, -3, 5, 3, 10, 12]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She has 16 - 3 = 13.\n#### 13", 13),
        (r"\boxed{18}, not 20", 18),
        (r"\boxed{18 \text{ dollars}}", 18),
        (r"\boxed{x = 18}", 18),
        (r"\boxed{5 + 3 = 8}", 8),
        ("#### 18\n\nThe next one: y = 5", 18),
        ("The answer is 1,000 apples in 3 boxes.", 1000),
        ("It costs $5 and $7, which makes $12.", 12),
        (r"\boxed{ten}. The answer is 10.", 10),
        ("no number at all", None),
        ("", None),
    ],
)
def test_final_number(text, expected):
    assert final_number(text) == expected


@settings(max_examples=200, deadline=None)
@given(text=ODD_TEXT)
@example(text="\\boxed{" * 1000)
@example(text="answer is $")
def test_odd_text_never_raises(text):
    for found in (boxed(text), after_phrase(text)):
        assert found is None or isinstance(found, str)
    value = final_number(text)
    assert value is None or value.is_finite()
    assert code(text, "f", "def f():\n").startswith("def f():\n") or "f" in text


@given(value=st.integers(-(10**12), 10**12), cents=st.integers(0, 99))
def test_written_numbers_are_read_back(value, cents):
    assert final_number(f"First 7, then 8. The answer is {value:,}.{cents:02d} dollars.") == Decimal(
        f"{value}.{cents:02d}"
    )


# ---------------------------------------------------------------- code

CONTEXT = 'import math\n\ndef helper(x):\n    return x\n\ndef f(x):\n    """Doubles x."""\n'
BODY = "    return 2 * x\n"
WHOLE = "def f(x):\n    return 2 * x\n"


def value_of(program):
    scope = {}
    exec(program, scope)
    return scope["f"](4)


@pytest.mark.parametrize(
    "response",
    [
        BODY,
        f"{BODY}```\nThis doubles x.",
        f"\n{BODY}\nThis function doubles its argument.\nIt is simple!",
        f"    # twice\n{BODY}\n\ndef other():\n    pass\n```",
        WHOLE,
        f"{WHOLE}```",
        f"Here is the function:\n```python\n{WHOLE}```\nIt doubles x.",
        f"Here is the function:\n{WHOLE}\nIt doubles x.",
        f"Sure!\n```\n{WHOLE}```",
        f"```py\n{WHOLE}```\n```python\nprint(f(3))\n```",
        f"Use it so:\n```python\nprint(f(3))\n```\nwhere\n```python\n{WHOLE}```",
        f"```python\nfrom typing import List\n\ndef g(x):\n    return 2 * x\n\n{WHOLE.replace('2 * x', 'g(x)')}```",
        "```python\ndef f(x):\n    return helper(x) + int(math.sqrt(16)) * 1\n```",
        "```python\nf = lambda x: 2 * x\n```",
        "```python\r\n" + WHOLE.replace("\n", "\r\n") + "```",
        f"```python\n{WHOLE}",  # never closed
        f"The body is\n```python\n{BODY}```",
    ],
)
def test_code(response):
    assert value_of(code(response, "f", CONTEXT)) == 8


@pytest.mark.parametrize(
    "response",
    ["", "   \n", "I cannot do this.", "```python\n```", "    return (2 * x", "```\ndef f(x:\n```"],
)
def test_without_code_nothing_is_invented(response):
    program = code(response, "f", CONTEXT)
    assert program.startswith(CONTEXT)
    assert syntax_error(program) or value_of(program) is None


def test_a_wrong_name_stays_wrong():
    assert code("def g(x):\n    return 2 * x\n", "f") == "def g(x):\n    return 2 * x\n"


def test_code_is_bounded():
    assert len(code("x\n" * LONGEST_CODE, "f")) == LONGEST_CODE
    assert syntax_error(code("(" * LONGEST_CODE, "f"))


def test_the_model_s_warnings_are_its_own():
    assert syntax_error("x = '\\d'\nassert (x, 1)\nx is 'a'\n") is None
    assert syntax_error("a = 1\nb = = 2\n") == 2
    assert syntax_error("a\0b")
