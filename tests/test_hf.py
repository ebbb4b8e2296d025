"""Hugging Face folders: configs with the real key names, weights both ways, and a named error for everything wrong."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from conftest import GOLDEN
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.models import lora
from cdlm_jax.models.hf import abstract, export_hf, load_model, read_config, read_metadata
from cdlm_jax.models.transformer import Transformer

# What config.json of GSAI-ML/LLaDA-8B-Instruct and Dream-org/Dream-v0-Instruct-7B say.
LLADA_8B = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
DREAM_7B = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
REAL = {"llada": LLADA_8B, "dream": DREAM_7B}
FAMILIES = ["llada", "dream"]
EMBED = {"llada": "model.transformer.wte.weight", "dream": "model.embed_tokens.weight"}
HEAD = {"llada": "model.transformer.ff_out.weight", "dream": "lm_head.weight"}
GATE = {"llada": "model.transformer.blocks.1.ff_proj.weight", "dream": "model.layers.1.mlp.gate_proj.weight"}
TIE = {"llada": "weight_tying", "dream": "tie_word_embeddings"}


def config_folder(folder: Path, raw: dict, **files) -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    with safe_open(file, "numpy") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


def all_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in tensors_of(file).items()}


def copy_of(tmp_path: Path, model: str) -> Path:
    return Path(shutil.copytree(GOLDEN / model, tmp_path / "model"))


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )


# Configs


def test_real_llada_8b(tmp_path):
    config = read_config(config_folder(tmp_path, LLADA_8B))
    assert dataclasses.replace(config, source="") == published.LLADA
    # The index of the published checkpoint gives 16,031,162,368 bytes of bfloat16.
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(config, jnp.bfloat16))) * 2 == 16_031_162_368


def test_real_dream_7b(tmp_path):
    # Its generation_config.json has a null mask_token_id, which must not hide the one of config.json.
    generation = {"mask_token_id": None, "eos_token_id": 151643}
    config = read_config(config_folder(tmp_path, DREAM_7B, generation_config=generation))
    assert dataclasses.replace(config, source="") == published.DREAM
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract(config, jnp.bfloat16)))
    assert parameters == 7_615_616_512  # that of Qwen2.5-7B, whose architecture it has


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"mlp_hidden_size": None}, "mlp_size", 4 * 4096),
        ({"n_kv_heads": None}, "num_kv_heads", 32),
        ({"n_kv_heads": 8}, "num_kv_heads", 8),
        ({"embedding_size": None}, "vocab_size", 126464),
        ({"vocab_size": 126400}, "vocab_size", 126464),
        ({"include_qkv_bias": True}, "qkv_bias", True),
        ({"weight_tying": True}, "tie_embeddings", True),
        ({"pad_token_id": None}, "pad_token_id", 126081),
        ({"some_new_key": [1, 2]}, "hidden_size", 4096),
    ],
)
def test_llada_rules(tmp_path, changes, field, value):
    assert getattr(read_config(config_folder(tmp_path, LLADA_8B | changes)), field) == value


def test_token_ids_fall_back_to_the_generation_config(tmp_path):
    raw = {key: value for key, value in DREAM_7B.items() if not key.endswith("token_id")}
    generation = {"mask_token_id": 151666, "eos_token_id": 151643, "pad_token_id": 7}
    config = read_config(config_folder(tmp_path, raw, generation_config=generation))
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (151666, 151643, 7)


REFUSED = [
    ("llada", {"alibi": True}, "alibi is true; this model supports only false"),
    ("llada", {"rope": False}, "rope is false"),
    ("llada", {"include_bias": True}, "include_bias is true"),
    ("llada", {"layer_norm_type": "default"}, 'layer_norm_type is "default"; this model supports only "rms"'),
    ("llada", {"layer_norm_with_affine": False}, "layer_norm_with_affine is false"),
    ("llada", {"bias_for_layer_norm": True}, "bias_for_layer_norm is true"),
    ("llada", {"block_type": "sequential"}, 'block_type is "sequential"'),
    ("llada", {"block_group_size": 2}, "block_group_size is 2"),
    ("llada", {"activation_type": "swiglu"}, 'activation_type is "swiglu"'),
    ("llada", {"attention_layer_norm": True}, "attention_layer_norm is true"),
    ("llada", {"input_emb_norm": True}, "input_emb_norm is true"),
    ("llada", {"scale_logits": True}, "scale_logits is true"),
    ("llada", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("llada", {"multi_query_attention": True}, "multi_query_attention is true"),
    ("llada", {"embedding_size": 1000}, "embedding_size 1000 must be at least vocab_size 126464"),
    ("dream", {"hidden_act": "gelu"}, 'hidden_act is "gelu"; this model supports only "silu"'),
    ("dream", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, r'rope_scaling is {"type": "yarn"'),
    ("dream", {"use_sliding_window": True}, "use_sliding_window is true"),
    ("dream", {"use_mrope": True}, "use_mrope is true"),
    ("dream", {"head_dim": 64}, "head_dim is 64; it must be hidden_size / num_attention_heads"),
    ("dream", {"num_attention_heads": 30}, "hidden_size 3584 must be a multiple of"),
    ("dream", {"num_key_value_heads": 3}, "num_kv_heads 3"),
    ("dream", {"mask_token_id": 151643}, "mask_token_id and eos_token_id are both 151643"),
    ("dream", {"mask_token_id": 200000}, "mask_token_id 200000 is outside the vocabulary"),
    ("dream", {"hidden_size": "3584"}, 'hidden_size must be of type int, got "3584"'),
    ("dream", {"num_hidden_layers": True}, "num_hidden_layers must be of type int, got true"),
    ("dream", {"tie_word_embeddings": 1}, "tie_word_embeddings must be of type bool, got 1"),
    ("dream", {"rope_theta": -1.0}, "rope_theta must be a positive number, got -1.0"),
    ("dream", {"eos_token_id": [1, 2]}, r"eos_token_id must be of type int, got \[1, 2\]"),
    ("dream", {"model_type": "gpt2"}, "model_type is 'gpt2'; known are llada, Dream, qwen2, llama"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED, ids=[next(iter(case[1])) for case in REFUSED])
def test_what_the_model_cannot_express_is_refused_by_name(tmp_path, family, changes, message):
    folder = config_folder(tmp_path, REAL[family] | changes)
    with pytest.raises(InputError, match=message) as error:
        read_config(folder)
    assert str(folder / "config.json") in str(error.value)
    assert "\n" not in str(error.value)


REQUIRED = {
    "llada": [
        *("d_model", "n_layers", "n_heads", "vocab_size", "max_sequence_length", "rope_theta", "rms_norm_eps"),
        *("weight_tying", "mask_token_id", "eos_token_id"),
        *("rope", "layer_norm_type", "activation_type", "block_type", "model_type"),
    ],
    "dream": [
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"),
        *("max_position_embeddings", "rope_theta", "rms_norm_eps", "mask_token_id", "eos_token_id"),
    ],
}


@pytest.mark.parametrize(("family", "key"), [(family, key) for family in FAMILIES for key in REQUIRED[family]])
def test_missing_keys_are_named(tmp_path, family, key):
    raw = dict(REAL[family])
    del raw[key]
    with pytest.raises(InputError, match=rf"\b{key}\b is (missing|null|None)"):
        read_config(config_folder(tmp_path, raw))


def test_unreadable_configs(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*config.json: No such file"):
        read_config(tmp_path)
    for text, message in (
        ("{", "not valid JSON"),
        ("[1]", "must hold a JSON object, got list"),
        ("\udcff", "not UTF-8 text"),
    ):
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(InputError, match=message):
            read_config(tmp_path)


# Loading


@pytest.mark.parametrize("family", FAMILIES)
def test_single_and_sharded_hold_the_same_model(family):
    single, sharded = load_model(GOLDEN / family / "model"), load_model(GOLDEN / family / "model_sharded")
    assert same_leaves(single, sharded)
    assert {leaf.dtype for leaf in jax.tree.leaves(single)} == {jnp.dtype("float32")}


def same_leaves(one, other) -> bool:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in leaves)


@pytest.mark.parametrize("family", FAMILIES)
def test_dtypes(family):
    stored = load_model(GOLDEN / family / "model_bf16")
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype("bfloat16")}
    widened = load_model(GOLDEN / family / "model_bf16", dtype=jnp.float32)
    assert same_leaves(widened, jax.tree.map(lambda x: x.astype(jnp.float32), stored))
    rounded = load_model(GOLDEN / family / "model", dtype="bfloat16")
    assert same_leaves(rounded, stored)  # that folder was made by rounding
    for bad in ("float16", "int8", "no such dtype"):
        with pytest.raises(InputError, match=f"dtype must be float32 or bfloat16, got .*{bad}"):
            load_model(GOLDEN / family / "model", dtype=bad)


def test_orientation():
    """Kernels are [in, out] here, [out, in] in the checkpoint."""
    model = load_model(GOLDEN / "dream" / "model")
    stored = all_tensors(GOLDEN / "dream" / "model")
    np.testing.assert_array_equal(model.layers.gate.kernel[1], stored[GATE["dream"]].T)
    np.testing.assert_array_equal(model.layers.k.bias[2], stored["model.layers.2.self_attn.k_proj.bias"])
    np.testing.assert_array_equal(model.embed[...], stored[EMBED["dream"]])
    np.testing.assert_array_equal(model.head, stored[HEAD["dream"]].T)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def rewrite(folder: Path, change) -> Path:
    """Apply `change(tensors)` to the single file of a folder."""
    tensors = tensors_of(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_missing_tensor(tmp_path, family):
    folder = rewrite(copy_of(tmp_path, f"{family}/model"), lambda t: t.pop(GATE[family]))
    with pytest.raises(InputError, match=rf"missing tensor {GATE[family]}$"):
        load_model(folder)


def test_unexpected_tensor(tmp_path, family):
    folder = copy_of(tmp_path, f"{family}/model")
    rewrite(folder, lambda t: t.update({"a.bias": np.zeros(3, np.float32), "b.bias": np.zeros(3, np.float32)}))
    with pytest.raises(InputError, match=r"unexpected tensor a\.bias \(and 1 more\)$"):
        load_model(folder)


def test_more_layers_stored_than_configured(tmp_path, family):
    folder = copy_of(tmp_path, f"{family}/model")
    raw = json.loads((folder / "config.json").read_text())
    config_folder(folder, raw | {"n_layers" if family == "llada" else "num_hidden_layers": 2})
    with pytest.raises(InputError, match=r"unexpected tensor model\.\S+\.2\.\S+ \(and \d+ more\)$"):
        load_model(folder)


def test_wrong_shape(tmp_path, family):
    folder = copy_of(tmp_path, f"{family}/model")
    rewrite(folder, lambda t: t.update({GATE[family]: np.ascontiguousarray(t[GATE[family]].T)}))
    with pytest.raises(InputError, match=rf"tensor {GATE[family]} has shape \[64, 176\], expected \[176, 64\]$"):
        load_model(folder)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8"])
def test_unsupported_stored_dtype(tmp_path, family, dtype):
    folder = copy_of(tmp_path, f"{family}/model")
    rewrite(folder, lambda t: t.update({GATE[family]: t[GATE[family]].astype(dtype)}))
    with pytest.raises(InputError, match=rf"tensor {GATE[family]} is stored as \w+; readable are F32 and BF16$"):
        load_model(folder)


def test_mixed_stored_dtypes_need_a_choice(tmp_path, family):
    folder = copy_of(tmp_path, f"{family}/model")
    rewrite(folder, lambda t: t.update({GATE[family]: t[GATE[family]].astype(jnp.bfloat16)}))
    with pytest.raises(InputError, match=rf"mixed dtypes: bfloat16 \({GATE[family]}\), float32 \(\S+\); choose one"):
        load_model(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(load_model(folder, dtype="float32"))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("damage", ["truncated", "empty", "html", "header"])
def test_damaged_files(tmp_path, family, damage):
    folder = copy_of(tmp_path, f"{family}/model")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {"truncated": content[:-1], "empty": b"", "html": b"<html>404</html>", "header": content[:500]}[damage]
    )
    with pytest.raises(InputError, match=r"model\.safetensors: truncated, or not a safetensors file"):
        load_model(folder)


def test_no_weights_or_two_kinds(tmp_path, family):
    folder = copy_of(tmp_path, f"{family}/model_sharded")
    shutil.copy(GOLDEN / family / "model" / "model.safetensors", folder)
    with pytest.raises(InputError, match=r"holds both model\.safetensors and model\.safetensors\.index\.json"):
        load_model(folder)
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(InputError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_model(folder)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(tmp_path: Path, family: str, change=None) -> Path:
    """A copy of the sharded folder with `change` applied to its weight_map."""
    folder = copy_of(tmp_path, f"{family}/model_sharded")
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    if change:
        change(index["weight_map"])
    index_file.write_text(json.dumps(index))
    return folder


def test_doubled_tensor(tmp_path, family):
    folder = sharded(tmp_path, family)
    first, second = (tensors_of(folder / file) for file in (FIRST, SECOND))
    name = min(first)
    save_file(second | {name: first[name]}, folder / SECOND)
    with pytest.raises(InputError, match=rf"tensor {name} is stored twice, in {FIRST} and in {SECOND}$"):
        load_model(folder)


def test_index_that_disagrees_with_its_files(tmp_path, family):
    gate = GATE[family]
    cases = [
        (lambda m: m.update({gate: "absent.safetensors"}), rf"{gate} is said to be in 'absent\.safetensors', which is"),
        (lambda m: m.update({gate: "../model/" + FIRST}), rf"{gate} is said to be in '\.\./model/\S+', which is not a"),
        (lambda m: m.update({gate: {FIRST: SECOND, SECOND: FIRST}[m[gate]]}), rf"{gate} is said .*, which does not"),
        (lambda m: m.update({"ghost": FIRST}), rf"ghost is said to be in {FIRST}, which does not hold it"),
        (lambda m: m.pop(gate), rf"tensor {gate} of \S+ is not listed"),
        (lambda m: m.update({gate: 3}), "weight_map must map tensor names to file names"),
    ]
    for number, (change, message) in enumerate(cases):
        case_path = tmp_path / str(number)
        case_path.mkdir()
        with pytest.raises(InputError, match=message):
            load_model(sharded(case_path, family, change))


def test_absent_and_truncated_shards(tmp_path, family):
    folder = sharded(tmp_path, family)
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-8])
    with pytest.raises(InputError, match=f"{SECOND}: truncated"):
        load_model(folder)
    (folder / SECOND).unlink()
    with pytest.raises(InputError, match=f"'{SECOND}', which is not a file of this folder"):
        load_model(folder)


def test_tied_embeddings(tmp_path, family):
    folder = copy_of(tmp_path, f"{family}/model")
    config_folder(folder, json.loads((folder / "config.json").read_text()) | {TIE[family]: True})
    with pytest.raises(InputError, match=rf"ties the embeddings, but tensor {HEAD[family]} differs from"):
        load_model(folder)
    rewrite(folder, lambda t: t.update({HEAD[family]: t[EMBED[family]]}))
    repeated = load_model(folder)
    rewrite(folder, lambda t: t.pop(HEAD[family]))
    absent = load_model(folder)
    assert repeated.lm_head is None and absent.lm_head is None
    assert same_leaves(repeated, absent)
    np.testing.assert_array_equal(absent.head, absent.embed[...].T)
    export_hf(absent, tmp_path / "out")
    assert HEAD[family] not in all_tensors(tmp_path / "out")
    rewrite(folder, lambda t: t.pop(EMBED[family]))
    with pytest.raises(InputError, match=f"missing tensor {EMBED[family]}"):
        load_model(folder)


# Export


@pytest.mark.parametrize("kind", ["model", "model_bf16", "model_sharded"])
def test_round_trip_is_bit_identical(tmp_path, family, kind):
    source, out = GOLDEN / family / kind, tmp_path / "out"
    export_hf(load_model(source), out)
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert same(all_tensors(out), all_tensors(source))
    if kind != "model_sharded":
        assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_sharded_export(tmp_path, family):
    model = load_model(GOLDEN / family / "model")
    export_hf(model, tmp_path / "out", max_shard_bytes=200_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 3
    stored = {name: sum(t.nbytes for t in tensors_of(tmp_path / "out" / name).values()) for name in files}
    assert max(stored.values()) <= 200_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(stored.values())
    assert same(all_tensors(tmp_path / "out"), all_tensors(GOLDEN / family / "model"))
    assert same_leaves(load_model(tmp_path / "out"), model)


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    export_hf(load_model(GOLDEN / "llada" / "model"), tmp_path / "out", max_shard_bytes=1)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == len(all_tensors(GOLDEN / "llada" / "model"))


def test_export_in_another_dtype(tmp_path, family):
    export_hf(load_model(GOLDEN / family / "model"), tmp_path / "out", dtype="bfloat16")
    assert same(all_tensors(tmp_path / "out"), all_tensors(GOLDEN / family / "model_bf16"))
    raw = json.loads((GOLDEN / family / "model" / "config.json").read_text())
    expected = raw | ({"torch_dtype": "bfloat16"} if "torch_dtype" in raw else {})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected


def tiny(family: str, **changes) -> Transformer:
    """A model made here: no source text."""
    shifted = {"qkv_bias": True, "logit_alignment": "shifted"} if family == "dream" else {}
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_size": 24}
    ids = {"mask_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    rest = {"rope_theta": 1e4, "norm_eps": 1e-5, "max_length": 64}
    config = ModelConfig(family=family, **(sizes | ids | rest | shifted | changes))
    return Transformer(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_made_here(tmp_path, family, tied):
    model = tiny(family, tie_embeddings=tied)
    export_hf(model, tmp_path / "out", metadata={"role": "student", "block_size": 4})
    loaded = load_model(tmp_path / "out")
    assert same_leaves(loaded, model)
    assert dataclasses.replace(loaded.config, source="") == model.config
    assert read_metadata(tmp_path / "out") == {"role": "student", "block_size": 4}
    export_hf(loaded, tmp_path / "again")  # metadata stays
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()


def test_metadata_is_optional_and_an_object(tmp_path):
    assert read_metadata(GOLDEN / "llada" / "model") == {}
    with pytest.raises(InputError, match="cdlm must be an object, got 3"):
        read_metadata(config_folder(tmp_path, LLADA_8B | {"cdlm": 3}))


def test_lora_is_merged(tmp_path, family):
    model = lora.attach(load_model(GOLDEN / family / "model"), rank=2, alpha=4.0, key=jax.random.key(0))
    model.layers.q.adapter.b = lora.LoRAParam(jnp.ones_like(model.layers.q.adapter.b[...]))
    export_hf(model, tmp_path / "out")
    assert same_leaves(load_model(tmp_path / "out"), lora.merge(model))
    assert model.layers.q.adapter is not None
    before, after = all_tensors(GOLDEN / family / "model"), all_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert len(changed) == 3 and all(name.endswith("q_proj.weight") for name in changed)


def test_a_changed_config_is_written_truly(tmp_path):
    """Cut to two layers, the old text would lie; what it says beyond the changed keys stays."""
    model = load_model(GOLDEN / "dream" / "model")
    model.layers = jax.tree.map(lambda x: x[:2], model.layers)
    model.config = dataclasses.replace(model.config, num_layers=2)
    export_hf(model, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["num_hidden_layers"] == 2
    assert raw["bos_token_id"] == 502
    assert same_leaves(load_model(tmp_path / "out"), model)


def test_ids_of_the_generation_config_survive_an_export(tmp_path):
    folder = copy_of(tmp_path, "dream/model")
    raw = json.loads((folder / "config.json").read_text())
    config_folder(folder, {key: value for key, value in raw.items() if key != "mask_token_id"})
    export_hf(load_model(folder), tmp_path / "out")
    assert load_model(tmp_path / "out").config.mask_token_id == 500


def test_what_a_family_cannot_express_is_refused(tmp_path):
    with pytest.raises(InputError, match="a dream checkpoint cannot express qkv_bias=False"):
        export_hf(tiny("dream", qkv_bias=False), tmp_path / "out")
    with pytest.raises(InputError, match="a llada checkpoint cannot express logit_alignment='shifted'"):
        export_hf(tiny("llada", logit_alignment="shifted"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_nothing_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    model = load_model(GOLDEN / "llada" / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(InputError, match="full exists already; export to a new or empty folder"):
        export_hf(model, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]

    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr("cdlm_jax.models.hf.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export_hf(model, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    export_hf(model, tmp_path / "empty")
    assert same_leaves(load_model(tmp_path / "empty"), model)
