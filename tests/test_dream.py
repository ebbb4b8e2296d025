"""Dream's `diffusion_generate` against upstream's decodes, and against a plain loop over one row."""

import dataclasses
import math
import re
from functools import cache, partial

import jax
import numpy as np
import pytest
from budget import again
from conftest import golden_ids
from flax import nnx
from plain import Twin, check_company, check_twins
from test_decoding import (
    CONFIG,
    EOS,
    GEN,
    MASK,
    PROMPTS,
    ROWS,
    TEMPLATES,
    make_request,
    quick_jit,
    replay,
)
from test_sampling import sample_plainly
from test_unmask import falling, leading, share_of

from cdlm_jax.config import InputError
from cdlm_jax.decoding import dream
from cdlm_jax.decoding.sampling import ROWS_AT_ONCE, Sampling
from cdlm_jax.kernels.vocab import TILE, Confidence
from cdlm_jax.models.hf import load_model
from cdlm_jax.models.transformer import Transformer

# ---- upstream's decodes --------------------------------------------------------------------------------------------

GOLDEN = [case_id for case_id in golden_ids("decode") if "/diffusion_generate_" in case_id]
golden_model = cache(load_model)


def test_all_golden_decodes_are_here():
    assert len(GOLDEN) == 10


@pytest.mark.parametrize("case_id", GOLDEN)
def test_golden(case_id, golden):
    case = golden(case_id)
    args, model = case.args, golden_model(case.model)
    given_prompts = case.arrays["prompt"]
    rows, width = given_prompts.shape
    real = case.arrays.get("attention_mask", np.ones_like(given_prompts)).astype(bool)
    lengths = real.sum(axis=1)
    prompts = np.zeros_like(given_prompts)  # left padding becomes right padding
    for row in range(rows):
        prompts[row, : lengths[row]] = given_prompts[row, real[row]]
    config = dream.Config(
        gen_length=args["max_new_tokens"],
        algorithm=args["alg"],
        **{name: args[name] for name in ("steps", "eps", "alg_temp", "temperature", "top_p", "top_k")},
    )
    result = jax.device_get(quick_jit(partial(dream.generate, config=config))(model, prompts, lengths))
    expected = case.arrays["output_ids"][:, width:]
    states = case.arrays["states"].reshape(-1, rows, width + config.gen_length)[..., width:]
    kept = np.arange(config.gen_length) < result.lengths[:, None]
    eos = model.config.eos_token_id
    assert result.lengths.tolist() == [[*row, eos].index(eos) for row in expected.tolist()]
    np.testing.assert_array_equal(result.tokens, np.where(kept, expected, eos))
    np.testing.assert_array_equal(result.forwards, np.full(rows, case.arrays["num_forwards"]))
    for row in range(rows):
        np.testing.assert_array_equal(replay(case, expected[row], result.finalized_at[row]), states[:, row])
    taken = np.bincount(result.finalized_at[0], minlength=config.steps)
    np.testing.assert_array_equal(taken, case.arrays["tokens_finalized"])


# ---- the twin ------------------------------------------------------------------------------------------------------


def choose(seen, places, config, step, key):
    """Places finalized at a step; and how far the closest decision was from going the other way."""
    share = share_of(step, config.steps, config.eps)
    uniform = jax.random.uniform(jax.random.fold_in(key, GEN), (GEN,), minval=np.finfo(np.float32).tiny)
    uniform = np.asarray(uniform, np.float64)
    if config.algorithm == "origin":
        return {i for i in places if uniform[i] < share}, min(abs(uniform[i] - share) for i in places)
    score = {"maskgit_plus": seen.probability, "topk_margin": seen.margin, "entropy": -seen.entropy}[config.algorithm]
    if config.alg_temp:
        score = score / config.alg_temp - np.log(-np.log(uniform))
    return leading(falling(score, places), score, int(np.float32(len(places)) * share))


