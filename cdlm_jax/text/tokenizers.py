"""Text to token ids and back: one `Tokenizer`, read from a Hugging Face model folder or made of single characters.

The work is done by the `tokenizers` library; this file knows where a model folder keeps its parts (also the old
`vocab.json` + `merges.txt` pair, which is what Dream ships). Nothing from a folder is executed here: a custom
`tokenization_*.py` is not even opened, and chat templates run in a process of their own.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from cdlm_jax.config import InputError
from cdlm_jax.files import read_text
from cdlm_jax.text.chat_template import render

TOKENIZER, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE = "chat_template.jinja"

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
ADDED_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")

# How Qwen2, and Dream after it, cut text into pieces before byte-pair merging: contractions, words, single digits,
# punctuation, line ends, spaces.
QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MAX_IDS = 1 << 32  # the library's ids are unsigned 32-bit integers
QUOTE = "\ufdd0"  # the next character begins no special token; Unicode keeps this one for a program's own use


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with an optional chat template. Immutable; compare two by `fingerprint()`.

    Attributes:
      backend: the `tokenizers.Tokenizer` that does the work.
      chat_template: Jinja source, or None.
      special_tokens: role -> token, for instance {"eos_token": "<|endoftext|>"}, as far as the folder names them.
    """

    backend: tokenizers.Tokenizer
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Reads the tokenizer of a Hugging Face model folder, or one written by `save`.

        `tokenizer.json` is taken as it is. Without it, `vocab.json` + `merges.txt` are read as Qwen2's byte-level BPE,
        with the added tokens of `tokenizer_config.json` or `added_tokens.json` at the ids given there; `decode` skips
        those that are flagged special or have a role, and a role's token that has no id gets the next free one.
        The chat template is `chat_template.jinja` if there is one, else the entry in `tokenizer_config.json`: of
        several named ones, `default`.

        Raises InputError, naming the file, if the tokenizer is absent or a file is broken.
        """
        folder = Path(path)
        if not has_tokenizer(folder):
            raise InputError(f"no tokenizer in {folder}: looked for {TOKENIZER}, or {VOCAB} and {MERGES}")
        config = _read_object(folder / CONFIG)
        named = _read_object(folder / SPECIAL_MAP) | config
        roles = {role: _content(named[role], folder, role) for role in ROLES if named.get(role) is not None}
        if (folder / TOKENIZER).exists():
            backend = _parse_tokenizer(folder / TOKENIZER)
        else:
            others = named.get("additional_special_tokens") or []
            if not isinstance(others, list):
                raise InputError(f"{folder}: additional_special_tokens must be a list, got {others!r:.80}")
            specials = [*roles.values(), *(_content(token, folder, "additional_special_tokens") for token in others)]
            backend = _byte_level_bpe(folder, config, specials)
        return cls(backend, _chat_template(folder, config), roles)

    @classmethod
    def characters(cls, alphabet: str, special_tokens: Sequence[str] = ("<eos>", "<mask>")) -> "Tokenizer":
        """One token per character: ids 0, 1, ... in the order of `alphabet`, then the special tokens.

        Raises InputError if the alphabet is empty, or a character or special token occurs twice.
        """
        tokens = [*alphabet, *special_tokens]
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        if not alphabet or twice:
            raise InputError(f"a character tokenizer needs distinct characters and special tokens; repeated: {twice}")
        backend = tokenizers.Tokenizer(models.WordLevel({character: i for i, character in enumerate(alphabet)}))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens(list(special_tokens))
        return cls(backend)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` (roles, chat template): `from_folder` gives the same
        tokenizer back, and so does `transformers`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (folder / TOKENIZER).write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Largest id + 1: the least number of embedding rows. A model's own vocab_size is often padded above it."""
        return max(self.backend.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is added around it. A special token written out in the text becomes its id,
        except where it is quoted: what a user wrote goes through `quote` first.

        Raises InputError for a character outside a character tokenizer's alphabet.
        """
        if isinstance(text, str) and QUOTE in text:
            return self._encode_quoted(text)
        return _encode(self.backend, text).ids

    def quote(self, text: str) -> str:
        """`text` for `encode`, to be read as text: a special token spelled in it is none. `QUOTE` is put before each
        place where one begins; most texts stay as they are."""
        return self._special_start.sub(lambda start: QUOTE + start[0], text)

    def _encode_quoted(self, text: str) -> list[int]:
        """What lies between the special tokens is encoded as one text, by a tokenizer that knows none.

        The pieces between quoted characters are shown to the ordinary tokenizer, which alone knows how it finds special
        tokens (some take the spaces around them along).
        """
        ids: list[int] = []
        plain = ""
        for number, piece in enumerate(re.split(f"{QUOTE}(.?)", text, flags=re.DOTALL)):
            end = 0
            if number % 2 == 0:
                found = _encode(self.backend, piece, whole=text)
                for token_id, (start, stop) in zip(found.ids, found.offsets, strict=True):
                    if token_id in self._special_ids:
                        ids += [*_encode(self._without_specials, plain + piece[end:start], whole=text).ids, token_id]
                        plain, end = "", stop
            plain += piece[end:]
        return ids + _encode(self._without_specials, plain, whole=text).ids

    @cached_property
    def _special_ids(self) -> dict[int, str]:
        """The added tokens that are flagged special or have a role, by id."""
        added = self.backend.get_added_tokens_decoder().items()
        roles = set(self.special_tokens.values())
        return {i: token.content for i, token in added if token.special or token.content in roles}

    @cached_property
    def _special_start(self) -> re.Pattern:
        """The first character of every special token that a text spells, also of those that overlap; and QUOTE."""
        return re.compile(f"(?={'|'.join(map(re.escape, (QUOTE, *self._special_ids.values())))}).", re.DOTALL)

    @cached_property
    def _without_specials(self) -> tokenizers.Tokenizer:
        """The same tokenizer, which reads special tokens as any other text."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.add_special_tokens(list(self._special_ids.values()))  # those that only have a role are special too
        backend.encode_special_tokens = True
        return backend

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; an id that names no token becomes nothing.

        Raises InputError for an id that does not fit 32 unsigned bits.
        """
        ids = [int(i) for i in ids]
        bad = next((i for i in ids if not 0 <= i < MAX_IDS), None)
        if bad is not None:
            raise InputError(f"token ids must be at least 0 and below {MAX_IDS}, got {bad}")
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def token_to_id(self, token: str) -> int:
        """Id of a token as the vocabulary spells it. Raises InputError if there is none."""
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise InputError(f"token {token!r} is not in the tokenizer's vocabulary of {self.vocab_size}")
        return token_id

    def id_to_token(self, token_id: int) -> str:
        """What to show for a single id: its text, special tokens included. Part of a multi-byte character shows as
        U+FFFD, and an id that names no token (models pad their vocabulary) as `<id 151900>`."""
        return self.decode([token_id], skip_special=False) or f"<id {token_id}>"

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change whenever the serialized tokenizer does. The chat template has no part in
        it: it shapes the text, not what an id means."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Renders `messages` ({"role": ..., "content": ...} each) as the model's prompt text, ready for `encode`.

        Special tokens of the template are special; those that a message spells are quoted (see `quote`). The template
        runs in a process of its own, in Jinja's immutable sandbox, with bounds on time, output and memory.

        Raises InputError if there is no template, a message is malformed, or the template is refused or fails.
        """
        if self.chat_template is None:
            raise InputError(f"the tokenizer has no chat template: neither {TEMPLATE} nor a chat_template in {CONFIG}")
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise InputError(f"a chat message needs the keys 'role' and 'content', got {message!r:.80}")
        # As Hugging Face does: absent tools and documents are None, which templates tell from undefined.
        variables = {"messages": self._quoted(messages), "add_generation_prompt": add_generation_prompt}
        return render(self.chat_template, variables | {"tools": None, "documents": None} | dict(self.special_tokens))

    def _quoted(self, value: Any) -> Any:
        """Messages with every text in them quoted."""
        if isinstance(value, str):
            return self.quote(value)
        if isinstance(value, Mapping):
            return {key: self._quoted(item) for key, item in value.items()}
        return [self._quoted(item) for item in value] if isinstance(value, list | tuple) else value


def has_tokenizer(path: str | Path) -> bool:
    """Whether the folder has `tokenizer.json`, or both `vocab.json` and `merges.txt`."""
    folder = Path(path)
    return (folder / TOKENIZER).exists() or all((folder / name).exists() for name in (VOCAB, MERGES))


# Encoding


def unquoted(text: str) -> str:
    """What was given to `Tokenizer.quote`."""
    return re.sub(f"{QUOTE}(.?)", r"\1", text, flags=re.DOTALL)


def _encode(backend: tokenizers.Tokenizer, text: str, whole: str | None = None) -> tokenizers.Encoding:
    """`whole`: the quoted text that `text` is a piece of, for messages."""
    try:
        return backend.encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises bare Exceptions, and TypeError for what is not Unicode text
        raise InputError(_why_not_encodable(backend, text, whole, error)) from error


def _why_not_encodable(backend: tokenizers.Tokenizer, text: str, whole: str | None, error: Exception) -> str:
    shown = f"cannot tokenize {text if whole is None else unquoted(whole)!r:.80}"
    if not isinstance(text, str) or not isinstance(backend.model, models.WordLevel):
        return f"{shown}: {error}"
    rest = text
    if not backend.encode_special_tokens:
        for token in backend.get_added_tokens_decoder().values():
            rest = rest.replace(token.content, "")
    vocabulary = backend.get_vocab(with_added_tokens=False)
    unknown = "".join(sorted(set(rest) - vocabulary.keys()))
    allowed = "".join(sorted(vocabulary, key=vocabulary.__getitem__))
    note = "" if whole is None else " (a special token in a prompt is read as text)"
    return f"{shown}: not in the alphabet: {unknown!r}; allowed: {allowed!r}{note}"


# Reading a folder


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an absent file is an empty one."""
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _parse_tokenizer(path: Path) -> tokenizers.Tokenizer:
    text = read_text(path)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        # The library panics on some broken files, and its PanicException is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{path} is not a tokenizer: {_one_line(error)}") from error
    # A stored training set-up must neither cut nor fill what is encoded here.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _byte_level_bpe(folder: Path, config: Mapping[str, Any], specials: Sequence[str]) -> tokenizers.Tokenizer:
    """Qwen2's tokenizer: NFC, pieces, bytes as printable characters, merges, and added tokens found before all that."""
    vocabulary = _read_object(folder / VOCAB)
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys()
    if missing:
        raise InputError(
            f"{folder / VOCAB} is not a byte-level vocabulary: {len(missing)} of the 256 bytes are missing"
        )
    merges = _read_merges(folder / MERGES, vocabulary)

    # Added tokens join the vocabulary because that is the only way to give them ids of our choice.
    added = _added_tokens(folder, config, specials)
    for token_id, token in added.items():
        if vocabulary.setdefault(token.content, token_id) != token_id:
            raise InputError(f"{folder}: token {token.content!r} has ids {vocabulary[token.content]} and {token_id}")
    if not all(type(i) is int and 0 <= i < MAX_IDS for i in vocabulary.values()):
        raise InputError(f"{folder}: {VOCAB} and the added tokens must give each token an id of at least 0")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise InputError(f"{folder}: two tokens of {VOCAB} and the added tokens share an id")
    undeclared = [token for token in specials if token not in {known.content for known in added.values()}]
    for name in undeclared:
        vocabulary.setdefault(name, max(vocabulary.values()) + 1)

    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix=""))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(added.values()))
    backend.add_special_tokens(undeclared)
    return backend


