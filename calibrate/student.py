"""A quantized network while it is calibrated: its QTensors, the floats they stand for, its ranges.

The params in which it runs are the pipeline's own, the QTensors without `act`: they multiply
as float values, and what goes into the layers is quantized by a hook (`simulate.py`), whose
ranges are still open. Only the block that is being fitted has float kernels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate.blocks import Block, find_blocks, subtree, whole_network
from qjax.calibrate.fitted import (
    KERNEL,
    LayerFormat,
    fixed_of,
    format_of,
    hard_kernel,
    quantized_kernels,
    start,
    with_kernels,
)
from qjax.calibrate.ranges import Method
from qjax.calibrate.reconstruction import FitSettings, Fitted, Runner
from qjax.calibrate.rollout import Network
from qjax.core.qtensor import QTensor
from qjax.core.typing import Apply, Array, Params, PRNGKeyArray
from qjax.models.pipeline import Pipeline

Tables = Mapping[str, Mapping[str, Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """A quantized network that is being calibrated; every change is a new one.

    Attributes:
      apply: The network's function.
      params: Its params, QTensors without `act`.
      floats: The params that its QTensors stand for.
      kernels: QTensors of the layers, with their `act`, as the pipeline had them.
    """

    apply: Apply
    params: Params
    floats: Params
    kernels: Mapping[str, QTensor]

    @classmethod
    def of(cls, pipe: Pipeline, floats: Params) -> "Student":
        """The student of a quantized pipeline.

        Raises:
          ValueError: If nothing in it is quantized.
        """
        return cls.of_params(pipe.apply, pipe.params, floats)

    @classmethod
    def of_params(cls, apply: Apply, params: Params, floats: Params) -> "Student":
        """The student of a function and quantized params, which may be shapes.

        Raises:
          ValueError: If nothing in them is quantized.
        """
        kernels = quantized_kernels(params)
        if not kernels:
            raise ValueError(
                "there is nothing to calibrate: no layer of this pipeline is quantized. Use a "
                "recipe whose rules quantize some."
            )
        bare = {path: q.replace(act=None) for path, q in kernels.items()}
        return cls(apply, with_kernels(params, bare), floats, kernels)

    @property
    def formats(self) -> dict[str, LayerFormat]:
        """The format of every quantized layer."""
        return {path: format_of(q) for path, q in self.kernels.items()}

    def network(self, pipe: Pipeline, method: Method) -> Network:
        """The network as a roll-out runs it."""
        return Network(
            self.apply, pipe.sampler, pipe.guidance_channels, tuple(self.formats.items()), method
        )

    def with_codes(self, kernels: Mapping[str, QTensor]) -> "Student":
        """The student with other integers in some layers."""
        bare = {path: q.replace(act=None) for path, q in kernels.items()}
        return dataclasses.replace(
            self,
            params=with_kernels(self.params, bare),
            kernels={**self.kernels, **kernels},
        )

    def fixed(self, block: Block) -> dict[str, dict[str, Array]]:
        """`fixed_of` the layers of a block, by relative path."""
        fixed = {}
        for layer in block.layers:
            path = block.absolute(layer)
            fixed[layer] = fixed_of(subtree(self.floats, path)[KERNEL], self.kernels[path])
        return fixed

    def block_params(self, block: Block, fixed: Mapping[str, Mapping[str, Array]]) -> Params:
        """The block's part of the params, with the float kernels in place of the QTensors.

        They are placeholders: a fit puts what it computes with into their places.
        """
        return with_kernels(
            subtree(self.params, block.path), {layer: one["w"] for layer, one in fixed.items()}
        )

    def begin(
        self,
        block: Block,
        fixed: Mapping[str, Mapping[str, Array]],
        tables: Tables,
        settings: FitSettings,
        key: PRNGKeyArray,
    ) -> Fitted:
        """What is fitted of a block, where it begins."""
        weights, acts = {}, {}
        for i, layer in enumerate(block.layers):
            path = block.absolute(layer)
            weights[layer] = start(
                settings.weights,
                format_of(self.kernels[path]),
                fixed[layer],
                jax.random.fold_in(key, i),
                rank=settings.rank,
            )
            if path in tables:
                acts[layer] = dict(tables[path])
        return Fitted(weights, acts)

    def harden(
        self, block: Block, fixed: Mapping[str, Mapping[str, Array]], fitted: Fitted
    ) -> "Student":
        """The student with the integers that a block's fit has ended in."""
        found = {}
        for layer in block.layers:
            path = block.absolute(layer)
            q = self.kernels[path]
            found[path] = hard_kernel(format_of(q), fixed[layer], fitted.weights[layer], q)
        return self.with_codes(found)

    def runner(self, block: Block) -> Runner:
        """What makes the program of a block."""
        formats = tuple((layer, self.formats[block.absolute(layer)]) for layer in block.layers)
        return Runner(block.module, None if block.module is not None else self.apply, formats)

    def blocks(self, x_t: Array, t: Array, told: Any) -> tuple[Block, ...]:
        """The blocks of the network, found by running it on such inputs abstractly."""
        return find_blocks(lambda: self.apply({"params": self.params}, x_t, t, told), self.formats)

    def whole(self) -> Block:
        """The network as one block."""
        return whole_network(self.formats)


def merged(tables: Tables, block: Block, fitted: Fitted) -> dict[str, Mapping[str, Array]]:
    """The tables of all layers, with a block's as they were fitted."""
    return {**tables, **{block.absolute(layer): rows for layer, rows in fitted.acts.items()}}


def stratified_pairs(
    steps: int, items: int, count: int, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count` different pairs of a sampler step and an item, all steps alike, shuffled.

    Args:
      steps: s.
      items: n.
      count: Pairs; all s * n if there are no more.
      seed: Of the choice.

    Returns:
      Steps and items, int32, each `[count]`.
    """
    rng = np.random.default_rng(seed)
    count = min(count, steps * items)
    rounds = [rng.permutation(items) for _ in range(steps)]
    pairs: list[tuple[int, int]] = []
    turn = 0
    while len(pairs) < count:
        for step in rng.permutation(steps)[: count - len(pairs)]:
            pairs.append((int(step), int(rounds[step][turn])))
        turn += 1
    order = rng.permutation(count)
    chosen = np.asarray(pairs, np.int32)[order]
    return chosen[:, 0], chosen[:, 1]


def rows_for(tables: Tables, group: Array) -> dict[str, dict[str, Array]]:
    """The rows of all layers for items of the groups `group`."""
    return {
        path: {name: jnp.asarray(table)[group] for name, table in rows.items()}
        for path, rows in tables.items()
    }


def names(blocks: Sequence[Block]) -> str:
    """What to call blocks in a line of progress."""
    first = blocks[0].path or "the whole network"
    return first if len(blocks) == 1 else f"{first} and {len(blocks) - 1} alike"
