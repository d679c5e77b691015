"""The data that alike blocks are fitted to, on a pod: blocks along one axis, items along the other.

As `collect.py`, in pieces of equal size that a device runs one after the other.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from qjax.calibrate.capture import bytes_per_item, items_within, watched
from qjax.calibrate.collect import Data, Groups, Samples, quantizing
from qjax.calibrate.pod import DATA, Pod, each
from qjax.calibrate.sharded_fit import block_axis, counts_of
from qjax.calibrate.simulate import simulated
from qjax.calibrate.spread import gathered, place, specs
from qjax.calibrate.student import Student, Tables
from qjax.core.typing import Apply, Params

Side = Literal["inputs", "outputs"]


@functools.partial(
    jax.jit, static_argnames=("side", "apply", "formats", "groups", "wanted", "pod", "blocks")
)
def collect_pieces(
    side: Side, apply, formats, groups, wanted, pod, blocks, counts, shared, chosen, samples
):
    """Inputs in the student, or outputs in the teacher, of blocks of the group `wanted`.

    Two programs, so that a device holds one network at a time.
    """

    def device(counts, shared, chosen, samples):
        in_parts, tables = shared

        def of_block(number):
            indices = [number if g == wanted else jnp.int32(0) for g in range(len(groups))]

            def of_piece(piece):
                params = gathered(in_parts)

                def run():
                    hook = quantizing(dict(formats), tables, piece.group)
                    with simulated(hook) if side == "inputs" else contextlib.nullcontext():
                        return apply({"params": params}, piece.x_t, piece.t, piece.told)

                inputs, output = watched(run, groups, indices)[1][wanted]
                return inputs if side == "inputs" else output

            return each(counts[1], of_piece, samples)

        return each(counts[0], of_block, chosen)

    every = PartitionSpec()
    return jax.shard_map(
        device,
        mesh=pod.mesh,
        in_specs=(every, specs(shared), PartitionSpec(blocks), PartitionSpec(DATA)),
        out_specs=PartitionSpec(blocks, DATA),
        check_vma=False,
    )(counts, shared, chosen, samples)


@functools.partial(jax.jit, static_argnames=("apply", "pod"))
def _answers(apply, pod, count, params, samples):
    """What the float network answers to all pieces."""

    def device(count, params, samples):
        def of_piece(piece):
            return apply({"params": gathered(params)}, piece.x_t, piece.t, piece.told)

        return each(count, of_piece, samples)

    every = PartitionSpec()
    return jax.shard_map(
        device,
        mesh=pod.mesh,
        in_specs=(every, specs(params), PartitionSpec(DATA)),
        out_specs=PartitionSpec(DATA),
        check_vma=False,
    )(count, params, samples)


def _joined(tree: Any, shards: int, axis: int) -> Any:
    """Pieces and their items as shards and theirs."""

    def one(a: jax.Array) -> jax.Array:
        lead = a.shape[:axis]
        return a.reshape(*lead, shards, -1, *a.shape[axis + 2 :])

    return jax.tree.map(one, tree)


def _on_pod(pod: Pod, samples: Sequence[Samples]) -> Samples:
    """Samples in pieces on the devices, pieces first."""
    host = jax.tree.map(lambda *leaves: np.stack([np.asarray(a) for a in leaves]), *samples)
    return pod.put(host, DATA)


def collect_blocks(
    pod: Pod,
    student: Student,
    teacher: tuple[Apply, Params],
    groups: Groups,
    group: int,
    members: Sequence[int],
    samples: Sequence[Samples],
    tables: Tables,
    *,
    shards: int,
    memory_gib: float,
) -> Data:
    """The data of alike blocks, `[k, shards, items of a shard, ...]` on the pod.

    Args:
      pod: The devices.
      student: The quantized network as it is now.
      teacher: Function and params of the float network.
      groups: Groups of alike blocks of the network.
      group: Which group.
      members: Which blocks of it, k.
      samples: Pieces of one size, a multiple of `shards`, those of a shard together.
      tables: Ranges of the layers' inputs.
      shards: Logical shards.
      memory_gib: Most that a device's part may take; pieces that do not fit are left out, the
        last of every shard first.

    Raises:
      ValueError: If not even one piece of every shard fits.
    """
    formats, k = tuple(student.formats.items()), len(members)
    blocks = block_axis(pod, k)
    each_shard = len(samples) // shards
    first = samples[0]

    def shapes(params: Params, floats: Params, tables: Tables, one: Samples) -> Any:
        zeros = [jnp.int32(0)] * len(groups)
        with simulated(quantizing(dict(formats), tables, one.group)):
            run = lambda: student.apply({"params": params}, one.x_t, one.t, one.told)
            _, kept = watched(run, groups, zeros)
        run = lambda: teacher[0]({"params": floats}, one.x_t, one.t, one.told)
        _, aims = watched(run, groups, zeros)
        return kept[group][0], aims[group][1]

    structure = jax.eval_shape(shapes, student.params, teacher[1], tables, first)
    size = len(first.group)
    here = counts_of(pod, k, shards)
    held = bytes_per_item(structure, size) * int(here[0]) * int(here[1])
    fitting = items_within(memory_gib, held, size * each_shard, least=size) // size
    kept = [
        one for s in range(shards) for one in samples[s * each_shard : s * each_shard + fitting]
    ]
    counts = pod.put(np.array([here[0], len(kept) // pod.data], np.int32))
    on_pod = _on_pod(pod, kept)
    chosen = pod.put(np.asarray(members, np.int32), blocks)

    def collected(side: Side, apply: Apply, params: Params, tables: Tables) -> Any:
        shared = (place(pod, params), pod.put(tables))
        return collect_pieces(
            side, apply, formats, groups, group, pod, blocks, counts, shared, chosen, on_pod
        )

    inputs = collected("inputs", student.apply, student.params, tables)
    jax.block_until_ready(inputs)  # before the other network comes
    target = collected("outputs", *teacher, {})
    inputs, target = _joined((inputs, target), shards, 1)
    groups_of_items = jnp.broadcast_to(on_pod.group, (k, *on_pod.group.shape))
    return Data(inputs, target, _joined(groups_of_items, shards, 1))


def collect_whole(
    pod: Pod, teacher: tuple[Apply, Params], samples: Sequence[Samples], *, shards: int
) -> Data:
    """The data of the whole network, as of one block: `[1, shards, items of a shard, ...]`."""
    on_pod = _on_pod(pod, samples)
    count = pod.put(np.int32(len(samples) // pod.data))
    target = _answers(teacher[0], pod, count, place(pod, teacher[1]), on_pod)
    inputs: Any = ((on_pod.x_t, on_pod.t, on_pod.told), {})
    data = Data(inputs, target, on_pod.group)
    return jax.tree.map(lambda a: a[None], _joined(data, shards, 0))
