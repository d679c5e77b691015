"""How the error of every sampler step fares while a network is fitted, iteration by iteration.

A fit that is given one step of the sampler after the other changes weights that all steps
share: what it gains for a step in its turn it loses while the others have theirs, and the error
of a step, drawn over the iterations, is a saw-tooth whose period is the number of steps. With
shuffled steps it is not. `rises` says how high the teeth are.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate import rounding
from qjax.calibrate.calibration import Calibration
from qjax.calibrate.collect import Pairs, collect_whole
from qjax.calibrate.optimize import go_on, groups_of, start_optimizer
from qjax.calibrate.reconstruction import (
    FitSettings,
    Fitted,
    Problem,
    Runner,
    nearest,
    output,
)
from qjax.calibrate.rollout import Buffer
from qjax.core.typing import Array, Float, PRNGKeyArray


@functools.partial(jax.jit, static_argnames=("runner", "groups", "batch"))
def errors_by_step(
    runner: Runner, problem: Problem, fitted: Fitted, *, groups: int, batch: int
) -> Float[Array, " s"]:
    """`E` (`reconstruction.py`) over the items of every group of steps; NaN where it has none.

    Args:
      runner: The block or the network.
      problem: Its arrays.
      fitted: What is fitted.
      groups: Groups of steps, s.
      batch: Items that run at once.
    """
    items = problem.group.shape[0]
    batch = min(batch, items)
    count = -(-items // batch)
    # The last batch is filled up with the last item, of which each counts once all the same.
    index = jnp.minimum(jnp.arange(count * batch), items - 1).reshape(count, batch)

    def one(index: Array) -> Array:
        found = output(runner, problem, fitted, index)
        return jax.vmap(rounding.block_loss)(found, problem.target[index])

    each = jax.lax.map(one, index).reshape(-1)[:items]
    total = jnp.zeros((groups,), each.dtype).at[problem.group].add(each)
    number = jnp.zeros((groups,), each.dtype).at[problem.group].add(jnp.ones_like(each))
    return total / number


def trace(
    runner: Runner,
    problem: Problem,
    begin: Fitted,
    settings: FitSettings,
    key: PRNGKeyArray,
    *,
    held_out: Problem,
) -> Float[np.ndarray, "n s"]:
    """Errors by step on items that are not fitted, before a fit and after each iteration.

    Args:
      runner: The block or the network.
      problem: What is fitted.
      begin: Where it begins.
      settings: How; `order` is what makes the difference.
      key: Of the fit.
      held_out: The same with other items; of some steps alone, if the others do not matter.

    Returns:
      For every iteration, the state before the first included, and every group of steps the
      error relative to that of rounding to nearest.
    """
    settings = dataclasses.replace(settings, chunk=1)
    groups = groups_of(problem, begin)
    errors = functools.partial(errors_by_step, groups=groups, batch=settings.batch)
    base = np.asarray(errors(runner, held_out, nearest(problem, begin)))
    found = [np.asarray(errors(runner, held_out, begin))]
    carry = start_optimizer(jax.tree.map(jnp.copy, begin), groups, settings, runner, problem)
    for done in range(settings.iterations):
        carry = go_on(runner, problem, carry, settings, key, (done, done + 1))
        found.append(np.asarray(errors(runner, held_out, carry.fitted)))
    return np.stack(found) / base


def rises(errors: Float[np.ndarray, " n"], *, steps: int, step: int = 0) -> Float[np.ndarray, " e"]:
    """By what share the error of a step grows from after its turn to before its next one.

    Args:
      errors: Of the step, before the first iteration and after each, as `trace` gives them.
      steps: Iterations from one turn to the next: an epoch.
      step: Whose turn is at iteration `step` of an epoch.

    Returns:
      One for every epoch; 0.1 for a tenth more. Without turns they are below 0 on average, as
      errors fall.

    Raises:
      ValueError: If no epoch is whole.
    """
    after, before = errors[step + 1 :: steps], errors[step + steps :: steps]
    if not len(before):
        raise ValueError(
            f"errors must be of an epoch of {steps} iterations at least; got {len(errors) - 1}."
        )
    return before / after[: len(before)] - 1


def network_problem(run: Calibration, buffer: Buffer, pairs: Pairs) -> Problem:
    """The whole network on samples of a roll-out, as a fit of the parallel phase has it.

    Args:
      run: Whose student it is; `settings.batch` divides the pairs.
      buffer: Its roll-out.
      pairs: Which samples, both halves of guidance each.
    """
    block = run.student.whole()
    fixed = run.student.fixed(block)
    teacher = (run.teacher.apply, run.teacher.params)
    data = collect_whole(teacher, run.samples(buffer, pairs))
    params = run.student.block_params(block, fixed)
    return Problem(params, fixed, data.inputs, data.target, data.group, jnp.float32(1))


def pairs_of(steps: Sequence[int], items: Sequence[int]) -> Pairs:
    """Every item at every one of the steps, items together."""
    grid = np.meshgrid(items, steps, indexing="ij")
    item, step = (axis.reshape(-1).astype(np.int32) for axis in grid)
    return Pairs(step, item)
