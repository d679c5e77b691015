"""The time table of a network: what depends on the timestep alone, for a sampler's timesteps.

    table = time_table(model, params, sampler.timesteps(steps))     # the step table's "time"
    rest, layers = drop_time_layers(model, params)                  # what it stands for
    params = restore_time_layers(rest, layers)

`time_rows.py` tells what a table holds and how a network reads it. Tables are computed in
float32: the sines and cosines of t = 999 lose digits in half precision.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.plan import name_some
from qjax.core.qtensor import is_qtensor
from qjax.core.serialize import flatten
from qjax.core.typing import Params
from qjax.models.time_rows import TabulatesTime

__all__ = [
    "drop_time_layers",
    "dropped_layers",
    "replaced_layers",
    "restore_time_layers",
    "split_layers",
    "time_layers_of",
    "time_table",
]


def replaced_layers(model: Any) -> tuple[str, ...]:
    """Paths of the layers that a time table of `model` stands for.

    Raises:
      ValueError: If it is no network of this library, or nothing in it depends on t alone.
    """
    layers = time_layers_of(model)
    if layers:
        return layers
    reason = "it is no network of this library"
    if isinstance(model, TabulatesTime):
        reason = "its guidance embedding enters before the first layer of the time MLP"
    raise ValueError(
        f"A time table needs layers that depend on t alone; {type(model).__name__} has none: "
        f"{reason}. Leave time information precalculation out of the recipe."
    )


def time_layers_of(model: Any) -> tuple[str, ...]:
    """As `replaced_layers`, but none where there can be no table."""
    return model.time_layers() if isinstance(model, TabulatesTime) else ()


def time_table(model: Any, params: Params, timesteps: Sequence[float] | np.ndarray) -> Any:
    """The rows of a time table, one for every call of the network, in float32.

    Args:
      model: The network, unbound.
      params: Its float params; only those of `replaced_layers(model)` are read.
      timesteps: Of every call, in the sampler's order; fractional ones too. A timestep that
        is visited twice has two equal rows.

    Returns:
      A tree nested as the `"time"` collection, every leaf `[s, ...]`.

    Raises:
      ValueError: If there can be no table, or layers are missing from `params`, or quantized.
    """
    wanted = replaced_layers(model)
    _, layers = split_layers(params, wanted)
    _check_float(layers, wanted)
    layers = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), layers)
    distinct, call = np.unique(np.asarray(timesteps, np.float32), return_inverse=True)
    with jax.default_matmul_precision("float32"):  # elsewhere than on CPUs less is the default
        # Compiled as the network is: op by op, exp rounds otherwise, and t = 999 times that is 5e-5.
        rows = jax.jit(model.time_table)(layers, jnp.asarray(distinct))
    return jax.tree.map(lambda leaf: leaf[call], rows)


def _check_float(layers: Params, wanted: Collection[str]) -> None:
    leaves = dict(flatten(layers))
    missing = [name for name in wanted if not any(_is_in(leaf, {name}) for leaf in leaves)]
    quantized = [path for path, leaf in leaves.items() if is_qtensor(leaf)]
    if missing or quantized:
        raise ValueError(
            "A time table is made of the float weights of the time layers; got missing: "
            f"{name_some(missing)}; quantized: {name_some(quantized)}. Use the float model's."
        )


def drop_time_layers(model: Any, params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """`params` without the layers that a time table stands for, and those layers.

    Raises:
      ValueError: If there can be no table.
    """
    return split_layers(params, replaced_layers(model))


def restore_time_layers(rest: Params, layers: Params) -> dict[str, Any]:
    """The inverse of `drop_time_layers`: one tree of both.

    Raises:
      ValueError: If both have a leaf of one path.
    """
    restored, twice = _joined(rest, layers, "")
    if twice:
        raise ValueError(f"Layers to restore must not be in the params; {name_some(twice)} are.")
    return restored


def dropped_layers(model: Any, params: Params) -> tuple[str, ...]:
    """Paths of the layers that `params` lack and a time table would stand for."""
    wanted = time_layers_of(model)
    _, there = split_layers(params, wanted)
    paths = [path for path, _ in flatten(there)]
    return tuple(name for name in wanted if not any(_is_in(path, {name}) for path in paths))


def split_layers(
    params: Params, layers: Collection[str], path: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`params` without the branches at these paths, and the branches; both nested as before."""
    rest: dict[str, Any] = {}
    taken: dict[str, Any] = {}
    for key, value in params.items():
        name = f"{path}{key}"
        if _is_in(name, layers):
            taken[key] = value
        elif isinstance(value, Mapping):
            kept, moved = split_layers(value, layers, f"{name}/")
            rest |= {key: kept} if kept else {}
            taken |= {key: moved} if moved else {}
        else:
            rest[key] = value
    return rest, taken


def _is_in(path: str, layers: Collection[str]) -> bool:
    return any(path == layer or path.startswith(f"{layer}/") for layer in layers)


def _joined(a: Params, b: Params, path: str) -> tuple[dict[str, Any], list[str]]:
    """Both trees in one, and the paths that are leaves of both."""
    tree, twice = dict(a), []
    for key, value in b.items():
        if key not in tree:
            tree[key] = value
        elif isinstance(value, Mapping) and isinstance(tree[key], Mapping):
            tree[key], more = _joined(tree[key], value, f"{path}{key}/")
            twice += more
        else:
            twice.append(f"{path}{key}")
    return tree, twice
