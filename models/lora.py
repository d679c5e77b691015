"""LoRA: low-rank changes of a model's layers, fused into the weights or beside them.

A LoRA of rank r changes a layer's kernel `W` by

    W' = W + scale (alpha / r) down up          down [i, r], up [r, o]

For a convolution `down` is a convolution to r channels and `up` a 1x1 one. `fuse` adds the
product to a float kernel, before it is quantized. `attach` puts the factors beside the kernel
as leaves of the same layer, `lora_down`, `lora_up` and `lora_scale`, and the layer adds
`((x down) * scale) up` to its output: the kernel may be a QTensor, and the scale is data, so
another one runs the same program. `qjax.models.lora_pipeline` does this for all networks of a
pipeline.

References:
  Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2022,
  https://arxiv.org/abs/2106.09685.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qjax.core.layers import LOW_RANK
from qjax.core.places import local_path
from qjax.core.qtensor import is_qtensor
from qjax.core.safetensors_io import ArrayLike, open_tensors
from qjax.core.typing import Array
from qjax.models.checkpoints import listed, raise_if_any
from qjax.models.convert import Target
from qjax.models.lora_keys import Tables, places
from qjax.models.lora_settings import settings_of

__all__ = ["AttachedLoRA", "Factors", "LoRA", "attach", "detach", "fuse", "load_lora", "rescale"]

ModulePath = tuple[str, ...]

_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True, eq=False)
class Factors:
    """The change of one layer, `alpha / r` already in `up`.

    Attributes:
      down: `[i, r]` of a dense layer, `[h, w, i, r]` of a convolution; float32.
      up: `[r, o]`, float32.
    """

    down: np.ndarray
    up: np.ndarray

    @property
    def rank(self) -> int:
        """r."""
        return self.up.shape[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoRA:
    """The changes of the layers of one network, by the layer's path in the params.

    Attributes:
      layers: Factors by path, without the leaf's own name.
      source: File they were read from, for messages.
    """

    layers: Mapping[ModulePath, Factors] = field(repr=False)
    source: str


@dataclass(frozen=True, kw_only=True)
class AttachedLoRA:
    """One of the LoRAs beside the weights of a pipeline.

    Attributes:
      name: File it was read from.
      scale: Its weight.
      ranks: Its rank in every layer it changes, by component and path of the layer.
    """

    name: str
    scale: float
    ranks: Mapping[str, Mapping[str, int]] = field(repr=False)


def load_lora(path: str | os.PathLike[str], tables: Tables, **names: Any) -> dict[str, LoRA]:
    """The LoRA in a safetensors file, by component of the pipeline.

    Args:
      path: A file of PEFT, diffusers or kohya, or a folder that holds one.
      tables: Key tables of the networks that it may change, by component.
      **names: `renames`, as for `lora_keys.places`.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is a pickle or empty, or if any of its keys belongs to no layer,
        lacks its other half, has another shape, is not finite, or says what another says otherwise: one error
        names all of them.
    """
    path = _file(local_path(path))
    tensors = open_tensors(path)
    if not tensors:
        raise ValueError(f"{path.name} must hold the tensors of a LoRA; it holds none.")
    found, unmatched = places(tensors, tables, **names)
    settings = settings_of(path)
    twice: list[str] = []
    halves: dict[tuple[str, str], dict[str, str]] = {}
    for key, (component, layer, role) in found.items():
        first = halves.setdefault((component, layer), {}).setdefault(role, key)
        if first != key and not np.array_equal(tensors[first], tensors[key]):
            twice.append(f"{key} and {first}")
    whole = {at: roles for at, roles in halves.items() if {"down", "up"} <= roles.keys()}
    single = [key for at in halves.keys() - whole.keys() for key in halves[at].values()]
    wrong: list[str] = []
    layers: dict[str, dict[ModulePath, Factors]] = {}
    for (component, layer), roles in whole.items():
        target = tables[component][f"{layer}.weight"]
        down, up = (np.asarray(tensors[roles[role]], np.float32) for role in ("down", "up"))
        if not (np.isfinite(down).all() and np.isfinite(up).all()):
            wrong.append(f"{roles['down']}, of which not all values are finite")
            continue
        if not _fits(down, up, target.shape):
            shapes = f"{list(down.shape)} and {list(up.shape)} for {list(target.shape)}"
            wrong.append(f"{roles['down']} {shapes}")
            continue
        alpha = _number(tensors[roles["alpha"]]) if "alpha" in roles else None
        if alpha is not None and not math.isfinite(alpha):
            wrong.append(f"{roles['alpha']}, which is no finite number")
            continue
        gain = settings.gain(component, layer, len(down), alpha)
        factors, there = _factors(down, up, gain, target), layers.setdefault(component, {})
        other = there.get(target.path[:-1])
        if other is not None and target.part[1] == 1:
            twice.append(roles["down"])  # copies of one layer, such as DiT's embedder
        there[target.path[:-1]] = factors if other is None else _side_by_side(other, factors)
    raise_if_any(
        {
            "of no layer of this model, or of no kind that is supported": unmatched,
            "without the other half": sorted(single),
            "of another shape or not finite": wrong,
            "of one layer, saying different things": twice,
        },
        f"{path.name} does not fit this model",
        "See that the LoRA was made for this model; DoRA, LoHa and LoKr are not supported.",
    )
    return {part: LoRA(layers=found, source=path.name) for part, found in layers.items()}


def fuse(params: Mapping[str, Any], lora: LoRA, *, scale: float = 1.0) -> dict[str, Any]:
    """The float params with `scale` times the LoRA added to their kernels.

    Raises:
      ValueError: If a layer is missing or its kernel is quantized; all are named.
    """
    flat = dict(traverse_util.flatten_dict(params, is_leaf=_is_leaf))
    _check(flat, lora, float_only=True)
    for path, factors in lora.layers.items():
        kernel = flat[*path, "kernel"]
        change = np.tensordot(factors.down, factors.up, axes=1) * np.float32(scale)
        summed = jnp.asarray(kernel, jnp.float32) + change.reshape(kernel.shape)
        flat[*path, "kernel"] = summed.astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat)


def attach(
    params: Mapping[str, Any],
    loras: LoRA | Sequence[LoRA],
    *,
    scale: float | Sequence[float] = 1.0,
    dtype: Any = jnp.float32,
) -> dict[str, Any]:
    """The params, float or quantized, with the LoRAs as side branches.

    Attached with other scales, the tree has the same structure, shapes and dtypes, and
    whatever was compiled for it goes on running.

    Args:
      params: Params; what is beside them already stays, and the LoRAs add up.
      loras: One or several for the same network.
      scale: Weight of each, any real number; 0 switches it off.
      dtype: Float dtype of the factors.

    Raises:
      ValueError: If a layer is missing, all of them named, or scales and LoRAs differ in number.
    """
    loras = [loras] if isinstance(loras, LoRA) else list(loras)
    flat = dict(traverse_util.flatten_dict(params, is_leaf=_is_leaf))
    for lora, weight in zip(loras, one_each(scale, len(loras)), strict=True):
        _check(flat, lora, float_only=False)
        for path, factors in lora.layers.items():
            leaves = (
                jnp.asarray(factors.down, dtype),
                jnp.asarray(factors.up, dtype),
                jnp.full((factors.rank,), weight, jnp.float32),
            )
            for name, leaf, axis in zip(LOW_RANK, leaves, (-1, 0, 0), strict=True):
                there = flat.get((*path, name))
                if there is not None:
                    leaf = jnp.concatenate([there, leaf.astype(there.dtype)], axis=axis)
                flat[*path, name] = leaf
    return traverse_util.unflatten_dict(flat)


def rescale(
    params: Mapping[str, Any], ranks: Sequence[Mapping[str, int]], scales: Sequence[float]
) -> dict[str, Any]:
    """The params with other weights for the LoRAs beside them.

    Args:
      params: Params with side branches; what a branch has before the LoRAs stays as it is.
      ranks: Of every LoRA, in the order of attaching, its rank by the path of the layer.
      scales: The new weight of each.

    Raises:
      ValueError: If these are not the ranks of the side branches.
    """
    flat = dict(traverse_util.flatten_dict(params, is_leaf=_is_leaf))
    for path in [path for path in flat if path[-1] == LOW_RANK[-1]]:
        layer = "/".join(path[:-1])
        weights = [[s] * rank.get(layer, 0) for rank, s in zip(ranks, scales, strict=True)]
        # In the dtype that is there, which quantize may have changed: another would retrace.
        leaf = jnp.asarray([w for one in weights for w in one], flat[path].dtype)
        flat[path] = jnp.concatenate([flat[path][: _own(flat[path], ranks, layer)], leaf])
    return traverse_util.unflatten_dict(flat)


def one_each(scale: float | Sequence[float], count: int) -> list[float]:
    """The weight of each of `count` LoRAs, of one for each or one for all of them.

    Raises:
      ValueError: If there are more or fewer, or one is not finite.
    """
    values = np.asarray(scale, np.float64)
    scales: list[float] = values.tolist() if values.ndim else [values.item()] * count
    if len(scales) != count:
        raise ValueError(f"scale needs one number for each LoRA; got {len(scales)} for {count}.")
    if not np.isfinite(values).all():
        raise ValueError(f"scale must be a finite number; got {scale}. 0 switches a LoRA off.")
    return scales


def detach(
    params: Mapping[str, Any], ranks: Sequence[Mapping[str, int]] | None = None
) -> dict[str, Any]:
    """The params without LoRAs beside them.

    Args:
      params: Params with side branches.
      ranks: As for `rescale`: what a branch has besides stays. None takes all branches away.

    Raises:
      ValueError: If the ranks are more than those of the side branches.
    """
    flat = dict(traverse_util.flatten_dict(params, is_leaf=_is_leaf))
    for path in [path for path in flat if path[-1] == LOW_RANK[-1]]:
        layer = path[:-1]
        own = 0 if ranks is None else _own(flat[path], ranks, "/".join(layer))
        for name, axis in zip(LOW_RANK, (-1, 0, 0), strict=True):
            leaf = flat.pop((*layer, name))
            if own:
                flat[*layer, name] = jax.lax.slice_in_dim(leaf, 0, own, axis=axis % leaf.ndim)
    return traverse_util.unflatten_dict(flat)


def _own(scale: Array, ranks: Sequence[Mapping[str, int]], layer: str) -> int:
    """How much of a layer's branch is not of its LoRAs: what calibration has put there."""
    count = sum(rank.get(layer, 0) for rank in ranks)
    if count > len(scale):
        raise ValueError(
            f"the ranks of the LoRAs must be those of the side branches; got {count} in all for "
            f"{layer}, which has {len(scale)}. Detach them and attach them again."
        )
    return len(scale) - count


