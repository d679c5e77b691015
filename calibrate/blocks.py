"""The blocks of a network: what is reconstructed at once, found by watching the network run.

A block is a ResNet block, a transformer block or an attention block that holds at least one
quantized layer; a quantized layer outside of all these is a block by itself; and the whole
network is a block, of path `""`. Nothing of the model is edited: Flax shows every call
(`nn.intercept_methods`), and a module taken out of its parent runs alone on its part of the
params.

Blocks of equal structure (class, settings, shapes, formats) run the same program.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from qjax.calibrate.simulate import LAYERS
from qjax.core.typing import Params
from qjax.models.attention import AttentionBlock
from qjax.models.dit import DiTBlock
from qjax.models.resnet import ResnetBlock
from qjax.models.transformer_2d import BasicTransformerBlock

KINDS: tuple[type[nn.Module], ...] = (
    AttentionBlock,
    BasicTransformerBlock,
    DiTBlock,
    ResnetBlock,
)
"""Classes of the models here that are reconstructed as one."""

Forward = Callable[[], Any]
"""A function that runs a network once: its result is not looked at."""


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A module of a network, taken out of it.

    Attributes:
      path: Its path, keys joined with `/`; `""` is the network.
      module: The module without a parent; None for the network, which has a function instead.
      layers: Paths of its quantized layers, relative to its own, in order of execution; `""`
        is the block itself.
      structure: Equal for blocks that run the same program.
    """

    path: str
    module: nn.Module | None
    layers: tuple[str, ...]
    structure: Hashable

    def absolute(self, layer: str) -> str:
        """The path of one of its layers in the network."""
        return "/".join(part for part in (self.path, layer) if part)


def find_blocks(
    forward: Forward,
    formats: Mapping[str, Hashable],
    *,
    kinds: Sequence[type[nn.Module]] = KINDS,
) -> tuple[Block, ...]:
    """The blocks of a network that hold quantized layers, in order of execution.

    Args:
      forward: Runs the network; called within `jax.eval_shape`, so nothing is computed.
      formats: What every quantized layer, by its path, is quantized to.
      kinds: Classes that are taken as one.

    Raises:
      ValueError: If a layer was not met, or a block was run twice, which could not be fitted
        to one input; all are named.
    """
    seen: dict[str, tuple[nn.Module, Any]] = {}
    order: list[str] = []
    twice: list[str] = []

    def watch(next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        module, path = context.module, "/".join(context.module.path)
        wanted = isinstance(module, tuple(kinds)) or path in formats and isinstance(module, LAYERS)
        if wanted and context.method_name == "__call__":
            if path in formats and isinstance(module, LAYERS):
                order.append(path)
            if path in seen:
                twice.append(path)
            seen[path] = (module.copy(parent=None, name=None), (args, kwargs))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(forward)
    if missing := sorted(formats.keys() - set(order)):
        raise ValueError(
            f"the network did not run {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}, which are quantized. Quantize only what a "
            "denoising step runs."
        )
    if twice:
        raise ValueError(
            f"a block can be calibrated only if it runs once in a step; {', '.join(twice[:5])} "
            "ran more than once."
        )
    owners = [path for path in seen if path not in formats]
    inside: dict[str, list[str]] = {}
    for layer in order:
        # The outermost of the known blocks around it.
        around = [owner for owner in owners if _within(layer, owner)]
        inside.setdefault(min(around, key=len, default=layer), []).append(layer)
    blocks = []
    for path, layers in inside.items():
        module, inputs = seen[path]
        relative = tuple(layer[len(path) :].lstrip("/") for layer in layers)
        structure = (
            _settings(module),
            _shapes(inputs),
            tuple((name, formats[layer]) for name, layer in zip(relative, layers, strict=True)),
        )
        blocks.append(Block(path, module, relative, structure))
    return tuple(blocks)


def whole_network(formats: Mapping[str, Hashable]) -> Block:
    """The network as one block."""
    return Block("", None, tuple(formats), ("network", tuple(formats.items())))


def alike(blocks: Iterable[Block]) -> tuple[tuple[Block, ...], ...]:
    """The blocks in groups of equal structure, both in the order given."""
    groups: dict[Hashable, list[Block]] = {}
    for block in blocks:
        groups.setdefault(block.structure, []).append(block)
    return tuple(map(tuple, groups.values()))


def subtree(tree: Mapping[str, Any], path: str) -> Any:
    """The part of nested dicts at `path`; an empty dict where there is none."""
    node: Any = tree
    for name in path.split("/") if path else ():
        node = node.get(name, {}) if isinstance(node, Mapping) else {}
    return node


def _within(layer: str, owner: str) -> bool:
    return layer.startswith(owner + "/") or owner == ""


def _settings(module: nn.Module) -> Hashable:
    """Class and fields of a module, but for what only matters at its initialisation."""
    names = [f.name for f in dataclasses.fields(module)]
    kept = [n for n in names if n not in ("parent", "name") and not n.endswith("_init")]
    return type(module), tuple((name, getattr(module, name)) for name in kept)


def _shapes(inputs: Any) -> Hashable:
    leaves, treedef = jax.tree.flatten(inputs)
    return treedef, tuple((np.shape(leaf), str(getattr(leaf, "dtype", leaf))) for leaf in leaves)


def params_of(block: Block, params: Params) -> Params:
    """The block's part of the network's params."""
    return subtree(params, block.path)
