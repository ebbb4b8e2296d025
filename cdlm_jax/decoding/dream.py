"""Dream's `diffusion_generate`: no blocks; a schedule of timesteps says how many tokens each full forward finalizes."""

import dataclasses
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from cdlm_jax.config import InputError, is_count
from cdlm_jax.decoding.common import check_request, full_forward, step_keys
from cdlm_jax.decoding.progress import DecodeResult, Progress, block_step, until_done
from cdlm_jax.decoding.sampling import Sampling
from cdlm_jax.decoding.unmask import Timesteps, top
from cdlm_jax.mesh.sharding import by_rows
from cdlm_jax.models.transformer import Transformer

Algorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """steps: forwards, each over the whole sequence.

    algorithm: what ranks the masked positions: `maskgit_plus` the top probability, `topk_margin` its lead over the
        second, `entropy` the negative entropy. `origin` reveals each position at random, with probability 1 - s / t.
    eps: the time after the last step; before the first it is 1.
    alg_temp: above 0, positions are drawn from softmax(score / alg_temp) in place of the best.
    temperature, top_p, top_k: cut and temper the distribution before tokens are drawn and scored. top_p and top_k cut
        at temperature 0 too, as upstream, which uses top_k 50 where a caller leaves it out; here None cuts nothing.
    """

    gen_length: int
    steps: int
    algorithm: Algorithm = "entropy"
    eps: float = 1e-3
    alg_temp: float | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self):
        if not is_count(self.gen_length):
            raise InputError(f"gen_length must be a positive integer, got {self.gen_length}")
        if self.algorithm not in get_args(Algorithm):
            raise InputError(f"algorithm must be one of {', '.join(get_args(Algorithm))}, got {self.algorithm!r}")
        if self.alg_temp is not None and not self.alg_temp >= 0:
            raise InputError(f"alg_temp must be 0 or more, got {self.alg_temp}")
        Timesteps(self.steps, self.eps)
        Sampling(self.temperature, self.top_p, self.top_k)

    @property
    def random(self) -> bool:
        return self.temperature > 0 or self.algorithm == "origin" or bool(self.alg_temp)


def generate(
    model: Transformer, prompts: jax.Array, prompt_lengths: jax.Array, config: Config, key: jax.Array | None = None
) -> DecodeResult:
    """Decode a batch: prompts [rows, P_max] int32 right-padded, prompt_lengths [rows] -> DecodeResult.

    The same contract as `cdlm.generate`; every row takes exactly `steps` forwards (`origin` may need fewer). A `key` is
    needed for `origin` and for temperatures above 0.
    """
    check_request(model.config, prompts, prompt_lengths, config.gen_length, config.temperature, key)
    if config.random and key is None:
        raise InputError(f"algorithm {config.algorithm!r} with alg_temp {config.alg_temp} needs a random key, got none")
    return _generate(model, prompts, prompt_lengths, key, config)


@partial(jax.jit, static_argnames="config")
def _generate(model, prompts, prompt_lengths, key, config: Config) -> DecodeResult:
    prompts, prompt_lengths = by_rows((prompts, prompt_lengths))
    size = config.gen_length  # the response is one block

    def forward(progress, carry):
        return full_forward(model, prompts, prompt_lengths, progress, size), carry

    step = partial(block_step, forward=forward, decide=partial(_decide, model, key, config), size=size)
    progress, _ = until_done(step, (Progress.start(prompts.shape[0], size, model.config.mask_id), None))
    return progress.result(model.config.eos_token_id)


def _decide(model: Transformer, key, config: Config, progress: Progress, hidden: jax.Array):
    """Upstream's `_sample`: tokens, and the positions of this step."""
    masked, schedule = progress.masked(config.gen_length), Timesteps(config.steps, config.eps)
    keys = step_keys(key, progress) if config.random else None
    candidates = Sampling(config.temperature, config.top_p, config.top_k)(model, hidden, keys)
    if config.algorithm == "origin":
        return candidates.token, masked & (_uniform(keys, masked.shape[1]) < schedule.share(progress.step)[:, None])
    score = {
        "maskgit_plus": candidates.probability,
        "topk_margin": candidates.margin,
        "entropy": -candidates.entropy,
    }[config.algorithm]
    if config.alg_temp:
        # Drawing without replacement from softmax(score / T) is taking the best of score / T plus Gumbel noise.
        score = score / config.alg_temp - jnp.log(-jnp.log(_uniform(keys, masked.shape[1])))
    return candidates.token, top(score, masked, schedule.count(masked, progress.step))


def _uniform(keys: jax.Array | None, size: int) -> jax.Array:
    """[rows, size] in (0, 1), by other keys than those that draw the tokens: they are numbered 0 .. size - 1."""
    draw = partial(jax.random.uniform, shape=(size,), minval=jnp.finfo(jnp.float32).tiny)
    return jax.vmap(lambda key: draw(jax.random.fold_in(key, size)))(keys)
