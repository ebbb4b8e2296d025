"""Any decoder from a flat set of options, as the command line gives them, and what a model folder says of itself."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

from cdlm_jax.config import InputError
from cdlm_jax.decoding import autoregressive, cdlm, dllm_cache, dream, fast_dllm, naive
from cdlm_jax.decoding.unmask import Threshold

DECODERS = {module.__name__.rpartition(".")[2]: module for module in (naive, dream, fast_dllm, dllm_cache)} | {
    "autoregressive": autoregressive,
    "cdlm": cdlm,
}
ROLES = {"teacher": "naive", "student": "cdlm", "autoregressive": "autoregressive"}

DEFAULT_SIZES = {"gen_length": 256, "block_size": 32}


def folder_size(metadata: dict[str, Any], name: str) -> int | None:
    """What a model folder says of a size of DEFAULT_SIZES, None if nothing."""
    size = metadata.get(name)
    if size is not None and (type(size) is not int or size < 1):
        raise InputError(f"config.json: cdlm.{name} must be a positive integer, got {size!r}")
    return size


def folder_threshold(metadata: dict[str, Any]) -> float | None:
    """The confidence threshold that a student's folder was made for (its preset), None if it has none."""
    match preset := metadata.get("preset"):
        case None:
            return None
        case {"threshold": int() | float() as tau, **more} if not more and not isinstance(tau, bool) and 0 <= tau <= 1:
            return tau
    raise InputError(f'config.json: cdlm.preset must be {{"threshold": a number from 0 to 1}}, got {preset!r:.80}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to decode. None takes what the model folder says (`ModelFolder.metadata`), else the default in brackets.

    decoder: a name of DECODERS [by the folder's role; naive for a masked model, autoregressive for a causal one];
    gen_length [256]; block_size [32; stays None for a decoder without blocks]; threshold: confidence above which tokens
    are finalized together [cdlm: the folder's preset, else 0.9; others: one token per step]; the others as in the
    `Config` of the decoder that has them [dream: as many steps as tokens; dllm_cache: intervals 50 and 7, its authors'
    for LLaDA on GSM8K].
    """

    decoder: str | None = None
    gen_length: int | None = None
    block_size: int | None = None
    threshold: float | None = None
    factor: float | None = None
    steps: int | None = None
    cache: Literal["none", "prefix", "dual"] | None = None
    remasking: Literal["low_confidence", "random"] | None = None
    cfg_scale: float | None = None
    algorithm: dream.Algorithm | None = None
    alg_temp: float | None = None
    prompt_interval: int | None = None
    response_interval: int | None = None
    update_ratio: float | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0

    def resolve(self, metadata: dict[str, Any], *, causal: bool = False) -> "Options":
        """With the folder's own sizes, decoder and preset. causal: the model is autoregressive."""
        sizes = {name: folder_size(metadata, name) or default for name, default in DEFAULT_SIZES.items()}
        preset = folder_threshold(metadata)
        role = metadata.get("role", "autoregressive" if causal else "teacher")
        if role not in list(ROLES):
            raise InputError(f"config.json: cdlm.role must be one of {', '.join(ROLES)}, got {role!r}")
        resolved = dataclasses.replace(
            self, decoder=self.decoder or ROLES[role], gen_length=self.gen_length or sizes["gen_length"]
        )
        if resolved.block_size is None and "block_size" in resolved._known():
            resolved = dataclasses.replace(resolved, block_size=sizes["block_size"])
        if resolved.threshold is None and resolved.decoder == "cdlm":  # the decoder that the preset was chosen with
            resolved = dataclasses.replace(resolved, threshold=preset)
        resolved.bind()  # what the decoder refuses is refused now
        return resolved

    def given(self) -> dict[str, Any]:
        """Those that are not None."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def bind(self) -> Callable:
        """generate(model, prompts, prompt_lengths, key) -> DecodeResult, from resolved options."""
        known = self._known()
        module = self._module()
        given = {name: value for name, value in self.given().items() if name not in ("decoder", "seed")}
        if not self.temperature:  # greedy, as every decoder can
            del given["temperature"]
        allowed = sorted((known | ({"threshold"} if "unmask" in known else set())) & vars(self).keys())
        if foreign := sorted(given.keys() - set(allowed)):
            raise InputError(f"{foreign[0]} is no option of the {self.decoder} decoder, allowed: {', '.join(allowed)}")
        if "threshold" in given and "unmask" in known:
            given["unmask"] = Threshold(given.pop("threshold"))
        defaults: dict[str, dict[str, Any]] = {
            "dream": {"steps": self.gen_length},
            "dllm_cache": {"prompt_interval": 50, "response_interval": 7},
        }
        config = module.Config(**defaults.get(str(self.decoder), {}) | given)
        return lambda model, prompts, lengths, key: module.generate(model, prompts, lengths, config, key)

    def _known(self) -> set[str]:
        """The fields of the decoder's `Config`."""
        return {field.name for field in dataclasses.fields(self._module().Config)}

    def _module(self) -> ModuleType:
        """The decoder that has been resolved."""
        if self.decoder not in DECODERS:
            raise InputError(f"decoder must be one of {', '.join(DECODERS)}, got {self.decoder!r}")
        return DECODERS[self.decoder]
