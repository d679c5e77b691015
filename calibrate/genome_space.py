"""The space of a pipeline's group sizes, and the rules that a choice among them comes to.

Which layers are quantized, and how but for their groups, is read from the pipeline's own rules
and the shapes of its float params, so that the same choice can be made of another checkpoint
of the same architecture (`recipe_file.py`).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from qjax.calibrate.fitted import KERNEL
from qjax.calibrate.genome import Gene, Space, float_operations, group_choices
from qjax.calibrate.layer_widths import with_rules
from qjax.calibrate.simulate import LAYERS
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.layers import LOW_RANK
from qjax.core.plan import PlanEntry, kernel_axes, name_some
from qjax.core.quantize import plan, quantize_leaf
from qjax.core.serialize import flatten
from qjax.core.typing import Params

__all__ = [
    "build_space",
    "entries_of",
    "grouped_config",
    "grouped_rule",
    "layers_of",
    "macs_of_layers",
]

REASON = "group size by search"
FLOAT_BITS = 16  # of an input that is not quantized


def entries_of(params: Params, config: QuantConfig) -> tuple[PlanEntry, ...]:
    """What the rules say of every leaf of a float model, low-rank branches left out."""
    own = {
        path: jax.ShapeDtypeStruct(np.shape(leaf), jnp.float32)
        for path, leaf in flatten(params)
        if path.rsplit("/", 1)[-1] not in LOW_RANK
    }
    tree = traverse_util.unflatten_dict(own, sep="/")
    return plan(tree, dataclasses.replace(config, allow_unmatched=True)).entries


def layers_of(entries: Sequence[PlanEntry], pattern: str | None) -> dict[str, PlanEntry]:
    """The quantized layers whose group size is chosen, by path without `/kernel`.

    Args:
      entries: All leaves (`entries_of`).
      pattern: Regular expression for the whole path; None for all quantized layers.

    Raises:
      ValueError: If there is none, or a layer's input has a range that does not come from the
        input itself.
    """
    quantized = {entry.path: entry for entry in entries if entry.weight is not None}
    named = {
        path.removesuffix(KERNEL).rstrip("/"): entry
        for path, entry in quantized.items()
        if path.rsplit("/", 1)[-1] == KERNEL
    }
    found = {p: e for p, e in named.items() if pattern is None or re.fullmatch(pattern, p)}
    if not found:
        raise ValueError(
            f"the search needs quantized layers; {len(named)} are quantized, and layers={pattern!r} "
            f"matches none of them ({name_some(list(named))}). Use a recipe whose rules quantize "
            "some, or another pattern."
        )
    fixed = [p for p, e in found.items() if e.act is not None and e.act.mode != "dynamic"]
    if fixed:
        raise ValueError(
            "layers in groups need inputs with dynamic ranges, or float ones; the rules give "
            f"others to {name_some(fixed)}. Use ActSpec(mode='dynamic')."
        )
    return found


def grouped_rule(entry: PlanEntry, group_size: int) -> Rule:
    """The rule that gives this kernel alone, and its layer's input, groups of that size."""
    assert entry.weight is not None
    groups: Any = {"granularity": "per_group", "group_size": group_size}
    weight: WeightSpec = dataclasses.replace(entry.weight, **groups)
    act: ActSpec | None = None if entry.act is None else dataclasses.replace(entry.act, **groups)
    return Rule(pattern=re.escape(entry.path), weight=weight, act=act, reason=REASON)


def grouped_config(
    config: QuantConfig, entries: Sequence[PlanEntry], groups: Mapping[str, int]
) -> QuantConfig:
    """The config with a rule of its own, put first, for every layer in `groups`.

    Args:
      config: The rules that quantize these layers.
      entries: All leaves, as these rules have them (`entries_of`).
      groups: Group sizes by layer.
    """
    wanted = {f"{path}/{KERNEL}" if path else KERNEL: g for path, g in groups.items()}
    rules = {e.path: grouped_rule(e, wanted[e.path]) for e in entries if e.path in wanted}
    return with_rules(config, rules, entries)


def build_space(
    layers: Mapping[str, PlanEntry],
    macs: Mapping[str, int],
    *,
    choices: Sequence[int] | None,
    scale_dtype: Any,
) -> Space:
    """The group sizes of all layers with what they cost.

    Args:
      layers: As `layers_of` gives them.
      macs: Multiplications of every layer (`macs_of_layers`).
      choices: Group sizes; a layer has those that divide its input channels. None: all
        multiples of 16 that divide.
      scale_dtype: Dtype in which scales are stored.

    Raises:
      ValueError: If none divides the input channels of some layers, which are named.
    """
    genes, without = [], []
    for path, entry in layers.items():
        assert entry.weight is not None
        axes = kernel_axes(entry.path, len(entry.shape))
        assert axes is not None  # or it would not be quantized
        channels = entry.shape[axes.group]
        sizes = group_choices(channels, choices)
        if not sizes:
            without.append(f"{path} ({channels})")
            continue
        act = entry.act
        genes.append(
            Gene(
                path=path,
                macs=macs[path],
                weight_bits=entry.weight.bits,
                act_bits=FLOAT_BITS if act is None else act.bits,
                float_ops=float_operations(
                    weight_symmetric=entry.weight.symmetric,
                    act_symmetric=None if act is None else act.symmetric,
                ),
                choices=sizes,
                stored=tuple(_stored_bytes(entry, g, scale_dtype) for g in sizes),
            )
        )
    if without:
        allowed = "multiples of 16" if choices is None else tuple(choices)
        raise ValueError(
            f"a layer's group size must divide its input channels; of {allowed} none divides those "
            f"of {name_some(without)}. Add choices that do, or leave the layers out with layers=."
        )
    return Space(tuple(genes))


def _stored_bytes(entry: PlanEntry, group_size: int, scale_dtype: Any) -> int:
    config = QuantConfig(rules=(grouped_rule(entry, group_size),), scale_dtype=scale_dtype)
    shape: Any = jax.ShapeDtypeStruct(entry.shape, jnp.float32)
    return quantize_leaf(entry.path, shape, config, box=False).nbytes_packed


def macs_of_layers(
    forward: Callable[[], Any], layers: Collection[str], *, items: int
) -> dict[str, int]:
    """Multiplications of layers in one run of a network, for one item.

    Args:
      forward: Runs the network on `items` items; nothing is computed.
      layers: Their paths.
      items: Of the batch.

    Raises:
      ValueError: If the network did not run some of them.
    """
    found: dict[str, int] = {}

    def watch(next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        output = next_fun(*args, **kwargs)
        module, path = context.module, "/".join(context.module.path)
        if path in layers and isinstance(module, LAYERS) and context.method_name == "__call__":
            shape = np.shape(module.get_variable("params", KERNEL))
            axes = kernel_axes(f"{path}/{KERNEL}", len(shape))
            assert axes is not None
            outputs = math.prod(shape[axis] for axis in axes.channels)
            positions = output.size // outputs
            found[path] = found.get(path, 0) + math.prod(shape) * positions // items
        return output

    with nn.intercept_methods(watch):
        jax.eval_shape(forward)
    if missing := [path for path in layers if path not in found]:
        raise ValueError(
            f"a denoising step did not run {name_some(missing)}. Name layers that it runs, and "
            "quantize no others."
        )
    return found
