"""Finds the fastest way to do every low-bit matmul of a model on this machine.

A call of the network is traced to see which matmuls it has. Every candidate of each
(`kernels.tuning.candidates`) runs alone, all in turn, and the fastest is kept, if it is clearly
faster than what the rules would have taken. `kernels.tuning.keep` writes them for programs that
are traced afterwards.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.typing import Array
from qjax.kernels import tuning
from qjax.kernels.packing import pack
from qjax.kernels.problem import Problem
from qjax.kernels.quant_matmul import choose, quant_matmul, weight_matmul
from qjax.kernels.tuning import Choice
from qjax.timing import interleaved

# A candidate must be faster than the rules' own by as much, twice: the fastest of many is
# partly the luckiest.
GAIN = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was found for a matmul.

    Attributes:
      problem: The matmul.
      choice: The fastest candidate, or the rule's own.
      seconds_rule: Of what the rules take.
      seconds: Of the choice.
      tried: Candidates that ran.
      failed: Candidates that did not, and why.
    """

    problem: Problem
    choice: Choice
    seconds_rule: float
    seconds: float
    tried: int
    failed: tuple[tuple[Choice, str], ...] = ()


def problems(function: Callable[..., Any], *args: Any) -> list[Problem]:
    """The different matmuls of a function, in the order in which it is traced.

    Args:
      function: Calls a quantized model.
      *args: What it is called with; shapes suffice.
    """
    with tuning.recording() as found:
        # A new function: what JAX has traced before would not be traced again.
        jax.eval_shape(lambda *given: function(*given), *args)
    return list(dict.fromkeys(found))


def tune(
    wanted: list[Problem],
    *,
    rounds: int = 7,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> list[Tuned]:
    """Measure all candidates of every problem on this machine.

    Args:
      wanted: The matmuls.
      rounds: Samples behind each median.
      on_progress: Called with work done, all work and what comes next.
    """
    found = []
    for i, problem in enumerate(wanted):
        if on_progress is not None:
            on_progress(i, len(wanted), problem.name())
        found.append(_tune(problem, rounds))
    return found


def _tune(problem: Problem, rounds: int) -> Tuned:
    operands = _operands(problem)
    by_rule = functools.partial(_program(problem, {}), *operands)
    wanted = np.asarray(by_rule(), np.float32)
    calls, failed = {}, []
    for choice in tuning.candidates(problem):
        call = functools.partial(_program(problem, {problem: choice}), *operands)
        try:
            result = np.asarray(call(), np.float32)
        except Exception as error:  # noqa: BLE001, blocks that a compiler refuses are no candidate
            failed.append((choice, (str(error) or type(error).__name__).splitlines()[0][:200]))
            continue
        if _same(result, wanted, problem):
            calls[choice] = call
        else:
            failed.append((choice, "its result is WRONG; please report it"))
    named = {str(choice): call for choice, call in calls.items()}
    times = interleaved({"rule": by_rule, **named}, rounds=rounds)
    of_rule, seconds = times["rule"], {choice: times[str(choice)] for choice in calls}
    with tuning.using({}):
        rule = choose("auto", problem)
    best = min(seconds, key=lambda choice: seconds[choice], default=rule)
    if seconds.get(best, of_rule) <= (1 - GAIN) * of_rule:
        again = interleaved({"rule": by_rule, "best": calls[best]}, rounds=2 * rounds, warm=True)
        of_rule, seconds[best] = again["rule"], again["best"]
    kept = seconds.get(best, of_rule) <= (1 - GAIN) * of_rule
    return Tuned(
        problem=problem,
        choice=best if kept else rule,
        seconds_rule=of_rule,
        seconds=seconds[best] if kept else of_rule,
        tried=len(seconds),
        failed=tuple(failed),
    )


def _same(result: np.ndarray, wanted: np.ndarray, problem: Problem) -> bool:
    """Whether a candidate computes what the rules do: integers exactly, floats but for order."""
    largest = 2 ** (6 + problem.fmt.bits + problem.x_zero + problem.w_zero)  # of a product
    exact = problem.codes and problem.size * largest < 2**24
    size = np.abs(wanted).max(initial=0.0)
    rounded = 1e-6 if problem.out == jnp.float32 else 2**-6
    return bool(np.abs(result - wanted).max(initial=0.0) <= (0.0 if exact else rounded * size))


def _program(problem: Problem, choices: dict[Problem, Choice]) -> Callable[..., Array]:
    def run(x: Array, x_scale: Array, x_zero: Array | None, *weight: Any) -> Array:
        with tuning.using(choices):
            if problem.codes:
                settings: dict[str, Any] = {"fmt": problem.fmt, "dtype": problem.out}
                return quant_matmul(x, x_scale, x_zero, *weight, **settings)
            return weight_matmul(x, *weight, fmt=problem.fmt)

    return jax.jit(run)


def _operands(problem: Problem) -> tuple[Array | None, ...]:
    """Random codes and zero points, and scales of 1: activations and weights as the matmuls' own."""
    rows, size, columns, groups, fmt, dtype, *_ = problem
    rng = np.random.default_rng(0)

    def codes(bits: int, *shape: int) -> Array:
        return jnp.asarray(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape), jnp.int8)

    if problem.codes:
        x = codes(8, rows, size)
    else:
        x = jnp.asarray(rng.standard_normal((rows, size), np.float32)).astype(dtype)
    q = codes(fmt.bits, size, columns)
    if fmt.packed:
        q = pack(q, bits=fmt.bits)
    elif fmt.bits <= 4:
        q = q.astype(jnp.int4)
    x_zero = codes(8, rows, 1).astype(jnp.int32) if problem.x_zero else None
    w_zero = codes(fmt.bits, groups, columns) if problem.w_zero else None
    return x, jnp.ones((rows, 1)), x_zero, q, jnp.ones((groups, columns)), w_zero
