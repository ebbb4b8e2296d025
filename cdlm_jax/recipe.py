"""The recipe's stages on one set of settings: pretrain a teacher, collect its trajectories, distill a student."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
from flax import nnx

from cdlm_jax import tasks
from cdlm_jax.config import InputError, ModelConfig
from cdlm_jax.data import Encoder, ProblemMixture, problem_batches
from cdlm_jax.decoding.common import check_blocks
from cdlm_jax.decoding.options import Options
from cdlm_jax.evaluation.harness import Score, answers, by_group, heldout_problems, problem_cases
from cdlm_jax.model_folder import ModelFolder
from cdlm_jax.models.hf import fingerprint
from cdlm_jax.models.lora import merge
from cdlm_jax.models.transformer import Transformer
from cdlm_jax.sharding import MeshConfig
from cdlm_jax.tokenizers import Tokenizer
from cdlm_jax.training import causal, denoising
from cdlm_jax.training import distill as distillation
from cdlm_jax.training.loop import train
from cdlm_jax.training.optimizer import make_optimizer
from cdlm_jax.training.pretrain import PretrainConfig
from cdlm_jax.training.step import TrainState, make_train_step
from cdlm_jax.trajectories.collect import CollectConfig
from cdlm_jax.trajectories.collect import collect as collect_trajectories
from cdlm_jax.trajectories.store import read


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

    tasks: weights of the problem mixture; teacher: a model folder, or `shipped`; init: the model folder that
    pre-training starts from, empty for random weights; heldout_per_task: problems of each evaluation.
    architecture: the teacher's, so that a run can be planned without its weights; dtype: what its weights are cast to.
    """

    work: str
    seed: int = 0
    tasks: dict[str, float]
    prompt_length: int
    gen_length: int
    block_size: int
    teacher: str = "shipped"
    architecture: ModelConfig | None = None
    dtype: str = ""
    mesh: MeshConfig = MeshConfig()
    prompts: str = ""
    init: str = ""
    heldout_per_task: int = 128
    model: ModelShape | None = None
    pretrain: PretrainConfig | None = None
    collect: CollectConfig
    distill: distillation.DistillConfig

    def __post_init__(self):
        check_blocks(self.gen_length, self.block_size)
        for name, least in (("seed", 0), ("prompt_length", 1), ("heldout_per_task", 0)):
            if getattr(self, name) < least:
                raise InputError(f"config.{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def folder(self) -> Path:
        return Path(self.work)

    def settings(self, *sections: str) -> dict:
        """What a checkpoint of a stage must agree on to be continued: the shared fields and the named sections.

        How often a run reports or saves may change under way.
        """
        names = ("seed", "tasks", "prompt_length", "gen_length", "block_size", *sections)
        values = dataclasses.asdict(self)
        for section in ("pretrain", "distill"):
            for name in ("checkpoint_every", "evaluate_every", "log_every"):
                del values[section][name]
        return {name: values[name] for name in names}

    def problems(self, split: str, length: int, *, stream: int) -> ProblemMixture:
        """Problems of the recipe's mixture; different streams of one recipe draw different problems."""
        return ProblemMixture(self.tasks, split, length, self.seed + stream)

    def metadata(self, role: str) -> dict:
        names = ("prompt_length", "gen_length", "block_size")
        return {"role": role, "tasks": list(self.tasks)} | {name: getattr(self, name) for name in names}


def pretrain(recipe: Recipe) -> ModelFolder:
    """Train a bidirectional teacher on the mixture, or a causal model: writes `work/teacher`, `work/autoregressive`."""
    config = recipe.pretrain
    start = ModelFolder.load(recipe.init) if recipe.init else untrained(recipe)
    if start.model.config.causal != (config.role == "autoregressive"):
        kind = "causal" if start.model.config.causal else "bidirectional"
        raise InputError(
            f"config.init {recipe.init} is a {kind} model, which objective {config.objective} cannot train"
        )
    encoder = start.encoder(recipe.prompt_length, recipe.gen_length)
    settings = recipe.settings("model", "pretrain") | {"init": fingerprint(start.model) if recipe.init else ""}
    graphdef, trainable, rest = nnx.split(start.model, nnx.Param, ...)
    optimizer = make_optimizer(config.optimizer, config.steps)
    loss_fn = denoising.make_loss(graphdef, config) if config.role == "teacher" else causal.make_loss(graphdef)
    mixture = recipe.problems("train", config.steps * config.batch_size, stream=0)
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
    )
    trained = ModelFolder(_merged(graphdef, rest, state), start.tokenizer, recipe.metadata(config.role))
    trained.save(recipe.folder / config.role, replace=True)
    return trained


