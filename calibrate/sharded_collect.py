"""The data that alike blocks are fitted to, on a pod: blocks along one axis, items along the other.

As `collect.py`, in pieces of equal size that a device runs one after the other.
"""

import functools
from collections.abc import Sequence
from typing import Any

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


@functools.partial(
    jax.jit,
    static_argnames=("apply", "float_apply", "formats", "groups", "wanted", "pod", "blocks"),
)
def collect_pieces(
    apply, float_apply, formats, groups, wanted, pod, blocks, counts, shared, chosen, samples
):
    """Inputs in the student, outputs in the teacher of blocks of the group `wanted`."""

    def device(counts, shared, chosen, samples):
        in_parts, tables, floats_in_parts = shared

        def of_block(number):
            indices = [number if g == wanted else jnp.int32(0) for g in range(len(groups))]

            def of_piece(piece):
                params, floats = gathered(in_parts), gathered(floats_in_parts)

                def student():
                    with simulated(quantizing(dict(formats), tables, piece.group)):
                        return apply({"params": params}, piece.x_t, piece.t, piece.told)

                def teacher():
                    return float_apply({"params": floats}, piece.x_t, piece.t, piece.told)

                _, kept = watched(student, groups, indices)
                _, aims = watched(teacher, groups, indices)
                return kept[wanted][0], aims[wanted][1]

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
    inputs, target = collect_pieces(
        student.apply,
        teacher[0],
        formats,
        groups,
        group,
        pod,
        blocks,
        counts,
        (place(pod, student.params), pod.put(tables), place(pod, teacher[1])),
        pod.put(np.asarray(members, np.int32), blocks),
        on_pod,
    )
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
