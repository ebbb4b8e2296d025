"""The installed harness, offline, on local tasks with the shipped teacher; and the adapter's rules one by one."""

import dataclasses
import json
import math
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_model_folder import tiny_folder

lm_eval = pytest.importorskip(
    "lm_eval", reason='lm-evaluation-harness is not installed: pip install "cdlm_jax[lm-eval]"'
)

from lm_eval.__main__ import cli_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from cdlm_jax import tasks  # noqa: E402
from cdlm_jax.cli import main  # noqa: E402
from cdlm_jax.commands.lm_eval import refusals  # noqa: E402
from cdlm_jax.config import InputError  # noqa: E402
from cdlm_jax.decoding import naive  # noqa: E402
from cdlm_jax.evaluation.answers import answer_all  # noqa: E402
from cdlm_jax.evaluation.harness import Case  # noqa: E402
from cdlm_jax.evaluation.likelihood import log_likelihood  # noqa: E402
from cdlm_jax.evaluation.lm_eval_adapter import CDLM  # noqa: E402
from cdlm_jax.models.model_folder import ModelFolder  # noqa: E402
from cdlm_jax.models.transformer import Transformer  # noqa: E402

PROBLEMS = 4

COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/problems.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
target_delimiter: ""
"""
WORKED = """
task: chain_worked
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
generation_kwargs: {until: ["\\n"], do_sample: false, temperature: 0, top_p: 0.95}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOICE = """
task: chain_choice
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def problems():
    return [tasks.get("chain").problem("heldout", index) for index in range(PROBLEMS)]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory, problems):
    """Two tasks of the harness in its own YAML: worked answers, and the right one among wrong ones of equal length."""
    folder = tmp_path_factory.mktemp("harness")
    rows = []
    for label, problem in enumerate(problems):
        steps, final = problem.answer[:-1], int(problem.answer[-1])
        choices = [f"{steps}{(final + change) % 10}" for change in (1, 2, 3)]
        choices.insert(label % 4, problem.answer)
        rows.append({"prompt": problem.prompt, "answer": problem.answer, "choices": choices, "label": label % 4})
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in (("worked", WORKED), ("choice", CHOICE)):
        (folder / f"{name}.yaml").write_text(task + COMMON.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def lm():
    return CDLM("shipped", threshold=0.9, batch_size="4", mc_num=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(**changes of the tokenizer) -> a folder with a model of random weights."""

    def save(**changes):
        folder = tmp_path_factory.mktemp("models") / "model"
        tiny = tiny_folder()
        dataclasses.replace(tiny, tokenizer=dataclasses.replace(tiny.tokenizer, **changes)).save(folder)
        return str(folder)

    return save


def generation(context, **kwargs):
    return Instance("generate_until", {}, (context, {"until": [], **kwargs}), 0)


def scoring(context, continuation):
    return Instance("loglikelihood", {}, (context, continuation), 0)


# ---- through the harness -------------------------------------------------------------------------------------------


def test_tasks_of_the_harness_run(lm, task_folder, problems):
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=["chain_worked", "chain_choice"],
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
    )
    texts = [sample["resps"][0][0] for sample in results["samples"]["chain_worked"]]
    cases = [Case(lm.tokenizer.encode(problem.prompt)) for problem in problems]
    assert texts == [answer.text for answer in answer_all(lm.folder, cases, lm.options, 4)]
    right = [text == problem.answer for text, problem in zip(texts, problems, strict=True)]
    assert results["results"]["chain_worked"]["exact_match,none"] == np.mean(right) >= 0.75
    assert results["results"]["chain_choice"]["acc,none"] >= 0.75  # of four choices
    assert results["config"]["decode_options"] == dataclasses.asdict(lm.options)


