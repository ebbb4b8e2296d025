"""Evaluation: one program for every batch, scores in the problems' order, and what each number means."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_folder import GEN_LENGTH, tiny_folder

from cdlm_jax import tasks
from cdlm_jax.decoding.progress import DecodeResult
from cdlm_jax.evaluation import harness
from cdlm_jax.evaluation.harness import Evaluation, evaluate, heldout_problems, latencies, spread

PROBLEMS = heldout_problems(["chain", "sort"], 4)
WRONG = {1, 2, 6}  # of PROBLEMS


@pytest.fixture(scope="module")
def encoder():
    return tiny_folder().encoder(prompt_length=24, gen_length=GEN_LENGTH - 10)


class Scripted:
    """A decoder that knows the answers, but gives the wrong ones an `=` too many; problem i takes it i + 1 forwards."""

    def __init__(self, encoder):
        self.encoder, self.calls = encoder, []

    def __call__(self, prompts, lengths):
        texts = [self.encoder.tokenizer.decode(row[:n].tolist()) for row, n in zip(prompts, lengths, strict=True)]
        at = [[problem.prompt for _, problem in PROBLEMS].index(text) for text in texts]
        self.calls.append(at)
        answers = [PROBLEMS[i][1].answer + "=" * (i in WRONG) for i in at]
        return DecodeResult(
            tokens=jnp.asarray(np.stack([self.encoder.answer(answer) for answer in answers])),
            lengths=jnp.asarray([len(answer) for answer in answers]),
            forwards=jnp.asarray(at) + 1,
            finalized_at=jnp.zeros((len(at), self.encoder.gen_length), jnp.int32),
        )


@settings(max_examples=12, deadline=None)
@given(batch_size=st.integers(1, 11))
def test_every_batch_has_the_same_shape_and_every_problem_counts_once(encoder, batch_size):
    decode = Scripted(encoder)
    found = evaluate(decode, encoder, PROBLEMS, batch_size)
    whole = [i for call in decode.calls for i in call]
    assert {len(call) for call in decode.calls} == {batch_size}
    assert whole[:8] == list(range(8)) and set(whole[8:]) <= {7}, "the last batch is filled up with its last problem"
    assert len(whole) < 8 + batch_size
    assert found.responses == [problem.answer + "=" * (i in WRONG) for i, (_, problem) in enumerate(PROBLEMS)]
    assert found.correct.tolist() == [i not in WRONG for i in range(8)]
    assert found.forwards.tolist() == list(range(1, 9))
    assert found.lengths.tolist() == [len(response) for response in found.responses]
    assert found.per_task == {"chain": 0.5, "sort": 0.75}
    assert (found.accuracy, found.mean_forwards) == (5 / 8, 4.5)


def test_tokens_per_forward_is_a_ratio_of_sums():
    """Not the mean of ratios, which would be (2 + 2 + 0) / 3."""
    found = Evaluation([], ["", "", ""], np.array([True] * 3), np.array([2, 5, 1]), np.array([4, 10, 0]))
    assert found.tokens_per_forward == 14 / 8
    assert found.mean_forwards == 8 / 3


def test_tasks_keep_their_order_of_appearance():
    problem = PROBLEMS[0][1]
    named = [("sort", problem), ("chain", problem), ("sort", problem)]
    found = Evaluation(named, [""] * 3, np.array([True, True, False]), np.ones(3), np.ones(3))
    assert list(found.per_task.items()) == [("sort", 0.5), ("chain", 1.0)]


def test_heldout_problems_are_the_first_ones():
    assert PROBLEMS[5] == ("sort", tasks.get("sort").problem("heldout", 1))
    assert [name for name, _ in PROBLEMS] == ["chain"] * 4 + ["sort"] * 4


def test_latencies_take_turns_and_leave_compilation_out(encoder, monkeypatch):
    clock, log = [0.0], []

    def decoder(name, first, later):
        def decode(prompts, lengths):
            assert prompts.shape == (1, encoder.prompt_length) and lengths.shape == (1,)
            clock[0] += later if name in log else first
            log.append(name)
            return lengths

        return decode

    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    seconds = latencies({"a": decoder("a", 64.0, 1.0), "b": decoder("b", 32.0, 0.25)}, encoder, PROBLEMS[:3])
    assert seconds == {"a": [1.0] * 3, "b": [0.25] * 3}
    assert log == ["a", "b"] * 4


def test_spread():
    assert spread([11, *range(1, 11)]) == (6, 2, 10)
    assert spread([3.0]) == (3, 3, 3)
