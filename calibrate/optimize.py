"""The optimisation of blocks: Adam over roundings, weights and ranges.

It runs in chunks, one program each: `lax.scan` over iterations, its state donated. Blocks of
equal structure run the same program: on accelerators all at once under `vmap`, on a CPU one
after the other (`benchmarks/reconstruction.py` measured both).

Weights take a common Adam; ranges one that counts the updates of every row by itself
(`adam_rows.py`). What is frozen gets no update: layers that the settings leave out, and with
`freeze` those whose codes have come to rest.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qjax.calibrate import adam_rows, rounding
from qjax.calibrate.fitted import hard_codes
from qjax.calibrate.reconstruction import (
    FitSettings,
    Fitted,
    Problem,
    Runner,
    block_error,
    distillation_error,
)
from qjax.core.typing import Array, Bool, Float, Int, PRNGKeyArray

FREEZE_EVERY = 100
"""Iterations between two looks at the codes."""


OnChunk = Callable[[int, np.ndarray], None]
"""Progress: iterations done, and the errors `E / E_0` of those since the call before."""


class Rest(NamedTuple):
    """What is known of the codes' coming to rest, by layer.

    Attributes:
      codes: At the last look.
      flips: Moving average of the share that changed between two looks.
      moving: Whether the layer is fitted still.
    """

    codes: dict[str, Int[Array, "..."]]
    flips: dict[str, Float[Array, ""]]
    moving: dict[str, Bool[Array, ""]]


class Carry(NamedTuple):
    """The state of an optimisation; `rest` is None without freezing."""

    fitted: Fitted
    weights_state: Any
    acts_state: adam_rows.RowState
    rest: Rest | None


def start_optimizer(
    fitted: Fitted, groups: int, settings: FitSettings, runner: Runner, problem: Problem
) -> Carry:
    """The state before the first iteration."""
    rest = None
    if settings.freeze > 0:
        codes = _codes(runner, problem, fitted)
        rest = Rest(
            codes,
            {path: jnp.float32(1) for path in codes},
            {path: jnp.bool_(True) for path in codes},
        )
    return Carry(
        fitted,
        _optimizer(settings).init(fitted.weights),
        adam_rows.init(fitted.acts, groups),
        rest,
    )


def _optimizer(settings: FitSettings) -> optax.GradientTransformation:
    adam = optax.scale_by_adam()
    if settings.clip is None:
        return adam
    return optax.chain(optax.clip_by_global_norm(settings.clip), adam)


def _codes(runner: Runner, problem: Problem, fitted: Fitted) -> dict[str, Array]:
    return {
        path: hard_codes(fmt, problem.fixed[path], fitted.weights[path])
        for path, fmt in runner.formats
    }


def _rates(
    runner: Runner, problem: Problem, settings: FitSettings, rest: Rest | None
) -> dict[str, Array]:
    """Every layer's learning rate: 0 for what is frozen, scaled with its grid if need be."""
    rates = {}
    for path, _ in runner.formats:
        chosen = not settings.only or re.search(settings.only, path) is not None
        rate = jnp.float32(settings.rate if chosen else 0.0)
        if settings.weights in ("latent", "lora"):
            rate = rate * jnp.mean(problem.fixed[path]["scale"])
        rates[path] = rate if rest is None else jnp.where(rest.moving[path], rate, 0.0)
    return rates


def _look(runner: Runner, problem: Problem, fitted: Fitted, rest: Rest, threshold: float) -> Rest:
    codes = _codes(runner, problem, fitted)
    changed = {
        path: jnp.mean((codes[path] != rest.codes[path]).astype(jnp.float32)) for path in codes
    }
    flips = {path: 0.5 * rest.flips[path] + 0.5 * changed[path] for path in codes}
    moving = {path: rest.moving[path] & (flips[path] >= threshold) for path in codes}
    return Rest(codes, flips, moving)