def test_its_command_line_runs(task_folder, monkeypatch, capsys):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "")  # which the command line sets
    model = [
        "--model",
        "cdlm_jax",
        "--model_args",
        "pretrained=shipped,threshold=0.9,block_size=16",
        "--batch_size",
        "4",
    ]
    run = ["--tasks", "chain_worked", "--include_path", str(task_folder), "--limit", str(PROBLEMS)]
    monkeypatch.setattr(sys, "argv", ["lm-eval", *model, *run])
    cli_evaluate()
    assert "|chain_worked|" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--limit many", "argument --limit/-L: invalid float value: 'many'"),
        ("--tasks chain --predict_only", "Specify --output_path if providing --log_samples or --predict_only"),
        ("--config absent.yaml", "Config file not found"),
    ],
)
def test_what_the_harness_refuses_is_one_line(line, message, monkeypatch, capsys):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "")  # which the command line sets
    assert main(["lm-eval", "run", *line.split()]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("cdlm lm-eval: ") and message in said


def test_a_fault_below_the_harness_keeps_its_traceback():
    with pytest.raises(ValueError, match="invalid literal"), refusals():
        int("many")


# ---- generation ----------------------------------------------------------------------------------------------------


def test_stop_strings_and_length(lm, problems):
    prompt = problems[0].prompt
    (whole,) = lm.generate_until([generation(prompt)], disable_tqdm=True)
    assert "#" in whole and ";" in whole
    requests = [
        generation(prompt, until=["#", ";"]),
        generation(prompt, until="#"),
        generation(prompt, until=["", "absent"]),
        generation(prompt, max_gen_toks=3),
        generation(prompt, max_gen_toks=3, until=[whole[1]]),
    ]
    expected = [whole.split(";")[0], whole.split("#")[0], whole, whole[:3], whole[:1]]
    assert lm.generate_until(requests, disable_tqdm=True) == expected


def test_a_special_token_can_stop_and_none_is_returned(lm):
    ids = [*lm.tokenizer.encode("1+2"), lm.model.config.mask_token_id, *lm.tokenizer.encode("=3")]
    assert lm._text(ids, ["<mask>"]) == "1+2"
    assert lm._text(ids, []) == "1+2=3"


def test_a_task_may_sample(lm, problems):
    """Greedy and sampled requests in one call; equal seeds give equal texts; repeats of a request differ."""
    sampled = {"do_sample": True, "temperature": 30.0}
    requests = [generation(problems[0].prompt, **kwargs) for kwargs in (sampled, {}, sampled)]
    first, greedy, second = lm.generate_until(requests, disable_tqdm=True)
    assert [first, greedy, second] == lm.generate_until(requests, disable_tqdm=True)
    assert len({first, greedy, second}) == 3
    assert lm.generate_until(requests[1:2], disable_tqdm=True) == [greedy]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 4}, "generation argument num_beams=4 is not supported, allowed: until, max_gen_toks, do_sample"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 0.9}, "generation argument top_p=0.9 is not supported"),
    ],
)
def test_refuses_generation_arguments(lm, kwargs, message):
    with pytest.raises(InputError, match=message):
        lm.generate_until([generation("1+1=", **kwargs)])


def test_refuses_a_context_that_does_not_fit(lm):
    with pytest.raises(InputError, match=r"of 24 tokens \+ gen_length 48 exceeds the model's 71 positions"):
        lm.generate_until([generation("1+1=" * 6)])


# ---- likelihood ----------------------------------------------------------------------------------------------------


def test_loglikelihood_is_that_of_the_module(lm, problems):
    """Scores in a batch, in any order, equal the plain call with the key of (seed, context)."""
    prompt, answer = problems[0].prompt, problems[0].answer
    pairs = [(prompt, answer), (prompt, answer[:-1] + "0"), (problems[1].prompt, problems[1].answer)]
    found = lm.loglikelihood([scoring(*pair) for pair in pairs], disable_tqdm=True)
    back = lm.loglikelihood([scoring(*pair) for pair in pairs[::-1]], disable_tqdm=True)[::-1]
    np.testing.assert_allclose(found, back, rtol=1e-4)
    context, continuation = map(lm.tokenizer.encode, pairs[0])
    arrays = [jnp.array(value) for value in ([context], [len(context)], [continuation], [len(continuation)])]
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(np.array(context, np.int32).tobytes()))
    expected = log_likelihood(lm.model, *arrays, key[None], samples=lm.mc_num)
    np.testing.assert_allclose(found[0][0], expected[0], rtol=1e-4)
    assert found[1][0] < found[0][0]
    greedy = naive.generate(
        lm.model, *arrays[:2], naive.Config(gen_length=len(continuation), block_size=len(continuation))
    )
    assert lm.tokenizer.decode(greedy.tokens[0]) == answer
    assert [top for _, top in found[:2]] == [True, False]


def test_loglikelihood_of_a_student_uses_its_blocks(lm, problems):
    student = CDLM("shipped", decoder="cdlm", block_size=4, mc_num=4)
    request = [scoring(problems[0].prompt, problems[0].answer)]
    assert student.loglikelihood(request, disable_tqdm=True)[0][0] < lm.loglikelihood(request, disable_tqdm=True)[0][0]


def test_loglikelihood_rolling_adds_up_windows(lm, problems):
    """Before the first window stands the prefix token, before the next as much of the text as there is room for."""
    text = "".join(problem.answer for problem in problems)[: lm.max_length + 20]
    cut = lm.max_length - 1
    (whole,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    pairs = [("", text[:cut]), (text[-lm.max_length : cut], text[cut:])]
    parts = lm.loglikelihood([scoring(*pair) for pair in pairs], disable_tqdm=True)
    assert math.isclose(whole, sum(bound for bound, _ in parts), rel_tol=1e-5)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("1+1=", ""), "has no tokens"),
        (("1+1=" * 10, "1" * 40), "context of 40 tokens .* exceeds the model's 71 positions"),
    ],
)
def test_refuses_what_cannot_be_scored(lm, pair, message):
    with pytest.raises(InputError, match=message):
        lm.loglikelihood([scoring(*pair)], disable_tqdm=True)


