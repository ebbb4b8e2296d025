"""Hugging Face folders of causal models: Qwen2.5 and Llama (what all families share is in test_hf)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from flax import nnx
from safetensors.numpy import save_file
from test_hf import all_tensors, config_folder, same, same_leaves, tensors_of

from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.decoding import autoregressive
from cdlm_jax.models.hf import abstract, export_hf, load_model, read_config
from cdlm_jax.models.transformer import Transformer

# What config.json of the published checkpoints says.
QWEN_7B_INSTRUCT = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN_HALF_B = QWEN_7B_INSTRUCT | {
    "eos_token_id": 151643,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "vocab_size": 151936,
}
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_2_7B = {  # from before rope_theta was written, and before grouped heads
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
REAL = {"qwen2": QWEN_7B_INSTRUCT, "llama": LLAMA_3_8B}
PARAMETERS = [  # as the checkpoints are counted
    (QWEN_7B_INSTRUCT, 7_615_616_512),
    (QWEN_HALF_B, 494_032_768),
    (LLAMA_3_8B, 8_030_261_248),
    (LLAMA_2_7B, 6_738_415_616),
]


def test_real_qwen(tmp_path):
    assert dataclasses.replace(read_config(config_folder(tmp_path, QWEN_HALF_B)), source="") == ModelConfig(
        family="qwen2",
        vocab_size=151936,
        hidden_size=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        mlp_size=4864,
        rope_theta=1000000.0,
        norm_eps=1e-6,
        qkv_bias=True,
        tie_embeddings=True,
        logit_alignment="shifted",
        mask_token_id=None,
        eos_token_id=151643,
        pad_token_id=151643,
        max_length=32768,
    )


def test_real_llama(tmp_path):
    assert dataclasses.replace(read_config(config_folder(tmp_path, LLAMA_3_8B)), source="") == ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        mlp_size=14336,
        rope_theta=500000.0,
        norm_eps=1e-5,
        logit_alignment="shifted",
        mask_token_id=None,
        eos_token_id=128001,
        pad_token_id=128001,
        max_length=8192,
    )


@pytest.mark.parametrize(("raw", "count"), PARAMETERS, ids=["7B", "0.5B", "8B", "7B of old"])
def test_size_of_real_checkpoints(tmp_path, raw, count):
    config = read_config(config_folder(tmp_path, raw))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract(config, jnp.bfloat16))) == count


@pytest.mark.parametrize(
    ("raw", "changes", "field", "value"),
    [
        (LLAMA_2_7B, {}, "rope_theta", 10_000.0),
        (LLAMA_2_7B, {}, "num_kv_heads", 32),
        (LLAMA_3_8B, {"eos_token_id": [128001, 128008, 128009]}, "eos_token_id", 128009),
        (LLAMA_3_8B, {"eos_token_id": [128001, 128008, 128009]}, "pad_token_id", 128009),
        (LLAMA_3_8B, {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta", 5e5),
        (LLAMA_3_8B, {"pad_token_id": 128004}, "pad_token_id", 128004),
        (LLAMA_3_8B, {"head_dim": 128}, "hidden_size", 4096),
        (QWEN_7B_INSTRUCT, {"mask_token_id": 5}, "mask_token_id", None),
        (QWEN_7B_INSTRUCT, {"tie_word_embeddings": None}, "tie_embeddings", False),
    ],
)
def test_rules(tmp_path, raw, changes, field, value):
    assert getattr(read_config(config_folder(tmp_path, raw | changes)), field) == value


def test_lists_of_eos_in_the_generation_config(tmp_path):
    """Where config.json has the one that ends a turn, it counts; else the last of the list (Llama)."""
    turn = read_config(
        config_folder(
            tmp_path, QWEN_7B_INSTRUCT, generation_config={"eos_token_id": [151645, 151643], "pad_token_id": 9}
        )
    )
    assert (turn.eos_token_id, turn.pad_token_id) == (151645, 9)
    raw = {key: value for key, value in LLAMA_3_8B.items() if key != "eos_token_id"}
    listed = read_config(config_folder(tmp_path, raw, generation_config={"eos_token_id": [128001, 128009]}))
    assert listed.eos_token_id == 128009


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r'rope_scaling is {"rope_type": "llama3"'),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "only rope_type default"),
        ("llama", {"attention_bias": True}, "attention_bias is true; this model supports only false or null"),
        ("llama", {"mlp_bias": True}, "mlp_bias is true"),
        ("llama", {"hidden_act": "gelu"}, 'hidden_act is "gelu"; this model supports only "silu" or null'),
        ("llama", {"head_dim": 64}, "head_dim is 64; it must be hidden_size / num_attention_heads"),
        ("llama", {"eos_token_id": []}, r"eos_token_id must be of type int, got \[\]"),
        ("llama", {"eos_token_id": 128256}, r"eos_token_id 128256 is outside the vocabulary 0\.\.128255"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is true"),
        ("qwen2", {"rope_theta": None}, "rope_theta is missing"),
        ("qwen2", {"model_type": "qwen3"}, "model_type is 'qwen3'; known are llada, Dream, qwen2, llama"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_the_model_cannot_express_is_refused_by_name(tmp_path, family, changes, message):
    with pytest.raises(InputError, match=message) as error:
        read_config(config_folder(tmp_path, REAL[family] | changes))
    assert "\n" not in str(error.value)


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["qwen2", "llama"])
def causal_folder(request, tmp_path):
    """The golden Dream weights as a causal model's: Qwen2.5 has the same tensors, Llama no biases."""
    source, folder = GOLDEN / "dream" / "model", tmp_path / request.param
    folder.mkdir()
    dream = json.loads((source / "config.json").read_text())
    sizes = {key: value for key, value in dream.items() if key in REAL[request.param] and key != "architectures"}
    config_folder(folder, REAL[request.param] | sizes | {"model_type": request.param})
    tensors = tensors_of(source / "model.safetensors")
    if request.param == "llama":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".bias")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_round_trip_is_bit_identical(causal_folder, tmp_path):
    model, out = load_model(causal_folder), tmp_path / "out"
    assert (model.config.family, model.config.mask_token_id) == (causal_folder.name, None)
    export_hf(model, out)
    for name in ("config.json", "model.safetensors"):
        assert (out / name).read_bytes() == (causal_folder / name).read_bytes()
    assert same(all_tensors(out), all_tensors(causal_folder))


