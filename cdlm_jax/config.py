"""Model configuration, and the one error class for bad input."""

import dataclasses
from collections.abc import Mapping
from numbers import Integral
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from ml_collections import ConfigDict

LogitAlignment = Literal["same_position", "shifted"]


class InputError(ValueError):
    """Something the user gave is unusable. The message is one line: what was got, and what is allowed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a Transformer. LLaDA, Dream, Qwen2.5 and Llama are settings of it (`models/hf_config.py` reads them).

    mask_token_id: None is an autoregressive model.
    logit_alignment: `same_position` (LLaDA: the logits of row i predict token i) or `shifted` (Dream: of row i-1).
    family: which checkpoint format the model came from, and is exported to.
    source: the original config.json text, kept so that an export writes back every key; empty for models made here.
    """

    family: Literal["llada", "dream", "qwen2", "llama"] = "llada"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_size: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool = False
    tie_embeddings: bool = False
    logit_alignment: LogitAlignment = "same_position"
    mask_token_id: int | None
    eos_token_id: int
    pad_token_id: int
    max_length: int
    source: str = dataclasses.field(default="", repr=False)

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "mlp_size", "max_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_heads):
            raise InputError(f"hidden_size {self.hidden_size} must be a multiple of 2 * num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is None and name == "mask_token_id":
                continue
            if not 0 <= token < self.vocab_size:
                raise InputError(f"{name} {token} is outside the vocabulary 0..{self.vocab_size - 1}")
        if self.causal and self.logit_alignment != "shifted":
            raise InputError(
                "an autoregressive model (no mask_token_id) predicts the next token: its logits are shifted"
            )
        if self.mask_token_id == self.eos_token_id:
            raise InputError(f"mask_token_id and eos_token_id are both {self.mask_token_id}")

    @property
    def causal(self) -> bool:
        """Whether it is an autoregressive model, which has no mask to fill."""
        return self.mask_token_id is None

    @property
    def mask_id(self) -> int:
        """`mask_token_id` of a model that has one: decoders and losses of masked models have checked so."""
        assert self.mask_token_id is not None, "an autoregressive model has no mask token"
        return self.mask_token_id

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def difference(theirs: dict, ours: dict) -> str | None:
    """The first nested setting, by its dotted name, that is not equal in both, and its two values; None if none is."""
    there, here = _flat(theirs), _flat(ours)
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            return f"{name} is {there.get(name)!r} there, {here.get(name)!r} here"
    return None


def _flat(settings: dict, prefix: str = "") -> dict:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def is_count(value) -> bool:
    """Whether it is a positive integer."""
    return isinstance(value, Integral) and int(value) >= 1


def build(cls, section, name: str):
    """A frozen dataclass from a mapping (a ConfigDict section); nested dataclass fields from nested mappings.

    Unknown keys, missing keys and values of the wrong type are refused by their full name.
    """
    if isinstance(section, ConfigDict):
        section = section.to_dict()
    if not isinstance(section, Mapping):
        raise InputError(f"config key {name} must be a section, got {section!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(section) - set(fields)):
        raise InputError(f"unknown config key {name}.{unknown[0]}; allowed: {', '.join(sorted(fields))}")
    values = {key: _checked(fields[key].type, value, f"{name}.{key}") for key, value in section.items()}
    required = {key for key, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING}
    if missing := sorted(required - set(values)):
        raise InputError(f"missing config key {name}.{missing[0]}")
    return cls(**values)


def _checked(kind, value, name: str):
    """`value` for a field of a type: a dataclass, a plain type, a Literal, dict[str, float], tuple[float, ...], or one
    of these and None."""
    if isinstance(kind, UnionType):
        if value is None:
            return None
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, name)
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        allowed = " or ".join(str(each) or repr(each) for each in get_args(kind))
        raise InputError(f"{name} must be {allowed}, got {value!r}")
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(_checked(get_args(kind)[0], item, name) for item in value)
    if get_origin(kind) is dict and isinstance(value, Mapping):
        return {key: _checked(get_args(kind)[1], item, f"{name}.{key}") for key, item in value.items()}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise InputError(f"{name} must be {getattr(kind, '__name__', kind)}, got {value!r}")