# ---- tokenizer -----------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{{ m.content | trim }};{% endfor %}{% if add_generation_prompt %}={% endif %}"


def test_chat_template(saved):
    lm = CDLM(saved(chat_template=TEMPLATE))
    turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "1+1 "}]
    assert lm.apply_chat_template(turns[:1]) == "1+1;="
    assert lm.apply_chat_template(turns, add_generation_prompt=False) == "1+1;1+1"
    assert lm.chat_template(True) == TEMPLATE
    assert lm.tokenizer_name != CDLM(saved()).tokenizer_name
    with pytest.raises(InputError, match="has no chat template"):
        CDLM(saved()).apply_chat_template(turns)


def test_bos(saved):
    lm = CDLM(saved(special_tokens={"bos_token": "#"}), add_bos_token=True)
    assert lm.tokenizer.decode(lm.tok_encode("1+1=")) == "#1+1="
    assert lm.tokenizer.decode(lm.tok_encode("#1+1=")) == "#1+1="
    assert lm.tok_encode("") == [lm.prefix_token_id] == lm.tokenizer.encode("#")
    with pytest.raises(InputError, match="names no bos_token"):
        CDLM(saved(), add_bos_token=True)


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"thresold": 0.9}, "unknown model argument 'thresold', allowed: pretrained, decoder, .*threshold"),
        ({"gen_length": "long"}, "model argument gen_length must be .*int.*, got 'long'"),
        ({"threshold": True}, "model argument threshold must be .*float.*, got True"),
        ({"decoder": "fast"}, "decoder must be one of .*, got 'fast'"),
        ({"cache": "double"}, "model argument cache must be .*dual.*, got 'double'"),
        ({"gen_length": 24}, "gen_length 24 must be a positive multiple of block_size 16"),
        ({"batch_size": "auto"}, "batch_size must be a positive integer, got 'auto'"),
        ({"mc_num": 0}, "mc_num must be a positive integer, got 0"),
        ({"cfg_scale": -1}, "cfg_scale must be a number of 0 or more, got -1"),
        ({"add_bos_token": "yes"}, "add_bos_token must be true or false, got 'yes'"),
        ({"pretrained": "/absent"}, "no model folder at /absent"),
        ({"pretrained": None}, "give --model_args pretrained=<model folder>, got None"),
        ({"pretrained": 3}, "pretrained=<model folder>, got 3"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        CDLM(**({"pretrained": "shipped"} | arguments))


def test_refuses_a_folder_without_a_tokenizer(tmp_path):
    dataclasses.replace(tiny_folder(), tokenizer=None).save(tmp_path / "model")
    with pytest.raises(InputError, match="has no tokenizer"):
        CDLM(str(tmp_path / "model"))


def test_an_autoregressive_model_generates_and_has_no_bound(tmp_path):
    tiny = tiny_folder()
    causal = {"family": "llama", "mask_token_id": None, "logit_alignment": "shifted"}
    config = dataclasses.replace(tiny.model.config, **causal)
    folder = ModelFolder(Transformer(config, rngs=nnx.Rngs(0)), tiny.tokenizer, {})
    folder.save(tmp_path / "model")
    lm = CDLM(str(tmp_path / "model"), gen_length=4)
    assert lm.options.decoder == "autoregressive"
    assert len(lm.generate_until([generation("1+1=")], disable_tqdm=True)) == 1
    with pytest.raises(InputError, match="likelihoods are those of masked diffusion models; llama is autoregressive"):
        lm.loglikelihood([scoring("1+1=", "2")], disable_tqdm=True)


def test_guides_generation_where_the_decoder_can():
    lm = CDLM("shipped", cfg_scale=0.5)
    assert lm.options.cfg_scale == 0.5
    assert lm.generate_until([generation("1+1=")], disable_tqdm=True)[0].isprintable()
    with pytest.raises(InputError, match="^cfg_scale 0.5: this task generates, and fast_dllm does not guide; naive"):
        CDLM("shipped", decoder="fast_dllm", cfg_scale=0.5).generate_until([generation("1+1=")])


def test_takes_what_the_harness_gives_to_every_model():
    lm = CDLM.create_from_arg_string(
        "pretrained=shipped,threshold=1,seed=3", {"batch_size": 2, "max_batch_size": None, "device": "cuda:0"}
    )
    assert (lm.batch_size, lm.options.threshold, lm.options.seed) == (2, 1, 3)


def test_missing_harness_is_named(monkeypatch):
    for name in ("lm_eval.api.instance", "cdlm_jax.evaluation.lm_eval_adapter"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    with pytest.raises(InputError, match=r'this needs lm-evaluation-harness: pip install "cdlm_jax\[lm-eval\]"'):
        import cdlm_jax.evaluation.lm_eval_adapter  # noqa: F401
