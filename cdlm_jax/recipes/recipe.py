"""The recipe's stages on one set of settings: pretrain a teacher, collect its trajectories, distill a student."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import optax
from flax import nnx

from cdlm_jax import tasks
from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.decoding.common import check_blocks
from cdlm_jax.decoding.options import Options
from cdlm_jax.evaluation import operating_point
from cdlm_jax.evaluation.harness import Score, answers, by_group, heldout_problems, problem_cases
from cdlm_jax.mesh.progress import progress
from cdlm_jax.mesh.sharding import MeshConfig, check_rows, shard
from cdlm_jax.models.hf import fingerprint
from cdlm_jax.models.lora import merge
from cdlm_jax.models.model_folder import ModelFolder
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.tasks.mixture import ProblemMixture, Problems, PromptFile
from cdlm_jax.text.encoder import Encoder
from cdlm_jax.text.tokenizers import Tokenizer
from cdlm_jax.training import causal, denoising
from cdlm_jax.training import distill as distillation
from cdlm_jax.training.batches import problem_batches, trajectory_batches
from cdlm_jax.training.flops import RowShape, distill_flops, pretrain_flops
from cdlm_jax.training.loop import train
from cdlm_jax.training.optimizer import make_optimizer
from cdlm_jax.training.pretrain import PretrainConfig
from cdlm_jax.training.step import TrainState, make_train_step
from cdlm_jax.trajectories.collect import CollectConfig
from cdlm_jax.trajectories.collect import collect as collect_trajectories
from cdlm_jax.trajectories.store import read

# What may change under way: when a run reports and saves, how a batch is worked through, and what follows training.
FREE = {
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "evaluate_every",
    "log_every",
    "accumulate",
    "remat",
    "preset_problems",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model trained from scratch; the rest of its ModelConfig follows from the recipe."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_size: int
    rope_theta: float
    norm_eps: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run depends on, read from a config file (`configs/`). Stages write under the folder `work`.

    tasks: weights of the problem mixture, or prompts: a JSON-lines file (`tasks.mixture.PromptFile`).
    teacher: a model folder, or `shipped`; dtype: what it is cast to, empty as stored; architecture: what it must be.
    init: the model folder that pre-training starts from, empty for random weights.
    stores: trajectories to distill from, mixed by store_weights (equal ones if empty); empty for `work/trajectories`.
    heldout_per_task: problems of each evaluation.
    mesh: of the devices; model, pretrain: for `pretrain` only.
    """

    work: str
    seed: int = 0
    tasks: dict[str, float] = dataclasses.field(default_factory=dict)
    prompts: str = ""
    prompt_length: int
    gen_length: int
    block_size: int
    teacher: str = "shipped"
    dtype: Literal["", "float32", "bfloat16"] = ""
    architecture: ModelConfig | None = None
    init: str = ""
    stores: tuple[str, ...] = ()
    store_weights: tuple[float, ...] = ()
    heldout_per_task: int = 128
    mesh: MeshConfig = MeshConfig()
    model: ModelShape | None = None
    pretrain: PretrainConfig | None = None
    collect: CollectConfig
    distill: distillation.DistillConfig

    def __post_init__(self):
        check_blocks(self.gen_length, self.block_size)
        if bool(self.tasks) == bool(self.prompts):
            raise InputError("give either config.tasks or config.prompts, a JSON-lines file")
        if self.store_weights and len(self.store_weights) != len(self.stores):
            raise InputError(f"{len(self.stores)} stores cannot have {len(self.store_weights)} store_weights")
        for name, least in (("seed", 0), ("prompt_length", 1), ("heldout_per_task", 0)):
            if getattr(self, name) < least:
                raise InputError(f"config.{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def folder(self) -> Path:
        return Path(self.work)

    def settings(self, *sections: str) -> dict:
        """What a checkpoint of a stage must agree on to be continued: the shared fields and the named sections.

        The mesh may change under way, and what is in FREE.
        """
        names = ("seed", "tasks", "prompt_length", "gen_length", "block_size", *sections)
        values = dataclasses.asdict(self)
        for section in sections:
            for name in FREE & values[section].keys():
                del values[section][name]
        return {name: values[name] for name in names}

    def mixture(self, split: str, length: int, *, stream: int) -> ProblemMixture:
        """Problems of the recipe's tasks; different streams of one recipe draw different problems."""
        return ProblemMixture(self.tasks, split, length, self.seed + stream)

    @property
    def row(self) -> RowShape:
        return RowShape(prompt_length=self.prompt_length, gen_length=self.gen_length, block_size=self.block_size)

    def load_teacher(self) -> ModelFolder:
        """The teacher on the current mesh. InputError if it is not of the recipe's architecture."""
        teacher = ModelFolder.load(self.teacher, dtype=self.dtype or None)
        if self.architecture is not None:
            ours, theirs = (dataclasses.asdict(each) for each in (self.architecture, teacher.model.config))
            for name in sorted(ours.keys() - {"source"}):
                if ours[name] != theirs[name]:
                    raise InputError(
                        f"config.architecture.{name} is {ours[name]!r}, but {self.teacher} has {theirs[name]!r}"
                    )
        return teacher

    def metadata(self, role: str) -> dict:
        names = ("prompt_length", "gen_length", "block_size")
        return {"role": role, "tasks": list(self.tasks)} | {name: getattr(self, name) for name in names}


def pretrain(recipe: Recipe, *, profile: bool = False) -> ModelFolder:
    """Train a bidirectional teacher on the mixture, or a causal model: writes `work/teacher`, `work/autoregressive`."""
    config = recipe.pretrain
    if config is None or recipe.model is None or not recipe.tasks:
        raise InputError("pre-training needs config.tasks, config.model and config.pretrain")
    start = ModelFolder.load(recipe.init) if recipe.init else untrained(recipe)
    if start.model.config.causal != (config.role == "autoregressive"):
        kind = "causal" if start.model.config.causal else "bidirectional"
        raise InputError(
            f"config.init {recipe.init} is a {kind} model, which objective {config.objective} cannot train"
        )
    encoder = start.encoder(recipe.prompt_length, recipe.gen_length)
    settings = recipe.settings("model", "pretrain") | {"init": fingerprint(start.model) if recipe.init else ""}
    graphdef, trainable, rest = nnx.split(start.model, nnx.Param, ...)  # type: ignore[misc]  # its stubs know no `...`
    optimizer = make_optimizer(config.optimizer, config.steps)
    loss_fn = denoising.make_loss(graphdef, config) if config.role == "teacher" else causal.make_loss(graphdef)
    mixture = recipe.mixture("train", config.steps * config.batch_size, stream=0)
    state = train(
        make_train_step(loss_fn, optimizer, seed=recipe.seed, ema_decay=config.ema_decay),
        TrainState.create(trainable, optimizer, ema=config.ema_decay > 0),
        rest,
        problem_batches(mixture, encoder, config.batch_size),
        config,
        folder=recipe.folder / "pretrain",
        settings=settings,
        label=config.role,
        evaluate=_heldout(recipe, encoder, partial(_merged, graphdef, rest), config.role),
        flops_per_step=pretrain_flops(start.model.config, config, recipe.row),
        profile=profile,
    )
    trained = ModelFolder(_merged(graphdef, rest, state), start.tokenizer, recipe.metadata(config.role))
    trained.save(recipe.folder / config.role, replace=True)
    return trained


def untrained(recipe: Recipe) -> ModelFolder:
    """A character model of the recipe's shape with random weights, on the current mesh."""
    assert recipe.pretrain is not None and recipe.model is not None, "`pretrain` refuses a recipe without them"
    tokenizer = Tokenizer.characters(tasks.CHARACTERS)
    eos = tokenizer.token_to_id("<eos>")
    kind: dict[str, Any]
    if recipe.pretrain.role == "autoregressive":
        kind = {"family": "llama", "logit_alignment": "shifted", "mask_token_id": None}
    else:
        kind = {"mask_token_id": tokenizer.token_to_id("<mask>")}
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        eos_token_id=eos,
        pad_token_id=eos,
        max_length=recipe.prompt_length + recipe.gen_length,
        **kind,
        **dataclasses.asdict(recipe.model),
    )
    model = shard(Transformer(config, rngs=nnx.Rngs(recipe.seed)))
    return ModelFolder(model, tokenizer, recipe.metadata(recipe.pretrain.role))


