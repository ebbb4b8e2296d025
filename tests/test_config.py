"""Configs built from mappings: what is taken over, and what is refused by its full name."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from tiny import TINY

from cdlm_jax.config import InputError, build
from cdlm_jax.recipes.recipe import Recipe
from cdlm_jax.training.losses import LossWeights
from cdlm_jax.training.optimizer import OptimizerConfig

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    width: int
    ratio: float = 0.5

    def __post_init__(self):
        if self.width < 1:
            raise InputError(f"width must be at least 1, got {self.width}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    name: str
    head: Head
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    sizes: tuple[int, ...] = (1, 2)


def values(**changes):
    return {"name": "a", "head": {"width": 3}} | changes


@pytest.mark.parametrize("mapping", [dict, ConfigDict])
def test_sections_become_dataclasses(mapping):
    section = mapping(values(weights={"sort": 2.0}, sizes=(4, 5), head={"width": 3, "ratio": 1.5}))
    built = build(Body, section, "run")
    assert built == Body(name="a", head=Head(width=3, ratio=1.5), weights={"sort": 2.0}, sizes=(4, 5))
    assert type(built.head) is Head and type(built.weights) is dict
    assert build(Body, mapping(values()), "run") == Body(name="a", head=Head(width=3))


def test_lists_become_tuples():
    assert build(Body, values(sizes=[4, 5]), "run").sizes == (4, 5)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (values(colour=1), "unknown config key run.colour; allowed: head, name, sizes, weights"),
        (values(head={"width": 1, "widht": 2}), "unknown config key run.head.widht; allowed: ratio, width"),
        ({"head": {"width": 1}}, "missing config key run.name"),
        (values(head={}), "missing config key run.head.width"),
        (values(head={"width": 0}), "width must be at least 1, got 0"),
    ],
)
def test_refusals_name_the_key(section, message):
    for mapping in (dict, ConfigDict):
        with pytest.raises(InputError) as error:
            build(Body, mapping(section), "run")
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"head": {"width": "wide"}}, "run.head.width"),
        ({"head": 3}, "run.head"),
        ({"name": 7}, "run.name"),
        ({"weights": "sort"}, "run.weights"),
        ({"sizes": 4}, "run.sizes"),
    ],
)
def test_values_of_the_wrong_type_are_refused(changes, key):
    with pytest.raises(InputError, match=key):
        build(Body, values(**changes), "run")


# ---- the configs that are shipped ----------------------------------------------------------------------------------


def load(path, *variant):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*variant)


@pytest.mark.parametrize("variant", ["full", "finish", "uniform", "arithmetic", "autoregressive", "quick"])
def test_the_tiny_config_is_a_recipe(variant):
    recipe = build(Recipe, load(CONFIGS / "tiny.py", variant), "config")
    assert recipe.gen_length % recipe.block_size == 0
    assert isinstance(recipe.distill.weights, LossWeights) and isinstance(recipe.pretrain.optimizer, OptimizerConfig)
    assert isinstance(recipe.collect.temperatures, tuple)
    settings = recipe.settings("distill")
    assert settings["distill"]["optimizer"]["learning_rate"] == recipe.distill.optimizer.learning_rate
    assert json.loads(json.dumps(settings)).keys() == settings.keys()  # a checkpoint keeps them as JSON


@pytest.mark.parametrize("place", ["", "model", "pretrain", "pretrain.optimizer", "pretrain.noise", "distill.weights"])
def test_a_misspelled_key_of_a_recipe_is_named(place):
    config = load(CONFIGS / "tiny.py")
    section = config
    for name in filter(None, place.split(".")):
        section = section[name]
    section["sped"] = 1
    full = ".".join(filter(None, ["config", place, "sped"]))
    with pytest.raises(InputError, match=f"unknown config key {full}; allowed: "):
        build(Recipe, config, "config")


# ---- the model's ---------------------------------------------------------------------------------------------------

MODEL = TINY


def test_head_dim():
    assert MODEL.head_dim == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"max_length": -1}, "max_length must be at least 1, got -1"),
        ({"hidden_size": 12}, r"hidden_size 12 must be a multiple of 2 \* num_heads 4"),
        ({"num_kv_heads": 3}, "num_heads 4 must be a multiple of num_kv_heads 3"),
        ({"mask_token_id": 40}, r"mask_token_id 40 is outside the vocabulary 0\.\.39"),
        ({"eos_token_id": -1}, r"eos_token_id -1 is outside the vocabulary 0\.\.39"),
        ({"mask_token_id": 2}, "mask_token_id and eos_token_id are both 2"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(MODEL, **changes)
