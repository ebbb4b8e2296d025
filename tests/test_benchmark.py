"""The benchmark: which methods run on which model, what is written, and that it repeats itself."""

import dataclasses
import io
import json

import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from test_model_folder import tiny_folder

from cdlm_jax.cli import main
from cdlm_jax.config import InputError
from cdlm_jax.evaluation.harness import Score
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.recipes import benchmark as program
from cdlm_jax.recipes.benchmark import BenchmarkConfig, Setting, benchmark, methods
from cdlm_jax.tasks import CHARACTERS

ALL = ("naive", "truncated", "dream", "dllm_cache", "fast_dllm", "autoregressive", "untrained", "cdlm")


def causal_folder():
    folder = tiny_folder(role="autoregressive")
    config = dataclasses.replace(
        folder.model.config, family="llama", logit_alignment="shifted", mask_token_id=None, source=""
    )
    return dataclasses.replace(folder, model=Transformer(config, rngs=nnx.Rngs(2)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_folder(0).save(folder / "teacher")
    tiny_folder(1, role="student").save(folder / "student")
    causal_folder().save(folder / "autoregressive")
    return {role: str(folder / role) for role in ("teacher", "student", "autoregressive")}


def make(models, work, **changes):
    given = {
        **models,
        "work": str(work),
        "methods": ALL,
        "tasks": ("chain", "sort"),
        "per_task": 3,
        "gen_length": 8,
        "block_size": 4,
        "thresholds": (0.9, 0.5),
        "caches": ("dual",),
        "steps": (2,),
        "prompt_interval": 4,
        "response_interval": 2,
        "batch_sizes": (1,),
        "repetitions": 2,
        "latency_problems": 2,
        "batch_size": 1,  # one program for the answers, the latency and the throughput of a method
    }
    return BenchmarkConfig(**(given | changes))


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    work, out = tmp_path_factory.mktemp("benchmark"), io.StringIO()
    results = benchmark(make(models, work, thresholds=(0.9,)), Console(file=out, width=160))
    return results, work, out.getvalue()


def test_every_method_once_in_order():
    config = make({}, "work", teacher="t", headline_threshold=0.9)
    found = methods(config)
    assert [(method.name, method.series, method.role, method.headline) for method in found] == [
        ("naive, 1 token per step", "naive", "teacher", True),
        ("naive, 2 steps", "naive", "teacher", False),
        ("dream, entropy", "dream", "teacher", True),
        ("dLLM-Cache, 4/2", "dLLM-Cache", "teacher", True),
        ("Fast-dLLM dual cache, tau 0.9", "Fast-dLLM dual cache", "teacher", True),
        ("Fast-dLLM dual cache, tau 0.5", "Fast-dLLM dual cache", "teacher", False),
        ("autoregressive", "autoregressive", "autoregressive", True),
        ("untrained student, tau 0.9", "untrained student", "teacher", True),
        ("untrained student, tau 0.5", "untrained student", "teacher", False),
        ("CDLM, tau 0.9", "CDLM", "student", True),
        ("CDLM, tau 0.5", "CDLM", "student", False),
    ]
    assert methods(dataclasses.replace(config, methods=("cdlm",))) == found[-2:]


def test_all_methods_measured_on_the_same_problems(finished):
    results, _, printed = finished
    assert len(results) == len(methods(make({}, "", thresholds=(0.9,))))
    for result in results:
        assert list(result.scores) == ["chain", "sort"]
        assert all(score.problems == 3 and 1 <= score.forwards <= 8 for score in result.scores.values())
        median, low, high = result.latency_ms
        assert 0 < low <= median <= high
        assert result.name in printed
    naive, truncated = results[:2]
    assert naive.scores["chain"].forwards == 8 and truncated.scores["chain"].forwards == 2
    assert truncated.throughput == {} and list(naive.throughput) == [1]


def test_throughput_of_every_batch_size(models, tmp_path):
    setting = Setting.load(make(models, tmp_path, methods=("naive",), batch_sizes=(1, 2)))
    chosen = [method for method in methods(setting.config) if method.headline]
    (found,) = program._throughput(setting, chosen, Console(file=io.StringIO())).values()
    assert list(found) == [1, 2] and all(0 < low <= median <= high for median, low, high in found.values())


def test_answers_of_all_methods_are_kept_and_continued(models, tmp_path):
    config = make(models, tmp_path / "work", methods=("naive", "cdlm"))
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    results = benchmark(config, Console(quiet=True), str(whole))
    lines = whole.read_bytes().splitlines(keepends=True)
    problems = sum(score.problems for score in results[0].scores.values())
    expected = [result.name for result in results for _ in range(problems)]
    assert [json.loads(line)["method"] for line in lines] == expected
    # A run that died in its second method goes on there.
    (tmp_path / "part.jsonl.partial").write_bytes(b"".join(lines[: problems + 1]))
    (tmp_path / "part.jsonl.settings.json").write_bytes((tmp_path / "whole.jsonl.settings.json").read_bytes())
    again = benchmark(config, Console(quiet=True), str(part))
    assert part.read_bytes() == whole.read_bytes()
    assert [result.scores for result in again] == [result.scores for result in results]
    with pytest.raises(InputError, match=r"part\.jsonl holds answers of another run: seed is 0 there, 1 here"):
        benchmark(dataclasses.replace(config, seed=1), Console(quiet=True), str(part))


def test_the_files_say_all_that_is_needed_to_repeat_it(finished, models):
    results, work, _ = finished
    names = ("results.json", "results.md", "tradeoff.png", "latency.png", "throughput.png", "roofline.png", "order.png")
    assert {path.name for path in work.iterdir()} == set(names)
    assert all((work / name).read_bytes().startswith(b"\x89PNG") for name in names[2:])
    summary = json.loads((work / "results.json").read_text())
    assert summary["config"]["seed"] == 0 and summary["config"]["thresholds"] == [0.9]
    assert summary["models"].keys() == models.keys()
    assert summary["environment"]["packages"]["jax"] and summary["environment"]["cores"] >= 1
    for stored, result in zip(summary["results"], results, strict=True):
        assert {name: Score(**score) for name, score in stored["scores"].items()} == result.scores
    assert all(f"| {result.name} " in (work / "results.md").read_text() for result in results)


def test_same_seed_same_tokens(models, tmp_path, monkeypatch):
    """Loaded and compiled anew, every method answers the same; sampling changes with the seed only."""
    warm = program.Method("warm", "CDLM", "student", program.Options(decoder="cdlm", temperature=0.8, threshold=0.5))

    def tokens(seed):
        config = make(models, tmp_path, methods=("naive", "autoregressive", "cdlm"), thresholds=(0.5,), seed=seed)
        setting = Setting.load(config)
        found = [setting.answer(method, Console(file=io.StringIO())) for method in (*methods(config), warm)]
        return [np.stack([answer.tokens for answer in answers]) for answers in found]

    first, again, other = tokens(0), tokens(0), tokens(1)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [(a == b).all() for a, b in zip(first, other, strict=True)] == [True, True, True, False]


def test_methods_without_a_model_are_left_out(models, tmp_path):
    config = make(models | {"student": "", "autoregressive": ""}, tmp_path, methods=("cdlm", "autoregressive"))
    with pytest.raises(InputError, match="^none of the methods cdlm, autoregressive has a model; give its folder$"):
        benchmark(config, Console(file=io.StringIO()))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"per_task": 0}, "config.per_task must be at least 1, got 0"),
        ({"methods": ()}, "config needs at least one of methods, .*"),
        ({"tasks": ()}, "config needs at least one of methods, .*"),
        ({"gen_length": -16}, "config.gen_length must be positive, or 0 for the models' own, got -16"),
        ({"thresholds": ()}, "config.thresholds is empty, and fast_dllm needs at least one"),
        ({"steps": ()}, "config.steps is empty, and truncated needs at least one"),
        ({"caches": ()}, "config.caches is empty, and fast_dllm needs at least one"),
        ({"batch_sizes": (1, 0)}, r"config.batch_sizes must be positive, got \(1, 0\)"),
    ],
)
def test_refused_settings(changes, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        make({}, "work", **changes)


def test_answers_are_compared_at_one_length(models, tmp_path):
    teacher = tiny_folder(0)
    longer = dataclasses.replace(teacher, metadata=teacher.metadata | {"role": "student", "gen_length": 32})
    longer.save(tmp_path / "longer")
    config = make(models | {"student": str(tmp_path / "longer")}, tmp_path, gen_length=0, block_size=0)
    with pytest.raises(InputError, match="^the models were made for different gen_lengths .*student 32.*: set config"):
        Setting.load(config)
    setting = Setting.load(dataclasses.replace(config, gen_length=16))
    assert setting.sizes == {"gen_length": 16, "block_size": teacher.metadata["block_size"]}
    options = {method.name: setting.options(method) for method in methods(config)}
    assert {option.gen_length for option in options.values()} == {16}
    assert options["dream, entropy"].block_size is None


@pytest.mark.parametrize(
    ("metadata", "changes", "headline"),
    [
        ({"preset": {"threshold": 0.5}}, {}, 0.5),
        ({"preset": {"threshold": 0.5}}, {"headline_threshold": 0.9}, 0.9),
        ({"preset": {"threshold": 0.7}}, {}, 0.9),  # which is not swept
        ({}, {}, 0.9),
    ],
)
def test_the_headline_is_the_students_preset(metadata, changes, headline, models, tmp_path):
    folder = tiny_folder(1, role="student")
    dataclasses.replace(folder, metadata=folder.metadata | metadata).save(tmp_path / "student")
    config = Setting.load(make(models | {"student": str(tmp_path / "student")}, tmp_path, **changes)).config
    chosen = {method.name for method in methods(config) if method.headline and method.options.threshold is not None}
    assert chosen == {f"{name}, tau {headline}" for name in ("Fast-dLLM dual cache", "untrained student", "CDLM")}


def test_a_headline_that_is_not_swept_is_refused(models, tmp_path):
    config = make(models, tmp_path, headline_threshold=0.7)
    with pytest.raises(InputError, match="^config.headline_threshold must be one of 0.9, 0.5, got 0.7$"):
        benchmark(config, Console(file=io.StringIO()))


def test_models_that_no_method_uses_are_not_read(models, tmp_path):
    config = make(models | {"autoregressive": str(tmp_path / "nowhere")}, tmp_path, methods=("naive", "cdlm"))
    assert set(Setting.load(config).folders) == {"teacher", "student"}


def test_a_folder_with_an_impossible_size_is_refused(models, tmp_path):
    folder = tiny_folder(0)
    dataclasses.replace(folder, metadata=folder.metadata | {"gen_length": [16]}).save(tmp_path / "odd")
    with pytest.raises(InputError, match=r"cdlm.gen_length must be a positive integer, got \[16\]"):
        Setting.load(make(models | {"teacher": str(tmp_path / "odd")}, tmp_path, gen_length=0))


def test_each_model_reads_the_problems_in_its_own_tokens(models, tmp_path):
    folder = causal_folder()
    alphabet = "".join(sorted(CHARACTERS, reverse=True))
    dataclasses.replace(folder, tokenizer=type(folder.tokenizer).characters(alphabet)).save(tmp_path / "other")
    setting = Setting.load(make(models | {"autoregressive": str(tmp_path / "other")}, tmp_path))
    teacher, other = setting.cases["teacher"], setting.cases["autoregressive"]
    assert [case.text for case in teacher] == [case.text for case in other]
    assert [case.ids for case in teacher] != [case.ids for case in other]
    decoded = [setting.folders["autoregressive"].tokenizer.decode(list(case.ids)) for case in other]
    assert decoded == [case.text for case in other]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_command_line(models, tmp_path, capsys):
    line = ["benchmark", "--methods=beam", "--task=chain", f"--config.work={tmp_path}"]
    line += [f"--config.{role}={folder}" for role, folder in models.items()]
    assert main(line) == 2
    assert "config.methods must be naive or truncated or" in capsys.readouterr().err
    assert main([*line, "--methods=cdlm", "--task=chess"]) == 2
    assert "unknown task 'chess'" in capsys.readouterr().err
