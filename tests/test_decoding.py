"""The decoders against golden decodes, and against a plain Python twin that recomputes everything at every step.

Ties. Two programs that compute the same numbers in another order differ by float noise (about 1e-6 here), so a decision
closer than that may fall either way. The twin therefore reports its closest decision (`doubt`: the smallest distance of
any comparison it made from going the other way). A row that differs is excused only if its doubt is below NEAR_TIE;
excused rows are counted, and more than one in a hundred is a failure.
"""

import dataclasses
import math
import re
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget import examples
from conftest import golden_ids
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from test_unmask import decide
from tiny import TINY

from cdlm_jax.config import InputError
from cdlm_jax.decoding import cdlm, common, naive
from cdlm_jax.decoding.progress import DecodeResult, response_lengths, take_rows
from cdlm_jax.decoding.unmask import EntropyBudget, Factor, Margin, Quota, Threshold
from cdlm_jax.kernels.vocab import Confidence
from cdlm_jax.kernels.vocab.noise import Seeds, gumbel
from cdlm_jax.models.hf import load_model
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.trajectories.collect import trajectories

NEAR_TIE = 1e-4

# One shape for all random cases: contents, lengths and weights are drawn, so that every program is compiled once.
ROWS, PROMPT_MAX, GEN, BLOCK = 4, 12, 12, 4
VOCAB, MASK, EOS = 24, 1, 2

CONFIG = dataclasses.replace(TINY, vocab_size=VOCAB, qkv_bias=True)  # its mask and EOS are MASK and EOS

# ---- golden decodes ------------------------------------------------------------------------------------------------

STUDENT = golden_ids("student_decode")
TRAJECTORY = golden_ids("teacher_trajectory")
GENERATE = [case_id for case_id in golden_ids("decode") if case_id.startswith("llada/generate_")]
golden_model = cache(load_model)


def replay(case, response, finalized_at):
    """Every state of a row, rebuilt from the order of finalization: int [forwards + 1, L]."""
    mask_id, steps = case.args["mask_id"], np.arange(finalized_at.max() + 2)
    return np.where(finalized_at < steps[:, None], response, mask_id)


def test_all_golden_decodes_are_here():
    assert (len(STUDENT), len(TRAJECTORY), len(GENERATE)) == (8, 2, 9)


@pytest.mark.parametrize("case_id", STUDENT)
def test_golden_student(case_id, golden):
    case, model = golden(case_id), golden_model(golden(case_id).model)
    prompt = case.arrays["prompt"]
    width = prompt.shape[1]
    expected, raw, states = (case.arrays[name][..., width:] for name in ("output_ids", "raw_ids", "states"))
    config = cdlm.Config(
        gen_length=case.args["gen_length"], block_size=case.args["block_length"], unmask=Threshold(case.args["tau"])
    )
    result = jax.device_get(cdlm.generate(model, prompt, np.array([width]), config))
    np.testing.assert_array_equal(result.tokens, expected)
    assert result.forwards == case.arrays["num_forwards"]
    assert result.lengths == [*expected[0], case.args["eos_id"]].index(case.args["eos_id"])
    np.testing.assert_array_equal(replay(case, raw[0], result.finalized_at[0]), states)

    separate = dataclasses.replace(config, merge_commit=False)
    again = jax.device_get(cdlm.generate(model, prompt, np.array([width]), separate))
    committed = np.count_nonzero(case.arrays["steps_per_block"]) - 1  # the last block reached needs no commit
    np.testing.assert_array_equal(again.tokens, expected)
    assert again.forwards == result.forwards + committed
    later = np.arange(config.gen_length) // config.block_size  # the commits of all blocks before
    np.testing.assert_array_equal(
        again.finalized_at, np.where(result.finalized_at < 0, -1, result.finalized_at + later)
    )


