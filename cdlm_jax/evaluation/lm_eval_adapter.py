"""A model folder as a model of lm-evaluation-harness (optional extra `lm-eval`): its tasks run unchanged.

    cdlm lm-eval --model cdlm_jax --model_args pretrained=shipped,threshold=0.9 --batch_size 16 --tasks gsm8k

From Python, importing this module registers the class: lm_eval.simple_evaluate(model="cdlm_jax", ...).
"""

import dataclasses
import hashlib
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cdlm_jax.config import InputError
from cdlm_jax.decoding.options import Options
from cdlm_jax.evaluation.harness import Answer, Case, answers
from cdlm_jax.evaluation.likelihood import is_greedy, log_likelihood
from cdlm_jax.models.model_folder import ModelFolder

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise InputError('this needs lm-evaluation-harness: pip install "cdlm_jax[lm-eval]"') from error

Pair = tuple[list[int], list[int]]  # token ids of a context and of its continuation
Arrays = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # prompts, their lengths, continuations, their lengths


@register_model("cdlm_jax")
class CDLM(TemplateLM):
    """Arguments (`--model_args name=value,...`):

    pretrained: a model folder; `shipped` is the tiny teacher in the package.
    decoder, gen_length, block_size, threshold, temperature, seed ...: every field of `decoding.options.Options`. A
        response has gen_length tokens, and is cut to a task's max_gen_toks where that is less. A task that samples
        brings its own temperature.
    mc_num: Monte-Carlo samples of a likelihood (`evaluation.likelihood`), which is a lower bound.
    cfg_scale: classifier-free guidance of likelihoods, and of the naive decoder.
    add_bos_token: put the tokenizer's BOS before every text that does not begin with it (Dream's base model wants it).

    `--batch_size`: rows of a forward. `--device` is not used: JAX takes the devices it finds.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        mc_num: int = 128,
        cfg_scale: float = 0.0,
        add_bos_token: bool = False,
        **options: Any,
    ):
        super().__init__()
        if not isinstance(pretrained, str):
            raise InputError(f"give --model_args pretrained=<model folder>, got {pretrained!r}")
        self.batch_size = _positive("batch_size", batch_size)
        self.mc_num = _positive("mc_num", mc_num)
        if not _fits(cfg_scale, float) or not cfg_scale >= 0:
            raise InputError(f"cfg_scale must be a number of 0 or more, got {cfg_scale!r}")
        if not isinstance(add_bos_token, bool):
            raise InputError(f"add_bos_token must be true or false, got {add_bos_token!r}")
        self.cfg_scale = cfg_scale
        asked = _options(options)
        self.folder = ModelFolder.load(pretrained)
        self.model, tokenizer = self.folder.model, self.folder.tokenizer
        if tokenizer is None:
            raise InputError(f"the harness gives texts, and model folder {pretrained} has no tokenizer")
        self.tokenizer = tokenizer
        self.options = asked.resolve(self.folder.metadata, causal=self.model.config.causal)
        assert self.options.gen_length is not None  # resolved
        self.gen_length = self.options.gen_length
        if self.options.decoder == "naive" and cfg_scale:
            self.options = dataclasses.replace(self.options, cfg_scale=cfg_scale)
        bos = self.tokenizer.special_tokens.get("bos_token")
        if add_bos_token and bos is None:
            raise InputError(f"add_bos_token: the tokenizer of {pretrained} names no bos_token")
        self.bos_token_id = None if bos is None else self.tokenizer.token_to_id(bos)
        self.add_bos_token = add_bos_token
        self.key = jax.random.key(self.options.seed)

    # ---- what the harness asks about a model -----------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.model.config.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands for an empty context."""
        return self.eot_token_id if self.bos_token_id is None else self.bos_token_id

    @property
    def max_length(self) -> int:
        return self.model.config.max_length

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's cache of rendered requests: it changes with the tokenizer and with its chat template."""
        template = hashlib.sha256((self.tokenizer.chat_template or "").encode()).hexdigest()[:16]
        return f"{self.tokenizer.fingerprint()}_{template}"

    def get_model_info(self) -> dict[str, Any]:
        """Goes into the `config` of the results."""
        return {
            "decode_options": dataclasses.asdict(self.options),
            "mc_num": self.mc_num,
            "cfg_scale": self.cfg_scale,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        ids = self.tokenizer.encode(string)
        add = self.add_bos_token and add_special_tokens is not False and ids[:1] != [self.bos_token_id]
        return [self.prefix_token_id, *ids] if add else ids

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Without a generation prompt the last message is one that the model is to go on with: what the template
        writes after its content (the end of the turn) is cut off."""
        rendered = self.tokenizer.apply_chat_template(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return rendered
        content = self.tokenizer.quote(chat_history[-1]["content"])
        for begun in (content, content.strip()):  # templates may strip contents
            if begun in rendered:
                return rendered[: rendered.rindex(begun) + len(begun)]
        raise InputError(f"the chat template drops the beginning of the answer, {content!r:.80}")

    # ---- generation ------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts, each up to its first stop string. Contexts that do not fit the model beside gen_length are refused."""
        if self.cfg_scale and self.options.decoder != "naive":
            guided = f"{self.options.decoder} does not guide; naive does"
            raise InputError(f"cfg_scale {self.cfg_scale}: this task generates, and {guided}")
        kwargs = [_generation_kwargs(request.args[1], self.gen_length) for request in requests]
        prompts = [self._prompt(request.args[0]) for request in requests]
        by_temperature = defaultdict(list)
        for number, one in enumerate(kwargs):
            by_temperature[one["temperature"] or self.options.temperature].append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for temperature, numbers in by_temperature.items():
                options = dataclasses.replace(self.options, temperature=temperature)
                found = self._answers([prompts[number] for number in numbers], options)
                for number, answer in zip(numbers, found, strict=True):
                    length = min(answer.length, kwargs[number]["max_gen_toks"])
                    texts[number] = self._text(answer.tokens[:length].tolist(), kwargs[number]["until"])
                    self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                    bar.update()
        return texts

    def _answers(self, cases: list[Case], options: Options) -> Iterator[Answer]:
        decode, config = partial(options.bind(), self.model), self.model.config
        return answers(decode, config, self.tokenizer, cases, batch_size=self.batch_size, seed=options.seed)

    def _prompt(self, context: str) -> Case:
        ids = self.tok_encode(context) or [self.prefix_token_id]
        if len(ids) + self.gen_length > self.max_length:
            sizes = f"{len(ids)} tokens + gen_length {self.gen_length}"
            raise InputError(f"context {context!r:.80} of {sizes} exceeds the model's {self.max_length} positions")
        return Case(ids, context)

    def _text(self, tokens: list[int], until: list[str]) -> str:
        """Stop strings may be special tokens (an end of turn), so these are taken out last."""
        text = self.tokenizer.decode(tokens, skip_special=False)
        for stop in filter(None, until):
            text = text.partition(stop)[0]
        for token in self.tokenizer.backend.get_added_tokens_decoder().values():
            if token.special:
                text = text.replace(token.content, "")
        return text

    # ---- likelihood ------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """Called by `TemplateLM.loglikelihood`: (bound in nats, whether greedy decoding gives the continuation)."""
        found: list[Any] = [None] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        for number, arrays, keys in self._batches(pairs, disable_tqdm):
            bounds = self._bounds(arrays, keys)
            greedy = is_greedy(self.model, *arrays, **self._rule)
            for i, bound, is_top in zip(number, bounds, np.asarray(greedy).tolist(), strict=False):
                found[i] = (bound, is_top)
                self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """A bound for each whole text, so perplexities are upper bounds. Of a text longer than the model, every token
        is scored once, in windows that see as much of what is before them as there is room for."""
        windows: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tokenizer.encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, context_len=1):
                windows.append(make_disjoint_window(window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for number, arrays, keys in self._batches(windows, disable_tqdm):
            for i, bound in zip(number, self._bounds(arrays, keys), strict=False):
                totals[owners[i]] += bound
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @property
    def _rule(self) -> dict[str, Any]:
        """A student's likelihood is taken under the attention that it decodes with."""
        block_size = self.options.block_size if self.options.decoder == "cdlm" else None
        return {"cfg_scale": self.cfg_scale, "block_size": block_size}

    def _bounds(self, arrays: Arrays, keys: jax.Array) -> list[float]:
        return np.asarray(log_likelihood(self.model, *arrays, keys, samples=self.mc_num, **self._rule)).tolist()

    def _batches(self, pairs: Sequence[Pair], disable_tqdm: bool) -> Iterator[tuple[list[int], Arrays, jax.Array]]:
        """(numbers of the pairs, their four padded arrays, random keys [rows]); a last batch is filled up.

        The masks of a pair are drawn from (seed, its context): the choices of one question are compared on equal
        draws, and no score depends on order, batching or what a cache holds.
        """
        if self.model.config.causal:
            family = self.model.config.family
            raise InputError(f"likelihoods are those of masked diffusion models; {family} is autoregressive")
        shapes = defaultdict(list)
        for number, pair in enumerate(pairs):
            shapes[self._shape(*pair)].append(number)
        with tqdm(total=len(pairs), desc="loglikelihood", disable=disable_tqdm) as bar:
            for (prompt_size, answer_size), numbers in sorted(shapes.items(), reverse=True):  # the largest first
                rows = min(self.batch_size, len(numbers))
                for start in range(0, len(numbers), rows):
                    batch = numbers[start : start + rows]
                    filled = batch + batch[-1:] * (rows - len(batch))
                    contexts, continuations = zip(*(pairs[number] for number in filled), strict=True)
                    seeds = [zlib.crc32(np.asarray(context, np.int32).tobytes()) for context in contexts]
                    keys = jax.vmap(jax.random.fold_in, (None, 0))(self.key, jnp.asarray(seeds, jnp.uint32))
                    yield batch, (*_padded(contexts, prompt_size), *_padded(continuations, answer_size)), keys
                    bar.update(len(batch))

    def _shape(self, context: list[int], continuation: list[int]) -> tuple[int, int]:
        """Powers of two, as far as the model has room: few programs to compile."""
        if not continuation:
            raise InputError(f"a continuation of {self.tokenizer.decode(context)[-60:]!r} has no tokens")
        room = self.max_length - len(context)
        if len(continuation) > room:
            sizes = f"{len(context)} tokens + continuation of {len(continuation)}"
            raise InputError(f"context of {sizes} exceeds the model's {self.max_length} positions")
        answer_size = min(_power_of_two(len(continuation)), room)
        return min(_power_of_two(len(context)), self.max_length - answer_size), answer_size


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _padded(rows: Iterable[list[int]], size: int) -> tuple[jax.Array, jax.Array]:
    """[rows, size] int32, right-padded, and [rows] lengths."""
    rows = list(rows)
    padded = np.stack([np.pad(np.asarray(row, np.int32), (0, size - len(row))) for row in rows])
    return jnp.asarray(padded), jnp.asarray([len(row) for row in rows], jnp.int32)


# ---- arguments -----------------------------------------------------------------------------------------------------

GENERATION_KWARGS = ("until", "max_gen_toks", "do_sample", "temperature")
SAMPLING_FILTERS = ("top_p", "top_k")
NEUTRAL = (None, False, 1)  # as values of others: num_beams=1, top_p=1.0


def _generation_kwargs(given: dict[str, Any], gen_length: int) -> dict[str, Any]:
    """`GENERATION_KWARGS` of a task; what would change its answers, and is not supported, is refused."""
    kwargs = normalize_gen_kwargs(given, gen_length)
    kwargs["temperature"] = float(kwargs.get("temperature", 0.0)) if kwargs["do_sample"] else 0.0
    without_effect = () if kwargs["temperature"] else SAMPLING_FILTERS
    for name, value in kwargs.items():
        if name not in (*GENERATION_KWARGS, *without_effect) and value not in NEUTRAL:
            allowed = ", ".join(GENERATION_KWARGS)
            raise InputError(f"generation argument {name}={value!r} is not supported, allowed: {allowed}")
    return kwargs


def _options(given: dict[str, Any]) -> Options:
    """Decode options from a command line's values; unknown names, and values of another type, are refused."""
    kinds: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Options)}
    for name, value in given.items():
        if name not in kinds:
            allowed = ", ".join(("pretrained", *kinds, "mc_num", "add_bos_token"))
            raise InputError(f"unknown model argument {name!r}, allowed: {allowed}")
        if not _fits(value, kinds[name]):
            kind = kinds[name] if get_args(kinds[name]) else kinds[name].__name__
            raise InputError(f"model argument {name} must be {kind}, got {value!r}")
    return Options(**given)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type: a plain one, a Literal, or a union of those."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if parts := get_args(kind):
        return any(_fits(value, part) for part in parts)
    return not isinstance(value, bool) and isinstance(value, (int, float) if kind is float else kind)


def _positive(name: str, value: int | str) -> int:
    """The harness's command line gives batch_size as text."""
    if not str(value).isdecimal() or int(value) < 1:
        raise InputError(f"{name} must be a positive integer, got {value!r}")
    return int(value)
