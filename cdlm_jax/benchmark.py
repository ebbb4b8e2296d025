"""Every decoder on the same weights, problems and machine: accuracy, tokens per forward, latency, throughput."""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cdlm_jax import evaluate
from cdlm_jax.config import InputError
from cdlm_jax.decoding.options import Options
from cdlm_jax.evaluation.harness import (
    Answer,
    Case,
    Decode,
    Spread,
    Timing,
    request,
    spread,
    timings,
)
from cdlm_jax.evaluation.metrics import Measured
from cdlm_jax.evaluation.order_plot import Order, plot_order
from cdlm_jax.evaluation.plots import plot_latency, plot_roofline, plot_throughput, plot_tradeoff
from cdlm_jax.evaluation.report import benchmark_markdown, benchmark_tables
from cdlm_jax.generate import answer_all
from cdlm_jax.model_folder import ModelFolder
from cdlm_jax.models.hf import fingerprint

MethodName = Literal["naive", "truncated", "dream", "fast_dllm", "dllm_cache", "autoregressive", "untrained", "cdlm"]
NAIVE = "naive, 1 token per step"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to compare, and on what. Everything is written under `work`.

    teacher, student, autoregressive: model folders; empty leaves the methods that need it out.
    methods: of MethodName; untrained is the student's decoder on the teacher's weights.
    tasks, per_task, data, allow_code_execution: as --task, --num, --data and the last of `cdlm evaluate`.
    gen_length, block_size: 0 takes each model folder's own.
    thresholds: of fast_dllm, cdlm and untrained; no confidence is above 1: there the last two go token by token.
    caches: of fast_dllm; steps: of truncated; prompt_interval, response_interval: of dllm_cache.
    headline_threshold: whose point stands for a series in the throughput sweep, over batch_sizes.
    repetitions: rounds of every timing; latency_problems: problems timed alone; batch_size: of the accuracy runs.
    """

    work: str
    seed: int = 0
    teacher: str = "shipped"
    student: str = ""
    autoregressive: str = ""
    methods: tuple[MethodName, ...]
    tasks: tuple[str, ...] = ()
    per_task: int = 512
    data: tuple[str, ...] = ()
    allow_code_execution: bool = False
    gen_length: int = 0
    block_size: int = 0
    thresholds: tuple[float, ...] = (1.0, 0.95, 0.9, 0.7, 0.5)
    headline_threshold: float = 0.9
    caches: tuple[Literal["none", "prefix", "dual"], ...] = ("none", "prefix", "dual")
    steps: tuple[int, ...] = ()
    prompt_interval: int = 50
    response_interval: int = 7
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    repetitions: int = 5
    latency_problems: int = 16
    batch_size: int = 64

    def __post_init__(self):
        for name in ("per_task", "repetitions", "latency_problems", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"config.{name} must be at least 1, got {getattr(self, name)}")
        if not self.methods or not (self.tasks or self.data):
            raise InputError("config needs at least one of methods, and one of tasks or data")
        swept = {"truncated": "steps", "fast_dllm": "thresholds", "untrained": "thresholds", "cdlm": "thresholds"}
        for method, knob in [*swept.items(), ("fast_dllm", "caches")]:
            if method in self.methods and not getattr(self, knob):
                raise InputError(f"config.{knob} is empty, and {method} needs at least one")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise InputError(f"config.batch_sizes must be positive, got {self.batch_sizes}")

    @property
    def folder(self) -> Path:
        return Path(self.work)


@dataclasses.dataclass(frozen=True)
class Method:
    """One decoder at one setting. series: the decoder, its knob left out; headline: stands for its series."""

    name: str
    series: str
    role: Literal["teacher", "student", "autoregressive"]
    options: Options
    headline: bool = True


def methods(config: BenchmarkConfig) -> list[Method]:
    """The methods asked for, in the order of a table: slow and exact first."""
    intervals = {name: getattr(config, name) for name in ("prompt_interval", "response_interval")}
    caches = {"none": "Fast-dLLM", "prefix": "Fast-dLLM prefix cache", "dual": "Fast-dLLM dual cache"}
    found: dict[str, list[Method]] = {
        "naive": [Method(NAIVE, "naive", "teacher", Options(decoder="naive"))],
        "truncated": [
            Method(f"naive, {steps} steps", "naive", "teacher", Options(decoder="naive", steps=steps), headline=False)
            for steps in config.steps
        ],
        "dream": [Method("dream, entropy", "dream", "teacher", Options(decoder="dream"))],
        "dllm_cache": [
            Method(
                f"dLLM-Cache, {config.prompt_interval}/{config.response_interval}",
                "dLLM-Cache",
                "teacher",
                Options(decoder="dllm_cache", **intervals),
            )
        ],
        "fast_dllm": [
            method
            for cache in config.caches
            for method in _swept(config, caches[cache], "teacher", Options(decoder="fast_dllm", cache=cache))
        ],
        "autoregressive": [
            Method("autoregressive", "autoregressive", "autoregressive", Options(decoder="autoregressive"))
        ],
        "untrained": _swept(config, "untrained student", "teacher", Options(decoder="cdlm")),
        "cdlm": _swept(config, "CDLM", "student", Options(decoder="cdlm")),
    }
    return [method for name in found if name in config.methods for method in found[name]]


def _swept(config: BenchmarkConfig, series: str, role: str, options: Options) -> list[Method]:
    """One method per threshold."""
    return [
        Method(
            f"{series}, tau {tau:g}",
            series,
            role,
            dataclasses.replace(options, threshold=tau),
            headline=tau == config.headline_threshold,
        )
        for tau in config.thresholds
    ]


# ---- running -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all methods share: cases, the width that prompts are padded to, response sizes, and each role's folder."""

    config: BenchmarkConfig
    folders: dict[str, ModelFolder]
    cases: list[Case]
    width: int
    sizes: dict[str, int]

    @classmethod
    def load(cls, config: BenchmarkConfig) -> "Setting":
        paths = {role: getattr(config, role) for role in ("teacher", "student", "autoregressive")}
        folders = {role: ModelFolder.load(path) for role, path in paths.items() if path}
        if not folders:
            raise InputError("config names no model: give teacher, student or autoregressive")
        tokenizers = {f.tokenizer.fingerprint() if f.tokenizer else None for f in folders.values()}
        if len(tokenizers) > 1:
            raise InputError(f"the models have different tokenizers: {', '.join(filter(None, paths.values()))}")
        tokenizer = next(iter(folders.values())).tokenizer
        cases = evaluate.cases(
            tokenizer,
            config.tasks,
            config.data,
            count=config.per_task,
            allow_code_execution=config.allow_code_execution,
        )
        sizes = {name: _size(config, folders, name) for name in ("gen_length", "block_size")}
        return cls(config, folders, cases, max(len(case.ids) for case in cases), sizes)

    def options(self, method: Method) -> Options:
        return method.options.resolve(self.folders[method.role].metadata | self.sizes)

    def decode(self, method: Method) -> Decode:
        return partial(self.options(method).bind(), self.folders[method.role].model)

    def answer(self, method: Method, console: Console) -> list[Answer]:
        options = dataclasses.replace(self.options(method), seed=self.config.seed)
        found = answer_all(self.folders[method.role], self.cases, options, self.config.batch_size)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            return list(progress.track(found, total=len(self.cases), description=f"{method.name:32}"))