def _read_merges(path: Path, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs in order of priority. An optional first line `#version: ...` and blank lines do not count."""
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        parts = line.split()
        if not parts or (number == 1 and line.startswith("#version")):
            continue
        if len(parts) != 2 or not {*parts, "".join(parts)} <= vocabulary.keys():
            raise InputError(f"{path}, line {number}: not two tokens that merge into one of {VOCAB}: {line!r:.80}")
        merges.append((parts[0], parts[1]))
    return merges


def _added_tokens(folder: Path, config: Mapping[str, Any], specials: Sequence[str]) -> dict[int, AddedToken]:
    """id -> token, of `added_tokens.json` (token -> id) and, over it, `added_tokens_decoder` (id -> properties)."""
    source = folder / ADDED
    try:
        added = {i: AddedToken(token, special=token in specials) for token, i in _read_object(source).items()}
        source = folder / CONFIG
        for token_id, properties in config.get("added_tokens_decoder", {}).items():
            content = properties["content"]
            special = properties.get("special", False) or content in specials
            flags = {flag: properties[flag] for flag in ADDED_FLAGS if flag in properties}
            added[int(token_id)] = AddedToken(content, special=special, **flags)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source}: malformed added tokens: {error!r}") from error
    return added


def _content(token: Any, folder: Path, role: str) -> str:
    """A token given as a string, or as an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise InputError(f"{folder}: {role} must be a string or an object with a content string, got {token!r:.80}")
    return content


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / TEMPLATE).exists():
        return read_text(folder / TEMPLATE)
    template = config.get("chat_template")
    if isinstance(template, list):
        try:
            by_name = {entry["name"]: entry["template"] for entry in template}
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / CONFIG}: each named chat_template needs a name and a template") from error
        if "default" not in by_name:
            raise InputError(f"{folder / CONFIG}: no chat_template is named 'default'; there are {sorted(by_name)}")
        template = by_name["default"]
    if template is not None and not isinstance(template, str):
        raise InputError(f"{folder / CONFIG}: chat_template must be a string or a list, got {type(template).__name__}")
    return template


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
