"""Every decoder on the same weights, problems and machine: accuracy, tokens per forward, latency, throughput."""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from rich.console import Console

from cdlm_jax.config import InputError
from cdlm_jax.decoding.options import DEFAULT_SIZES, Options, folder_size, folder_threshold
from cdlm_jax.decoding.progress import DecodeResult
from cdlm_jax.decoding.unmask import Threshold
from cdlm_jax.evaluation import problems
from cdlm_jax.evaluation.answer_file import AnswerFile, answer_file
from cdlm_jax.evaluation.answers import answer_kept, asked
from cdlm_jax.evaluation.harness import (
    Answer,
    Case,
    Spread,
    Timing,
    request,
    spread,
    timings,
)
from cdlm_jax.evaluation.metrics import Measured
from cdlm_jax.evaluation.operating_point import THRESHOLDS
from cdlm_jax.evaluation.order_plot import Order, plot_order
from cdlm_jax.evaluation.plots import plot_latency, plot_roofline, plot_throughput, plot_tradeoff
from cdlm_jax.evaluation.report import benchmark_markdown, benchmark_tables
from cdlm_jax.mesh.progress import track
from cdlm_jax.models.hf import fingerprint
from cdlm_jax.models.model_folder import ModelFolder

Role = Literal["teacher", "student", "autoregressive"]
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
    headline_threshold: whose point stands for a series in the throughput sweep, over batch_sizes; 0 takes the
        student's preset where it is one of the thresholds, else the decoder's own default.
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
    thresholds: tuple[float, ...] = (1.0, *THRESHOLDS)
    headline_threshold: float = 0.0
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
        for name in ("gen_length", "block_size"):
            if getattr(self, name) < 0:
                raise InputError(f"config.{name} must be positive, or 0 for the models' own, got {getattr(self, name)}")
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
    role: Role
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


