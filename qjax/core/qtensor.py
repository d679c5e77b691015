"""QTensor: a low-bit array that stands in a params tree where a float array stood.

The value is `(qvalue - zero_point) * scale`, with scales of the same rank as the array: an
axis of size 1 is shared, any other size divides the axis, and runs of equal length share a
scale ("generic broadcast"). The conditions a QTensor always meets:

- codes lie in `[-2**(bits-1), 2**(bits-1) - 1]`; `zero_point`, where there is one, too;
- `axis` is negative and names the axis of the input channels, along which groups run and,
  in the packed layout, bytes are packed; it is the second-to-last but for kernels of rank 3;
- nothing static knows the logical shape, which is derived from the arrays, so that a QTensor
  may be stacked, scanned over and mapped over like any array.

Layouts: `"native"` keeps one integer of a JAX dtype per value; `"packed"` keeps uint8 bytes,
`bits / 8` per value, as `qjax.kernels.packing` describes.
"""

import dataclasses
import json
import math
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp
from flax import serialization

from qjax.core.config import ActSpec
from qjax.core.typing import Array, Float, Int, Shaped
from qjax.kernels import packing

Layout = Literal["native", "packed"]

# The fields in the order of the constructor.
_ARRAYS = ("qvalue", "scale", "zero_point")
_STATIC = ("bits", "axis", "block", "pad", "layout", "dtype_name", "act")


@dataclasses.dataclass(frozen=True)
class QTensor:
    """Low-bit values with their scales; a pytree of two or three arrays.

    Attributes:
      qvalue: Integers; uint8 bytes along `axis` in the packed layout.
      scale: Step between two levels, of the rank of the array, in a 16-bit float dtype.
      zero_point: The code that means 0.0, int8, shaped as `scale`; None means code 0.
      bits: Width of a value.
      axis: Negative index of the input-channel axis.
      block: Values per packing block.
      pad: Values added at the end of `axis` to fill a block.
      layout: `"native"` or `"packed"`.
      dtype_name: Name of the float dtype that `dequantize` returns by default.
      act: How the input of the op that uses this weight is quantized; None: not at all.
    """

    qvalue: Shaped[Array, "..."]
    scale: Float[Array, "..."]
    zero_point: Int[Array, "..."] | None = None
    bits: int = 8
    axis: int = -2
    block: int = 1
    pad: int = 0
    layout: Layout = "native"
    dtype_name: str = "float32"
    act: ActSpec | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, that of the float array it replaces."""
        shape = list(self.qvalue.shape)
        if self.layout == "packed":
            shape[self.axis] = shape[self.axis] * 8 // self.bits - self.pad
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.qvalue.shape)

    @property
    def size(self) -> int:
        """Number of logical values."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The float dtype that `dequantize` returns by default."""
        return jnp.dtype(self.dtype_name)

    @property
    def num_groups(self) -> int:
        """Scales along the input-channel axis; 1 where the axis shares one."""
        return self.scale.shape[self.axis]

    @property
    def group_size(self) -> int | None:
        """Input channels that share a scale; None for all of them."""
        groups = self.num_groups
        return None if groups == 1 else self.shape[self.axis] // groups

    @property
    def nbytes_packed(self) -> int:
        """Bytes of the values at their true width, and of scales and zero points.

        Counted from bits: `jnp.int4` arrays report a byte per value.
        """
        values = self.qvalue.size * (8 if self.layout == "packed" else self.bits)
        total = -(-values // 8) + self.scale.size * self.scale.dtype.itemsize
        return total if self.zero_point is None else total + self.zero_point.size

    def codes(self) -> Int[Array, "..."]:
        """The integers as int8, in the logical shape."""
        if self.layout == "native":
            return self.qvalue.astype(jnp.int8)
        moved = jnp.moveaxis(self.qvalue, self.axis, -2) if self.axis != -2 else self.qvalue
        codes = packing.unpack(moved, bits=self.bits, block=self.block, pad=self.pad)
        return codes if self.axis == -2 else jnp.moveaxis(codes, -2, self.axis)

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """`(qvalue - zero_point) * scale`, computed in float32.

        Args:
          dtype: Float dtype of the result; None for that of the array it replaced.
        """
        values = self.codes().astype(jnp.float32)
        if self.zero_point is not None:
            values = values - spread(self.zero_point, values.shape).astype(jnp.float32)
        values = values * spread(self.scale, values.shape).astype(jnp.float32)
        return values.astype(self.dtype if dtype is None else dtype)

    def with_layout(self, layout: Layout) -> "QTensor":
        """The same values stored natively or packed."""
        if layout == self.layout:
            return self
        return from_codes(self.codes(), self.scale, self.zero_point, like=self, layout=layout)

    def replace(self, **changes: Any) -> "QTensor":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        """One line: format and logical shape."""
        kind = "symmetric" if self.zero_point is None else "asymmetric"
        shape = getattr(self.qvalue, "shape", None) and list(self.shape)
        return (
            f"{type(self).__name__}(W{self.bits} {kind}, shape={shape}, {self.layout}, "
            f"act={self.act})"
        )


def register(cls: type) -> type:
    """Make a QTensor class a pytree, and known to `jax.export` and `flax.serialization`.

    Its keys are the field names. What Flax writes is the arrays and one string with the
    static fields; it is read into a target of the same static fields only, since a tree that
    was quantized in another way is another model.
    """
    keys = [jax.tree_util.GetAttrKey(name) for name in _ARRAYS]

    def children(q):
        return tuple(getattr(q, name) for name in _ARRAYS), tuple(getattr(q, n) for n in _STATIC)

    def children_with_keys(q):
        arrays, static = children(q)
        return tuple(zip(keys, arrays, strict=True)), static

    def build(static, arrays):
        return cls(*arrays, *static)

    # Not `register_dataclass`: from JAX 0.10 on, structures of two classes registered so are
    # equal where their static fields are, and a box would pass for the QTensor in it.
    jax.tree_util.register_pytree_with_keys(cls, children_with_keys, build, children)
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"qjax.{cls.__name__}",
        serialize_auxdata=lambda static: _dump(static).encode(),
        deserialize_auxdata=lambda data: _load(data.decode()),
        from_children=build,
    )
    serialization.register_serialization_state(cls, _to_state, _from_state)
    return cls