def pick(
    settings: FitSettings, group: Int[Array, " m"], groups: int, number: Array, key: PRNGKeyArray
) -> Int[Array, " b"]:
    """The items of iteration `number`: any, or of the step whose turn it is."""
    items = group.shape[0]
    size = min(settings.batch, items)
    if settings.order == "shuffled":
        return jax.random.randint(key, (size,), 0, items)
    allowed = jnp.where(group == number % groups, 0.0, -jnp.inf)
    return jax.random.categorical(key, allowed, shape=(size,))


def data_loss(
    runner: Runner,
    settings: FitSettings,
    problem: Problem,
    fitted: Fitted,
    index: Int[Array, " b"],
    key: PRNGKeyArray,
) -> tuple[Array, Array]:
    """What the items `index` say of the fit, and `E / E_0` of it."""
    extra = jnp.float32(0)
    if settings.distillation > 0 and runner.watched:
        error, extra = distillation_error(runner, problem, fitted, index, key, drop=settings.drop)
    else:
        error = block_error(runner, problem, fitted, index, key, drop=settings.drop)
    relative = error / problem.baseline
    total = relative if settings.scaling == "relative" else error
    return total + settings.distillation * extra, relative


def rounding_term(settings: FitSettings, fitted: Fitted, number: Array) -> Array | None:
    """What the roundings that are undecided cost; None where none are fitted."""
    sizes = [v["v"].size for v in fitted.weights.values() if "v" in v]
    if not sizes:
        return None
    beta, on = rounding.penalty_exponent(number, settings.iterations, warmup=settings.warmup)
    penalty = sum(
        rounding.rounding_penalty(leaf["v"], beta)
        for leaf in fitted.weights.values()
        if "v" in leaf
    )
    strength = settings.strength
    if settings.scaling == "relative":
        strength = strength / sum(sizes)
    return strength * jnp.where(on, penalty, 0.0)


def advance(
    runner: Runner,
    settings: FitSettings,
    problem: Problem,
    carry: Carry,
    gradient: Fitted,
    present: Bool[Array, " rows"],
    number: Array,
) -> Carry:
    """The state after the update of iteration `number`.

    Args:
      runner: The block.
      settings: How.
      problem: Its arrays; of the data nothing is read.
      carry: The state before.
      gradient: Of the whole loss.
      present: Rows of the ranges that the batch had.
      number: Of the iteration.
    """
    update, weights_state = _optimizer(settings).update(
        gradient.weights, carry.weights_state, carry.fitted.weights
    )
    # The cosine is of the number, not of Adam's count, which begins anew in every refresh.
    fraction = number.astype(jnp.float32) / settings.iterations
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * fraction))
    share = 0.1 + 0.9 * cosine
    weights = {
        path: jax.tree.map(
            lambda w, u, rate=rate: w - share * rate * u,
            carry.fitted.weights[path],
            update[path],
        )
        for path, rate in _rates(runner, problem, settings, carry.rest).items()
    }
    acts, acts_state = carry.fitted.acts, carry.acts_state
    if settings.act_rate > 0 and acts:
        change, acts_state = adam_rows.update(
            gradient.acts, acts_state, present, settings.act_rate * cosine
        )
        acts = adam_rows.apply(acts, change)
    fitted, rest = Fitted(weights, acts), carry.rest
    if rest is not None:
        rest = jax.lax.cond(
            number % FREEZE_EVERY == FREEZE_EVERY - 1,
            lambda rest: _look(runner, problem, fitted, rest, settings.freeze),
            lambda rest: rest,
            rest,
        )
    return Carry(fitted, weights_state, acts_state, rest)


def _chunk(
    runner: Runner,
    settings: FitSettings,
    length: int,
    carry: Carry,
    problem: Problem,
    first: Array,
    key: PRNGKeyArray,
) -> tuple[Carry, Array]:
    """`length` iterations from number `first`; the errors `E / E_0` come too."""
    rows = carry.acts_state.updates.shape[0]
    passed = runner.groups(problem.args, problem.group)

    def loss(fitted: Fitted, index: Array, key: PRNGKeyArray, number: Array):
        total, relative = data_loss(runner, settings, problem, fitted, index, key)
        penalty = rounding_term(settings, fitted, number)
        return total if penalty is None else total + penalty, relative

    def step(carry: Carry, number: Array):
        index_key, drop_key = jax.random.split(jax.random.fold_in(key, number))
        index = pick(settings, problem.group, rows, number, index_key)
        gradient, relative = jax.grad(loss, has_aux=True)(carry.fitted, index, drop_key, number)
        present = jnp.zeros((rows,), bool).at[passed[index]].set(True)
        return advance(runner, settings, problem, carry, gradient, present, number), relative

    return jax.lax.scan(step, carry, first + jnp.arange(length))


