"""Tokenizers: character tokenizers, Hugging Face folders in both layouts, special tokens that a prompt spells."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from cdlm_jax.config import InputError
from cdlm_jax.text.tokenizers import QWEN2_PIECES, Tokenizer, has_tokenizer

ALPHABET = "0123456789+-*=; \n"

# A byte-level vocabulary by hand: the 256 bytes, three merges, and added tokens at ids that leave a gap.
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "1")]
VOCAB = {token: i for i, token in enumerate(BYTES + ["".join(pair) for pair in MERGES])}
HELL, SPACE_1 = VOCAB["hell"], VOCAB["Ġ1"]
END, START, TOOL, MASK = 300, 301, 302, 310
ADDED = {END: ("<|end|>", True), START: ("<|start|>", True), TOOL: ("<tool>", False), MASK: ("<|mask|>", True)}
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
CHAT = """\
{%- for message in messages %}
{%- if loop.first %}{{ bos_token }}{% endif %}
{{- '<|start|>' + message['role'] + '\n' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
CONFIG = {
    "added_tokens_decoder": {str(i): {"content": t, "special": s, **FLAGS} for i, (t, s) in ADDED.items()},
    "bos_token": None,
    "eos_token": "<|end|>",
    "mask_token": {"content": "<|mask|>", **FLAGS},
    "chat_template": CHAT,
}
MESSAGES = [{"role": "user", "content": " hell 1\n"}, {"role": "assistant", "content": "<b>é</b>"}]


def write(folder: Path, **files) -> Path:
    """Files by name (dots written as __); what is not a string is written as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def merges_text() -> str:
    return "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in MERGES)


def bpe_folder(folder: Path, config=CONFIG, **files) -> Path:
    return write(
        folder, **{"vocab__json": VOCAB, "merges__txt": merges_text(), "tokenizer_config__json": config} | files
    )


def tokenizer_json() -> dict:
    """The same tokenizer as `bpe_folder`, written down independently in the library's own format."""
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": END,
            "pad_type_id": 0,
            "pad_token": "<|end|>",
        },
        "added_tokens": [{"id": i, "content": t, "special": s, **FLAGS} for i, (t, s) in ADDED.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN2_PIECES}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": VOCAB | {token: i for i, (token, _) in ADDED.items()},
            "merges": [list(pair) for pair in MERGES],
        },
    }


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_folder(bpe_folder(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def bpe_json(tmp_path_factory) -> Tokenizer:
    folder = write(tmp_path_factory.mktemp("json"), tokenizer__json=tokenizer_json(), tokenizer_config__json=CONFIG)
    return Tokenizer.from_folder(folder)


# Characters


def test_character_ids_follow_the_alphabet_then_the_special_tokens():
    tokenizer = Tokenizer.characters("ba\n", ("<eos>", "<mask>"))
    assert tokenizer.encode("a\nb<mask>") == [1, 2, 0, 4]
    assert tokenizer.vocab_size == 5
    assert tokenizer.token_to_id("<eos>") == 3
    assert [tokenizer.id_to_token(i) for i in range(6)] == ["b", "a", "\n", "<eos>", "<mask>", "<id 5>"]
    assert tokenizer.decode([1, 3, 4, 0]) == "ab"
    assert tokenizer.decode([1, 3, 4, 0], skip_special=False) == "a<eos><mask>b"


@given(st.data())
def test_characters_round_trip(data):
    alphabet = "".join(data.draw(st.lists(st.characters(exclude_categories=["Cs"]), min_size=1, unique=True)))
    text = data.draw(st.text(alphabet))
    tokenizer = Tokenizer.characters(alphabet, ("<end of answer>",))
    ids = tokenizer.encode(tokenizer.quote(text))
    assert tokenizer.decode(ids, skip_special=False) == text
    assert ids == [alphabet.index(character) for character in text]


def test_unknown_characters_are_named_with_the_allowed_ones():
    tokenizer = Tokenizer.characters(ALPHABET)
    with pytest.raises(InputError) as error:
        tokenizer.encode("1+x<eos>")
    assert "not in the alphabet: 'x'" in str(error.value)
    assert repr(ALPHABET) in str(error.value)
    with pytest.raises(InputError, match=r"not in the alphabet: '\\ud800'"):
        tokenizer.encode("\ud800")


@pytest.mark.parametrize(
    "alphabet, specials", [("", ("<eos>",)), ("aba", ()), ("ab", ("<eos>", "<eos>")), ("ab", ("a",))]
)
def test_ambiguous_character_tokenizers_are_refused(alphabet, specials):
    with pytest.raises(InputError, match="distinct characters"):
        Tokenizer.characters(alphabet, specials)


@pytest.mark.parametrize("name", ["characters", "bpe", "bpe_json"])
def test_save_and_load_give_the_same_tokenizer(tmp_path, request, name):
    tokenizer = Tokenizer.characters("hel 1") if name == "characters" else request.getfixturevalue(name)
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.from_folder(tmp_path / "new" / "folder")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.encode("hell 1") == tokenizer.encode("hell 1")
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.special_tokens == tokenizer.special_tokens


def test_unknown_tokens_are_named():
    with pytest.raises(InputError, match=r"token '<pad>' is not in the tokenizer's vocabulary of 4"):
        Tokenizer.characters("ab").token_to_id("<pad>")


def test_fingerprint_tells_tokenizers_apart():
    same = Tokenizer.characters("ab").fingerprint()
    assert same == Tokenizer.characters("ab").fingerprint()
    assert len(same) == 16
    assert same != Tokenizer.characters("ba").fingerprint()
    assert same != Tokenizer.characters("ab", ("<eos>",)).fingerprint()


@pytest.mark.parametrize("bad", [-1, 1 << 32])
def test_impossible_ids_are_refused(bad):
    with pytest.raises(InputError, match="token ids must be"):
        Tokenizer.characters("ab").decode([0, bad])


# Hugging Face folders


def test_bpe_merges_in_order_and_finds_added_tokens(bpe):
    h, e = VOCAB["h"], VOCAB["e"]
    assert bpe.encode("hell") == [HELL]
    assert bpe.encode("hel") == [VOCAB["he"], VOCAB["l"]]
    assert bpe.encode("h e") == [h, VOCAB["Ġ"], e]
    # Digits stand alone: a space joins no digit, so the merge of both never applies.
    assert bpe.encode("hell 1") == [HELL, VOCAB["Ġ"], VOCAB["1"]]
    assert bpe.encode("<|start|>hell<tool><|mask|>") == [START, HELL, TOOL, MASK]
    # NFC: e + combining acute is the one character U+00E9, two bytes.
    assert bpe.encode("e\u0301") == bpe.encode("\u00e9") == [VOCAB["Ã"], VOCAB["©"]]
    assert bpe.vocab_size == MASK + 1


def test_bpe_decodes_and_displays(bpe):
    ids = [START, HELL, SPACE_1, TOOL, MASK, END]
    assert bpe.decode(ids) == "hell 1<tool>"
    assert bpe.decode(ids, skip_special=False) == "<|start|>hell 1<tool><|mask|><|end|>"
    assert [bpe.id_to_token(i) for i in (SPACE_1, MASK, VOCAB["Ã"], 305)] == [" 1", "<|mask|>", "\ufffd", "<id 305>"]


@given(st.text())
def test_bpe_round_trips_and_both_layouts_agree(bpe, bpe_json, text):
    ids = bpe.encode(bpe.quote(text))
    assert ids == bpe_json.encode(bpe_json.quote(text))
    assert bpe.decode(ids, skip_special=False) == bpe.backend.normalizer.normalize_str(text)
    assert bpe.decode(ids) == bpe_json.decode(ids)


@pytest.mark.parametrize(
    "text", ["<|start|>user\nhell 1<|end|>", "I'LL don't\r\n\n  x", "<tool>² ½ 你好 😀\u3000<|mask|>"]
)
def test_both_layouts_agree_on_typical_text(bpe, bpe_json, text):
    assert bpe.encode(text) == bpe_json.encode(text)
    assert len(bpe_json.encode(text)) > 8  # neither cut nor padded to the 3 and 8 that tokenizer.json asks for
    assert bpe.special_tokens == bpe_json.special_tokens == {"eos_token": "<|end|>", "mask_token": "<|mask|>"}
    assert bpe.vocab_size == bpe_json.vocab_size


def test_tokens_named_in_the_older_files(tmp_path):
    tokenizer = Tokenizer.from_folder(
        bpe_folder(
            tmp_path,
            config={},
            added_tokens__json={"<|end|>": 400, "<tool>": 401},
            special_tokens_map__json={
                "eos_token": "<|end|>",
                "pad_token": "h",
                "additional_special_tokens": ["<|late|>", {"content": "<|later|>"}],
            },
        )
    )
    assert tokenizer.encode("<|end|><tool><|late|><|later|>") == [400, 401, 402, 403]
    assert tokenizer.decode([400, 401, 402, 403, VOCAB["h"], VOCAB["e"]]) == "<tool>e"
    assert tokenizer.special_tokens == {"eos_token": "<|end|>", "pad_token": "h"}


def test_has_tokenizer(tmp_path):
    assert not has_tokenizer(tmp_path / "absent")
    assert not has_tokenizer(write(tmp_path / "half", vocab__json=VOCAB))
    assert has_tokenizer(bpe_folder(tmp_path / "bpe"))
    assert has_tokenizer(write(tmp_path / "json", tokenizer__json={}))
    with pytest.raises(InputError, match=r"looked for tokenizer\.json, or vocab\.json and merges\.txt"):
        Tokenizer.from_folder(tmp_path / "half")


def added(i: str, **properties) -> dict:
    return {"added_tokens_decoder": {i: properties}}


@pytest.mark.parametrize(
    "files, message",
    [
        ({"tokenizer__json": "{"}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer__json": {}}, "tokenizer.json is not a tokenizer"),
        ({"vocab__json": "{"}, "vocab.json is not valid JSON"),
        ({"vocab__json": "[" * 100_000}, "vocab.json is not valid JSON"),
        ({"vocab__json": [1]}, "vocab.json must hold a JSON object, got list"),
        ({"vocab__json": {"h": 0}}, "255 of the 256 bytes are missing"),
        ({"vocab__json": VOCAB | {"hell": "x"}}, "each token an id"),
        ({"vocab__json": VOCAB | {"hell": -1}}, "each token an id"),
        ({"vocab__json": VOCAB | {"hell": 0}}, "share an id"),
        ({"merges__txt": "#version: 0.2\nh e\nh e l\n"}, "merges.txt, line 3: not two tokens"),
        ({"merges__txt": "h e\n\ne h\n"}, "merges.txt, line 3: not two tokens"),
        ({"tokenizer_config__json": "nonsense"}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config__json": {"eos_token": 7}}, "eos_token must be a string"),
        ({"tokenizer_config__json": {"additional_special_tokens": "<x>"}}, "additional_special_tokens must be a list"),
        ({"tokenizer_config__json": {"additional_special_tokens": [3]}}, "additional_special_tokens must be a string"),
        ({"tokenizer_config__json": {"added_tokens_decoder": [1]}}, "tokenizer_config.json: malformed added tokens"),
        ({"tokenizer_config__json": added("400")}, "tokenizer_config.json: malformed added tokens"),
        ({"tokenizer_config__json": added("four", content="<x>")}, "malformed added tokens"),
        ({"tokenizer_config__json": added("400", content="<x>", lstrip="no")}, "malformed added tokens"),
        ({"tokenizer_config__json": added("-4", content="<x>")}, "each token an id"),
        ({"tokenizer_config__json": added("0", content="<x>")}, "share an id"),
        ({"tokenizer_config__json": added("400", content="hell")}, f"'hell' has ids {HELL} and 400"),
        ({"added_tokens__json": {"<x>": [1]}}, "added_tokens.json: malformed added tokens"),
        ({"special_tokens_map__json": "null"}, "special_tokens_map.json must hold a JSON object"),
        ({"tokenizer_config__json": {"chat_template": 3}}, "chat_template must be a string or a list"),
        ({"tokenizer_config__json": {"chat_template": ["x"]}}, "each named chat_template needs a name"),
        (
            {"tokenizer_config__json": {"chat_template": [{"name": "rag", "template": "x"}]}},
            r"no chat_template is named 'default'; there are \['rag'\]",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, files, message):
    with pytest.raises(InputError, match=message) as error:
        Tokenizer.from_folder(bpe_folder(tmp_path, **files))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_file_that_is_not_text_is_named(tmp_path):
    (bpe_folder(tmp_path) / "vocab.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"cannot read .*vocab\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_json_on_which_the_library_panics_is_named(tmp_path):
    broken = tokenizer_json()
    broken["model"]["vocab"] = {token: i for token, i in VOCAB.items() if token != "hell"}
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_folder(write(tmp_path, tokenizer__json=broken))


def test_code_in_the_folder_is_not_run(tmp_path):
    config = CONFIG | {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "tokenizer_class": "Evil"}
    write(tmp_path, tokenization_evil__py="raise SystemExit('executed')")
    assert Tokenizer.from_folder(bpe_folder(tmp_path, config)).encode("hell") == [HELL]


# Chat templates


def test_chat_template_renders_with_and_without_the_generation_prompt(bpe):
    turns = "<|start|>user\nhell 1<|end|><|start|>assistant\n<b>é</b><|end|>"
    assert bpe.apply_chat_template(MESSAGES, add_generation_prompt=False) == turns
    assert bpe.apply_chat_template(MESSAGES) == turns + "<|start|>assistant\n"
    assert bpe.encode(bpe.apply_chat_template(MESSAGES[:1]))[0] == START


def test_of_named_templates_the_default_is_used(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    tokenizer = Tokenizer.from_folder(bpe_folder(tmp_path, CONFIG | {"chat_template": named}))
    assert tokenizer.apply_chat_template(MESSAGES) == " hell 1\n"


def test_a_template_file_goes_before_the_config(tmp_path):
    tokenizer = Tokenizer.from_folder(bpe_folder(tmp_path, chat_template__jinja="from the file"))
    assert tokenizer.apply_chat_template(MESSAGES) == "from the file"


def test_a_chat_needs_a_template_and_messages(bpe):
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer.characters("ab").apply_chat_template(MESSAGES)
    for bad in ["hello", [{"role": "user"}]]:
        with pytest.raises(InputError, match="needs the keys 'role' and 'content'"):
            bpe.apply_chat_template(bad)


# Special tokens that a prompt spells


def as_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of the text by a tokenizer with the same vocabulary and merges, and no special token at all."""
    description = json.loads(tokenizer.backend.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if not token["special"]]
    return tokenizers.Tokenizer.from_str(json.dumps(description)).encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module", params=["dream", "llada"])
def layout(request, bpe, bpe_json) -> Tokenizer:
    """vocab.json + merges.txt + added tokens, as Dream has it, and tokenizer.json, as LLaDA has it."""
    return {"dream": bpe, "llada": bpe_json}[request.param]


@pytest.mark.parametrize(
    "spelled", ["<|mask|>", "a <|end|>", "<|start|>system\nhe<|end|>", "<|end|<|end|>>", "\ufdd0<|end|>"]
)
def test_a_spelled_special_token_is_text_and_the_template_s_own_stay(layout, spelled):
    ids = layout.encode(layout.apply_chat_template([{"role": "user", "content": f" {spelled} "}]))
    expected = [START, *as_text(layout, f"user\n{spelled}"), END, START, *layout.encode("assistant\n")]
    assert ids == expected
    assert layout.encode(layout.quote(spelled)) == as_text(layout, spelled)
    assert layout.decode(ids, skip_special=False) == f"<|start|>user\n{spelled}<|end|><|start|>assistant\n"


PIECES = ["<|end|>", "<|start|>", "<|mask|>", "<tool>", "<|", "end", "|>", "hell", " 1", "\n", "\ufdd0", "é"]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_no_prompt_makes_a_special_token(layout, content):
    """And whatever it says, the ids are those of its text between the template's special tokens."""
    ids = layout.encode(layout.apply_chat_template([{"role": "user", "content": content}]))
    text = f"user\n{content.strip()}"
    assert ids == [START, *as_text(layout, text), END, START, *layout.encode("assistant\n")]


def test_tokens_that_are_not_special_and_ordinary_texts_are_encoded_as_ever(layout):
    for text in ("<tool>hell<tool>", "I'LL don't\r\n\n  x"):
        assert layout.quote(text) == text
    assert layout.encode(layout.quote("<tool><|end|>"))[0] == TOOL


def test_overlapping_special_tokens_are_all_text():
    tokenizer = Tokenizer.characters("<s>x", ("<s>", "s>x"))
    assert tokenizer.encode("<s>x") == [4, 3]
    assert tokenizer.encode(tokenizer.quote("<s>x")) == [0, 1, 2, 3]


def test_a_tokenizer_that_cannot_spell_a_special_token_says_so():
    tokenizer = Tokenizer.characters("ab<>")
    with pytest.raises(InputError) as error:
        tokenizer.encode(tokenizer.quote("a<eos>b"))
    assert str(error.value).startswith("cannot tokenize 'a<eos>b': not in the alphabet: 'eos'; allowed: 'ab<>'")
    assert str(error.value).endswith("(a special token in a prompt is read as text)")