def decode_plainly(config, model, prompt, key):
    """One row; all its positions are sampled at every step, by keys of their own."""
    sampling = Sampling(config.temperature, config.top_p, config.top_k)
    start, shift = len(prompt), int(model.config.logit_alignment == "shifted")
    tokens = [*map(int, prompt), *[MASK] * GEN]
    finalized_at, step, doubt = [-1] * GEN, 0, math.inf
    while -1 in finalized_at:
        step_key = jax.random.fold_in(jax.random.fold_in(key, 0), step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, np.arange(GEN))
        logits = model.run(tokens)[start - shift :][:GEN]
        answers = [sample_plainly(logits[i], sampling, MASK, keys[i]) for i in range(GEN)]
        seen = Confidence(*map(np.array, zip(*(answer for answer, _ in answers), strict=True)))
        places = [i for i in range(GEN) if finalized_at[i] < 0]
        chosen, closest = choose(seen, places, config, step, step_key)
        doubt = min([doubt, closest, *(answers[i][1] for i in places)])
        for i in chosen:
            tokens[start + i], finalized_at[i] = int(seen.token[i]), step
        step += 1
    return Twin.of(tokens[start:], step, finalized_at, doubt, EOS)


make = partial(dream.Config, gen_length=GEN)
CASES = {
    "entropy": ("shifted", make(steps=6)),
    "entropy, more steps than tokens": ("same_position", make(steps=15, eps=0.1)),
    "maskgit_plus, cut": ("shifted", make(steps=5, algorithm="maskgit_plus", top_p=0.8, top_k=3)),
    "topk_margin, sampled": ("shifted", make(steps=6, algorithm="topk_margin", temperature=0.7)),
    "entropy, drawn positions": ("same_position", make(steps=6, alg_temp=0.5)),
    "maskgit_plus, all drawn": (
        "shifted",
        make(steps=4, algorithm="maskgit_plus", alg_temp=0.2, temperature=1.2, top_k=6),
    ),
    "origin": ("shifted", make(steps=6, algorithm="origin")),
    "origin, sampled": ("same_position", make(steps=4, algorithm="origin", temperature=0.8, top_p=0.9)),
}
INVARIANT = ["topk_margin, sampled", "entropy, drawn positions"]


@cache
def quickly(config):
    compiled = quick_jit(lambda *request: dream.generate(*request[:3], config, request[3]))
    return lambda request: jax.device_get(compiled(*request))


@again
@pytest.mark.parametrize("alignment, config", CASES.values(), ids=CASES)
def test_twin(alignment, config):
    check_twins(partial(make_request, alignment), quickly(config), partial(decode_plainly, config))


@pytest.mark.parametrize("name", INVARIANT)
def test_batch_invariance(name):
    alignment, config = CASES[name]
    check_company(partial(make_request, alignment), quickly(config), partial(decode_plainly, config))


@pytest.mark.parametrize("name", ["entropy", "maskgit_plus, all drawn", "entropy, more steps than tokens"])
def test_every_row_takes_all_steps(name):
    alignment, config = CASES[name]
    result = quickly(config)(make_request(alignment, 3, [1, 5, 12, 8]))
    np.testing.assert_array_equal(result.forwards, [config.steps] * ROWS)
    for row in result.finalized_at:
        left, taken = GEN, np.bincount(row, minlength=config.steps)
        for step in range(config.steps):
            assert taken[step] == int(np.float32(left) * share_of(step, config.steps, config.eps))
            left -= taken[step]
        assert left == 0


def test_origin_reveals_each_position_by_its_share():
    """Of 4 x 64 rows x 12 positions each step reveals 1 / steps of all (eps apart), whatever the model says."""
    config = make(steps=4, algorithm="origin")
    request = make_request("shifted", 0, [1, 5, 12, 8])
    runs = [quickly(config)(request._replace(keys=jax.random.split(jax.random.key(seed), ROWS))) for seed in range(64)]
    steps = np.concatenate([run.finalized_at for run in runs])
    frequency = np.bincount(steps.ravel(), minlength=4) / steps.size
    np.testing.assert_allclose(frequency, [0.25] * 4, atol=4 * math.sqrt(0.25 * 0.75 / steps.size))
    for run in runs:  # a row is done with its last position
        np.testing.assert_array_equal(run.forwards, run.finalized_at.max(axis=1) + 1)


def test_draws_of_tokens_and_of_positions_are_apart():
    """The same keys with another alg_temp give another order, and the first forward's tokens are the same."""
    alignment, config = CASES["maskgit_plus, all drawn"]
    request = make_request(alignment, 5, [5, 5, 5, 5])
    one, other = (quickly(dataclasses.replace(config, steps=1, alg_temp=t))(request) for t in (0.2, 5.0))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    later, same = quickly(config)(request), quickly(config)(request)
    np.testing.assert_array_equal(later.tokens, same.tokens)
    again = quickly(config)(request._replace(keys=jax.random.split(jax.random.key(9), ROWS)))
    assert (later.finalized_at != again.finalized_at).any() and (later.tokens != again.tokens).any()


