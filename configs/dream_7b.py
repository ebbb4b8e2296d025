"""CDLM of Dream-7B-Instruct: the paper's recipe on a TPU slice or a node of GPUs.

Prompts: 7,500 of at most 512 tokens with answers, as JSON lines {"prompt", "answer"}. It was planned, not run: no such
machine was at hand. The teacher's folder is that of Dream-org/Dream-v0-Instruct-7B. In this order:

    cdlm plan     --config=dream_7b --topology=v5e:4x4 --stage=distill    # collect, generate
    cdlm collect  --config=dream_7b
    cdlm distill  --config=dream_7b
    cdlm evaluate --model=runs/dream_7b/student --task=gsm8k --data=gsm8k_test.jsonl

Two trajectories per prompt (temperatures 0 and 0.5), 16 epochs of 15,000 in updates of 64 rows. The paper leaves open
rank, learning rate and schedule: those are this project's (docs/method.md).

What `cdlm plan` says (docs/planning.md), for 64 rows: the mesh data x fsdp x tensor, peak GiB of one device, and the
seconds, at least, of an update or of decoding a batch, with what bounds them.

    machine        distill                     collect                     generate
    v5e:4x4        1x16x1    7.0  1.33 compute 1x16x1    2.1  53.5 compute 4x1x4     4.6  2.14 compute
    v5p:4x4x4      1x64x1    3.3 0.156 compute 64x1x1   14.3  5.74 compute 64x1x1   14.3  0.62 memory
    v6e:4x4        1x16x1    6.7 0.411 memory  16x1x1   14.7  11.6 compute 16x1x1   14.6     1 memory
    tpu7x:2x2x1    1x8x1    13.8 0.944 memory  8x1x1    28.4  31.1 memory  8x1x1    40.4  12.8 memory
    h100:8         1x8x1    10.7 0.578 compute 8x1x1    15.0  21.3 compute 8x1x1    15.0  1.89 memory

Memory of one device: v5e 15.75, v5p 95.7, v6e 31.25, tpu7x 94.75 (half a chip), H100 74.5 GiB. The default mesh is
plain FSDP; decode with whole weights where they fit (--config.mesh.data=8 --config.mesh.fsdp=1 on eight devices). Where
it does not fit: four v5e chips (v5e:2x2) do not hold an update in one part (17.9 GiB). One H100 does in 16 parts,
--config.distill.accumulate=16 (19.5 GiB).
"""

from ml_collections import ConfigDict

from cdlm_jax.recipes.published import published_recipe


def get_config() -> ConfigDict:
    config = published_recipe(prompts=7500)  # 3,750 updates
    config.work = "runs/dream_7b"
    config.teacher = "models/Dream-v0-Instruct-7B"
    config.architecture = {
        "family": "dream",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "num_layers": 28,
        "num_heads": 28,
        "num_kv_heads": 4,
        "mlp_size": 18944,
        "rope_theta": 1e6,
        "norm_eps": 1e-6,
        "qkv_bias": True,
        "logit_alignment": "shifted",
        "mask_token_id": 151666,
        "eos_token_id": 151643,
        "pad_token_id": 151643,
        "max_length": 131072,
    }
    config.distill.weights.dlm = 0.01
    return config