def _swept(config: BenchmarkConfig, series: str, role: Role, options: Options) -> list[Method]:
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
    """What all methods share: each role's folder and, in its tokens, the cases; and the sizes of a response.

    config: with the headline threshold that its 0 stands for."""

    config: BenchmarkConfig
    folders: Mapping[Role, ModelFolder]
    cases: Mapping[Role, list[Case]]
    sizes: dict[str, int]

    @classmethod
    def load(cls, config: BenchmarkConfig) -> "Setting":
        paths = {role: getattr(config, role) for role in get_args(Role)}
        used = {method.role for method in methods(config)}
        folders = {role: ModelFolder.load(path) for role, path in paths.items() if path and role in used}
        if not folders:
            raise InputError(f"none of the methods {', '.join(config.methods)} has a model; give its folder")
        cases = {
            role: problems.cases(
                folder.tokenizer,
                config.tasks,
                config.data,
                count=config.per_task,
                allow_code_execution=config.allow_code_execution,
            )
            for role, folder in folders.items()
        }
        sizes = {name: _size(config, folders, name) for name in ("gen_length", "block_size")}
        preset = folder_threshold(folders["student"].metadata) if "student" in folders else None
        headline = config.headline_threshold or (preset if preset in config.thresholds else None) or Threshold().tau
        config = dataclasses.replace(config, headline_threshold=headline)
        return cls(config, folders, cases, sizes)

    def width(self, role: Role) -> int:
        """What prompts are padded to."""
        return max(len(case.ids) for case in self.cases[role])

    def requests(self, role: Role, count: int, size: int) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
        """`count` problems (at least) spread over all groups, in batches of `size`."""
        cases, pad = self.cases[role], self.folders[role].model.config.pad_token_id
        places = np.linspace(0, len(cases) - 1, -(-count // size) * size).astype(int)
        batches = [[cases[place] for place in batch] for batch in places.reshape(-1, size)]
        return [request(batch, self.width(role), pad, self.config.seed) for batch in batches]

    def options(self, method: Method) -> Options:
        return method.options.resolve(self.folders[method.role].metadata | self.sizes)

    def kept(self, chosen: Sequence[Method]) -> dict[str, Any]:
        """The settings that the answers of all methods depend on."""
        models: dict[str, Any] = {role: asked(folder, self.cases[role]) for role, folder in self.folders.items()}
        options = {method.name: self.options(method).given() for method in chosen}
        return {"seed": self.config.seed, "methods": options, **models}

    def calls(self, method: Method, count: int, size: int) -> list[Callable[[], DecodeResult]]:
        """Decodes `requests`."""
        decode = partial(self.options(method).bind(), self.folders[method.role].model)
        return [partial(decode, *request) for request in self.requests(method.role, count, size)]

    def answer(self, method: Method, console: Console, file: AnswerFile | None = None) -> list[Answer]:
        options = dataclasses.replace(self.options(method), seed=self.config.seed)
        cases = [dataclasses.replace(case, tags={"method": method.name}) for case in self.cases[method.role]]
        found = answer_kept(self.folders[method.role], cases, options, self.config.batch_size, file)
        return list(track(found, f"{method.name:32}", len(cases), console=console))


def _size(config: BenchmarkConfig, folders: Mapping[Role, ModelFolder], name: str) -> int:
    """The configuration's, or else what the folders that name one agree on: answers are compared at one length."""
    found = {role: size for role, folder in folders.items() if (size := folder_size(folder.metadata, name))}
    if not getattr(config, name) and len(set(found.values())) > 1:
        sizes = ", ".join(f"{role} {size}" for role, size in found.items())
        raise InputError(f"the models were made for different {name}s ({sizes}): set config.{name}")
    return getattr(config, name) or next(iter(found.values()), DEFAULT_SIZES[name])


def benchmark(config: BenchmarkConfig, console: Console, output: str | None = None) -> list[Measured]:
    """Measure every method, print the tables, write results.json, results.md and the plots under `work`.

    output: a file for the answers of all methods (`AnswerFile`). The same call continues it; times are taken anew.
    """
    setting = Setting.load(config)
    config = setting.config
    chosen = [method for method in methods(config) if method.role in setting.folders]
    swept = any(method.options.threshold is not None for method in chosen)
    if swept and config.headline_threshold not in config.thresholds:
        allowed = ", ".join(f"{tau:g}" for tau in config.thresholds)
        raise InputError(f"config.headline_threshold must be one of {allowed}, got {config.headline_threshold:g}")
    if not any(method.headline for method in chosen):
        raise InputError("truncated has no row in the throughput sweep of its own: add naive to the methods")
    for method in chosen:
        setting.options(method)  # what a decoder refuses is refused now
    problems = len(setting.cases[chosen[0].role])
    config.folder.mkdir(parents=True, exist_ok=True)
    console.print(
        f"{len(chosen)} methods, {problems} problems; everything is written under {config.folder}", markup=False
    )
    with answer_file(output, problems * len(chosen), partial(setting.kept, chosen)) as file:
        latency = _latency(setting, chosen, console)
        throughput = _throughput(setting, [method for method in chosen if method.headline], console)
        answers = {method.name: setting.answer(method, console, file) for method in chosen}
    results, samples = [], []
    for method in chosen:
        found = answers[method.name]
        name, options = method.name, setting.options(method)
        results.append(Measured.of(name, method.series, options, found, latency[name], throughput.get(name)))
        if method.headline:
            tokenizer = setting.folders[method.role].tokenizer
            assert tokenizer is not None  # the cases are texts
            samples.append(Order.of(name, found[0], tokenizer, options.block_size))
    _write(setting, chosen[0].role, results, samples, console)
    return results


def _latency(setting: Setting, chosen: Sequence[Method], console: Console) -> dict[str, Timing]:
    """Every method on single problems."""
    calls = {method.name: setting.calls(method, setting.config.latency_problems, 1) for method in chosen}
    label = f"latency, one sequence at a time, {setting.config.repetitions} rounds"
    return timings(calls, setting.config.repetitions, label=label, console=console)


def _throughput(setting: Setting, chosen: Sequence[Method], console: Console) -> dict[str, dict[int, Spread]]:
    """Tokens before the first EOS per second, by batch size: the same problems, cut into batches."""
    found: dict[str, dict[int, Spread]] = {method.name: {} for method in chosen}
    for size in setting.config.batch_sizes:
        calls = {method.name: setting.calls(method, max(setting.config.batch_sizes), size) for method in chosen}
        label = f"throughput, batch {size}, {setting.config.repetitions} rounds"
        timed = timings(calls, setting.config.repetitions, label=label, console=console)
        for name, own in calls.items():
            tokens = sum(int(call().lengths.sum()) for call in own)
            rounds = np.reshape(timed[name].calls, (setting.config.repetitions, len(own))).sum(axis=1)
            found[name][size] = spread(tokens / rounds)
    return found


# ---- writing -------------------------------------------------------------------------------------------------------


def _write(
    setting: Setting, role: Role, results: Sequence[Measured], samples: Sequence[Order], console: Console
) -> None:
    config, folder = setting.config, setting.config.folder
    baseline = next((r.name for r in results if r.name == NAIVE), results[0].name)
    models = {
        name: {"folder": getattr(config, name), "fingerprint": fingerprint(loaded.model)}
        for name, loaded in setting.folders.items()
    }
    summary = {
        "environment": environment(),
        "config": dataclasses.asdict(config),
        "models": models,
        "prompt_width": {name: setting.width(name) for name in setting.folders},
        "results": [dataclasses.asdict(result) for result in results],
    }
    (folder / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "results.md").write_text(benchmark_markdown(results, baseline))
    for table in benchmark_tables(results, baseline):
        console.print(table)
    plot_tradeoff(results, folder / "tradeoff.png")
    plot_latency(results, folder / "latency.png")
    plot_throughput(results, folder / "throughput.png")
    model = setting.folders[role].model
    plot_roofline(
        model.config,
        folder / "roofline.png",
        context=setting.width(role) + setting.sizes["gen_length"],
        block_size=setting.sizes["block_size"],
        itemsize=model.embed[...].dtype.itemsize,
        device=jax.devices()[0].device_kind,
    )
    prompt = setting.cases[role][0].text
    plot_order(samples, folder / "order.png", f"When each token of the answer to {prompt} was finalized")
    console.print(f"tables, plots and results.json: {folder}", markup=False)


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