@pytest.mark.parametrize("alignment, config", CASES.values(), ids=CASES)
@pytest.mark.parametrize("trouble", ["mask", "nan"])
def test_a_model_that_predicts_masks_or_nothing_ends(alignment, config, trouble):
    request = make_request(alignment, 1, [1, 5, 12, 8])
    head = request.model.lm_head.kernel
    head[...] = head[...].at[:, MASK].multiply(100) if trouble == "mask" else np.full(head.shape, np.nan)
    result = quickly(config)(request)
    assert (result.forwards <= config.steps).all() and (result.finalized_at >= 0).all()
    assert not (result.tokens == MASK).any()


# ---- compilation ---------------------------------------------------------------------------------------------------


def test_one_program_per_shape_and_config():
    compiled = dream._generate._cache_size
    before = compiled()
    config = dream.Config(gen_length=4, steps=2)
    for seed, lengths in ((0, [1, 2]), (1, [12, 3])):
        dream.generate(*make_request("shifted", seed, lengths)[:3], config)
        assert compiled() == before + 1


@pytest.mark.parametrize("alignment, config", CASES.values(), ids=CASES)
def test_no_host_round_trip_and_no_logits_of_whole_rows(alignment, config):
    """Greedy and uncut, a tile of the vocabulary at a time; else all of it for some hidden rows at a time."""
    vocab = TILE + 904
    model = Transformer(dataclasses.replace(CONFIG, vocab_size=vocab, logit_alignment=alignment), rngs=nnx.Rngs(0))
    request = make_request(alignment, 0, [3, 12, 7, 9])._replace(model=model)
    program = dream._generate.lower(*request, config).as_text()
    assert program.count("stablehlo.while") >= 1
    assert not re.search("callback|infeed|outfeed|send|recv", program)
    shapes = {tuple(map(int, dims[:-1].split("x"))) for dims in re.findall(r"tensor<((?:\d+x)+)\w+>", program)}
    largest = max(math.prod(shape) for shape in shapes - {(CONFIG.hidden_size, vocab), (vocab, CONFIG.hidden_size)})
    if config.temperature == 0 and config.top_p is None and config.top_k is None:
        assert largest == ROWS * GEN * TILE and not any(shape[-1] == vocab and len(shape) > 2 for shape in shapes)
    else:
        words = 2 if config.temperature > 0 else 1  # random ones per logit
        assert ROWS * GEN > ROWS_AT_ONCE and largest == words * ROWS_AT_ONCE * vocab


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gen_length": 0}, "gen_length must be a positive integer, got 0"),
        ({"steps": 0}, "Timesteps: steps must be a positive integer, got 0"),
        ({"eps": 1.0}, r"Timesteps: eps must be in \(0, 1\), got 1\.0"),
        (
            {"algorithm": "random"},
            "algorithm must be one of origin, maskgit_plus, topk_margin, entropy, got 'random'",
        ),
        ({"alg_temp": -1.0}, r"alg_temp must be 0 or more, got -1\.0"),
        ({"alg_temp": math.nan}, "alg_temp must be 0 or more, got nan"),
        ({"temperature": -1.0}, r"temperature must be 0 or more, got -1\.0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0\.0"),
        ({"top_k": 0}, "top_k must be a positive integer, got 0"),
    ],
)
def test_configs_refused(changes, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        make(**{"steps": 4} | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": 0.5}, r"temperature 0\.5 needs a random key, got none"),
        ({"algorithm": "origin"}, "algorithm 'origin' with alg_temp None needs a random key, got none"),
        ({"alg_temp": 0.5}, r"algorithm 'entropy' with alg_temp 0\.5 needs a random key, got none"),
    ],
)
def test_chance_needs_a_key(changes, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        dream.generate(TEMPLATES["shifted"], PROMPTS, np.array([6, 6]), make(steps=4, **changes))


def test_requests_refused():
    with pytest.raises(InputError, match=r"^prompt lengths must be in 1\.\.6, got 0\.\.6$"):
        dream.generate(TEMPLATES["shifted"], PROMPTS, np.array([6, 0]), make(steps=4))
    changes = {"family": "qwen2", "logit_alignment": "shifted", "mask_token_id": None}
    causal = Transformer(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"^qwen2 is autoregressive: decode it with decoding\.autoregressive$"):
        dream.generate(causal, PROMPTS, np.array([6, 6]), make(steps=4))