def collect(recipe: Recipe) -> None:
    """Decode the mixture with the teacher; fills the store `work/trajectories`, continuing an interrupted one."""
    teacher = recipe.load_teacher()
    encoder = teacher.encoder(recipe.prompt_length, recipe.gen_length)
    count = recipe.collect.num_prompts
    problems: Problems
    if recipe.prompts:
        file = PromptFile(recipe.prompts, encoder.tokenizer, recipe.prompt_length, recipe.seed + 1)
        problems = file
        if len(file) < count:
            within = f"{len(file)} of its {file.total} prompts have at most {recipe.prompt_length} tokens"
            raise InputError(f"config.collect.num_prompts is {count}, but {recipe.prompts} has fewer: {within}")
    else:
        problems = recipe.mixture("train", count, stream=1)
    collect_trajectories(
        teacher.model,
        encoder,
        problems,
        recipe.collect,
        block_size=recipe.block_size,
        model_fingerprint=fingerprint(teacher.model),
        folder=recipe.folder / "trajectories",
    )


def distill(recipe: Recipe, *, profile: bool = False) -> ModelFolder:
    """Train the block-causal student on the stores of trajectories; writes `work/student`, adapters merged."""
    config = recipe.distill
    check_rows(config.batch_size // config.accumulate)
    teacher = recipe.load_teacher()
    encoder = teacher.encoder(recipe.prompt_length, recipe.gen_length)
    expected = {
        "model_fingerprint": fingerprint(teacher.model),
        "tokenizer_fingerprint": encoder.tokenizer.fingerprint(),
        "prompt_length": recipe.prompt_length,
        "gen_length": recipe.gen_length,
        "block_size": recipe.block_size,
        "logit_alignment": teacher.model.config.logit_alignment,
    }
    stores = [read(folder, **expected) for folder in recipe.stores or (recipe.folder / "trajectories",)]
    made_from = [dataclasses.asdict(store.metadata) for store in stores]
    key = jax.random.fold_in(jax.random.key(recipe.seed), 1)
    graphdef, trainable, frozen = distillation.make_student(teacher.model, config, key)
    dtypes = jax.tree.map(lambda x: x.dtype, teacher.model)
    del teacher  # of its memory, only what `frozen` shares is needed
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = train(
        distill_step(recipe, graphdef, optimizer),
        TrainState.create(trainable, optimizer, ema=config.ema_decay > 0),
        frozen,
        trajectory_batches(stores, config.batch_size, recipe.seed, weights=recipe.store_weights),
        config,
        folder=recipe.folder / "distill",
        settings=recipe.settings("distill") | {"trajectories": made_from, "store_weights": list(recipe.store_weights)},
        label="student",
        evaluate=_heldout(recipe, encoder, partial(_merged, graphdef, frozen.student), "student"),
        flops_per_step=distill_flops(encoder.model, config, recipe.row),
        profile=profile,
    )
    student = merge(_merged(graphdef, frozen.student, state))
    student = jax.tree.map(lambda x, dtype: x.astype(dtype), student, dtypes)
    folder = with_preset(recipe, ModelFolder(student, encoder.tokenizer, recipe.metadata("student")))
    folder.save(recipe.folder / "student", replace=True)
    return folder


def with_preset(recipe: Recipe, student: ModelFolder) -> ModelFolder:
    """The student with the threshold to use it at, chosen by `evaluation.operating_point`.

    It is chosen on problems of the train split, as many of each task, in a stream that no stage trains on. A prompt
    file has no verifiers, so such a student gets none.
    """
    count, points = recipe.distill.preset_problems, {}
    if not (count and recipe.tasks):
        return student
    mixtures = [ProblemMixture({name: 1.0}, "train", count, recipe.seed + 2) for name in recipe.tasks]
    problems = [mixture[index] for mixture in mixtures for index in range(count)]
    with progress("preset", len(operating_point.THRESHOLDS)) as bar:
        for tau, score in operating_point.sweep(student, problems):
            points[tau] = score
            bar.advance()
        chosen = operating_point.headline(points)
        bar.advance(0, f"threshold {chosen:g}")
    return dataclasses.replace(student, metadata=student.metadata | {"preset": {"threshold": chosen}})


def distill_step(recipe: Recipe, graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation) -> jax.stages.Wrapped:
    """The train step of `distill`, jitted."""
    config = recipe.distill
    return make_train_step(
        distillation.make_loss(graphdef, config, recipe.block_size),
        optimizer,
        seed=recipe.seed + 2,
        accumulate=config.accumulate,
        ema_decay=config.ema_decay,
    )


def _merged(graphdef: nnx.GraphDef, rest: nnx.State, state: TrainState) -> Transformer:
    return nnx.merge(graphdef, state.evaluated, rest)


def _heldout(recipe: Recipe, encoder: Encoder, model_of: Callable, role: str) -> Callable | None:
    """The periodic evaluation of a training loop: accuracy per task and mean forwards on held-out problems."""
    if recipe.heldout_per_task == 0 or not recipe.tasks:
        return None
    cases = problem_cases(encoder.tokenizer, heldout_problems(list(recipe.tasks), recipe.heldout_per_task))
    decode = Options().resolve(recipe.metadata(role)).bind()

    def evaluate_state(state: TrainState) -> dict[str, float]:
        model, width = model_of(state), recipe.prompt_length
        decoder = partial(decode, model)
        found = list(answers(decoder, model.config, encoder.tokenizer, cases, batch_size=64, width=width))
        whole, groups = Score.of(found), {name: score.accuracy for name, score in by_group(found).items()}
        return {**groups, "accuracy": whole.accuracy, "forwards": whole.forwards}

    return evaluate_state