def _size(config: BenchmarkConfig, folders: dict[str, ModelFolder], name: str) -> int:
    """The configuration's, or else what the folders that name one agree on: answers are compared at one length."""
    found = {role: folder.metadata[name] for role, folder in folders.items() if name in folder.metadata}
    if not getattr(config, name) and len(set(found.values())) > 1:
        sizes = ", ".join(f"{role} {size}" for role, size in found.items())
        raise InputError(f"the models were made for different {name}s ({sizes}): set config.{name}")
    return getattr(config, name) or next(iter(found.values()), {"gen_length": 256, "block_size": 32}[name])


def benchmark(config: BenchmarkConfig, console: Console) -> list[Measured]:
    """Measure every method, print the tables, write results.json, results.md and the plots under `work`."""
    setting = Setting.load(config)
    chosen = [method for method in methods(config) if method.role in setting.folders]
    if not chosen:
        raise InputError(f"none of the methods {', '.join(config.methods)} has a model; give its folder")
    swept = any(method.options.threshold is not None for method in chosen)
    if swept and config.headline_threshold not in config.thresholds:
        allowed = ", ".join(f"{tau:g}" for tau in config.thresholds)
        raise InputError(f"config.headline_threshold must be one of {allowed}, got {config.headline_threshold:g}")
    if not any(method.headline for method in chosen):
        raise InputError("truncated has no row in the throughput sweep of its own: add naive to the methods")
    decoders = {method.name: setting.decode(method) for method in chosen}  # what they refuse is refused now
    config.folder.mkdir(parents=True, exist_ok=True)
    console.print(f"{len(chosen)} methods, {len(setting.cases)} problems; everything is written under {config.folder}")
    latency = _latency(setting, decoders, console)
    headlines = {method.name: decoders[method.name] for method in chosen if method.headline}
    throughput = _throughput(setting, headlines, console)
    results, samples = [], []
    for method in chosen:
        found = setting.answer(method, console)
        name, options = method.name, setting.options(method)
        results.append(Measured.of(name, method.series, options, found, latency[name], throughput.get(name)))
        if method.headline:
            samples.append(Order.of(name, found[0], setting.folders[method.role].tokenizer, options.block_size))
    _write(setting, chosen[0], results, samples, console)
    return results