@pytest.mark.parametrize("case_id", GENERATE)
def test_golden_llada_generate(case_id, golden):
    case, model = golden(case_id), golden_model(golden(case_id).model)
    given_prompts = case.arrays["prompt"]
    rows, width = given_prompts.shape
    real = case.arrays.get("attention_mask", np.ones_like(given_prompts)).astype(bool)
    lengths = real.sum(axis=1)
    prompts = np.full_like(given_prompts, model.config.pad_token_id)  # left padding becomes right padding
    for row in range(rows):
        prompts[row, : lengths[row]] = given_prompts[row, real[row]]
    config = naive.Config(
        gen_length=case.args["gen_length"],
        block_size=case.args["block_length"],
        steps=case.args["steps"],
        cfg_scale=case.args["cfg_scale"],
    )
    progress, _ = naive.decode(model, prompts, lengths, None, config)
    expected = case.arrays["output_ids"][:, width:]
    states = case.arrays["states"].reshape(-1, rows, width + config.gen_length)[..., width:]
    np.testing.assert_array_equal(progress.response, expected)
    np.testing.assert_array_equal(progress.forwards, np.full(rows, case.arrays["num_forwards"]))
    for row in range(rows):
        order = np.asarray(progress.finalized_at[row])
        np.testing.assert_array_equal(replay(case, expected[row], order), states[:, row])

    result = jax.device_get(naive.generate(model, prompts, lengths, config))
    kept = np.arange(config.gen_length) < result.lengths[:, None]
    np.testing.assert_array_equal(result.tokens, np.where(kept, expected, model.config.eos_token_id))
    np.testing.assert_array_equal(result.forwards, progress.forwards)


@pytest.mark.parametrize("case_id", TRAJECTORY)
def test_golden_teacher_trajectory(case_id, golden):
    case, model = golden(case_id), golden_model(golden(case_id).model)
    prompt = case.arrays["prompt"]
    width = prompt.shape[1]
    tokens, order, hidden = jax.device_get(
        trajectories(
            model,
            prompt,
            np.array([width]),
            gen_length=case.args["gen_length"],
            block_size=case.args["block_length"],
            temperature=0.0,
            keys=jax.random.split(jax.random.key(0), 1),
        )
    )
    np.testing.assert_array_equal(tokens[0], case.arrays["output_ids"][0, width:])
    np.testing.assert_array_equal(order[0], case.arrays["step_of"])
    np.testing.assert_array_equal(replay(case, tokens[0], order[0]), case.arrays["states"][:, width:])
    tolerance = {name: case.tolerance[name] for name in ("atol", "rtol")}
    np.testing.assert_allclose(hidden[0], case.arrays["hidden"], **tolerance)
    probability = jax.nn.softmax(model.unembed(hidden[0]))[np.arange(len(order[0])), tokens[0]]
    np.testing.assert_allclose(probability, case.arrays["confidence"], **tolerance)


# ---- random requests -----------------------------------------------------------------------------------------------

TEMPLATES = {
    alignment: Transformer(dataclasses.replace(CONFIG, logit_alignment=alignment), rngs=nnx.Rngs(0))
    for alignment in ("same_position", "shifted")
}


def random_model(alignment, rng):
    """A model of which every leaf is random, with probabilities from flat to sharp."""
    noisy = partial(jax.tree.map, lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32))
    model = noisy(TEMPLATES[alignment])
    model.lm_head.kernel[...] *= 3
    return model


class Request(NamedTuple):
    model: Transformer
    prompts: np.ndarray
    lengths: np.ndarray
    keys: jax.Array  # [rows]

    def rows(self, order, extra_columns=0):
        """These rows only, in this order, perhaps with more padding."""
        prompts = np.pad(self.prompts[order], ((0, 0), (0, extra_columns)), constant_values=MASK)
        return Request(self.model, prompts, self.lengths[order], self.keys[np.array(order)])


def make_request(alignment, seed, lengths):
    """Prompts of ordinary tokens, EOS among them; padding of anything at all, mask tokens and nonsense included."""
    rng = np.random.default_rng(seed)
    shape, lengths = (len(lengths), PROMPT_MAX), np.array(lengths, np.int32)
    prompt = rng.choice([token for token in range(VOCAB) if token != MASK], shape)
    padding = rng.choice([MASK, -1, VOCAB, 10**6, 5], shape)
    prompts = np.where(np.arange(PROMPT_MAX) < lengths[:, None], prompt, padding).astype(np.int32)
    keys = jax.random.split(jax.random.key(seed), len(lengths))
    return Request(random_model(alignment, rng), prompts, lengths, keys)


seeds = st.integers(0, 2**31)
row_lengths = st.lists(st.integers(1, PROMPT_MAX), min_size=ROWS, max_size=ROWS)
few = examples(2, 6)

