"""LoRA: low-rank changes of a model's layers, fused into the weights or beside them.

A LoRA of rank r changes a layer's kernel `W` by

    W' = W + scale (alpha / r) down up          down [i, r], up [r, o]

For a convolution `down` is a convolution to r channels and `up` a 1x1 one. `fuse` adds the
product to a float kernel, before it is quantized. `attach` puts the factors beside the kernel
as leaves of the same layer, `lora_down`, `lora_up` and `lora_scale`, and the layer adds
`((x down) * scale) up` to its output: the kernel may be a QTensor, and the scale is data, so
another one runs the same program.

References:
  Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2022,
  https://arxiv.org/abs/2106.09685.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qjax.core.layers import LOW_RANK
from qjax.core.qtensor import is_qtensor
from qjax.core.safetensors_io import metadata, open_tensors
from qjax.models.checkpoints import listed, raise_if_any
from qjax.models.convert import Target
from qjax.models.lora_keys import Tables, places

__all__ = ["Factors", "LoRA", "attach", "detach", "fuse", "load_lora"]

ModulePath = tuple[str, ...]

_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings


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


def load_lora(path: str | os.PathLike[str], tables: Tables, **names: Any) -> dict[str, LoRA]:
    """The LoRA in a safetensors file, by component of the pipeline.

    Args:
      path: A file of PEFT, diffusers or kohya, or a folder that holds one.
      tables: Key tables of the networks that it may change, by component.
      **names: `renames`, as for `lora_keys.places`.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is a pickle, or if any of its keys belongs to no layer, lacks its
        other half or has another shape: one error names all of them.
    """
    path = _file(Path(path))
    tensors = open_tensors(path)
    found, unmatched = places(tensors, tables, **names)
    settings = _settings(path)
    halves: dict[tuple[str, str], dict[str, str]] = {}
    for key, (component, layer, role) in found.items():
        halves.setdefault((component, layer), {})[role] = key
    problems: dict[str, list[str]] = {
        "of no layer of this model, or of no kind that is supported": unmatched,
        "without the other half": [
            key
            for roles in halves.values()
            for key in roles.values()
            if not {"down", "up"} <= roles.keys()
        ],
        "of a layer stored fused with others": [],
        "of another shape": [],
    }
    layers: dict[str, dict[ModulePath, Factors]] = {}
    for (component, layer), roles in halves.items():
        if not {"down", "up"} <= roles.keys():
            continue
        target = tables[component][f"{layer}.weight"]
        if target.part[1] > 1:
            problems["of a layer stored fused with others"].append(roles["down"])
            continue
        down, up = (np.asarray(tensors[roles[role]], np.float32) for role in ("down", "up"))
        if not _fits(down, up, target.shape):
            shapes = f"{list(down.shape)} and {list(up.shape)} for {list(target.shape)}"
            problems["of another shape"].append(f"{roles['down']} {shapes}")
            continue
        alpha = np.asarray(tensors[roles["alpha"]]).item() if "alpha" in roles else None
        gain = settings.gain(component, layer, len(down), alpha)
        layers.setdefault(component, {})[target.path[:-1]] = _factors(down, up, gain, target)
    raise_if_any(
        problems,
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

    Attached again with other scales, the tree keeps its structure, shapes and dtypes, and
    whatever was compiled for it goes on running.

    Args:
      params: Params; side branches that are there already are replaced.
      loras: One or several for the same network; several add up.
      scale: Weight of each, any real number; 0 switches it off.
      dtype: Float dtype of the factors.

    Raises:
      ValueError: If a layer is missing, all of them named, or scales and LoRAs differ in number.
    """
    loras = [loras] if isinstance(loras, LoRA) else list(loras)
    scales = [float(scale)] if isinstance(scale, int | float) else [float(s) for s in scale]
    if len(scales) != len(loras):
        raise ValueError(
            f"scale needs one number for each LoRA; got {len(scales)} for {len(loras)}."
        )
    flat = dict(traverse_util.flatten_dict(detach(params), is_leaf=_is_leaf))
    for lora in loras:
        _check(flat, lora, float_only=False)
    for path in dict.fromkeys(path for lora in loras for path in lora.layers):
        here = [
            (lora.layers[path], s)
            for lora, s in zip(loras, scales, strict=True)
            if path in lora.layers
        ]
        leaves = (
            jnp.concatenate([jnp.asarray(f.down, dtype) for f, _ in here], axis=-1),
            jnp.concatenate([jnp.asarray(f.up, dtype) for f, _ in here]),
            jnp.concatenate([jnp.full((f.rank,), s, jnp.float32) for f, s in here]),
        )
        flat |= {(*path, name): leaf for name, leaf in zip(LOW_RANK, leaves, strict=True)}
    return traverse_util.unflatten_dict(flat)