def test_a_forward_is_that_of_the_same_weights(causal_folder):
    """The golden Dream model under a causal mask (for Llama with its biases at zero), row for row."""
    model, dream = load_model(causal_folder), load_model(GOLDEN / "dream" / "model")
    if causal_folder.name == "llama":
        for layer in (dream.layers.q, dream.layers.k, dream.layers.v):
            layer.bias[...] = jnp.zeros_like(layer.bias[...])
        dream.config = model.config
    tokens = np.random.default_rng(0).integers(0, 500, (2, 21))
    causal = np.broadcast_to(np.arange(1, 22), tokens.shape)
    hidden = model(tokens, visible_end=causal)
    np.testing.assert_array_equal(hidden, dream(tokens, visible_end=causal))
    changed = model(np.where(np.arange(21) == 12, 3, tokens), visible_end=causal)
    np.testing.assert_array_equal(changed[:, :12], hidden[:, :12])
    assert (changed[:, 12:] != hidden[:, 12:]).any(axis=-1).all()


def test_decoding_continues_a_forward(causal_folder):
    model = load_model(causal_folder)
    prompts = np.random.default_rng(1).integers(0, 500, (1, 9))
    result = autoregressive.generate(model, prompts, np.array([9]), autoregressive.Config(gen_length=6))
    whole = np.concatenate([prompts, result.tokens], axis=1)
    logits = model.unembed(model(whole, visible_end=np.arange(1, whole.shape[1] + 1)[None]))
    count = int(result.forwards[0])
    np.testing.assert_array_equal(logits[0, 8:-1].argmax(axis=-1)[:count], result.tokens[0, :count])


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_model_made_here(tmp_path, family):
    config = ModelConfig(
        family=family,
        vocab_size=40,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_size=24,
        rope_theta=1e4,
        norm_eps=1e-5,
        qkv_bias=family == "qwen2",
        tie_embeddings=True,
        logit_alignment="shifted",
        mask_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        max_length=64,
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    export_hf(model, tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert same_leaves(loaded, model)
    assert dataclasses.replace(loaded.config, source="") == config
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["architectures"] == [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[family]]
    assert "mask_token_id" not in raw


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"qkv_bias": True}, "a llama checkpoint cannot express qkv_bias=True"),
        ("qwen2", {"qkv_bias": False}, "a qwen2 checkpoint cannot express qkv_bias=False"),
        ("llama", {"mask_token_id": 3}, "a llama checkpoint cannot express mask_token_id=3"),
    ],
)
def test_what_a_family_cannot_express_is_refused(tmp_path, family, changes, message):
    folder = config_folder(tmp_path, REAL[family])
    config = dataclasses.replace(
        read_config(folder),
        vocab_size=40,
        hidden_size=16,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        mlp_size=24,
        eos_token_id=2,
        pad_token_id=0,
        **changes,
    )
    with pytest.raises(InputError, match=message):
        export_hf(Transformer(config, rngs=nnx.Rngs(0)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
