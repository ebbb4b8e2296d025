"""Evaluation: one program for every batch, scores in the problems' order, and what each number means."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from budget import examples
from hypothesis import given
from hypothesis import strategies as st
from test_model_folder import GEN_LENGTH, tiny_folder

from cdlm_jax import tasks
from cdlm_jax.config import InputError
from cdlm_jax.decoding.progress import DecodeResult
from cdlm_jax.evaluation import harness
from cdlm_jax.evaluation.harness import (
    Answer,
    Case,
    Score,
    answers,
    by_group,
    heldout_problems,
    padded,
    problem_cases,
    request,
    spread,
    timings,
)

PROBLEMS = heldout_problems(["chain", "sort"], 4)
WRONG = {1, 2, 6}  # of PROBLEMS
WIDTH, LENGTH = 24, GEN_LENGTH - 10


@pytest.fixture(scope="module")
def encoder():
    return tiny_folder().encoder(prompt_length=WIDTH, gen_length=LENGTH)


class Scripted:
    """A decoder that knows the answers, but gives the wrong ones an `=` too many; problem i takes it i + 1 forwards."""

    def __init__(self, encoder):
        self.encoder, self.calls = encoder, []

    def __call__(self, prompts, lengths, keys):
        assert prompts.shape == (len(lengths), WIDTH) and keys.shape == lengths.shape
        texts = [self.encoder.tokenizer.decode(row[:n].tolist()) for row, n in zip(prompts, lengths, strict=True)]
        at = [[problem.prompt for _, problem in PROBLEMS].index(text) for text in texts]
        self.calls.append(at)
        answers = [PROBLEMS[i][1].answer + "=" * (i in WRONG) for i in at]
        return DecodeResult(
            tokens=jnp.asarray(np.stack([self.encoder.answer(answer) for answer in answers])),
            lengths=jnp.asarray([len(answer) for answer in answers]),
            forwards=jnp.asarray(at) + 1,
            finalized_at=jnp.zeros((len(at), LENGTH), jnp.int32),
        )


@examples(4, 12)
@given(batch_size=st.integers(1, 11))
def test_every_batch_has_the_same_shape_and_every_problem_counts_once(encoder, batch_size):
    decode, tokenizer = Scripted(encoder), encoder.tokenizer
    cases = problem_cases(tokenizer, PROBLEMS)
    found = list(answers(decode, encoder.model, tokenizer, cases, batch_size=batch_size, width=WIDTH))
    whole = [i for call in decode.calls for i in call]
    assert {len(call) for call in decode.calls} == {min(batch_size, 8)}
    assert whole[:8] == list(range(8)) and set(whole[8:]) <= {7}, "the last batch is filled up with its last problem"
    assert len(whole) < 8 + batch_size
    assert [answer.case for answer in found] == cases
    assert [answer.text for answer in found] == [p.answer + "=" * (i in WRONG) for i, (_, p) in enumerate(PROBLEMS)]
    assert [answer.correct for answer in found] == [i not in WRONG for i in range(8)]
    assert [answer.forwards for answer in found] == list(range(1, 9))
    assert [answer.length for answer in found] == [len(answer.text) for answer in found]
    assert {name: score.accuracy for name, score in by_group(found).items()} == {"chain": 0.5, "sort": 0.75}
    assert (Score.of(found).accuracy, Score.of(found).forwards) == (5 / 8, 4.5)


def made(length, forwards, correct=True, group=""):
    return Answer(Case([1], group=group), np.zeros(1), np.zeros(1), length, forwards, "", correct)


def test_tokens_per_forward_is_a_ratio_of_sums():
    """Not the mean of ratios, which would be (2 + 2 + 0) / 3."""
    found = Score.of([made(4, 2), made(10, 5), made(0, 1, correct=False)])
    assert found == Score(3, accuracy=2 / 3, forwards=8 / 3, tokens=14 / 3, tokens_per_forward=14 / 8)


def test_groups_keep_their_order_of_appearance():
    found = by_group([made(1, 1, group="sort"), made(1, 1, group="chain"), made(1, 1, correct=False, group="sort")])
    assert [(name, score.accuracy, score.problems) for name, score in found.items()] == [
        ("sort", 0.5, 2),
        ("chain", 1.0, 1),
    ]


def test_heldout_problems_are_the_first_ones():
    assert PROBLEMS[5] == ("sort", tasks.get("sort").problem("heldout", 1))
    assert [name for name, _ in PROBLEMS] == ["chain"] * 4 + ["sort"] * 4


def test_batches_are_padded_and_filled_up():
    prompts, lengths = padded([Case([5, 6]), Case([7])], rows=3, width=4, pad=9)
    np.testing.assert_array_equal(prompts, [[5, 6, 9, 9], [7, 9, 9, 9], [7, 9, 9, 9]])
    assert lengths.tolist() == [2, 1, 1]
    with pytest.raises(InputError, match="^prompt 'abc' has 5 tokens, allowed: 1 to 4$"):
        padded([Case([1] * 5, text="abc")], rows=1, width=4, pad=9)


@pytest.mark.parametrize(
    "ids, message",
    [
        ([], "prompt 1 is empty"),
        ([3, 10_000], r"prompt 1 holds token 10000, outside the vocabulary 0\.\.\d+"),
        ([3, 0], "prompt 1 holds the mask token 0 at position 1"),
    ],
)
def test_prompts_are_refused_before_anything_is_decoded(encoder, ids, message):
    config = dataclasses.replace(encoder.model, mask_token_id=0, eos_token_id=1)
    with pytest.raises(InputError, match=f"^{message}$"):
        next(answers(None, config, encoder.tokenizer, [Case([3]), Case(ids)], batch_size=1))


def test_decoders_take_turns_and_compilation_is_left_out(encoder, monkeypatch):
    clock, log = [0.0], []

    def decoder(name, first, later):
        def decode(prompts, lengths, keys):
            assert prompts.shape == (1, WIDTH) and lengths.shape == keys.shape == (1,)
            clock[0] += later if name in log else first
            log.append(name)
            return lengths

        return decode

    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    requests = [request([case], WIDTH, pad=0) for case in problem_cases(encoder.tokenizer, PROBLEMS[:3])]
    decoders = {"a": decoder("a", 64.0, 1.0), "b": decoder("b", 32.0, 0.25)}
    calls = {name: [partial(decode, *one) for one in requests] for name, decode in decoders.items()}
    found = timings(calls, repetitions=2)
    assert {name: timing.calls for name, timing in found.items()} == {"a": [1.0] * 6, "b": [0.25] * 6}
    assert (found["a"].compile, found["b"].compile) == (63.0, 31.75)
    assert log == ["a", "b"] * 8


def test_spread():
    assert spread([11, *range(1, 11)]) == (6, 2, 10)
    assert spread([3.0]) == (3, 3, 3)