student = partial(cdlm.Config, gen_length=GEN, block_size=BLOCK)
teacher = partial(naive.Config, gen_length=GEN, block_size=BLOCK)
CASES = {
    "threshold": ("same_position", student(unmask=Threshold(0.5))),
    "threshold, separate commits": ("shifted", student(unmask=Threshold(0.5), merge_commit=False, early_stop=False)),
    "margin": ("shifted", student(unmask=Margin(0.3))),
    "factor, separate commits": ("same_position", student(unmask=Factor(0.9), merge_commit=False)),
    "entropy budget": ("shifted", student(unmask=EntropyBudget(1.5), early_stop=False)),
    "quota": ("same_position", student(unmask=Quota(3), early_stop=False)),
    "threshold, sampled": ("shifted", student(unmask=Threshold(0.4), temperature=0.7)),
    "teacher": ("same_position", teacher(steps=6)),
    "teacher, threshold": ("shifted", teacher(unmask=Threshold(0.5), early_stop=True)),
    "teacher, random and sampled": ("same_position", teacher(steps=6, remasking="random", temperature=0.7)),
}
INVARIANT = ["threshold", "threshold, sampled", "teacher, threshold", "teacher, random and sampled"]


def decoder(config):
    return cdlm if isinstance(config, cdlm.Config) else naive


def generate(request, config):
    return jax.device_get(decoder(config).generate(*request[:3], config, request.keys))


# Compiles in half the time, for tests of what a program decides.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@cache
def quickly(config):
    """`generate` inside a jit of our own."""

    def run(model, prompts, lengths, keys):
        return decoder(config).generate(model, prompts, lengths, config, keys)

    compiled = quick_jit(run)
    return lambda request: jax.device_get(compiled(*request))


# ---- the twin ------------------------------------------------------------------------------------------------------


class Twin(NamedTuple):
    tokens: list[int]
    length: int
    forwards: int
    finalized_at: list[int]
    doubt: float


@jax.jit
def logits_of(model, tokens, visible_end):
    return model.unembed(model(tokens[None], visible_end=visible_end[None]))[0]