def _is_leaf(path: ModulePath, leaf: Any) -> bool:
    return is_qtensor(leaf)


def _check(flat: Mapping[ModulePath, Any], lora: LoRA, *, float_only: bool) -> None:
    kernels = {path: flat.get((*path, "kernel")) for path in lora.layers}
    missing = ["/".join(path) for path, kernel in kernels.items() if kernel is None]
    if missing:
        raise ValueError(
            f"{lora.source} changes layers that these params do not have; got {listed(missing)}. "
            "Pass the params of the network that it was loaded for; time layers that a step table "
            "stands for are no longer in them, so fuse it before."
        )
    quantized = ["/".join(path) for path, kernel in kernels.items() if is_qtensor(kernel)]
    if float_only and quantized:
        raise ValueError(
            f"{lora.source} can be fused with float kernels only; {listed(quantized)} are "
            "quantized. Fuse it before quantize, or put it beside them, without fuse=True."
        )


def _file(path: Path) -> Path:
    if path.is_dir():
        inside = [path / name for name in _FILES if (path / name).is_file()]
        if not inside:
            raise FileNotFoundError(f"{path} must hold {' or '.join(_FILES)}.")
        return inside[0]
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} must be a safetensors file; pickles can run code when they are read. "
            "Save it again with safetensors."
        )
    return path


