"""What a benchmark of a kernel consists of, and how its values and its times are found."""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CALLS = 50  # in a timed program
TIMES = 5  # of which the shortest counts


class Compared(NamedTuple):
    """Another way to the same result: call(*prepare(*arguments)), where only the call is timed."""

    call: Callable
    prepare: Callable = lambda *arguments: arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """A search of tiles: candidates (dataclasses), the call with some of them, and the place of the best in a file.
    fields: those that are written; all if empty."""

    candidates: Callable[[], Sequence[Any]]
    call: Callable[[Any], Callable]
    file: Path
    shape: str
    fields: tuple[str, ...] = ()

    def write(self, device_kind: str, best: Any) -> None:
        """Adds the entry device kind -> shape -> fields to the file."""
        tuned = json.loads(self.file.read_text())
        found = {name: size for name, size in vars(best).items() if name in (self.fields or vars(best))}
        tuned.setdefault(device_kind, {})[self.shape] = found
        self.file.write_text(json.dumps(tuned, indent=2, sort_keys=True) + "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel at one size, and what it is compared with.

    make: the arguments of a call; also traced, for their shapes. call: the public function, by the kernel.
    expected: the right values, in plain JAX; tolerance: of the largest difference, against the largest value.
    least: bytes that have to be moved.
    """

    name: str
    make: Callable[[], tuple]
    call: Callable
    expected: Callable
    others: Mapping[str, Compared]
    tolerance: float = 0.02
    least: int
    tuning: Tuning | None = None


def error(found, expected) -> float:
    """The largest difference of any array of floating-point numbers, against the largest value that is expected."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    worst = [_difference(a, b) for a, b in pairs if jnp.issubdtype(b.dtype, jnp.floating)]
    return max([0.0, *map(float, worst)])


@jax.jit  # so that no wider copy of a large array is made
def _difference(a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    difference = jnp.abs(a - b)
    difference = jnp.where(jnp.isnan(difference), jnp.inf, difference)  # a maximum on CPU leaves out nan
    return difference.max() / jnp.maximum(jnp.abs(b).max(), 1e-30)


def check(case: Case, arguments: tuple) -> None:
    """Compares the kernel and all others with the right values. SystemExit where one is wrong."""
    expected = jax.jit(case.expected)(*arguments)
    for name, (call, prepare) in {"kernel": Compared(case.call), **case.others}.items():
        worst = error(jax.jit(call)(*prepare(*arguments)), expected)
        if not worst <= case.tolerance:
            raise SystemExit(f"wrong values: {case.name}, {name}, is off by {worst:.3g} (at most {case.tolerance})")


def seconds(call: Callable, arguments: tuple) -> float:
    """One call's time on the device: many in one program, each waiting for the one before, less the time of the same
    loop without them."""

    @functools.partial(jax.jit, static_argnames="step")
    def chain(first, rest, step):
        def body(_, carry):
            # An element of every result goes into the next call's first argument, so that none is left out.
            results = jax.lax.optimization_barrier(step(carry, *rest))
            return carry + sum(0 * x.ravel()[0] for x in jax.tree.leaves(results)).astype(carry.dtype)

        return jax.lax.fori_loop(0, CALLS, body, first)

    def best(step) -> float:
        chain(arguments[0], arguments[1:], step).block_until_ready()
        times = []
        for _ in range(TIMES):
            start = time.perf_counter()
            chain(arguments[0], arguments[1:], step).block_until_ready()
            times.append(time.perf_counter() - start)
        return min(times) / CALLS

    return best(call) - best(lambda first, *_: first)


def search(tuning: Tuning, arguments: tuple) -> tuple[Any, dict[Any, float]]:
    """(the fastest candidate, the time of each); one that the device's compiler refuses takes forever."""
    times = {}
    for each in tuning.candidates():
        try:
            times[each] = seconds(tuning.call(each), arguments)
        except (jax.errors.JaxRuntimeError, ValueError) as refused:  # most likely more memory on the chip than there is
            print(f"  {each}: {str(refused).splitlines()[0][:80]}")
            times[each] = math.inf
    return min(times, key=times.__getitem__), times


def tune(case: Case, arguments: tuple, device_kind: str) -> Callable:
    """The call with the fastest tiles, which it writes; as it was, and nothing written, if none of them run.

    SystemExit, and nothing written, where their values are wrong.
    """
    tuning = case.tuning
    assert tuning is not None, f"{case.name} has nothing to tune"
    best, times = search(tuning, arguments)
    for tiles, taken in sorted(times.items(), key=lambda item: item[1]):
        print(f"  {1e6 * taken:9.1f}  {tiles}")
    if not math.isfinite(times[best]):
        print(f"  {case.name}: none of these tiles can run, nothing is written")
        return case.call
    call = tuning.call(best)
    check(dataclasses.replace(case, name=f"{case.name}, {best}", call=call, others={}), arguments)
    tuning.write(device_kind, best)
    return call
