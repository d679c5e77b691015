"""Between a checkpoint in the diffusers layout and a Flax params tree, with a full account.

A key table says, for every key of a checkpoint, where it goes (`Target.path`), what shape it
must have there (`Target.shape`, the checkpoint's own order) and how its axes are reordered
(`Target.transform`). This is the only module that knows PyTorch's orders:

| transform | checkpoint | params |
|---|---|---|
| `same` | `[...]` | `[...]` |
| `linear` | `[o, i]` | `[i, o]` |
| `conv` | `[o, i, h, w]` | `[h, w, i, o]` |
| `conv1x1` | `[o, i, 1, 1]` | `[i, o]` |

Tensors are read one at a time and may be quantized as they come (`finish`), so a checkpoint
never has to fit into memory in float. Nothing is skipped: a key without a place, a place
without a key and a tensor of another shape are errors, and they are named all at once.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from qjax.core.places import local_path
from qjax.core.safetensors_io import ArrayLike, LazyTensor, atomic_write, write_tensors
from qjax.models.checkpoints import STEM, Checkpoint, listed, load_checkpoint, raise_if_any

__all__ = [
    "Checkpoint",
    "Target",
    "Transform",
    "conv",
    "conv1x1",
    "convert",
    "linear",
    "load_checkpoint",
    "same",
    "save_component",
    "to_checkpoint",
]

ParamPath = tuple[str, ...]


@dataclass(frozen=True)
class Transform:
    """A reordering of axes that can be undone; calling it goes from checkpoint to params.

    Attributes:
      name: Shown in reports and errors.
      forward: Checkpoint order to params order.
      inverse: Params order to checkpoint order; `inverse(forward(w))` equals `w`.
    """

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]

    def __call__(self, w: np.ndarray) -> np.ndarray:
        return self.forward(w)


same = Transform("same", lambda w: w, lambda w: w)
linear = Transform("linear", lambda w: w.T, lambda w: w.T)
conv = Transform("conv", lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))
conv1x1 = Transform("conv1x1", lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None])


@dataclass(frozen=True)
class Target:
    """Where one tensor of a checkpoint goes.

    Several keys may share a path (diffusers' DiT stores its embedder once in every block);
    their tensors must then be equal, unless they are different parts of the leaf.

    Attributes:
      path: Names from the root of the params tree to the leaf.
      shape: The tensor's shape in the checkpoint.
      transform: From the checkpoint's order of axes to the leaf's.
      part: `(index, count)`: the leaf is the concatenation of `count` tensors along its last
        axis (a fused projection), and this is the one at `index`.
    """

    path: ParamPath
    shape: tuple[int, ...]
    transform: Transform = same
    part: tuple[int, int] = (0, 1)


def convert(
    tensors: Mapping[str, ArrayLike],
    targets: Mapping[str, Target],
    *,
    dtype: DTypeLike | None = None,
    finish: Callable[[ParamPath, np.ndarray], Any] | None = None,
    on_tensor: Callable[[str, int, int], None] | None = None,
    require_finite: bool = False,
    allow_unexpected: Sequence[str] = (),
) -> dict[str, Any]:
    """The params tree that a checkpoint and its key table make.

    Keys and shapes are checked before any value is read. Beyond the result there is one
    tensor in memory at a time, two while shared ones are compared.

    Args:
      tensors: A `Checkpoint`, or arrays by key. Arrays are copied, never kept.
      targets: The key table.
      dtype: Float dtype of the leaves; None keeps the stored one. Integers stay as they are.
      finish: Called once for each leaf as soon as it is read, with its path and a C-contiguous
        array of its own; what it returns becomes the leaf. Put leaves on a device or quantize
        them here. None keeps the NumPy array.
      on_tensor: Called after each tensor with its key, the bytes read so far and the bytes to
        read in all: progress.
      require_finite: Whether an infinity or a NaN in the checkpoint is an error.
      allow_unexpected: Regular expressions; a key without a target that one of them matches
        whole is left out.

    Returns:
      Nested dicts with one leaf for each path of `targets`.

    Raises:
      ValueError: If keys are missing or unexpected, shapes differ, tensors that share a path
        are not equal, values are not finite or overflow `dtype`: one error with all names.
        If `dtype` is no float dtype, or the key table contradicts itself.
      TypeError: If `allow_unexpected` is a single text.
    """
    _check_dtype(dtype)
    groups = _group_by_path(targets)
    problems = _check_keys(tensors, targets, allow_unexpected)
    usable = {
        path: [key for key in keys if key in tensors and _fits(tensors[key], targets[key])]
        for path, keys in groups.items()
    }
    # Shared tensors come first, so that unequal ones stop the conversion before the rest is
    # finished; the rest follows in the order of the file.
    position = {key: n for n, key in enumerate(tensors)}
    order = sorted(
        (path for path, keys in usable.items() if keys),
        key=lambda path: (len(usable[path]) == 1, position[usable[path][0]]),
    )
    total = sum(_nbytes(tensors[key]) for keys in usable.values() for key in keys)
    done = 0
    leaves: dict[ParamPath, Any] = {}
    for path in order:
        keys = usable[path]
        narrows = any(_narrows(tensors[key].dtype, dtype) for key in keys)
        if any(problems.values()) and not (len(keys) > 1 or require_finite or narrows):
            continue  # its values cannot be wrong
        leaf = _read_leaf(tensors, targets, keys, dtype, require_finite, problems)
        if not any(problems.values()):
            leaves[path] = leaf if finish is None else finish(path, leaf)
        del leaf  # before the next one is read
        for key in keys:
            done += _nbytes(tensors[key])
            if on_tensor is not None:
                on_tensor(key, done, total)
    raise_if_any(
        problems,
        "The checkpoint does not fit the model",
        "See that config and weights belong together; keys that are known to be of no use can be "
        "named in allow_unexpected.",
    )
    return _nest({path: leaves[path] for path in groups})


def to_checkpoint(
    params: Mapping[str, Any], targets: Mapping[str, Target]
) -> dict[str, np.ndarray]:
    """The checkpoint that `convert` would make `params` of; its inverse.

    Keys that share a path get a copy each.

    Raises:
      ValueError: If leaves are missing, have no key or have another shape: all are named.
      TypeError: If a leaf is not an array; QTensors must be dequantized first.
    """
    return {key: np.asarray(value) for key, value in _entries(params, targets, None).items()}


def save_component(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    targets: Mapping[str, Target],
    *,
    dtype: DTypeLike | None = None,
    stem: str = STEM,
) -> None:
    """Write `config.json` and `diffusion_pytorch_model.safetensors`, as diffusers would.

    Each file appears complete or not at all, the weights before the config; a failure leaves
    both as they were. One tensor is copied at a time.

    Args:
      folder: Created if need be.
      config: The config in the form of diffusers, for JSON.
      params: Float params.
      targets: The key table of the model.
      dtype: Float dtype to store, such as `np.float16`; None keeps the leaves'.
      stem: Name of the weights without ending; "model" for text encoders.

    Raises:
      ValueError: As `to_checkpoint`; if `dtype` is no float dtype, or a value overflows it; if
        the folder holds a sharded checkpoint, which would stand beside the new file.
      TypeError: As `to_checkpoint`; if `config` is not JSON.
    """
    folder = local_path(folder)
    _check_dtype(dtype)
    text = json.dumps(dict(config), indent=2, sort_keys=True, allow_nan=False) + "\n"
    entries = _entries(params, targets, dtype)
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        raise ValueError(f"{index} belongs to another checkpoint. Save to another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "config.json") as file:
        file.write(text.encode())
        write_tensors(folder / f"{stem}.safetensors", entries, {"format": "pt"})


def _group_by_path(targets: Mapping[str, Target]) -> dict[ParamPath, list[str]]:
    """The keys of each path, once the table agrees with itself."""
    groups: dict[ParamPath, list[str]] = {}
    for key, target in targets.items():
        groups.setdefault(target.path, []).append(key)
    problems = {
        "keys without a path": [key for key, target in targets.items() if not target.path],
        "paths shared by targets of different shape or transform": [
            "/".join(path)
            for path, keys in groups.items()
            if len({(targets[k].shape, targets[k].transform, targets[k].part[1]) for k in keys}) > 1
        ],
        "paths that lack a part": [
            "/".join(path)
            for path, keys in groups.items()
            if {targets[k].part[0] for k in keys} != set(range(targets[keys[0]].part[1]))
        ],
        "paths below a leaf": [
            "/".join(path) for path in groups if any(path[:n] in groups for n in range(len(path)))
        ],
    }
    raise_if_any(problems, "The key table contradicts itself", "Give each tensor its own path.")
    return groups


def _check_keys(
    tensors: Mapping[str, ArrayLike], targets: Mapping[str, Target], allowed: Sequence[str]
) -> dict[str, list[str]]:
    """What is wrong with a checkpoint as far as its header tells, by kind of problem."""
    if isinstance(allowed, str):
        raise TypeError(f"allow_unexpected must be a sequence of patterns; got {allowed!r}.")
    return {
        "missing": [key for key in targets if key not in tensors],
        "unexpected": [
            key
            for key in tensors
            if key not in targets and not any(re.fullmatch(p, key) for p in allowed)
        ],
        "of another shape": [
            f"{key} {list(tensors[key].shape)} instead of {list(target.shape)}"
            for key, target in targets.items()
            if key in tensors and not _fits(tensors[key], target)
        ],
        "that should be equal and are not": [],
        "not finite": [],
        "too large for the dtype": [],
    }


def _read_leaf(
    tensors: Mapping[str, ArrayLike],
    targets: Mapping[str, Target],
    keys: Sequence[str],
    dtype: DTypeLike | None,
    require_finite: bool,
    problems: dict[str, list[str]],
) -> np.ndarray:
    """The leaf that `keys` share, in params order; what is wrong is added to `problems`."""
    parts: dict[int, list[str]] = {}
    for key in keys:
        parts.setdefault(targets[key].part[0], []).append(key)
    pieces = []
    for index in sorted(parts):
        first, *copies = parts[index]
        w = _read(tensors[first])
        problems["that should be equal and are not"] += [
            f"{key} and {first}" for key in copies if not _equal(w, _read(tensors[key]))
        ]
        if require_finite and _is_float(w.dtype) and not np.isfinite(w).all():
            problems["not finite"].append(first)
        piece = _cast(targets[first].transform(w), _stored_dtype(w.dtype, dtype))
        if _overflows(w, piece):
            problems["too large for the dtype"].append(first)
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)


def _read(tensor: ArrayLike) -> np.ndarray:
    """An array that nobody else holds."""
    return tensor.read() if isinstance(tensor, LazyTensor) else np.array(tensor)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b)


def _cast(w: np.ndarray, dtype: np.dtype, *, copy: bool = False) -> np.ndarray:
    """`w` in C order, without a word about overflow: `_overflows` looks for it."""
    with np.errstate(over="ignore", invalid="ignore"):
        return w.astype(dtype, order="C", copy=copy)


def _stored_dtype(dtype: DTypeLike, wanted: DTypeLike | None) -> np.dtype:
    """`wanted`, where one is given and there is a float to cast."""
    return np.dtype(dtype if wanted is None or not _is_float(dtype) else wanted)


def _narrows(dtype: DTypeLike, wanted: DTypeLike | None) -> bool:
    """Whether a cast can make infinities or NaNs out of numbers."""
    if wanted is None or not _is_float(dtype):
        return False
    return float(jnp.finfo(wanted).max) < float(jnp.finfo(dtype).max)


def _overflows(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether a cast did so."""
    if not _narrows(before.dtype, after.dtype) or np.isfinite(after).all():
        return False
    return bool(np.isfinite(before).sum() > np.isfinite(after).sum())


def _entries(
    params: Mapping[str, Any], targets: Mapping[str, Target], dtype: DTypeLike | None
) -> dict[str, ArrayLike]:
    """The tensors of a checkpoint, each to be made when it is read."""
    groups = _group_by_path(targets)
    leaves = dict(_leaves(params))
    strange = [
        f"{'/'.join(path)} ({type(leaf).__name__})"
        for path, leaf in leaves.items()
        if not isinstance(leaf, np.ndarray | jax.Array)
    ]
    if strange:
        raise TypeError(
            f"params must be arrays; got {listed(strange)}. Dequantize or unbox them first."
        )
    expected = {target.path: _params_shape(target) for target in targets.values()}
    problems = {
        "missing": ["/".join(path) for path in groups if path not in leaves],
        "unexpected": ["/".join(path) for path in leaves if path not in groups],
        "of another shape": [
            f"{'/'.join(path)} {list(leaves[path].shape)} instead of {list(shape)}"
            for path, shape in expected.items()
            if path in leaves and leaves[path].shape != shape
        ],
    }
    raise_if_any(
        problems, "The params do not fit the model", "See that config and params belong together."
    )
    return {key: _Entry(leaves[t.path], t, dtype) for key, t in targets.items()}


@dataclass(frozen=True, eq=False)
class _Entry:
    """A leaf in the checkpoint's order and dtype; `np.asarray` makes a fresh array of it."""

    leaf: Any
    target: Target
    cast_to: DTypeLike | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.target.shape

    @property
    def dtype(self) -> np.dtype:
        return _stored_dtype(self.leaf.dtype, self.cast_to)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        index, count = self.target.part
        whole = np.asarray(self.leaf)
        size = whole.shape[-1] // count if count > 1 else 0
        w = whole[..., index * size : (index + 1) * size] if count > 1 else whole
        array = _cast(self.target.transform.inverse(w), self.dtype, copy=True)
        if _overflows(w, array):
            raise ValueError(
                f"{'/'.join(self.target.path)} must fit {self.dtype}; its largest magnitude is "
                f"{np.abs(w).max()}. Save in float32 or bfloat16."
            )
        return array if dtype is None else array.astype(dtype, copy=False)


def _params_shape(target: Target) -> tuple[int, ...]:
    # A broadcast zero has any shape and takes no memory.
    shape = target.transform(np.broadcast_to(np.zeros(()), target.shape)).shape
    return shape if target.part[1] == 1 else (*shape[:-1], shape[-1] * target.part[1])


def _leaves(tree: Mapping[str, Any], path: ParamPath = ()) -> Iterator[tuple[ParamPath, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _nest(leaves: Mapping[ParamPath, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*parents, name), leaf in leaves.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _fits(tensor: ArrayLike, target: Target) -> bool:
    return tuple(tensor.shape) == tuple(target.shape)


def _nbytes(tensor: ArrayLike) -> int:
    return prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _check_dtype(dtype: DTypeLike | None) -> None:
    if dtype is not None and not _is_float(dtype):
        raise ValueError(f"dtype must be a float dtype; got {np.dtype(dtype)}. Pass float16, say.")


def _is_float(dtype: DTypeLike) -> bool:
    return bool(jnp.issubdtype(np.dtype(dtype), jnp.floating))  # knows bfloat16 and float8