_STATIC = ("runner", "settings", "length")
_run_chunk = jax.jit(_chunk, static_argnames=_STATIC, donate_argnames="carry")


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="carry")
def _run_chunks(runner, settings, length, carry, problem, first, key):
    """As `_run_chunk` for a stack of alike blocks."""
    one = functools.partial(_chunk, runner, settings, length)
    return jax.vmap(one, in_axes=(0, 0, None, 0))(carry, problem, first, key)


def groups_of(problem: Problem, fitted: Fitted) -> int:
    """Groups of steps that a fit knows of: rows of its tables, or of its items at least."""
    rows = [table.shape[0] for table in jax.tree.leaves(fitted.acts)]
    return max(int(jnp.max(problem.group)) + 1, *rows, 1)


def go_on(
    runner: Runner,
    problem: Problem,
    carry: Carry,
    settings: FitSettings,
    key: PRNGKeyArray,
    span: tuple[int, int],
    on_chunk: OnChunk | None = None,
    *,
    run: Callable[..., tuple[Carry, Array]] | None = None,
) -> Carry:
    """The state after the iterations `span`; `carry` is used up.

    Args:
      runner: What makes the program.
      problem: The block, or a stack of them.
      carry: The state before.
      settings: How.
      key: Of the block; one for each of a stack.
      span: First iteration and the one after the last.
      on_chunk: As for `fit`.
      run: The program of a chunk; None for that of one block.
    """
    run = _run_chunk if run is None else run
    begin, end = span
    for done in range(begin, end, settings.chunk):
        length = min(settings.chunk, end - done)
        carry, errors = run(runner, settings, length, carry, problem, jnp.int32(done), key)
        if on_chunk is not None:
            on_chunk(done + length, np.asarray(errors))
    return carry


def fit(
    runner: Runner,
    problems: Sequence[Problem],
    fitted: Sequence[Fitted],
    settings: FitSettings,
    keys: Sequence[PRNGKeyArray],
    *,
    span: tuple[int, int] | None = None,
    together: bool | None = None,
    on_chunk: OnChunk | None = None,
) -> list[Fitted]:
    """Fit alike blocks.

    Args:
      runner: What they have in common.
      problems: One for each block.
      fitted: Where each begins.
      settings: How.
      keys: One for each block.
      span: First iteration and the one after the last, of `settings.iterations`; None for all.
      together: Whether all run at once under `vmap`; None: on accelerators.
      on_chunk: Called after every chunk of a block (or of all) with the iterations done and the
        errors `E / E_0` of the chunk's iterations.

    Returns:
      What was fitted, for each block.
    """
    if together is None:
        together = jax.default_backend() != "cpu"
    span = (0, settings.iterations) if span is None else span
    groups = max(map(groups_of, problems, fitted), default=1)
    # Donated below: what the caller holds must survive.
    begin = [
        start_optimizer(jax.tree.map(jnp.copy, one), groups, settings, runner, problem)
        for one, problem in zip(fitted, problems, strict=True)
    ]
    if together and len(problems) > 1:
        stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        carry, problem, key = stack(begin), stack(problems), jnp.stack(list(keys))
        found = go_on(runner, problem, carry, settings, key, span, on_chunk, run=_run_chunks)
        return [jax.tree.map(lambda a, i=i: a[i], found.fitted) for i in range(len(problems))]
    return [
        go_on(runner, problem, carry, settings, key, span, on_chunk).fitted
        for carry, problem, key in zip(begin, problems, keys, strict=True)
    ]
