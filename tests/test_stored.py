"""Reading safetensors piece by piece: the right values, little memory, and only what a process's devices hold."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN
from devices import environment
from safetensors import safe_open
from safetensors.numpy import save_file

from cdlm_jax import load_model
from cdlm_jax.decoding import naive
from cdlm_jax.models import stored
from cdlm_jax.models.stored import Stored


@pytest.mark.parametrize("step", [1, 50, 100, 10_000])
@pytest.mark.parametrize("index", [np.s_[:, :], np.s_[2:9, 1:4], np.s_[3:4, :], np.s_[0:0, :]])
def test_pieces_are_what_is_stored(tmp_path, monkeypatch, step, index):
    monkeypatch.setattr(stored, "STEP", step)
    values = np.arange(60, dtype=np.float32).reshape(12, 5)
    save_file({"t": values}, tmp_path / "file")
    with safe_open(tmp_path / "file", "numpy") as file:
        parts = list(Stored(file, "file", "t").read(index))
    assert all(part.nbytes <= max(step, part[0].nbytes) for _, part in parts)
    got = np.concatenate([np.empty_like(values[index][:0]), *(part for _, part in parts)])
    np.testing.assert_array_equal(got, values[index])
    assert all((values[index][at] == part).all() for at, part in parts)


def test_tensors_are_compared_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "STEP", 16)
    one = np.arange(20, dtype=np.float32).reshape(5, 4)
    other = one.copy()
    other[-1, -1] += 1
    save_file({"one": one, "same": one.copy(), "other": other, "short": one[:4].copy()}, tmp_path / "file")
    with safe_open(tmp_path / "file", "numpy") as file:
        tensor = {name: Stored(file, "file", name) for name in ("one", "same", "other", "short")}
        assert tensor["one"].equals(tensor["same"])
        assert not tensor["one"].equals(tensor["other"])
        assert not tensor["one"].equals(tensor["short"])


def run(*arguments, devices: int) -> subprocess.Popen:
    env = environment(devices, optimized=True)
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def outputs(*processes) -> list[dict]:
    """The JSON that each wrote last, once all are done."""
    written = [process.communicate() for process in processes]
    for process, (_, err) in zip(processes, written, strict=True):
        assert process.returncode == 0, err[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in written]


MEASURE_MEMORY = """
import json, re, sys, threading, time
import jax
import cdlm_jax
from cdlm_jax.mesh import sharding

folder, on_mesh, dtype = sys.argv[1], sys.argv[2] == "mesh", sys.argv[3]
if on_mesh:
    jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2)))
jax.block_until_ready(jax.numpy.zeros(8))
status = open("/proc/self/status", "rb", buffering=0)

def held():
    status.seek(0)
    return 1024 * int(re.search(rb"RssAnon:\\s+(\\d+)", status.read())[1])

before, peak, done = held(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, held())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
model = jax.block_until_ready(cdlm_jax.load_model(folder, dtype=dtype))
done = True
thread.join()
kept = sum(shard.data.nbytes for leaf in jax.tree.leaves(model) for shard in leaf.addressable_shards)
print(json.dumps({"extra": peak - before - kept, "kept": kept}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A LLaDA folder of 100 MB in bfloat16, of which embedding and lm_head have 32 MB each."""
    folder = tmp_path_factory.mktemp("large")
    config = json.loads((GOLDEN / "llada" / "model_bf16" / "config.json").read_text())
    d, mlp, layers, vocab = 512, 4096, 2, 32768
    sizes = {"d_model": d, "mlp_hidden_size": mlp, "n_layers": layers, "vocab_size": vocab, "embedding_size": vocab}
    config |= sizes | {"n_heads": 8, "n_kv_heads": 8}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"wte.weight": (vocab, d), "ff_out.weight": (vocab, d), "ln_f.weight": (d,)}
    for layer in range(layers):
        block = {f"{name}_proj.weight": (d, d) for name in "qkv"} | {"attn_out.weight": (d, d)}
        block |= {"attn_norm.weight": (d,), "ff_norm.weight": (d,)}
        block |= {"ff_proj.weight": (mlp, d), "up_proj.weight": (mlp, d), "ff_out.weight": (d, mlp)}
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    tensors = {f"model.transformer.{name}": np.ones(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


LARGEST = 32768 * 512 * 4  # bytes in float32


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("where", ["one", "mesh"])
def test_memory_beside_the_model_is_less_than_one_and_a_half_tensors(tmp_path, large, where):
    script = tmp_path / "measure.py"
    script.write_text(MEASURE_MEMORY)
    (found,) = outputs(run(script, large, where, "float32", devices=4))
    assert found["kept"] >= 2 * LARGEST
    assert found["extra"] < 1.5 * LARGEST, found


IN_ONE_OF_TWO_PROCESSES = """
import json, sys
import jax, numpy as np
from cdlm_jax import load_model
from cdlm_jax.mesh import sharding
from cdlm_jax.decoding import naive
from cdlm_jax.models import stored

folder, number, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, number)
jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4)))
stored.STEP = 4096  # so that layers go one at a time
read, plain = 0, stored.Stored.read

def counting(tensor, index):
    global read
    for at, values in plain(tensor, index):
        read += values.size
        yield at, values

stored.Stored.read = counting
model = load_model(folder)
held = sum(shard.data.size for leaf in jax.tree.leaves(model) for shard in leaf.addressable_shards)
total = sum(leaf.size for leaf in jax.tree.leaves(model))
pieces = {
    "embed": np.concatenate([shard.data for shard in model.embed[...].addressable_shards], axis=1),
    "up": np.concatenate([shard.data for shard in model.layers.up.kernel[...].addressable_shards], axis=1),
}
np.savez(sys.argv[4], **pieces)
mine = np.arange(6).reshape(2, 3) + 100 * number
back = sharding.local_rows(jax.jit(lambda x: x + 1)(sharding.place(mine)))
prompts, lengths = sharding.place((mine, np.array([3, 2])))
decoded = naive.generate(model, prompts, lengths, naive.Config(gen_length=2, block_size=1))
tokens = sharding.local_rows(decoded.tokens).tolist()
print(json.dumps({"read": read, "total": total, "rows": (back - mine).tolist(), "tokens": tokens}))
"""


def test_each_process_reads_what_its_devices_hold(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(IN_ONE_OF_TWO_PROCESSES)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder = GOLDEN / "llada" / "model"
    files = [tmp_path / "0.npz", tmp_path / "1.npz"]
    processes = [run(script, folder, number, port, file, devices=2) for number, file in enumerate(files)]
    first, second = outputs(*processes)
    pieces = [np.load(file) for file in files]
    with safe_open(folder / "model.safetensors", "numpy") as file:
        embed = file.get_tensor("model.transformer.wte.weight")
        up = [file.get_tensor(f"model.transformer.blocks.{layer}.up_proj.weight").T for layer in range(3)]
    np.testing.assert_array_equal(np.concatenate([piece["embed"] for piece in pieces], axis=1), embed)
    np.testing.assert_array_equal(np.concatenate([piece["up"] for piece in pieces], axis=1), up)
    prompts = np.concatenate([np.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3) + 100])
    alone = naive.generate(load_model(folder), prompts, np.array([3, 2] * 2), naive.Config(gen_length=2, block_size=1))
    assert [*first["tokens"], *second["tokens"]] == alone.tokens.tolist()
    for found in (first, second):
        assert found["rows"] == [[1, 1, 1], [1, 1, 1]]
        assert found["read"] < 0.51 * found["total"]  # the norms are whole on every device