def untrained(recipe: Recipe) -> ModelFolder:
    """A character model of the recipe's shape with random weights."""
    tokenizer = Tokenizer.characters(tasks.CHARACTERS)
    eos = tokenizer.token_to_id("<eos>")
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
    return ModelFolder(
        Transformer(config, rngs=nnx.Rngs(recipe.seed)), tokenizer, recipe.metadata(recipe.pretrain.role)
    )


def collect(recipe: Recipe) -> None:
    """Decode the mixture with the teacher; fills the store `work/trajectories`, continuing an interrupted one."""
    teacher = ModelFolder.load(recipe.teacher)
    collect_trajectories(
        teacher.model,
        teacher.encoder(recipe.prompt_length, recipe.gen_length),
        recipe.problems("train", recipe.collect.num_prompts, stream=1),
        recipe.collect,
        block_size=recipe.block_size,
        model_fingerprint=fingerprint(teacher.model),
        folder=recipe.folder / "trajectories",
    )


def distill(recipe: Recipe) -> ModelFolder:
    """Train the block-causal student on `work/trajectories`; writes `work/student`, adapters merged."""
    config = recipe.distill
    teacher = ModelFolder.load(recipe.teacher)
    encoder = teacher.encoder(recipe.prompt_length, recipe.gen_length)
    trajectories = read(
        recipe.folder / "trajectories",
        model_fingerprint=fingerprint(teacher.model),
        tokenizer_fingerprint=encoder.tokenizer.fingerprint(),
        prompt_length=recipe.prompt_length,
        gen_length=recipe.gen_length,
        block_size=recipe.block_size,
        logit_alignment=teacher.model.config.logit_alignment,
    )
    key = jax.random.fold_in(jax.random.key(recipe.seed), 1)
    graphdef, trainable, frozen = distillation.make_student(teacher.model, config, key)
    optimizer = make_optimizer(config.optimizer, config.steps)
    loss_fn = distillation.make_loss(graphdef, config, recipe.block_size)
    step = make_train_step(
        loss_fn, optimizer, seed=recipe.seed + 2, accumulate=config.accumulate, ema_decay=config.ema_decay
    )
    state = train(
        step,
        TrainState.create(trainable, optimizer, ema=config.ema_decay > 0),
        frozen,
        distillation.trajectory_batches(trajectories, config.batch_size, recipe.seed),
        config,
        folder=recipe.folder / "distill",
        settings=recipe.settings("distill") | {"trajectories": dataclasses.asdict(trajectories.metadata)},
        label="student",
        evaluate=_heldout(recipe, encoder, partial(_merged, graphdef, frozen.student), "student"),
    )
    student = merge(_merged(graphdef, frozen.student, state))
    student = jax.tree.map(lambda x, like: x.astype(like.dtype), student, teacher.model)
    folder = ModelFolder(student, teacher.tokenizer, recipe.metadata("student"))
    folder.save(recipe.folder / "student", replace=True)
    return folder


def _merged(graphdef: nnx.GraphDef, rest: nnx.State, state: TrainState) -> Transformer:
    return nnx.merge(graphdef, state.evaluated, rest)


def _heldout(recipe: Recipe, encoder: Encoder, model_of: Callable, role: str) -> Callable | None:
    """The periodic evaluation of a training loop: accuracy per task and mean forwards on held-out problems."""
    if recipe.heldout_per_task == 0:
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