def _number(tensor: ArrayLike) -> float:
    """The one value of a tensor; NaN if it has more or none."""
    return float(np.asarray(tensor).reshape(-1)[0]) if math.prod(tensor.shape) == 1 else math.nan


def _fits(down: np.ndarray, up: np.ndarray, kernel: tuple[int, ...]) -> bool:
    """Whether the halves, in the checkpoint's order, make a kernel `[o, i, ...]`."""
    rank, taps = len(down), math.prod(kernel[2:])
    return (
        min(down.ndim, up.ndim, len(kernel)) >= 2
        and up.shape[:2] == (kernel[0], rank)
        and math.prod(up.shape[2:]) == 1
        and down.shape[1] == kernel[1]
        and (down.shape[2:] == kernel[2:] or math.prod(down.shape[2:]) == taps == 1)
    )


def _factors(down: np.ndarray, up: np.ndarray, gain: float, target: Target) -> Factors:
    """In the params' order; a 1x1 convolution that is stored as a dense layer stays one.

    Of a layer that is stored fused with others, `up` is 0 for those.
    """
    o, rank = up.shape[:2]
    up = up.reshape(o, rank).T * np.float32(gain)
    index, count = target.part
    up = np.pad(up, ((0, 0), (index * o, (count - 1 - index) * o)))
    down = down.reshape(rank, *target.shape[1:])
    return Factors(np.ascontiguousarray(target.transform(down)), np.ascontiguousarray(up))


def _side_by_side(a: Factors, b: Factors) -> Factors:
    """The sum of two changes of one kernel."""
    return Factors(np.concatenate([a.down, b.down], axis=-1), np.concatenate([a.up, b.up]))
