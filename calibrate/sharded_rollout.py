"""The serial roll-out on a pod: items spread over all devices, ranges agreed on at every step.

Items are in pieces of equal size, and a device runs its pieces one after the other. A step has
two passes: in the first every piece finds the ranges of the layers in the order of execution
for itself, and their mean over the pieces, in the order of the pieces, is the step's; in the
second the samples move on with it. So the samples and ranges have the same bits whatever the
mesh. (`rollout.py`, on one device, lets pieces follow each other and averages with decay.)
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from qjax.calibrate.pod import BLOCK, DATA, Pod, each, ordered_mean
from qjax.calibrate.ranges import Range, empty, union
from qjax.calibrate.rollout import Buffer, Items, Network, one_step
from qjax.calibrate.spread import gathered, place, specs
from qjax.core.typing import Array, Float, Int, Params


def piece_axes(pod: Pod, pieces: int) -> tuple[str, ...]:
    """Axes of the mesh over which so many pieces are spread: both, if that comes out even."""
    return (BLOCK, DATA) if pieces % (pod.block * pod.data) == 0 else (DATA,)


def in_pieces(tree: Any, size: int) -> Any:
    """Arrays with the items first as pieces of `size`: `[p, size, ...]`."""
    return jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), tree)


def _over_pieces(pod: Pod, axes: tuple[str, ...], function: Callable[..., Any], *arguments: Any):
    """`function(shared, piece)` of all pieces: `arguments` are count, shared and pieces."""
    pieces, every = PartitionSpec(axes), PartitionSpec()
    _, shared, _ = arguments

    def device(count, shared, pieces):
        return each(count, lambda *piece: function(shared, *piece), *pieces)

    return jax.shard_map(
        device,
        mesh=pod.mesh,
        in_specs=(every, specs(shared), pieces),
        out_specs=pieces,
        check_vma=False,
    )(*arguments)


def _step_of_piece(network, shared, x, state, items, *, decay):
    """`one_step` of a piece, on a device."""
    params, row, step, prior, scale = shared
    keys = jax.random.wrap_key_data(items.keys)
    return one_step(
        network,
        gathered(params),
        x,
        state,
        row,
        items.told,
        items.null,
        keys,
        step,
        prior,
        jnp.float32(decay),
        scale,
    )


@functools.partial(jax.jit, static_argnames=("network", "pod", "axes"))
def _observe(network, pod, axes, counts, params, x, states, row, items, step, prior, scale):
    """The ranges of a step: the mean of what all pieces find."""
    spread, every = PartitionSpec(axes), PartitionSpec()
    shared = (params, row, step, prior, scale)

    def device(counts, shared, pieces):
        def one(x, state, items):
            *_, found = _step_of_piece(network, shared, x, state, items, decay=0)
            return found

        found = each(counts[0], one, *pieces)
        whole = jax.tree.map(lambda a: jax.lax.all_gather(a, axes, tiled=True), found)
        return ordered_mean(counts[1], whole)

    return jax.shard_map(
        device,
        mesh=pod.mesh,
        in_specs=(every, specs(shared), spread),
        out_specs=every,
        check_vma=False,
    )(counts, shared, (x, states, items))


@functools.partial(jax.jit, static_argnames=("network", "pod", "axes"))
def _move(network, pod, axes, counts, params, x, states, row, items, step, prior, scale):
    """All pieces one step on."""

    def one(shared, x, state, items):
        x, state, _ = _step_of_piece(network, shared, x, state, items, decay=1)
        return x, state

    shared = (params, row, step, prior, scale)
    return _over_pieces(pod, axes, one, counts[0], shared, (x, states, items))


@functools.partial(jax.jit, static_argnames=("network", "pod", "axes"))
def _begin(network, pod, axes, counts, x):
    init = lambda _, x: network.sampler.init(x)
    return _over_pieces(pod, axes, init, counts[0], (), (x,))


def roll_out(
    pod: Pod,
    network: Network,
    params: Params,
    items: Items,
    rows: Mapping[str, np.ndarray],
    *,
    group: Int[np.ndarray, " s"],
    guidance_scale: Array | None = None,
    piece: int,
    driver: tuple[Network, Params] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Buffer:
    """Run the sampler on the items and fit the ranges of every group of steps.

    Args:
      pod: The devices.
      network: The quantized network.
      params: Its params, on the host or on one device.
      items: Where to begin, and what the network is told; a multiple of `piece`.
      rows: `sampler.rows(steps)`.
      group: For every step the group that shares its ranges: 0 first, never falling.
      guidance_scale: Weight of the guidance; None for none.
      piece: Items that run at once on a device.
      driver: Another network, which makes the samples in place of `network`.
      on_step: Progress: called with the number of every step that is done.

    Returns:
      As `rollout.roll_out`; the same in all processes.
    """
    steps, n = len(rows["t"]), len(items.x_T)
    pieces = n // piece
    axes = piece_axes(pod, pieces)
    devices = pod.data * (pod.block if BLOCK in axes else 1)
    counts = pod.put(np.array([pieces // devices, pieces], np.int32))
    bare = items._replace(keys=jax.random.key_data(items.keys))
    spread = pod.put(in_pieces(jax.tree.map(np.asarray, bare), piece), axes)
    x = spread.x_T * rows["init_scale"][0] if "init_scale" in rows else spread.x_T
    states = _begin(network, pod, axes, counts, x)
    params = place(pod, params)
    moving = (network, params) if driver is None else (driver[0], place(pod, driver[1]))
    scale = None if guidance_scale is None else pod.put(guidance_scale)
    nothing = pod.put(empty(dict(network.formats)))
    fitted: list[dict[str, Range]] = []
    samples: list[Float[np.ndarray, "n h w c"]] = []
    for i in range(steps):
        samples.append(pod.get(x).reshape(n, *x.shape[2:]))
        row = pod.put({name: np.asarray(column[i]) for name, column in rows.items()})
        at = (row, spread, pod.put(np.int32(i)))
        found = nothing
        if nothing:
            found = _observe(network, pod, axes, counts, params, x, states, *at, nothing, scale)
        host: dict[str, Range] = pod.get(found)
        if i > 0 and group[i] == group[i - 1]:
            host = union(fitted[-1], host)
            fitted[-1] = host
        else:
            fitted.append(host)
        prior = pod.put(host) if driver is None else {}
        x, states = _move(moving[0], pod, axes, counts, moving[1], x, states, *at, prior, scale)
        if on_step is not None:
            on_step(i + 1)
    forwards = n * steps * (2 if nothing else 1)
    return Buffer(np.stack(samples), pod.get(x).reshape(n, *x.shape[2:]), fitted, forwards)