def _dump(static: tuple[Any, ...]) -> str:
    """The values of the static fields as JSON."""
    *plain, act = static
    return json.dumps([*plain, None if act is None else dataclasses.asdict(act)])


def _load(text: str) -> tuple[Any, ...]:
    *plain, act = json.loads(text)
    return *plain, None if act is None else ActSpec(**act)


def _static(q: "QTensor") -> str:
    return _dump(tuple(getattr(q, name) for name in _STATIC))


def _to_state(q: "QTensor") -> dict[str, Any]:
    arrays = {name: getattr(q, name) for name in _ARRAYS if getattr(q, name) is not None}
    return arrays | {"static": _static(q)}


def _from_state(target: "QTensor", state: dict[str, Any]) -> "QTensor":
    arrays = {name: value for name, value in state.items() if name != "static"}
    wanted = {name for name in _ARRAYS if getattr(target, name) is not None}
    if state.get("static") != _static(target) or arrays.keys() != wanted:
        raise ValueError(
            f"The state at {serialization.current_path() or 'the root'} must be of a QTensor "
            f"with the static fields of its target; got {state.get('static')} with "
            f"{', '.join(sorted(arrays))} for {_static(target)} with {', '.join(sorted(wanted))}. "
            "Quantize the target with the configuration that was saved."
        )
    return target.replace(**arrays)


register(QTensor)


def native_dtype(bits: int) -> jnp.dtype:
    """The smallest signed JAX dtype of 4 or 8 bits that holds `bits`-bit codes."""
    return jnp.dtype(jnp.int4 if bits <= 4 else jnp.int8)


def spread(small: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
    """Repeat `small` to `shape`: size 1 is shared, another size repeats in equal runs."""
    for axis, (have, want) in enumerate(zip(small.shape, shape, strict=True)):
        if have not in (1, want):
            small = jnp.repeat(small, want // have, axis=axis, total_repeat_length=want)
    return jnp.broadcast_to(small, shape)


def from_codes(
    codes: Int[Array, "..."],
    scale: Float[Array, "..."],
    zero_point: Int[Array, "..."] | None = None,
    *,
    bits: int | None = None,
    axis: int = -2,
    layout: Layout = "packed",
    dtype_name: str = "float32",
    act: ActSpec | None = None,
    like: QTensor | None = None,
) -> QTensor:
    """A QTensor of `codes`, integers of `bits` bits in the logical shape.

    Args:
      codes: Signed integers in the range of `bits`.
      scale: Of the rank of `codes`, each axis 1 or a divisor.
      zero_point: Shaped as `scale`, or None.
      bits: Width of a value.
      axis: Negative index of the input-channel axis.
      layout: How the values are stored.
      dtype_name: Float dtype of the array that is replaced.
      act: How the input is quantized.
      like: A QTensor to take its class and the five settings above from instead.

    Raises:
      ValueError: If a scale's axis neither is 1 nor divides the codes' axis.
    """
    if like is not None:
        bits, axis, dtype_name, act = like.bits, like.axis, like.dtype_name, like.act
    if bits not in packing.PLANES:
        raise ValueError(f"bits must be one of {sorted(packing.PLANES)}; got {bits}.")
    if axis >= 0:
        raise ValueError(f"axis must be negative, so that stacking keeps it true; got {axis}.")
    small = (scale,) if zero_point is None else (scale, zero_point)
    for array in small:
        if array.ndim != codes.ndim or any(
            size % part for size, part in zip(codes.shape, array.shape, strict=True)
        ):
            raise ValueError(
                "scale and zero_point need the rank of the codes, and axes of size 1 or a "
                f"divisor; got {array.shape} for codes of shape {codes.shape}."
            )
    block, pad = 1, 0
    if layout == "packed":
        block, _, pad = packing.packed_size(codes.shape[axis], bits)
        moved = jnp.moveaxis(codes, axis, -2) if axis != -2 else codes
        qvalue = packing.pack(moved, bits=bits)
        qvalue = qvalue if axis == -2 else jnp.moveaxis(qvalue, -2, axis)
    else:
        qvalue = codes.astype(native_dtype(bits))
    return (QTensor if like is None else type(like))(
        qvalue=qvalue,
        scale=scale,
        zero_point=None if zero_point is None else zero_point.astype(jnp.int8),
        bits=bits,
        axis=axis,
        block=block,
        pad=pad,
        layout=layout,
        dtype_name=dtype_name,
        act=act,
    )


def is_qtensor(leaf: Any) -> bool:
    """Whether `leaf` is a QTensor; the `is_leaf` of tree functions that stop at them."""
    return isinstance(leaf, QTensor)
