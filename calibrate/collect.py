"""The data that blocks are fitted to, from the samples of a roll-out.

For every pair of an item and a sampler step the quantized network runs on the sample that the
roll-out left there, both halves of guidance in one batch, and the inputs of the block that is
wanted are kept; the float network runs on the same sample, and the block's output is kept. So
a block sees the inputs that it will have, and aims at what it was before quantization.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qjax.calibrate.blocks import Block
from qjax.calibrate.capture import bytes_per_item, items_within, watched
from qjax.calibrate.fitted import LayerFormat, quantize_input
from qjax.calibrate.rollout import Buffer, Items
from qjax.calibrate.simulate import simulated
from qjax.calibrate.student import Student, Tables
from qjax.core.typing import Apply, Array, Int, Params

Groups = tuple[tuple[Block, ...], ...]


class Data(NamedTuple):
    """What one block is fitted to.

    Attributes:
      inputs: `(args, kwargs)` of its calls, items first.
      target: Its float outputs.
      group: Group of sampler steps of every item.
    """

    inputs: Any
    target: Array
    group: Int[Array, " m"]


class Pairs(NamedTuple):
    """Samples of a roll-out, by step and item.

    Attributes:
      step: Sampler steps, int32 `[p]`.
      item: Items, int32 `[p]`.
    """

    step: np.ndarray
    item: np.ndarray


class Samples(NamedTuple):
    """Where the network is evaluated, both halves of guidance one after the other."""

    x_t: Array
    t: Array
    told: Any
    group: Array


def samples_at(
    buffer: Buffer, items: Items, t: np.ndarray, group: np.ndarray, pairs: Pairs
) -> Samples:
    """The samples of pairs; twice as many items with guidance, the null half second.

    Args:
      buffer: A roll-out.
      items: Its items.
      t: Timestep of every sampler step.
      group: Group of every sampler step.
      pairs: Which.
    """
    x_t = jnp.asarray(buffer.x_t[pairs.step, pairs.item])
    times, groups = jnp.asarray(t[pairs.step]), jnp.asarray(group[pairs.step])
    told, null = jax.tree.map(lambda a: a[pairs.item], (items.told, items.null))
    return with_null_half(Samples(x_t, times, told, groups), null)


def with_null_half(samples: Samples, null: Any) -> Samples:
    """The samples, and after them the same with the null half; as they are if that is None."""
    if null is None:
        return samples
    twice = lambda a: jnp.concatenate([a, a])
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), samples.told, null)
    return Samples(twice(samples.x_t), twice(samples.t), both, twice(samples.group))


def quantizing(formats: Mapping[str, LayerFormat], tables: Tables, group: Array) -> Any:
    """The hook that quantizes the layers' inputs with the rows of their steps."""

    def hook(path: str, module: nn.Module, x: Array) -> Array:
        fmt = formats.get(path)
        if fmt is None or fmt.act is None:
            return x
        rows = jax.tree.map(lambda table: table[group], tables.get(path))
        return quantize_input(x, fmt.act, module, rows)

    return hook


@functools.partial(jax.jit, static_argnames=("apply", "formats", "groups"))
def _student(apply, formats, groups, params, tables, samples, chosen):
    def forward():
        with simulated(quantizing(dict(formats), tables, samples.group)):
            return apply({"params": params}, samples.x_t, samples.t, samples.told)

    # Whoever watches first sees the inputs before the hook has quantized them.
    answer, kept = watched(forward, groups, chosen)
    return answer, [None if one is None else one[0] for one in kept]


@functools.partial(jax.jit, static_argnames=("apply", "groups"))
def _teacher(apply, groups, params, samples, chosen):
    answer, kept = watched(
        lambda: apply({"params": params}, samples.x_t, samples.t, samples.told), groups, chosen
    )
    return answer, [None if one is None else one[1] for one in kept]


def collect(
    student: Student,
    teacher: tuple[Apply, Params],
    groups: Groups,
    wanted: Mapping[int, int],
    samples: Sequence[Samples],
    tables: Tables,
    *,
    memory_gib: float,
) -> dict[int, Data]:
    """The data of one block of every group that is asked for.

    Args:
      student: The quantized network as it is now.
      teacher: Function and params of the float network.
      groups: Groups of alike blocks of the network.
      wanted: For groups, by number, the number of the block within.
      samples: Where, in batches of one size.
      tables: Ranges of the layers' inputs.
      memory_gib: Most that the result may take; batches that do not fit are left out, the last
        first.

    Raises:
      ValueError: If not even one batch fits.
    """
    chosen = [jnp.int32(wanted.get(g, 0)) for g in range(len(groups))]
    formats = tuple(student.formats.items())
    parts: dict[int, list[tuple[Any, Array, Array]]] = {g: [] for g in wanted}
    fitting = len(samples)
    for number, batch in enumerate(samples):
        if number >= fitting:
            break
        _, inputs = _student(student.apply, formats, groups, student.params, tables, batch, chosen)
        _, outputs = _teacher(teacher[0], groups, teacher[1], batch, chosen)
        for g in wanted:
            parts[g].append((inputs[g], outputs[g], batch.group))
        if number == 0:
            size = len(batch.group)
            each = sum(bytes_per_item((inputs[g], outputs[g]), size) for g in wanted)
            most = items_within(memory_gib, each, size * len(samples), least=size)
            fitting = most // size
    return {g: _joined(found) for g, found in parts.items()}


def collect_whole(teacher: tuple[Apply, Params], samples: Sequence[Samples]) -> Data:
    """The data of the whole network: what it is given, and what it answers in float."""
    targets = [_teacher(teacher[0], (), teacher[1], batch, [])[0] for batch in samples]
    return _joined(
        [
            (((batch.x_t, batch.t, batch.told), {}), target, batch.group)
            for batch, target in zip(samples, targets, strict=True)
        ]
    )


def _joined(parts: Sequence[tuple[Any, Array, Array]]) -> Data:
    join = lambda *leaves: jnp.concatenate(leaves)
    inputs, target, group = jax.tree.map(join, *parts) if len(parts) > 1 else parts[0]
    return Data(inputs, target, group)
