"""Where the parts of a QTensor lie on a mesh, given where the float kernel would lie.

The packed axis is cut between blocks only, and groups are not cut, so that every device holds
whole bytes and whole groups of its own part and unpacks it alone. What is too small to be cut
(a scale shared along an axis) lies whole on every device.
"""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

from qjax.core.qtensor import QTensor


def sharding_for(q: QTensor, sharding: NamedSharding) -> QTensor:
    """Shardings of the parts of `q`, for a kernel that is sharded as `sharding` says.

    Args:
      q: The tensor, or its shapes (`jax.eval_shape`).
      sharding: Mesh and spec of the kernel, by logical axes; axes the spec does not name are
        not cut.

    Returns:
      A QTensor with a `NamedSharding` for every array, as `jax.device_put(q, ...)`, and the
      `in_shardings` of `jax.jit`, take it. `qvalue` has the kernel's spec; `scale` and
      `zero_point` too, but for the axes that they share or that are not divisible.

    Raises:
      ValueError: If the spec names more axes than `q` has, or its cuts do not divide an axis,
        or split a packed block or a group of input channels.

    Example:
      >>> from qjax.core.qtensor import from_codes
      >>> q = from_codes(jnp.ones((8, 6), jnp.int8), jnp.ones((1, 6)), bits=4)
      >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",))
      >>> tuple(sharding_for(q, NamedSharding(mesh, PartitionSpec(None, "model"))).scale.spec)
      (None, 'model')
    """
    spec = tuple(sharding.spec)
    if len(spec) > q.ndim:
        raise ValueError(f"{sharding.spec} names more axes than a kernel of shape {q.shape} has.")
    spec += (None,) * (q.ndim - len(spec))
    parts = [_parts(sharding, entry) for entry in spec]
    _check_cuts(q, spec, parts)

    def place(array: jax.Array | None) -> NamedSharding | None:
        if array is None:
            return None
        fits = [size % n == 0 for size, n in zip(array.shape, parts, strict=True)]
        kept = [entry if fit else None for entry, fit in zip(spec, fits, strict=True)]
        return NamedSharding(sharding.mesh, PartitionSpec(*kept))

    return q.replace(qvalue=place(q.qvalue), scale=place(q.scale), zero_point=place(q.zero_point))


def _parts(sharding: NamedSharding, entry: str | tuple[str, ...] | None) -> int:
    """Into how many parts an entry of the spec cuts its axis."""
    names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def _check_cuts(q: QTensor, spec: tuple, parts: list[int]) -> None:
    """That every cut falls between values, blocks and groups."""
    for axis, (entry, n) in enumerate(zip(spec, parts, strict=True)):
        size = q.shape[axis]
        units = {"values": size}
        if axis - q.ndim == q.axis:
            if q.layout == "packed":
                # With padding in the last block no cut falls between blocks.
                units[f"packed blocks of {q.block}"] = 1 if q.pad else size // q.block
            if q.group_size is not None:
                units[f"groups of {q.group_size}"] = q.num_groups
        for unit, count in units.items():
            if count % n:
                raise ValueError(
                    f"A cut must not split a packed block or a group; got {entry!r}, {n} parts, "
                    f"for axis {axis} of a kernel of shape {q.shape}, which has {count} {unit}. "
                    f"Use a number of parts that divides {count}, or cut another axis."
                )
