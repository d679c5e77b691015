"""The optimisation of alike blocks on a pod: one program for all its devices.

A device fits the blocks of its place along the axis `block`, one after the other, on the items of
its place along `data`. The items are in logical shards, as many on any number of devices: an
iteration draws a part of its batch from every shard, the gradients of the shards are computed
by programs of equal shapes, and their mean is taken in the order of the shards. So what is
fitted has the same bits whatever the mesh; it differs from a fit without shards, which draws its
batch from all items at once.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from qjax.calibrate import optimize
from qjax.calibrate.optimize import Carry
from qjax.calibrate.pod import BLOCK, DATA, Pod, each, mean_over_shards
from qjax.calibrate.reconstruction import FitSettings, Fitted, Problem, Runner, block_error
from qjax.core.typing import Array

Reduction = str
"""`"ordered"` or `"fast"`: how gradients of shards are added up."""


def stack(trees: Sequence[Any]) -> Any:
    """Trees of equal structure as one on the host, stacked along a new first axis."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(a) for a in leaves]), *trees)


def problem_spec(blocks: Any) -> Any:
    """Where the arrays of stacked problems lie, as prefixes; `blocks` is their first axis."""
    whole: Any = PartitionSpec(blocks)
    data: Any = PartitionSpec(blocks, DATA)
    return Problem(whole, whole, data, data, data, whole)


def block_axis(pod: Pod, count: int) -> str | None:
    """Where the axis of `count` stacked blocks lies; None: on all devices.

    Raises:
      ValueError: If they cannot be spread evenly.
    """
    if count == 1:
        return None  # all columns of the mesh do the same
    if count % pod.block:
        raise ValueError(f"{count} blocks cannot be spread over mesh.block={pod.block}.")
    return BLOCK


@functools.partial(
    jax.jit,
    static_argnames=("runner", "settings", "length", "pod", "shards", "ordered", "blocks"),
    donate_argnames="carry",
)
def run_chunk(
    runner: Runner,
    settings: FitSettings,
    length: int,
    pod: Pod,
    shards: int,
    ordered: bool,
    blocks: str | None,
    carry: Carry,
    problem: Problem,
    first: Array,
    key_data: Array,
    counts: Array,
) -> tuple[Carry, Array]:
    """`length` iterations of all blocks from number `first`; the errors `E / E_0` come too.

    Args:
      runner: What the blocks have in common.
      settings: How; `batch` is that of all shards.
      length: Iterations.
      pod: The devices.
      shards: Logical shards of the items.
      ordered: As for `mean_over_shards`.
      blocks: Axis of the mesh along which blocks lie.
      carry: The states before, stacked `[k, ...]`.
      problem: The problems, stacked; of the data `[k, shards, items of a shard, ...]`.
      first: Number of the first iteration.
      key_data: Of every block's key, `[k, 2]`.
      counts: Blocks and shards of a device, and all shards, int32 `[3]`: data, so that a loop
        over them has the same body on any mesh (`pod.each`).
    """
    whole, every = PartitionSpec(blocks), PartitionSpec()

    def device(carry, problem, key_data, numbers, first, counts):
        def one(carry, problem, key_data):
            key = jax.random.wrap_key_data(key_data)
            step = functools.partial(
                _step, runner, settings, pod, shards, ordered, counts, problem, numbers, key
            )
            return jax.lax.scan(step, carry, first + jnp.arange(length))

        return each(counts[0], one, carry, problem, key_data)

    return jax.shard_map(
        device,
        mesh=pod.mesh,
        in_specs=(whole, problem_spec(blocks), whole, PartitionSpec(DATA), every, every),
        out_specs=(whole, whole),
        check_vma=False,
    )(carry, problem, key_data, jnp.arange(shards), first, counts)


def _step(runner, settings, pod, shards, ordered, counts, problem, numbers, key, carry, number):
    """One iteration of one block on one device."""
    rows = carry.acts_state.updates.shape[0]

    def of_shard(shard, args, target, group):
        here = problem._replace(args=args, target=target, group=group)
        own = jax.random.fold_in(jax.random.fold_in(key, number), shard)
        index_key, drop_key = jax.random.split(own)
        size = min(settings.batch // shards, group.shape[0])
        index = jax.random.randint(index_key, (size,), 0, group.shape[0])

        def loss(fitted):
            return optimize.data_loss(runner, settings, here, fitted, index, drop_key)

        gradient, relative = jax.grad(loss, has_aux=True)(carry.fitted)
        present = jnp.zeros((rows,), jnp.float32).at[group[index]].set(1.0)
        return gradient, relative, present

    found = each(counts[1], of_shard, numbers, problem.args, problem.target, problem.group)
    gradient, relative, present = mean_over_shards(
        counts[2], found, ordered=ordered, devices=pod.data
    )

    def penalty(fitted):
        term = optimize.rounding_term(settings, fitted, number)
        return jnp.float32(0) if term is None else term

    gradient = jax.tree.map(jnp.add, gradient, jax.grad(penalty)(carry.fitted))
    carry = optimize.advance(runner, settings, problem, carry, gradient, present > 0, number)
    return carry, relative


@functools.partial(
    jax.jit, static_argnames=("runner", "batch", "pod", "shards", "blocks", "ordered")
)
def mean_errors(
    runner: Runner,
    batch: int,
    pod: Pod,
    shards: int,
    ordered: bool,
    blocks: str | None,
    problem: Problem,
    fitted: Fitted,
    counts: Array,
) -> Array:
    """`E` of every block over all items, `[k]`; what fills no batch of a shard is not counted."""
    whole = PartitionSpec(blocks)

    def device(problem, fitted, counts):
        def one(problem, fitted):
            def of_shard(args, target, group):
                here = problem._replace(args=args, target=target, group=group)
                size = min(max(batch // shards, 1), group.shape[0])
                starts = jnp.arange(0, group.shape[0] - size + 1, size)
                error = lambda at: block_error(runner, here, fitted, at + jnp.arange(size))
                return jnp.mean(jax.lax.map(error, starts))

            found = each(counts[1], of_shard, problem.args, problem.target, problem.group)
            return mean_over_shards(counts[2], found, ordered=ordered, devices=pod.data)

        return each(counts[0], one, problem, fitted)

    return jax.shard_map(
        device,
        mesh=pod.mesh,
        in_specs=(problem_spec(blocks), whole, PartitionSpec()),
        out_specs=whole,
        check_vma=False,
    )(problem, fitted, counts)


def padded(pod: Pod, count: int) -> int:
    """Places for `count` blocks: one, or as many on every column of the mesh."""
    return 1 if count == 1 else -(-count // pod.block) * pod.block


def counts_of(pod: Pod, blocks: int, shards: int) -> np.ndarray:
    """Blocks and shards of a device, and all shards: the lengths of a device's loops."""
    here = blocks if blocks == 1 else blocks // pod.block
    return np.array([here, shards // pod.data, shards], np.int32)
