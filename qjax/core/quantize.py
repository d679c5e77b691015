"""quantize, dequantize and plan: a params tree, and rules for its leaves.

The tree's structure never changes. Leaves named `kernel` that look like a layer's (two to
four axes) become QTensors, other leaves stay as they are, and every decision is recorded, so
that nothing is left in float without a reason. `plan.py` decides, this module carries it out.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from qjax.core.config import QuantConfig
from qjax.core.linen import box as boxed
from qjax.core.plan import (
    Plan,
    PlanEntry,
    decide,
    kernel_axes,
    name_some,
    natural_order,
    to_qtensor,
)
from qjax.core.qtensor import is_qtensor
from qjax.core.typing import Array

__all__ = ["Plan", "PlanEntry", "dequantize", "plan", "quantize", "quantize_leaf", "tree_bytes"]


def plan(params: Any, config: QuantConfig) -> Plan:
    """What `quantize(params, config)` would do, without computing anything.

    Args:
      params: As for `quantize`; arrays or `jax.ShapeDtypeStruct`s, so that a model needs no
        weights to be planned.
      config: Rules and default.

    Raises:
      ValueError: If a rule decides nothing, a group size does not divide, or a leaf is of an
        integer dtype or already quantized; one error names all leaves concerned.
      TypeError: If a leaf is not an array.
    """
    return Plan(tuple(sorted(decide(_leaves(params), config), key=natural_order)))


def quantize(params: Any, config: QuantConfig, *, box: bool = True) -> Any:
    """The same tree with QTensors for the kernels that `config` chooses; data-free.

    Leaf by leaf: no second float copy of the tree is ever held. The input is not changed, and
    a leaf that stays as it is stays the same object.

    Args:
      params: A params tree of any containers JAX knows (dicts, FrozenDicts, lists, Flax's
        metadata boxes), an `nnx.State` or an `nnx.Module`. Within jit, or of
        `jax.ShapeDtypeStruct`s, it gives the abstract result, and values are not checked.
      config: Rules and default.
      box: Whether QTensors are boxes that an unmodified Linen model unboxes, dequantizing,
        when it reads its params. False for code that calls `nn.unbox` on whole trees.

    Returns:
      The same kind of tree, State or Module, a new one.

    Raises:
      ValueError: As `plan`; or if weights to be quantized are NaN or infinite, or leaves that
        stay in float overflow `config.float_dtype`.
      TypeError: If a leaf is not an array.
    """
    leaves = _leaves(params)
    entries = decide(leaves, config)
    _check_finite(
        [(e.path, leaf) for e, (_, leaf) in zip(entries, leaves, strict=True) if e.weight]
    )
    if _is_nnx(params):
        from qjax.core import nnx

        by_path = {entry.path: entry for entry in entries}
        return nnx.quantize_leaves(
            params, lambda path, leaf: _quantize_leaf(by_path[path], leaf, config, box=False)
        )
    # A box of Flax's metadata holds one leaf, so these are the leaves of `_leaves`.
    nodes, treedef = jax.tree.flatten(params, is_leaf=is_qtensor)
    made = [
        _quantize_leaf(entry, node, config, box=box)
        for entry, node in zip(entries, nodes, strict=True)
    ]
    return jax.tree.unflatten(treedef, made)


def dequantize(params: Any, *, dtype: Any = None) -> Any:
    """The same tree with float arrays for QTensors, in `dtype` or that of the originals."""
    if _is_nnx(params):
        from qjax.core import nnx

        return nnx.dequantize(params, dtype=dtype)
    restore = lambda leaf: leaf.dequantize(dtype) if is_qtensor(leaf) else leaf
    return jax.tree.map(restore, params, is_leaf=is_qtensor)


def quantize_leaf(
    path: str, array: Array | np.ndarray, config: QuantConfig, *, box: bool = True
) -> Any:
    """One leaf as `quantize` would make it: for loaders that see one tensor at a time.

    Rules that match nothing are not looked for, since only one leaf is seen; `plan` on the
    shapes of the whole tree does that.
    """
    (entry,) = decide([(path, array)], dataclasses.replace(config, allow_unmatched=True))
    if entry.weight is not None:
        _check_finite([(path, array)])
    return _quantize_leaf(entry, array, config, box=box)


def tree_bytes(params: Any) -> int:
    """Stored bytes of a tree: QTensors at their true width, floats at 16 bits a value."""
    leaves = (leaf for _, leaf in _leaves(params))
    return sum(leaf.nbytes_packed if is_qtensor(leaf) else 2 * leaf.size for leaf in leaves)


def _is_nnx(params: Any) -> bool:
    from flax import nnx

    return isinstance(params, nnx.State | nnx.Module)


def _leaves(params: Any) -> list[tuple[str, Any]]:
    """Paths joined with `/` and leaves, QTensors whole, in the order of `jax.tree.flatten`."""
    if _is_nnx(params):
        from qjax.core import nnx

        return list(nnx.leaves(params))
    nodes, treedef = jax.tree.flatten(params, is_leaf=is_qtensor)
    if jax.tree_util.treedef_is_leaf(treedef) and not is_qtensor(params):
        raise TypeError(
            "params must be a tree of arrays as Flax makes them, an nnx.State or an nnx.Module; "
            f"got {type(params).__name__}."
        )
    # The boxes of Flax's metadata (Partitioned) have no part in a leaf's path.
    is_box = lambda node: is_qtensor(node) or isinstance(node, meta.AxisMetadata)
    paths, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)
    return [
        ("/".join(map(_name, path)), node) for (path, _), node in zip(paths, nodes, strict=True)
    ]


def _name(key: Any) -> str:
    """A key of a path, as the container shows it."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _check_finite(leaves: list[tuple[str, Any]]) -> None:
    """That weights to be quantized hold numbers; abstract ones are not asked."""
    if wrong := [path for path, leaf in leaves if not _is_abstract(leaf) and not _is_finite(leaf)]:
        raise ValueError(
            f"Weights to be quantized must be finite; {name_some(wrong)} hold NaN or infinity. "
            "Repair the checkpoint, or leave these layers in float with a rule."
        )


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer)


