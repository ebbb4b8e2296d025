"""The train step: one donated jit, (state, frozen, batch) -> (state, metrics)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from cdlm_jax.mesh.sharding import by_rows, check_rows

# loss_fn(trainable, frozen, batch, keys [rows], step) -> (loss, metrics): means over the batch's rows.
LossFn = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. `trainable` and `ema` are `nnx.State`s; `ema` is None when it is off.

    The randomness of step n is a function of (seed, n) only, so a resumed run repeats it.
    """

    step: jax.Array
    trainable: jax.Array
    opt_state: jax.Array
    ema: jax.Array | None

    @classmethod
    def create(cls, trainable, optimizer: optax.GradientTransformation, *, ema: bool) -> "TrainState":
        # float32 whatever the parameters are: bfloat16 would round small steps of a slow average away.
        average = jax.tree.map(lambda x: jnp.array(x, jnp.float32), trainable) if ema else None
        return cls(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), average)

    @property
    def evaluated(self):
        """The parameters to evaluate and export: the EMA where there is one, in their own dtypes."""
        if self.ema is None:
            return self.trainable
        return jax.tree.map(lambda average, x: average.astype(x.dtype), self.ema, self.trainable)


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, seed: int, accumulate: int = 1, ema_decay: float = 0.0
) -> jax.stages.Wrapped:
    """The jitted step. The batch's rows are split into `accumulate` equal parts, one backward pass each.

    Every loss is a mean over rows and every row has its own random key, so the result does not depend on `accumulate`.
    metrics: the loss function's, plus `loss` and `grad_norm`, float32 scalars on device.
    """

    def gradients(state, frozen, batch, keys):
        backward = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), grads = backward(state.trainable, frozen, batch, keys, state.step)
        return grads, {"loss": loss, **metrics}

    def accumulated(state, frozen, batch, keys):
        # Part i takes every accumulate-th row from the i-th on, so that each device goes through rows of its own.
        parts = by_rows(jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]), (batch, keys)))
        parts = jax.tree.map(lambda x: x.swapaxes(0, 1), parts)
        shapes = jax.eval_shape(gradients, state, frozen, *jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(jnp.zeros_like, shapes)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradients(state, frozen, *part)), None

        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / accumulate, total)

    def train_step(state: TrainState, frozen, batch):
        rows = jax.tree.leaves(batch)[0].shape[0]
        check_rows(rows // accumulate)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), rows)
        batch, keys = by_rows((batch, keys))
        grads, metrics = (gradients if accumulate == 1 else accumulated)(state, frozen, batch, keys)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        ema = state.ema
        if ema is not None:
            # A short memory at first, so that the random initialization is soon forgotten.
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, trainable)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, trainable, opt_state, ema), metrics

    return jax.jit(train_step, donate_argnums=0)
