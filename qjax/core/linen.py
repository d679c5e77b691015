"""Running on QTensors inside other people's Flax Linen models.

Two ways, and neither touches the model or Flax:

- A `BoxedQTensor` in the params tree is enough for any Linen model to run: Flax opens every
  metadata box that it reads a parameter from, and this one opens by dequantizing. Weights are
  low-bit in memory, the arithmetic is the model's own.
- Within `intercept()`, `nn.Dense`, `nn.DenseGeneral` and `nn.Conv` take the box as it is and
  compute with `qjax.core.ops`: int8 arithmetic where the QTensor says how its layer's input
  is quantized. What has no low-bit form runs as above, and the log says so.

Whatever opens boxes opens these: `nn.unbox(params)` returns the whole tree in float. Code that
does so before `apply` wants bare QTensors (`unbox_tree`) and `intercept()`; outside of it a
bare QTensor is no parameter to Flax, which fails on its shape or its type.
"""

from typing import Any

import jax
from flax.core import meta

from qjax.core.qtensor import QTensor, is_qtensor, register
from qjax.core.typing import Array, Float

_FIELDS = tuple(QTensor.__dataclass_fields__)


@register
class BoxedQTensor(QTensor, meta.AxisMetadata[Any]):
    """A QTensor that Flax Linen reads as the float array it stands for."""

    def unbox(self) -> Float[Array, "..."]:
        """The dequantized array; its shape and dtype where the leaves are only shapes."""
        if isinstance(self.qvalue, jax.ShapeDtypeStruct):
            return jax.eval_shape(QTensor.dequantize, self)
        return self.dequantize()

    def replace_boxed(self, val: Any) -> "BoxedQTensor":
        """The box of another QTensor.

        Raises:
          TypeError: If `val` is a float array, which would need quantizing anew.
        """
        if not isinstance(val, QTensor):
            raise TypeError(
                "A quantized parameter can only be replaced by a QTensor; got "
                f"{type(val).__name__}. Quantize the new value, or keep this leaf in float."
            )
        return box(val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "BoxedQTensor":
        """The same tensor after a transformation stacked it along `index`."""
        del params  # nothing but the position matters
        return self._shifted(index, added=True)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "BoxedQTensor":
        """The same tensor before a transformation maps over its axis `index`.

        Raises:
          ValueError: If that axis holds the packed input channels, or if the layers along it
            share scales.
        """
        del params
        return self._shifted(index, added=False)

    def _shifted(self, index: int, *, added: bool) -> "BoxedQTensor":
        # Flax calls both while the arrays have the axis. `axis` counts from the end, so only
        # an axis behind the input channels moves it.
        if not hasattr(self.qvalue, "shape"):
            return self
        stacked, ndim = self.qvalue.shape, self.ndim
        position = index % ndim
        axis = self.axis - 1 if added and position >= ndim + self.axis else self.axis
        if position == ndim + axis:
            raise ValueError(
                f"A transformation maps over axis {index} of a kernel of shape {self.shape}, "
                "along which its input channels are quantized; stack the layers on another axis."
            )
        if self.scale.shape[position] != stacked[position]:
            raise ValueError(
                f"A transformation maps over axis {index} of a kernel of shape {self.shape}, but "
                f"its scales have the shape {self.scale.shape}: the layers share them. Quantize "
                "each layer by itself (jax.vmap over that axis) and try again."
            )
        if position < ndim + axis:
            return self
        return self.replace(axis=axis if added else axis + 1)


def box(q: QTensor) -> BoxedQTensor:
    """`q` as the leaf that an unmodified Linen model can read."""
    return BoxedQTensor(**{name: getattr(q, name) for name in _FIELDS})


def unbox(b: QTensor) -> QTensor:
    """The bare QTensor of `b`, still quantized; `b.unbox()` would dequantize it."""
    return QTensor(**{name: getattr(b, name) for name in _FIELDS})


def box_tree(params: Any) -> Any:
    """`params` with every QTensor boxed; other leaves are the same objects."""
    return jax.tree.map(lambda x: box(x) if is_qtensor(x) else x, params, is_leaf=is_qtensor)


def unbox_tree(params: Any) -> Any:
    """`params` with every QTensor bare, still quantized; the inverse of `box_tree`."""
    return jax.tree.map(lambda x: unbox(x) if is_qtensor(x) else x, params, is_leaf=is_qtensor)
