"""Rows in place of time layers: what a network reads of the step table's `"time"` entry.

What a network computes of the timestep alone is the same for every image and every text, and
a sampler visits few timesteps. So it can be computed once, in float32, and the layers that
compute it left out of the params: the temporal path has no quantization error then, and the
file is smaller. A row is the variable collection `"time"`; a value in it stands at the path of
the layer whose output it is, without a batch, and is used in place of that layer:

| network | values of a row | layers they stand for |
|---|---|---|
| UNets whose time vector is of t alone (SD 1 and 2, LDM, DDPM) | `.../time_emb_proj` of every ResNet block, `[c]`, or `[2c]` under `"scale_shift"` | these, and `time_embedding` |
| UNets that add to it (SDXL, classes) | `time_embedding`, `[d]` | `time_embedding` |
| DiT | `conditioning/time_out`, `[d]` | it and `conditioning/time_in` |

An activation follows the sum in SDXL and with classes, so that a projection there is no
function of t: the projections stay. A guidance embedding (LCM) enters before the first layer,
and leaves nothing that depends on t alone.

`time_table.py` makes the rows and takes the layers out.

References:
  Li et al., Efficiency Meets Fidelity, 2024, https://arxiv.org/abs/2412.06661 (time
  information precalculation).
"""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from qjax.core.typing import Array, Float, Params

__all__ = [
    "COLLECTION",
    "PROJECTION",
    "VECTOR",
    "TabulatesTime",
    "at_paths",
    "has_projection_rows",
    "subtree",
    "time_row",
]

COLLECTION = "time"
"""The collection, and the entry of the step table."""
VECTOR = "time_embedding"
"""The MLP of a UNet that makes the time vector."""
PROJECTION = "time_emb_proj"
"""The layer of a ResNet block that reads it."""


@runtime_checkable
class TabulatesTime(Protocol):
    """A network that can have a time table; both methods are of the unbound module."""

    def time_layers(self) -> tuple[str, ...]:
        """Paths of the layers that rows stand for; none where nothing is of t alone."""
        ...

    def time_table(self, params: Params, t: Float[Array, " s"]) -> dict[str, Any]:
        """The rows of timesteps `t`, every value `[s, ...]`, of the params of `time_layers`."""
        ...


def time_row(
    module: nn.Module, name: str, dtype: Any, *, computable: bool = True
) -> Float[Array, "1 c"] | None:
    """The row's value for the layer `name` of `module`, or None where the layer is to be called.

    Args:
      module: The module that has the layer, bound.
      name: Of the layer.
      dtype: Float dtype in which the layer's output would be.
      computable: Whether the layer has an input.

    Raises:
      ValueError: If there is neither a value nor the layer with its input.
    """
    if module.is_initializing():
        return None
    if module.has_variable(COLLECTION, name):
        value = jnp.asarray(module.get_variable(COLLECTION, name))
        return value[None].astype(dtype)
    if computable and module.has_variable("params", name):
        return None
    path = "/".join((*module.path, name))
    raise ValueError(
        f"A time layer is in the params, or its output in the {COLLECTION!r} collection; {path} is "
        "in neither. Its output is in the step table that was made when it was dropped: draw "
        "with that pipeline, or apply the model with {'params': ..., 'time': row}. "
        "pipe.retarget(steps=...) makes the table anew of the dropped layers (time.safetensors)."
    )


def has_projection_rows(module: nn.Module) -> bool:
    """Whether the row has the ResNet blocks' projections, so that no time vector is needed."""
    rows = {} if module.is_initializing() else module.variables.get(COLLECTION, {})
    return bool(rows) and VECTOR not in rows


def subtree(params: Params, path: str) -> Params:
    """What stands in `params` at a path joined with `/`; empty where there is nothing."""
    for name in path.split("/"):
        params = params.get(name, {})
    return params


def at_paths(values: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The tree that has each value at its path."""
    return traverse_util.unflatten_dict(dict(values), sep="/")