def ends(prompt_length, config):
    """What each position sees, by groups: the prompt, then every block of the student; all one group for a teacher."""
    blocks = [place // BLOCK + 1 for place in range(GEN)]
    group = [0] * prompt_length + (blocks if isinstance(config, cdlm.Config) else [0] * GEN)
    seen = [sum(key <= query for key in group) for query in group]
    return np.array(seen + [len(group)] * (PROMPT_MAX - prompt_length), np.int32)


def look(logits, config, key):
    """logits [B, V] -> (Confidence of each position, [B] how far its token leads)."""
    z = logits.astype(np.float64)
    log_p = z - z.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    score = z.copy()
    if config.temperature > 0:
        words = jax.random.key_data(key)
        noise = gumbel(Seeds(words[0], words[1], np.arange(len(z), dtype=np.uint32)[:, None]), np.arange(z.shape[1]))
        score = z / config.temperature + np.asarray(noise)
    score[:, MASK] = -math.inf
    token = score.argmax(axis=1)
    second, first = np.sort(np.delete(p, MASK, axis=1), axis=1)[:, -2:].T
    probability = p[np.arange(len(p)), token]
    if getattr(config, "remasking", None) == "random":
        probability = np.asarray(jax.random.uniform(jax.random.fold_in(key, 1), token.shape))
    lead = np.diff(np.sort(score, axis=1)[:, -2:])[:, 0]
    return Confidence(token, probability, first - second, -(p * log_p).sum(axis=1)), lead


def decode_plainly(model, prompt, key, config):
    """One row alone, no cache, no padding that it can see, every step a forward of the whole row."""
    student_like = isinstance(config, cdlm.Config)
    policy = config.unmask if student_like else config.policy
    start, end = len(prompt), ends(len(prompt), config)
    shift = model.config.logit_alignment == "shifted"
    tokens = [*map(int, prompt), *[MASK] * GEN, *[0] * (PROMPT_MAX - len(prompt))]
    finalized_at, forwards, doubt = [-1] * GEN, 0, math.inf
    for first in range(0, GEN, BLOCK):
        block, step = range(start + first, start + first + BLOCK), 0
        while any(tokens[i] == MASK for i in block):
            logits = np.asarray(logits_of(model, np.array(tokens, np.int32), end))[[i - shift for i in block]]
            step_key = jax.random.fold_in(jax.random.fold_in(key, first // BLOCK), step)
            seen, lead = look(logits, config, step_key)
            chosen, closest = decide(policy, seen, [tokens[i] == MASK for i in block], step)
            doubt = min([doubt, closest, *(lead[i] for i in chosen)])
            for i in chosen:
                tokens[block[i]], finalized_at[first + i] = int(seen.token[i]), forwards
            forwards, step = forwards + 1, step + 1
        if config.early_stop and EOS in (tokens[i] for i in block):
            break
        if student_like and not config.merge_commit and first + BLOCK < GEN:
            forwards += 1
    response = tokens[start : start + GEN]
    length = [*response, EOS].index(EOS)
    return Twin(response[:length] + [EOS] * (GEN - length), length, forwards, finalized_at, doubt)


def differing(request, config, result, others):
    """Rows in which two results differ, each shown to be a near tie by the twin."""
    differ = [
        row
        for row in range(len(request.lengths))
        if any((getattr(result, f)[row] != getattr(others, f)[row]).any() for f in result.__dataclass_fields__)
    ]
    for row in differ:
        prompt = request.prompts[row, : request.lengths[row]]
        twin = decode_plainly(request.model, prompt, request.keys[row], config)
        assert twin.doubt < NEAR_TIE, (row, prompt, twin, result, others)
    return len(differ)


def recomputed(request, config):
    """The twin's rows as a DecodeResult."""
    rows = zip(request.prompts, request.lengths, request.keys, strict=True)
    twins = [decode_plainly(request.model, prompt[:length], key, config) for prompt, length, key in rows]
    return DecodeResult(*(np.array(values) for values in list(zip(*twins, strict=True))[:4]))


def rows_of(result, order):
    return jax.tree.map(lambda values: values[order], result)


def stacked(results):
    return jax.tree.map(lambda *values: np.concatenate(values), *results)


# ---- guarantees ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment, config", CASES.values(), ids=CASES)
def test_cached_equals_recomputed(alignment, config):
    differ = []

    @few
    @given(seeds, row_lengths)
    def check(seed, lengths):
        request = make_request(alignment, seed, lengths)
        differ.append(differing(request, config, quickly(config)(request), recomputed(request, config)))

    check()
    assert sum(differ) <= 0.01 * ROWS * len(differ)


@pytest.mark.parametrize("name", ["threshold, sampled", "teacher, random and sampled"])  # all of them below, at length
def test_batch_invariance(name):
    alignment, config = CASES[name]
    differ = []

    @few
    @given(seeds, row_lengths, st.permutations(range(ROWS)))
    def check(seed, lengths, order):
        request, run = make_request(alignment, seed, lengths), quickly(config)
        batch, alone = run(request), stacked([run(request.rows([row])) for row in range(ROWS)])
        shuffled = rows_of(run(request.rows(order, extra_columns=3)), np.argsort(order))
        differ.extend(differing(request, config, batch, other) for other in (alone, shuffled))

    check()
    assert sum(differ) <= 0.01 * ROWS * len(differ)


@pytest.mark.slow
def test_a_thousand_rows_recomputed(record_property):
    count, per_case, rows = 1000, 10, 10
    differ = 0
    for case, (alignment, config) in enumerate(CASES.values()):
        for seed in range(case * per_case, (case + 1) * per_case):
            lengths = np.random.default_rng(seed).integers(1, PROMPT_MAX, rows, endpoint=True)
            request = make_request(alignment, seed, lengths)
            differ += differing(request, config, generate(request, config), recomputed(request, config))
    assert len(CASES) * per_case * rows == count
    record_property("mismatches", differ)
    print(f"cached against recomputed: {differ} of {count} rows differ, all near ties")
    assert differ <= 0.01 * count


@pytest.mark.slow
def test_a_thousand_rows_in_other_company(record_property):
    count, per_case, rows = 1000, 25, 10
    differ = 0
    for case, name in enumerate(INVARIANT):
        alignment, config = CASES[name]
        for seed in range(case * per_case, (case + 1) * per_case):
            rng = np.random.default_rng(seed)
            request = make_request(alignment, seed, rng.integers(1, PROMPT_MAX, rows, endpoint=True))
            batch, order = generate(request, config), rng.permutation(rows)
            shuffled = generate(request.rows(order, extra_columns=3), config)
            alone = [generate(request.rows([row]), config) for row in range(rows)]
            others = [rows_of(shuffled, np.argsort(order)), stacked(alone)]
            differ += sum(differing(request, config, batch, other) for other in others)
    assert len(INVARIANT) * per_case * rows == count
    record_property("mismatches", differ)
    print(f"alone and shuffled against batch: {differ} of {2 * count} comparisons differ, all near ties")
    assert differ <= 0.01 * 2 * count


def test_random_requests_are_worth_testing():
    """They take different numbers of forwards, and some stop early, in the middle, or never."""
    alignment, config = CASES["threshold"]
    results = [quickly(config)(make_request(alignment, seed, [1, 4, 7, 12])) for seed in range(8)]
    forwards = np.concatenate([result.forwards for result in results])
    lengths = np.concatenate([result.lengths for result in results])
    assert len(set(forwards.tolist())) >= 5 and 2 < np.mean(forwards) < GEN
    assert (lengths < BLOCK).any() and ((lengths > BLOCK) & (lengths < GEN)).any() and (lengths == GEN).any()


def poisoned(carry):
    """Uncommitted slots hold NaN keys, and values that would show (a NaN value would survive a weight of zero)."""
    cache = carry.cache
    scratch = (np.arange(cache.k.shape[2]) >= cache.length[:, None])[None, :, :, None, None]
    k, v = jnp.where(scratch, jnp.nan, cache.k), jnp.where(scratch, 1e3, cache.v)
    return dataclasses.replace(carry, cache=dataclasses.replace(cache, k=k, v=v))


@pytest.mark.parametrize("merge_commit", [True, False])
def test_a_python_loop_of_steps_never_reads_scratch(merge_commit):
    """The compiled loop is the step, over and over; and between steps only committed slots carry anything."""
    alignment, config = "shifted", student(unmask=Threshold(0.4), merge_commit=merge_commit)
    request = make_request(alignment, 7, [1, 5, 12, 8])
    prefill, step = (quick_jit(f, static_argnames="config") for f in (cdlm.prefill, cdlm.decode_step))
    progress, carry = prefill(*request[:3], config=config)
    committed = 0
    while not progress.done.all():
        state = progress, poisoned(carry)
        progress, carry = step(request.model, request.lengths, request.keys, config=config, state=state)
        assert (carry.cache.length >= committed).all()
        committed = carry.cache.length
    blocks, rest = np.divmod(committed - request.lengths, BLOCK)
    assert (blocks >= progress.block).all() and not rest.any()
    assert differing(request, config, quickly(config)(request), progress.result(EOS)) == 0


# ---- compilation ---------------------------------------------------------------------------------------------------


def test_one_program_per_shape_and_config():
    compiled = cdlm._generate._cache_size
    before = compiled()
    for seed, lengths in ((0, [1, 2]), (1, [12, 3]), (2, [5, 5])):
        request = make_request("same_position", seed, lengths)
        generate(request, cdlm.Config(gen_length=4, block_size=4, unmask=Threshold(0.75), merge_commit=False))
        assert compiled() == before + 1
    generate(request, cdlm.Config(gen_length=4, block_size=4, unmask=Threshold(0.25), merge_commit=False))
    assert compiled() == before + 2


@pytest.mark.parametrize("config", [student(temperature=0.5), student(merge_commit=False), teacher()], ids=str)
def test_no_host_round_trip_and_no_logits_of_whole_rows(config):
    """No callback in the program, and nothing larger than the logits of the current block."""
    vocab = 1000
    model = Transformer(dataclasses.replace(CONFIG, vocab_size=vocab), rngs=nnx.Rngs(0))
    request = make_request("same_position", 0, [3, 12, 7, 9])._replace(model=model)
    private = cdlm._generate if isinstance(config, cdlm.Config) else naive.decode
    program = private.lower(*request, config).as_text()
    assert program.count("stablehlo.while") >= 1
    assert not re.search("callback|infeed|outfeed|send|recv", program)
    shapes = {tuple(map(int, dims[:-1].split("x"))) for dims in re.findall(r"tensor<((?:\d+x)+)\w+>", program)}
    assert (ROWS * BLOCK, vocab) in shapes
    largest = max(math.prod(shape) for shape in shapes if shape != (CONFIG.hidden_size, vocab))
    assert largest == ROWS * BLOCK * vocab


def test_inside_a_callers_jit():
    """A closed-over model and lengths, a donated prompt whose memory the answer takes, more work around it."""
    config = student(unmask=Threshold(0.5))
    request = make_request("same_position", 3, [2, 12, 6, 1])
    expected = quickly(config)(request)

    @partial(quick_jit, donate_argnums=0)
    def answer(prompts):
        result = cdlm.generate(request.model, prompts, jnp.asarray(request.lengths), config)
        return result.tokens, result.lengths + 1

    prompts = jnp.asarray(request.prompts)
    tokens, lengths = answer(prompts)
    np.testing.assert_array_equal(tokens, expected.tokens)
    np.testing.assert_array_equal(lengths, expected.lengths + 1)
    assert prompts.is_deleted()


# ---- sampling ------------------------------------------------------------------------------------------------------


def test_samples_follow_the_key():
    alignment, config = CASES["threshold, sampled"]
    one = make_request(alignment, 11, [5])
    request = Request(one.model, *(np.repeat(a, ROWS, axis=0) for a in one[1:3]), one.keys)
    run = quickly(config)
    same = run(request._replace(keys=jnp.repeat(one.keys, ROWS)))
    assert (same.tokens == same.tokens[0]).all()
    several = run(request._replace(keys=jax.random.split(jax.random.key(1), ROWS)))
    assert len({tuple(row) for row in several.tokens.tolist()}) > 1
    by_place = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(2), jnp.arange(ROWS))
    result = run(request._replace(keys=jax.random.key(2)))
    assert differing(request._replace(keys=by_place), config, run(request._replace(keys=by_place)), result) == 0
    assert len({tuple(row) for row in result.tokens.tolist()}) > 1


def test_samples_do_not_depend_on_how_blocks_are_committed():
    alignment, config = CASES["threshold, sampled"]
    request = make_request(alignment, 13, [2, 12, 6, 1])
    merged = quickly(config)(request)
    separate = quickly(dataclasses.replace(config, merge_commit=False))(request)
    committed = (merged.finalized_at[:, ::BLOCK] >= 0).sum(axis=1) - 1
    assert committed.max() > 0
    again = dataclasses.replace(separate, forwards=merged.forwards, finalized_at=merged.finalized_at)
    assert differing(request, config, merged, again) == 0
    np.testing.assert_array_equal(separate.forwards, merged.forwards + committed)


def test_samples_follow_the_distribution():
    """Tokens from softmax(logits / T) without the mask token; their probability from the plain softmax with it."""
    temperature, draws, size = 0.5, 4000, 2
    model = random_model("same_position", np.random.default_rng(5))
    hidden = jax.random.normal(jax.random.key(0), (1, size, CONFIG.hidden_size)) / 4
    keys = jax.random.split(jax.random.key(1), draws)
    seen = common.predict(model, jnp.repeat(hidden, draws, axis=0), keys, temperature)
    logits = np.asarray(model.unembed(hidden[0]), np.float64)
    weights = np.exp(logits / temperature)
    weights[:, MASK] = 0
    frequency = np.stack([np.bincount(column, minlength=VOCAB) / draws for column in np.asarray(seen.token).T])
    assert np.abs(frequency - weights / weights.sum(axis=1, keepdims=True)).max() < 4 * 0.5 / draws**0.5
    plain = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(seen.probability, plain[np.arange(size), seen.token], rtol=1e-4)


def test_random_remasking_finalizes_anything_not_the_surest():
    alignment, config = CASES["teacher, random and sampled"]
    request = make_request(alignment, 0, [5, 6, 7, 8])
    orders = {
        tuple(quickly(config)(request._replace(keys=jax.random.split(jax.random.key(i), ROWS))).finalized_at[0])
        for i in range(5)
    }
    assert len(orders) > 1
    for order in orders:
        counts = np.bincount(order, minlength=6)
        np.testing.assert_array_equal(counts, [2] * 6)  # 2 steps for each block of 4


# ---- the mask token ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment, config", CASES.values(), ids=CASES)
def test_a_model_that_would_predict_the_mask_token(alignment, config):
    """It ends in no more forwards than there are tokens (and commits), and the mask token is nowhere in the answer."""
    request = make_request(alignment, 1, [1, 5, 12, 8])
    head = request.model.lm_head.kernel
    head[...] = head[...].at[:, MASK].multiply(100)
    logits = logits_of(request.model, np.full(PROMPT_MAX + GEN, MASK), ends(PROMPT_MAX, config))
    assert (logits.argmax(axis=-1) == MASK).any()
    result = quickly(config)(request)
    assert not (result.tokens == MASK).any()
    assert (result.forwards <= GEN + GEN // BLOCK).all()
    np.testing.assert_array_equal(
        result.finalized_at < 0, np.repeat(result.finalized_at[:, ::BLOCK] < 0, BLOCK, axis=1)
    )


@pytest.mark.parametrize("alignment, config", CASES.values(), ids=CASES)
def test_a_model_that_is_not_a_number_ends_too(alignment, config):
    request = make_request(alignment, 2, [1, 5, 12, 8])
    head = request.model.lm_head.kernel
    head[...] = jnp.full_like(head[...], jnp.nan)
    result = quickly(config)(request)
    assert not (result.tokens == MASK).any()
    assert (result.forwards <= GEN + GEN // BLOCK).all()


# ---- rows ----------------------------------------------------------------------------------------------------------


@few
@given(row_lengths, seeds)
def test_where_a_response_lies(lengths, seed):
    rng = np.random.default_rng(seed)
    prompts, response = rng.integers(0, 99, (ROWS, PROMPT_MAX)), rng.integers(100, 199, (ROWS, GEN))
    lengths = np.array(lengths)
    whole = common.append_response(prompts, lengths, response)
    assert whole.shape == (ROWS, PROMPT_MAX + GEN)
    for row, length in enumerate(lengths):
        expected = [*prompts[row, :length], *response[row]]
        np.testing.assert_array_equal(whole[row, : length + GEN], expected)
    np.testing.assert_array_equal(take_rows(whole, lengths, GEN), response)

    values = rng.normal(size=(ROWS, PROMPT_MAX + GEN, 2)).astype(np.float32)
    for alignment, shift in (("same_position", 0), ("shifted", 1)):
        rows = common.predicting_rows(values, lengths, GEN, alignment)
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(rows[row], values[row, length - shift : length - shift + GEN])


def test_lengths_end_at_the_first_eos():
    tokens = jnp.array([[EOS, 5, EOS], [5, EOS, 7], [5, 6, 7]])
    np.testing.assert_array_equal(response_lengths(tokens, EOS), [0, 1, 3])


# ---- refusals ------------------------------------------------------------------------------------------------------

PROMPTS = np.full((2, 6), 5, np.int32)


def with_token(token, row, place):
    prompts = PROMPTS.copy()
    prompts[row, place] = token
    return prompts


@pytest.mark.parametrize(
    "prompts, lengths, changes, message",
    [
        (PROMPTS, [6, 0], {}, r"prompt lengths must be in 1\.\.6, got 0\.\.6"),
        (PROMPTS, [7, 6], {}, r"prompt lengths must be in 1\.\.6, got 6\.\.7"),
        (PROMPTS, [-1, 6], {}, r"prompt lengths must be in 1\.\.6, got -1\.\.6"),
        (PROMPTS, [6], {}, r"prompts must be \[rows, P_max\] and prompt_lengths \[rows\], got \(2, 6\) and \(1,\)"),
        (PROMPTS[:0], [], {}, "there are no prompts: prompts has 0 rows"),
        (PROMPTS[0], [6], {}, r"prompts must be \[rows, P_max\] and prompt_lengths \[rows\], got \(6,\) and \(1,\)"),
        (
            PROMPTS,
            [6, 6],
            {"gen_length": 60},
            r"prompt 6 \+ gen_length 60 exceeds the model's 64 positions",
        ),
        (with_token(MASK, 1, 3), [6, 6], {}, "prompt 1 holds the mask token 1 at position 3"),
        (with_token(24, 0, 2), [6, 6], {}, r"prompt 0 holds token 24, outside the vocabulary 0\.\.23"),
        (with_token(-1, 1, 0), [6, 6], {}, r"prompt 1 holds token -1, outside the vocabulary 0\.\.23"),
        (PROMPTS, [6, 6], {"temperature": -0.5}, r"temperature must be 0 or more, got -0\.5"),
        (PROMPTS, [6, 6], {"temperature": math.nan}, "temperature must be 0 or more, got nan"),
        (PROMPTS, [6, 6], {"temperature": 0.5}, r"temperature 0\.5 needs a random key, got none"),
    ],
)
@pytest.mark.parametrize("module", [cdlm, naive], ids=["cdlm", "naive"])
def test_requests_refused(module, prompts, lengths, changes, message):
    config = module.Config(**{"gen_length": GEN, "block_size": BLOCK} | changes)
    with pytest.raises(InputError, match=f"^{message}$"):
        module.generate(TEMPLATES["same_position"], prompts, np.array(lengths), config)


@pytest.mark.parametrize("module", [cdlm, naive], ids=["cdlm", "naive"])
@pytest.mark.parametrize(
    "key, got",
    [
        (jax.random.PRNGKey(0), r"uint32 \(2,\)"),
        (jax.random.split(jax.random.key(0), 3), r"key<fry> \(3,\)"),
        (jax.random.split(jax.random.key(0), (2, 2)), r"key<fry> \(2, 2\)"),
    ],
    ids=["legacy", "rows", "dimensions"],
)
def test_keys_refused(module, key, got):
    config = module.Config(gen_length=GEN, block_size=BLOCK, temperature=0.5)
    with pytest.raises(InputError, match=rf"^key must be one jax\.random\.key, or one per row, got {got}$"):
        module.generate(TEMPLATES["shifted"], PROMPTS, np.array([6, 6]), config, key)


def test_random_remasking_without_a_key_is_refused():
    with pytest.raises(InputError, match="^remasking 'random' needs a random key, got none$"):
        naive.generate(TEMPLATES["same_position"], PROMPTS, np.array([6, 6]), teacher(remasking="random"))


def test_shapes_are_refused_inside_a_callers_jit_too():
    config = student(gen_length=60)
    with pytest.raises(InputError, match="exceeds the model's 64 positions"):
        jax.jit(lambda prompts, lengths: cdlm.generate(TEMPLATES["shifted"], prompts, lengths, config))(
            PROMPTS, np.array([6, 6])
        )


@pytest.mark.parametrize(
    "make, changes, message",
    [
        *(
            (
                make,
                {"gen_length": length, "block_size": size},
                f"gen_length {length} must be a positive multiple of block_size {size}",
            )
            for make in (student, teacher)
            for length, size in ((10, 4), (0, 4), (4, 0), (-4, 4), (4, -4), (4, 8), (8.0, 4), (8, 4.0))
        ),
        *(
            (
                teacher,
                {"steps": steps},
                f"steps must be a multiple of the 3 blocks and at most 12, got {steps}",
            )
            for steps in (0, -3, 4, 15)
        ),
        (teacher, {"steps": 6, "unmask": Threshold(0.5)}, r"give either steps or an unmask policy, got steps 6 and .*"),
        *(
            (make, {"unmask": 0.9}, r"unmask must be a policy such as Threshold\(0\.9\), got 0\.9")
            for make in (student, teacher)
        ),
        (teacher, {"remasking": "high"}, "remasking must be low_confidence or random, got 'high'"),
        (teacher, {"cfg_scale": -1.0}, r"cfg_scale must be 0 or more, got -1\.0"),
        (teacher, {"cfg_scale": math.nan}, "cfg_scale must be 0 or more, got nan"),
    ],
)
def test_configs_refused(make, changes, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        make(**changes)


@pytest.mark.parametrize("make", [student, teacher], ids=["cdlm", "naive"])
def test_configs_are_frozen_values(make):
    config = make(temperature=0.5)
    assert config == make(temperature=0.5) and hash(config) == hash(make(temperature=0.5))
    assert config != make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.temperature = 1.0
    with pytest.raises(TypeError):
        type(config)(GEN, BLOCK)
