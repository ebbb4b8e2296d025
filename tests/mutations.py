"""Break the code on purpose, one place at a time, and see whether the fast tests notice.

python tests/mutations.py            every fault; exits 1 if one is missed
python tests/mutations.py 3 17       those of these numbers

The package and its tests are copied to a temporary folder, so that nothing happens to the files here.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
COPIED = ("cdlm_jax", "configs", "tests", "benchmarks", "examples", "launch", "docs", "pyproject.toml", "README.md")


class Mutation(NamedTuple):
    """`old`, which is in the package's `file` exactly once, becomes `new`: then `meaning` is true, and a test of the
    test files `tests` should fail."""

    meaning: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    # ---- visibility
    Mutation(
        "a block does not see its own last token",
        "visibility.py",
        "prompt + block_size * (block + 1))",
        "prompt + block_size * (block + 1) - 1)",
        ("test_visibility",),
    ),
    Mutation(
        "a packed noisy block sees its own clean tokens",
        "visibility.py",
        "jnp.where(noisy, end - block_size,",
        "jnp.where(noisy, end,",
        ("test_packed",),
    ),
    Mutation(
        "left padding hides one key too many",
        "visibility.py",
        "mask &= keys >= valid_start[:, None, None]",
        "mask &= keys > valid_start[:, None, None]",
        ("test_visibility",),
    ),
    # ---- decoders
    Mutation(
        "the threshold is inclusive",
        "decoding/unmask.py",
        "else p > self.tau",
        "else p >= self.tau",
        ("test_unmask",),
    ),
    Mutation(
        "the factor rule loses upstream's trap",
        "decoding/unmask.py",
        "jnp.where(first_failure == count - 1, count, first_failure)",
        "first_failure",
        ("test_unmask",),
    ),
    Mutation(
        "the entropy budget counts the largest, too",
        "decoding/unmask.py",
        "jnp.cumsum(ascending, axis=1) - ascending",
        "jnp.cumsum(ascending, axis=1)",
        ("test_unmask",),
    ),
    Mutation(
        "a row that is done counts the forwards of others",
        "decoding/progress.py",
        "active = ~self.done",
        "active = jnp.ones_like(self.done)",
        ("test_decoding",),
    ),
    Mutation(
        "what follows the first EOS is kept",
        "decoding/progress.py",
        "tokens = jnp.where(after, eos_token_id, self.response)",
        "tokens = jnp.where(after & False, eos_token_id, self.response)",
        ("test_decoding",),
    ),
    Mutation(
        "a forward's draw does not depend on its step",
        "decoding/common.py",
        "return fold(fold(keys, progress.block), progress.step)",
        "return fold(keys, progress.block)",
        ("test_decoding",),
    ),
    Mutation(
        "shifted models predict a token at its own place",
        "decoding/common.py",
        'start - (alignment == "shifted")',
        "start",
        ("test_naive", "test_likelihood"),
    ),
    Mutation(
        "the first token of a shifted block is predicted by the block's own last row",
        "decoding/cdlm.py",
        "jnp.concatenate([new.before[:, None], hidden[:, :-1]], axis=1)",
        "jnp.roll(hidden, 1, axis=1)",
        ("test_decoding",),
    ),
    # ---- the cache
    Mutation(
        "a finished block is committed one forward late",
        "decoding/cdlm.py",
        "(progress.step == 0) & (progress.block > 0)",
        "(progress.step == 1) & (progress.block > 0)",
        ("test_decoding",),
    ),
    Mutation(
        "rows with nothing to commit write, too",
        "decoding/cdlm.py",
        "write = pending[:, None] |",
        "write = (pending | True)[:, None] |",
        ("test_decoding",),
    ),
    Mutation(
        "keys are written one slot too far",
        "models/cache.py",
        "jnp.stack([jnp.full_like(slots, layer), slots], axis=-1)",
        "jnp.stack([jnp.full_like(slots, layer), slots + 1], axis=-1)",
        ("test_block_attention_cache_write",),
    ),
    # ---- sampling
    Mutation(
        "top_p cuts the token that reaches it",
        "decoding/sampling.py",
        "jnp.where(ahead > self.top_p,",
        "jnp.where(ahead >= self.top_p,",
        ("test_sampling",),
    ),
    Mutation(
        "the margin forgets the second token",
        "decoding/sampling.py",
        "margin=jnp.exp(first) - jnp.exp(second)",
        "margin=jnp.exp(first)",
        ("test_sampling",),
    ),
    # ---- losses, likelihood, training
    Mutation(
        "a loss is summed over rows",
        "training/losses.py",
        "(jnp.maximum(counts, 1) * mask.shape[0])",
        "jnp.maximum(counts, 1)",
        ("test_losses",),
    ),
    Mutation(
        "the denoising loss forgets its 1 / t",
        "training/losses.py",
        "weights / (t[:, None] * masked.shape[0])",
        "weights / masked.shape[0]",
        ("test_losses",),
    ),
    Mutation(
        "gradients of micro-batches are summed",
        "training/step.py",
        "return jax.tree.map(lambda x: x / accumulate, total)",
        "return total",
        ("test_step",),
    ),
    Mutation(
        "every step draws the same",
        "training/step.py",
        "jax.random.fold_in(jax.random.key(seed), state.step)",
        "jax.random.key(seed)",
        ("test_step",),
    ),
    Mutation(
        "the bound masks one token too many",
        "evaluation/likelihood.py",
        "ranks < counts[:, None]",
        "ranks <= counts[:, None]",
        ("test_likelihood",),
    ),
    # ---- states
    Mutation(
        "a block ends a block's length after the step",
        "trajectories/states.py",
        "(step // block_size + 1) * block_size",
        "step + block_size",
        ("test_states",),
    ),
    Mutation(
        "a state shows the token of its own step",
        "trajectories/states.py",
        "jnp.where(order < step, tokens, mask_token_id)",
        "jnp.where(order <= step, tokens, mask_token_id)",
        ("test_states",),
    ),
    # ---- the store
    Mutation(
        "the last shard wants records that there are not",
        "trajectories/store.py",
        "min((shard + 1) * self.shard_size, self.num_records)",
        "(shard + 1) * self.shard_size",
        ("test_store",),
    ),
    Mutation(
        "a shard of too few records is taken",
        "trajectories/store.py",
        "if found != expected:",
        "if found > expected:",
        ("test_store",),
    ),
    # ---- sharding
    Mutation(
        "key heads are cut where tensor does not divide them",
        "mesh/sharding.py",
        'few = kv_heads % mesh_sizes().get("tensor", 1) != 0',
        "few = False",
        ("test_sharding",),
    ),
    # ---- kernels
    Mutation(
        "the noise has 16 rounds",
        "kernels/vocab/noise.py",
        "for group in range(5):",
        "for group in range(4):",
        ("test_vocab",),
    ),
    Mutation(
        "columns that fill no tile are left out",
        "kernels/vocab/xla.py",
        "carry = step(carry, 0, first)",
        "pass",
        ("test_vocab",),
    ),
    Mutation(
        "the TPU kernel sees one key too many",
        "kernels/block_attention/tpu.py",
        "seen = position < end_state[:, :1]",
        "seen = position <= end_state[:, :1]",
        ("test_block_attention",),
    ),
    # ---- options
    Mutation(
        "an option that the decoder does not know is dropped",
        "decoding/options.py",
        "if foreign := sorted(given.keys() - set(allowed)):",
        "if foreign := sorted(given.keys() - given.keys()):",
        ("test_generate",),
    ),
)


def noticed(mutation: Mutation, copy: Path) -> bool:
    """Whether a fast test fails in the copy with this fault in it. SystemExit: the fault cannot be made."""
    path = copy / "cdlm_jax" / mutation.file
    before = path.read_text()
    if (count := before.count(mutation.old)) != 1:
        raise SystemExit(f"{mutation.file} holds {mutation.old!r} {count} times; it must once")
    path.write_text(before.replace(mutation.old, mutation.new))
    files = [f"tests/{name}.py" for name in mutation.tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-m", "not slow", "-p", "no:cacheprovider", *files]
    env = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    path.write_text(before)
    if done.returncode not in (0, 1):  # neither passed nor failed
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode == 1


def main(numbers: list[int]) -> int:
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        for number in numbers or range(1, len(MUTATIONS) + 1):
            mutation = MUTATIONS[number - 1]
            found = noticed(mutation, copy)
            missed += not found
            print(
                f"{number:2}  {'noticed' if found else 'MISSED '}  {mutation.file:32}  {mutation.meaning}", flush=True
            )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main([int(number) for number in sys.argv[1:]]))