def detach(params: Mapping[str, Any]) -> dict[str, Any]:
    """The params without side branches."""
    flat = traverse_util.flatten_dict(params, is_leaf=_is_leaf)
    return traverse_util.unflatten_dict(
        {path: leaf for path, leaf in flat.items() if path[-1] not in LOW_RANK}
    )


def _is_leaf(path: ModulePath, leaf: Any) -> bool:
    return is_qtensor(leaf)


def _check(flat: Mapping[ModulePath, Any], lora: LoRA, *, float_only: bool) -> None:
    kernels = {path: flat.get((*path, "kernel")) for path in lora.layers}
    missing = ["/".join(path) for path, kernel in kernels.items() if kernel is None]
    if missing:
        raise ValueError(
            f"{lora.source} changes layers that these params do not have; got {listed(missing)}. "
            "Pass the params of the network that it was loaded for."
        )
    quantized = ["/".join(path) for path, kernel in kernels.items() if is_qtensor(kernel)]
    if float_only and quantized:
        raise ValueError(
            f"{lora.source} can be fused with float kernels only; {listed(quantized)} are "
            "quantized. Fuse it before quantize, or use attach."
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


def _fits(down: np.ndarray, up: np.ndarray, kernel: tuple[int, ...]) -> bool:
    """Whether the halves, in the checkpoint's order, make a kernel `[o, i, ...]`."""
    rank, taps = len(down), math.prod(kernel[2:])
    return (
        down.ndim >= 2
        and up.ndim >= 2
        and up.shape[:2] == (kernel[0], rank)
        and math.prod(up.shape[2:]) == 1
        and down.shape[1] == kernel[1]
        and (down.shape[2:] == kernel[2:] or math.prod(down.shape[2:]) == taps == 1)
    )


def _factors(down: np.ndarray, up: np.ndarray, gain: float, target: Target) -> Factors:
    """In the params' order; a 1x1 convolution that is stored as a dense layer stays one."""
    o, rank = up.shape[:2]
    up = up.reshape(o, rank).T * np.float32(gain)
    down = down.reshape(rank, *target.shape[1:])
    return Factors(np.ascontiguousarray(target.transform(down)), np.ascontiguousarray(up))


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """PEFT's settings by component, `""` for a file of one network."""

    parts: Mapping[str, Mapping[str, Any]]

    def gain(self, component: str, layer: str, rank: int, alpha: float | None) -> float:
        """`alpha / r`, `alpha / sqrt(r)` for rank-stabilised LoRA, 1 if nothing says alpha."""
        part = self.parts.get(component, self.parts.get("", {}))
        if alpha is None:
            patterns = part.get("alpha_pattern") or {}
            own = [value for name, value in patterns.items() if _ends(layer, name)]
            alpha = own[0] if own else part.get("lora_alpha")
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if part.get("use_rslora") else rank)


def _ends(layer: str, name: str) -> bool:
    return layer == name or layer.endswith("." + name)


def _settings(path: Path) -> _Settings:
    beside = path.parent / "adapter_config.json"
    parts: dict[str, dict[str, Any]] = {}
    try:
        if beside.is_file():
            parts[""] = json.loads(beside.read_text(encoding="utf-8"))
        for name, value in json.loads(metadata(path).get(_METADATA, "{}")).items():
            component, _, setting = name.partition(".")
            parts.setdefault(component, {})[setting] = value
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"{path.name}: the settings of the adapter must be JSON; got {error}."
        ) from None
    return _Settings(parts=parts)
