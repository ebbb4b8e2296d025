"""What a chat is: the messages that a template puts into words, and which of them make sense."""

from typing import Any

from cdlm_jax.config import InputError
from cdlm_jax.text.tokenizers import Tokenizer

Messages = list[dict[str, str]]  # role and content, as chat templates take them
ROLES = ("system", "user", "assistant")
NO_TEMPLATE = "messages need a chat template, and this model folder has none"


def checked(messages: Any, *, last: str, tokenizer: Tokenizer | None) -> Messages:
    """`messages` as read from JSON, if they are a chat: perhaps a system message, then user and assistant in turns.

    last: whose the last turn must be. InputError names what is wrong with them, or says that there is no template.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        raise InputError(NO_TEMPLATE)
    if not isinstance(messages, list) or not messages:
        raise InputError(f"messages must be a list of {{role, content}}, got {messages!r:.80}")
    for number, message in enumerate(messages, 1):
        _check(message, f"message {number}")
    roles = [message["role"] for message in messages]
    turns = roles[roles[0] == "system" :]
    expected = [("user", "assistant")[place % 2] for place in range(len(turns))]
    if turns != expected or not turns or turns[-1] != last:
        allowed = f"perhaps system, then user and assistant in turns, {last} at the end"
        raise InputError(f"messages are of {', '.join(roles)}; allowed: {allowed}"[:400])
    return messages


def _check(message: Any, name: str) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise InputError(f"{name} needs role and content, got {message!r:.80}")
    if unknown := sorted(message.keys() - {"role", "content"}):
        raise InputError(f"{name} has the unknown key {unknown[0]!r}, allowed: role, content")
    if message["role"] not in ROLES:
        raise InputError(f"{name}: role must be one of {', '.join(ROLES)}, got {message['role']!r:.80}")
    if not isinstance(message["content"], str) or not message["content"]:
        raise InputError(f"{name}: content must be a text that is not empty, got {message['content']!r:.80}")


def with_system(messages: Messages, system: str | None) -> Messages:
    """Begun with this system message, if there is one to begin with and the chat has none of its own."""
    own = bool(messages) and messages[0]["role"] == "system"
    return messages if system is None or own else [{"role": "system", "content": system}, *messages]