def _is_finite(leaf: Any) -> bool:
    return bool(np.isfinite(leaf).all() if isinstance(leaf, np.ndarray) else _all_finite(leaf))


@jax.jit
def _all_finite(leaf: Array) -> Array:
    return jnp.isfinite(leaf).all()


# Neither path nor reason is an argument: leaves of one shape share a program.
_to_qtensor = jax.jit(
    to_qtensor, static_argnames=("spec", "act", "group_size", "axes", "scale_dtype")
)


def _quantize_leaf(entry: PlanEntry, leaf: Any, config: QuantConfig, *, box: bool) -> Any:
    if entry.weight is None:
        return _cast_float(entry.path, leaf, config)
    make = functools.partial(
        _to_qtensor,
        spec=entry.weight,
        act=entry.act,
        group_size=entry.group_size,
        axes=kernel_axes(entry.path, len(entry.shape)),
        scale_dtype=config.scale_dtype,
    )
    if isinstance(leaf, jax.ShapeDtypeStruct):
        q = jax.eval_shape(make, leaf)
    else:
        q = make(leaf)
        if not _is_abstract(q.scale) and not _is_finite(q.scale):
            raise ValueError(
                f"{entry.path} must have scales that fit scale_dtype={config.scale_dtype!r}; its "
                f"largest magnitude is {_largest(leaf):g}. Use bfloat16 or float32 scales."
            )
    return boxed(q) if box else q


def _cast_float(path: str, leaf: Any, config: QuantConfig) -> Any:
    """A leaf left in float, in the dtype the config stores such leaves in."""
    if config.float_dtype is None or leaf.dtype == jnp.dtype(config.float_dtype):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, config.float_dtype)
    cast = jnp.asarray(leaf).astype(config.float_dtype)
    if not _is_abstract(cast) and not _is_finite(cast) and _is_finite(leaf):
        raise ValueError(
            f"{path} must stay finite in float_dtype={config.float_dtype!r}; its largest magnitude "
            f"is {_largest(leaf):g}. Use bfloat16, or None to leave its dtype."
        )
    return cast


def _largest(leaf: Any) -> float:
    return float(jnp.max(jnp.abs(jnp.asarray(leaf).astype(jnp.float32))))
