"""CDLM of LLaDA-8B-Instruct: the paper's recipe on a TPU slice or a node of GPUs.

Prompts: 15,000 of at most 512 tokens with answers, as JSON lines {"prompt", "answer"}. It was planned, not run: no such
machine was at hand. The teacher's folder is that of GSAI-ML/LLaDA-8B-Instruct. In this order:

    cdlm plan     --config=llada_8b --topology=v5e:4x4 --stage=distill    # collect, generate
    cdlm collect  --config=llada_8b
    cdlm distill  --config=llada_8b
    cdlm evaluate --model=runs/llada_8b/student --task=gsm8k --data=gsm8k_test.jsonl

Two trajectories per prompt (temperatures 0 and 0.5), 16 epochs of 30,000 in updates of 64 rows. The paper leaves open
rank, learning rate and schedule: those are this project's (docs/method.md).

What `cdlm plan` says (docs/planning.md), for 64 rows: the mesh data x fsdp x tensor, peak GiB of one device, and the
seconds, at least, of an update or of decoding a batch, with what bounds them.

    machine        distill                     collect                     generate
    v5e:4x4        1x16x1    7.4  1.58 compute 1x16x1    2.1  57.5 compute 4x1x4     6.8   2.3 compute
    v5p:4x4x4      1x64x1    3.2 0.169 compute 64x1x1   15.0  6.17 compute 64x1x1   15.7 0.693 memory
    v6e:4x4        1x16x1    7.2 0.575 memory  16x1x1   15.7  12.3 compute 16x1x1   18.0  1.19 memory
    tpu7x:2x2x1    1x8x1    14.7  1.11 memory  8x1x1    30.8  40.4 memory  8x1x1    46.5  15.3 memory
    h100:8         1x8x1    11.4 0.629 compute 8x1x1    15.9  22.9 compute 8x1x1    20.9  2.68 memory

Memory of one device: v5e 15.75, v5p 95.7, v6e 31.25, tpu7x 94.75 (half a chip), H100 74.5 GiB. The default mesh is
plain FSDP; decode with whole weights where they fit (--config.mesh.data=8 --config.mesh.fsdp=1 on eight devices). Where
it does not fit: four v5e chips (v5e:2x2) do not hold an update in one part (17.1 GiB). One H100 does in 16 parts,
--config.distill.accumulate=16 (20.8 GiB).
"""

from ml_collections import ConfigDict

from cdlm_jax.recipes.published import published_recipe


def get_config() -> ConfigDict:
    config = published_recipe(prompts=15000)  # 7,500 updates
    config.work = "runs/llada_8b"
    config.teacher = "models/LLaDA-8B-Instruct"
    config.architecture = {
        "family": "llada",
        "vocab_size": 126464,
        "hidden_size": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 32,
        "mlp_size": 12288,
        "rope_theta": 5e5,
        "norm_eps": 1e-5,
        "qkv_bias": False,
        "logit_alignment": "same_position",
        "mask_token_id": 126336,
        "eos_token_id": 126081,
        "pad_token_id": 126081,
        "max_length": 4096,
    }
    return config
