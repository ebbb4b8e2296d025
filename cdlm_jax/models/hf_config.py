"""Hugging Face config.json <-> ModelConfig, for the families this project reads.

Facts are those of GSAI-ML/LLaDA-8B-Instruct (`configuration_llada.py`) and Dream-org/Dream-v0-Instruct-7B
(`configuration_dream.py`), and of Qwen2.5 and Llama, the autoregressive models to compare with. A setting that the
Transformer cannot express is refused by name, never ignored.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, cast

from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.files import read_text

_KINDS: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
_TOKEN_IDS = ("mask_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class _Family:
    """How one family writes its config.json.

    fields: ModelConfig field -> key. fixed: key -> the values that this Transformer is; None among them is an absent
    or null key, allowed where upstream's own default says the same. implied: ModelConfig fields without a key.
    """

    model_type: str
    architecture: str
    fields: dict[str, str]
    fixed: dict[str, tuple]
    implied: dict[str, Any]


_FAMILIES = {
    "llada": _Family(
        model_type="llada",
        architecture="LLaDAModelLM",
        fields={
            "vocab_size": "embedding_size",
            "hidden_size": "d_model",
            "num_layers": "n_layers",
            "num_heads": "n_heads",
            "num_kv_heads": "n_kv_heads",
            "mlp_size": "mlp_hidden_size",
            "rope_theta": "rope_theta",
            "norm_eps": "rms_norm_eps",
            "qkv_bias": "include_qkv_bias",
            "tie_embeddings": "weight_tying",
            "max_length": "max_sequence_length",
        },
        fixed={
            "block_type": ("llama",),
            "layer_norm_type": ("rms",),
            "activation_type": ("silu",),
            "rope": (True,),
            "alibi": (False, None),
            "attention_layer_norm": (False, None),
            "bias_for_layer_norm": (False, None),
            "block_group_size": (1, None),
            "clip_qkv": (None,),
            "include_bias": (False, None),
            "input_emb_norm": (False, None),
            "layer_norm_with_affine": (True, None),
            "multi_query_attention": (None,),
            "scale_logits": (False, None),
        },
        implied={"logit_alignment": "same_position"},
    ),
    "dream": _Family(
        model_type="Dream",
        architecture="DreamModel",
        fields={
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads",
            "mlp_size": "intermediate_size",
            "rope_theta": "rope_theta",
            "norm_eps": "rms_norm_eps",
            "tie_embeddings": "tie_word_embeddings",
            "max_length": "max_position_embeddings",
        },
        fixed={
            "hidden_act": ("silu", None),
            "rope_scaling": (None,),
            "use_mrope": (False, None),
            "use_sliding_window": (False, None),
        },
        implied={"logit_alignment": "shifted", "qkv_bias": True},
    ),
}
# Dream began as Qwen2.5, so these differ from it in little.
_NO_BIASES = {"attention_bias": (False, None), "mlp_bias": (False, None)}
for _name, _architecture, _bias in (("qwen2", "Qwen2ForCausalLM", True), ("llama", "LlamaForCausalLM", False)):
    _FAMILIES[_name] = dataclasses.replace(
        _FAMILIES["dream"],
        model_type=_name,
        architecture=_architecture,
        fixed=_FAMILIES["dream"].fixed | ({} if _bias else _NO_BIASES),
        implied={"logit_alignment": "shifted", "qkv_bias": _bias, "mask_token_id": None},
    )


def read_config(folder: str | Path) -> ModelConfig:
    """ModelConfig of a Hugging Face folder; token ids that config.json lacks are taken from generation_config.json.

    Raises InputError for a missing or unreadable file, an unknown model_type, a missing or mistyped key, and every
    setting that the Transformer cannot express. Keys it does not know are kept in `source` and otherwise left alone.
    """
    path, generation_path = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    source = read_text(path)
    raw = _json_object(source, path)
    generation = read_json(generation_path) if generation_path.exists() else {}
    found = {key: generation.get(key) for key in _TOKEN_IDS if raw.get(key) is None}
    return dataclasses.replace(parse_config(raw | found, str(path)), source=source)


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """What an export by this project noted under the key `cdlm` of config.json (block size, role); {} elsewhere."""
    path = Path(folder) / "config.json"
    metadata = read_json(path).get("cdlm", {})
    if not isinstance(metadata, dict):
        raise InputError(f"{path}: cdlm must be an object, got {metadata!r}")
    return metadata


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; anything else is an InputError."""
    return _json_object(read_text(path), path)


