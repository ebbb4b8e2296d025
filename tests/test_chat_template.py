"""Chat templates: what Hugging Face's expect, and the worker process that hostile ones cannot outlast."""

import time

import pytest

from cdlm_jax.config import InputError
from cdlm_jax.text import chat_template
from cdlm_jax.text.tokenizers import Tokenizer
from cdlm_jax.worker import Worker

MESSAGES = [{"role": "user", "content": " hell 1\n"}, {"role": "assistant", "content": "<b>é</b>"}]


def with_template(template: str) -> Tokenizer:
    return Tokenizer(Tokenizer.characters("ab").backend, template, {"eos_token": "<eos>"})


def test_templates_get_what_hugging_face_gives_them():
    template = """\
    {% if tools is none and documents is none %}
none
    {% endif %}
{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}
{{ {"é": "<&>"} | tojson }}{{ strftime_now("%Y") | length }}{{ bos_token }}{{ eos_token }}{{ 3 * 4 }}{{ '-' * 3 }}"""
    assert with_template(template).apply_chat_template(MESSAGES) == 'none\n01{"é": "<&>"}4<eos>12---'


def test_values_come_through_whole():
    text = "\ud800\x00\u2028\r\n\U0001f600" * 9000
    assert chat_template.render("{{ text }}", {"text": text}) == text
    with pytest.raises(InputError, match="chat messages must be what JSON can say: .*set"):
        chat_template.render("{{ text }}", {"text": {1}})


@pytest.mark.parametrize(
    "template, why",
    [
        ("{{ ''.__class__ }}", "access to attribute '__class__' of 'str'"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute"),
        ("{{ ''['__class__'] }}", "access to attribute"),
        ("{{ '' | attr('__class__') }}", "access to attribute"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "access to attribute"),
        ("{{ raise_exception.__globals__ }}", "access to attribute"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "access to attribute"),
        ("{{ messages.append(1) }}", "not safely callable|access to attribute"),
        ("{{ messages[0].update(role='system') }}", "not safely callable|access to attribute"),
        ("{{ 'a' * 1000000000 }}", "512 MiB of memory"),
        ("{{ 1000000000 * [1] }}", "512 MiB of memory"),
        ("{{ '%999999999d' % 1 }}", "512 MiB of memory"),
        ("{{ '{:>999999999}'.format(1) }}", "512 MiB of memory"),
        ("{{ messages | batch(900000000, 'x') | list }}", "512 MiB of memory"),
        ("{{ 'a\na' | indent(999999999) }}", "512 MiB of memory"),
        ("{{ messages | tojson(indent=999999999) }}", "512 MiB of memory"),
        ("{% for i in range(100000) %}{{ 'a' * 100 }}{% endfor %}", "1,000,000 characters"),
    ],
)
def test_malicious_templates_are_refused(template, why):
    with pytest.raises(InputError, match=f"^the chat template is refused: .*({why})"):
        with_template(template).apply_chat_template(MESSAGES)
    assert MESSAGES[0]["role"] == "user"


ENDLESS = {
    "loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a filter": "{{ 'abc' | slice(900000000) | list | length }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "its length": "{{ 1" + "+1" * 200_000 + " }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_templates_are_stopped(name, monkeypatch):
    """In a tenth of the time here; the next template finds a fresh process."""
    renderer = Worker(chat_template._start)
    monkeypatch.setattr(chat_template, "_RENDERER", renderer)
    monkeypatch.setattr(chat_template, "SECONDS", 0.1)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"^the chat template is refused: it takes more than 0\.1 s$"):
        with_template(ENDLESS[name]).apply_chat_template(MESSAGES)
    assert time.monotonic() - start < 20
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    assert with_template("{{ 1 + 1 }}").apply_chat_template(MESSAGES) == "2"
    renderer.close()


def test_a_template_that_took_too_long_is_not_tried_again(monkeypatch):
    template = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}again"
    monkeypatch.setattr(chat_template, "SECONDS", 0.1)
    monkeypatch.setattr(chat_template, "_RENDERER", renderer := Worker(chat_template._start))
    for _ in range(2):
        with pytest.raises(InputError, match=r"it takes more than 0\.1 s$"):
            with_template(template).apply_chat_template(MESSAGES)
        assert renderer.process is None  # nothing was started for the second
    renderer.close()


def test_a_process_that_ends_is_replaced():
    assert chat_template.render("a", {}) == "a"
    chat_template._RENDERER.process.kill()
    chat_template._RENDERER.process.wait()
    assert chat_template.render("b", {}) == "b"


def test_one_process_renders_many_prompts():
    chat_template.render("a", {})
    process = chat_template._RENDERER.process
    tokenizer = with_template("{% for m in messages %}{{ m['content'] | trim }}{% endfor %}")
    assert {tokenizer.apply_chat_template(MESSAGES) for _ in range(200)} == {"hell 1<b>é</b>"}
    assert chat_template._RENDERER.process is process


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('roles must\nalternate') }}", "TemplateError: roles must alternate"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{% include 'other' %}", "TypeError: no loader"),
        ("{{ missing.attribute }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 10 ** 5000 }}", "ValueError: Exceeds the limit"),
        ("{% for i in range(100000000) %}{% endfor %}", "OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "RecursionError"),
    ],
)
def test_failing_templates_say_so_in_one_line(template, message):
    with pytest.raises(InputError, match=f"the chat template failed: {message}") as error:
        with_template(template).apply_chat_template(MESSAGES)
    assert "\n" not in str(error.value)