def _latency(setting: Setting, decoders: dict[str, Decode], console: Console) -> dict[str, Timing]:
    """Every decoder on single problems."""
    requests = _requests(setting, setting.config.latency_problems, 1)
    with console.status(f"latency, one sequence at a time, {setting.config.repetitions} rounds"):
        return timings(decoders, requests, setting.config.repetitions)


def _throughput(setting: Setting, decoders: dict[str, Decode], console: Console) -> dict[str, dict[int, Spread]]:
    """Tokens before the first EOS per second, by batch size: the same problems, cut into batches."""
    found: dict[str, dict[int, Spread]] = {name: {} for name in decoders}
    for size in setting.config.batch_sizes:
        requests = _requests(setting, max(setting.config.batch_sizes), size)
        with console.status(f"throughput, batch {size}, {setting.config.repetitions} rounds"):
            timed = timings(decoders, requests, setting.config.repetitions)
        for name, decode in decoders.items():
            tokens = sum(int(decode(*request).lengths.sum()) for request in requests)
            rounds = np.reshape(timed[name].calls, (setting.config.repetitions, len(requests))).sum(axis=1)
            found[name][size] = spread(tokens / rounds)
    return found


def _requests(setting: Setting, count: int, size: int) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """`count` problems (at least) spread over all groups, in batches of `size`."""
    places = np.linspace(0, len(setting.cases) - 1, -(-count // size) * size).astype(int)
    pad = next(iter(setting.folders.values())).model.config.pad_token_id
    batches = [[setting.cases[place] for place in batch] for batch in places.reshape(-1, size)]
    return [request(batch, setting.width, pad, setting.config.seed) for batch in batches]


# ---- writing -------------------------------------------------------------------------------------------------------


def _write(
    setting: Setting, first: Method, results: Sequence[Measured], samples: Sequence[Order], console: Console
) -> None:
    config, folder = setting.config, setting.config.folder
    baseline = next((r.name for r in results if r.name == NAIVE), results[0].name)
    models = {
        role: {"folder": getattr(config, role), "fingerprint": fingerprint(loaded.model)}
        for role, loaded in setting.folders.items()
    }
    summary = {
        "environment": environment(),
        "config": dataclasses.asdict(config),
        "models": models,
        "prompt_width": setting.width,
        "results": [dataclasses.asdict(result) for result in results],
    }
    (folder / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "results.md").write_text(benchmark_markdown(results, baseline))
    for table in benchmark_tables(results, baseline):
        console.print(table)
    plot_tradeoff(results, folder / "tradeoff.png")
    plot_latency(results, folder / "latency.png")
    plot_throughput(results, folder / "throughput.png")
    model = setting.folders[first.role].model
    plot_roofline(
        model.config,
        folder / "roofline.png",
        context=setting.width + setting.sizes["gen_length"],
        block_size=setting.sizes["block_size"],
        itemsize=model.embed[...].dtype.itemsize,
        device=jax.devices()[0].device_kind,
    )
    plot_order(samples, folder / "order.png", f"When each token of the answer to {setting.cases[0].text} was finalized")
    console.print(f"tables, plots and results.json: {folder}")


def environment() -> dict:
    """Versions and hardware, enough to say where a number comes from."""
    packages = ("cdlm_jax", "jax", "jaxlib", "flax", "numpy")
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform.processor() knows no more than the architecture there
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in packages},
        "platform": platform.platform(),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return None