def _json_object(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def parse_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """The content of a config.json -> ModelConfig without `source`. `where` begins every error message."""
    name = next((name for name, family in _FAMILIES.items() if family.model_type == raw.get("model_type")), None)
    if name is None:
        known = ", ".join(family.model_type for family in _FAMILIES.values())
        raise InputError(f"{where}: model_type is {raw.get('model_type')!r}; known are {known}")
    family = _FAMILIES[name]
    for key, allowed in family.fixed.items():
        if raw.get(key) not in allowed:
            only = " or ".join(json.dumps(value) for value in allowed)
            raise InputError(f"{where}: {key} is {json.dumps(raw.get(key))}; this model supports only {only}")
    raw = _with_defaults(name, raw, where)
    tokens = {key: _value(raw, key, int, where) for key in _TOKEN_IDS if key not in family.implied}
    values = {field: _value(raw, key, _KINDS[field], where) for field, key in family.fields.items()} | tokens
    try:
        return ModelConfig(family=cast(Any, name), **values, **family.implied)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _with_defaults(family: str, raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Upstream's rules for keys that are null or absent. Of several EOS tokens the last counts (Llama 3: a turn's)."""
    if family == "llama" and isinstance(eos := raw.get("eos_token_id"), list) and eos:
        raw = raw | {"eos_token_id": eos[-1]}
    defaults = {"pad_token_id": raw.get("eos_token_id")}
    if family == "llada":
        defaults |= {
            "n_kv_heads": raw.get("n_heads"),
            "include_qkv_bias": False,
            "embedding_size": raw.get("vocab_size"),
        }
        if raw.get("mlp_hidden_size") is None:
            defaults["mlp_hidden_size"] = _value(raw, "mlp_ratio", int, where) * _value(raw, "d_model", int, where)
        if raw.get("embedding_size") is not None:
            vocab, rows = (_value(raw, key, int, where) for key in ("vocab_size", "embedding_size"))
            if rows < vocab:
                raise InputError(f"{where}: embedding_size {rows} must be at least vocab_size {vocab}")
    else:
        heads = _value(raw, "num_attention_heads", int, where)
        if raw.get("head_dim") is not None and _value(raw, "head_dim", int, where) * heads != raw.get("hidden_size"):
            raise InputError(f"{where}: head_dim is {raw['head_dim']}; it must be hidden_size / num_attention_heads")
        raw = raw | _rope(raw, where)
        defaults |= {"num_key_value_heads": heads, "tie_word_embeddings": False}
        if family == "llama":
            defaults["rope_theta"] = 10_000.0
    return raw | {key: value for key, value in defaults.items() if raw.get(key) is None}


def _rope(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters` in place of `rope_theta` and `rope_scaling`."""
    rope = raw.get("rope_parameters")
    if rope is None:
        return {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise InputError(f"{where}: rope_parameters is {json.dumps(rope)}; this model supports only rope_type default")
    return {"rope_theta": rope.get("rope_theta", raw.get("rope_theta"))}


def _value(raw: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = raw.get(key)
    if value is None:
        raise InputError(f"{where}: {key} is missing")
    number: Any = (int, float) if kind is float else kind
    # In Python True is an int; in a config it is a mistake.
    if not isinstance(value, number) or isinstance(value, bool) != (kind is bool):
        raise InputError(f"{where}: {key} must be of type {kind.__name__}, got {json.dumps(value)}")
    if kind is float and not 0 < value < math.inf:
        raise InputError(f"{where}: {key} must be a positive number, got {value}")
    return kind(value)


def config_text(config: ModelConfig, dtype: str, metadata: dict[str, Any] | None = None) -> str:
    """config.json for an export: the original text where it still says the truth, else with the changed keys replaced.

    dtype is the stored one ("float32", "bfloat16"); metadata goes under the key `cdlm`.
    """
    plain = dataclasses.replace(config, source="")
    original = json.loads(config.source) if config.source else {}
    try:
        still_true = parse_config(original, "config.json") == plain
    except InputError:
        still_true = False
    raw = original if still_true else original | _generated(config)
    raw = raw | {key: dtype for key in ("torch_dtype", "dtype") if raw.get(key)}
    if metadata is not None:
        raw["cdlm"] = metadata
    written = parse_config(raw, "config.json")
    for field in _KINDS:
        if getattr(written, field) != getattr(plain, field):
            raise InputError(f"a {config.family} checkpoint cannot express {field}={getattr(plain, field)!r}")
    return config.source if raw == original else json.dumps(raw, indent=2) + "\n"


def _generated(config: ModelConfig) -> dict[str, Any]:
    """Every key that describes `config`, under the family's real names."""
    family = _FAMILIES[config.family]
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": "float32",
        "vocab_size": config.vocab_size,
        **{key: allowed[0] for key, allowed in family.fixed.items()},
        **{key: getattr(config, field) for field, key in family.fields.items()},
        **{key: getattr(config, key) for key in _TOKEN_IDS if getattr(config, key) is not None},
    }
