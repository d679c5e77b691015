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

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import promote_dtype

from qjax.core import foreign, layers
from qjax.core.foreign import LOW_BIT, WEIGHTS_ONLY
from qjax.core.qtensor import QTensor, is_qtensor, register
from qjax.core.typing import Array, Float


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
        return dataclasses.replace(self, axis=axis if added else axis + 1)


def box(q: QTensor) -> BoxedQTensor:
    """`q` as the leaf that an unmodified Linen model can read."""
    return BoxedQTensor(**_fields(q))


def unbox(b: QTensor) -> QTensor:
    """The bare QTensor of `b`, still quantized; `b.unbox()` would dequantize it."""
    return QTensor(**_fields(b))


def _fields(q: QTensor) -> dict[str, Any]:
    return {field.name: getattr(q, field.name) for field in dataclasses.fields(QTensor)}


def box_tree(params: Any) -> Any:
    """`params` with every QTensor boxed; other leaves are the same objects."""
    return jax.tree.map(lambda x: box(x) if is_qtensor(x) else x, params, is_leaf=is_qtensor)


def unbox_tree(params: Any) -> Any:
    """`params` with every QTensor bare, still quantized; the inverse of `box_tree`."""
    return jax.tree.map(lambda x: unbox(x) if is_qtensor(x) else x, params, is_leaf=is_qtensor)


class InterceptLog:
    """What ran within an `intercept()` block; written while Flax traces the model.

    A function that JAX compiled before runs without being traced, and adds nothing.
    """

    def __init__(self):
        self._seen: dict[tuple[str, str], None] = {}

    def _add(self, path: str, outcome: str) -> None:
        self._seen[path, outcome] = None

    def _has(self, path: str) -> bool:
        return any(seen == path for seen, _ in self._seen)

    @property
    def layers(self) -> tuple[tuple[str, str], ...]:
        """The path of every kernel met, and how it ran: in the order of the first calls.

        `"low-bit"`: integer arithmetic. `"low-bit weights, float arithmetic"`: the QTensor has no
        `act`. `"float"`: no QTensor there. `"dequantized: ..."`: the reason why.
        """
        return tuple(self._seen)

    def __str__(self) -> str:
        return "\n".join(f"{path}: {outcome}" for path, outcome in self.layers)


@contextlib.contextmanager
def intercept() -> Iterator[InterceptLog]:
    """Within it, Flax's own Dense, DenseGeneral and Conv run on QTensors at their low bits.

    Attention's projections are DenseGenerals, so they do as well. A subclass is intercepted
    where it calls the method of its parent. Layers whose options `ops` cannot express run on
    the dequantized kernel; the log that `with ... as log` gives says which and why.

    What is traced inside is what runs low-bit, so use it inside the function that is jitted
    (a function that JAX has compiled outside stays what it is):

        @jax.jit
        def apply(params, x):
            with qjax.linen.intercept():
                return model.apply({"params": params}, x)

    Static and per-step activation ranges come from the `"quant"` collection, at the layer's
    own path, as for `qjax.core.layers`.

    An error in a module that is not intercepted and holds a bare QTensor, which Flax cannot
    read, comes with a note that names the leaf.
    """
    log = InterceptLog()

    def run(next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if module.scope is None or module.is_initializing():
            return next_fun(*args, **kwargs)
        low_bit = _LOW_BIT.get(inspect.unwrap(context.orig_method.func))
        leaves = {name: _opened(leaf) for name, leaf in _own_params(module).items()}
        path = lambda name: "/".join((*module.path, name))
        if low_bit is not None and "kernel" in leaves:
            q = leaves["kernel"]
            reason = low_bit.why_not(module, q) if isinstance(q, QTensor) else "float"
            if reason is None:
                log._add(path("kernel"), WEIGHTS_ONLY if q.act is None else LOW_BIT)
                return low_bit.call(module, q, *args, **kwargs)
            log._add(path("kernel"), reason)
        quantized = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, QTensor)}
        try:
            y = next_fun(*args, **kwargs)
        except Exception as error:
            for name, leaf in quantized.items():
                if not isinstance(leaf, meta.AxisMetadata):
                    error.add_note(
                        f"{path(name)} is a bare QTensor, and {type(module).__name__} may read "
                        "its parameters as Flax does, which needs a box: pass "
                        "qjax.linen.box_tree(params), or leave the leaf in float."
                    )
            raise
        for name, leaf in quantized.items():
            if isinstance(module, layers.Dense | layers.Conv):  # these are low-bit anyway
                log._add(path(name), WEIGHTS_ONLY if leaf.act is None else LOW_BIT)
            elif not log._has(path(name)):  # a parent's method may have taken it
                log._add(path(name), f"dequantized: {type(module).__name__} has no low-bit form")
        return y

    with nn.intercept_methods(run):
        yield log


def _own_params(module: nn.Module) -> dict[str, Any]:
    """The leaves that the module itself holds, not those of its submodules."""
    params = module.variables.get("params", {})
    return {name: leaf for name, leaf in params.items() if not isinstance(leaf, Mapping)}


def _opened(leaf: Any) -> Any:
    """`leaf` out of the boxes around it; a QTensor stays as it is, boxed or bare."""
    while isinstance(leaf, meta.AxisMetadata) and not isinstance(leaf, QTensor):
        # A sharding constraint for the float kernel does not fit its codes and scales.
        leaf = leaf.value if isinstance(leaf, nn.Partitioned) else leaf.unbox()
    return leaf


def _add_bias(y: Array, bias: Array | None) -> Array:
    # In the rank of the output, as Flax adds it: some run with rank promotion forbidden.
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def _promoted(module: Any, x: Array, q: QTensor) -> tuple[Array, Array | None]:
    """The input and the bias in the dtype of the layer's computation."""
    bias = meta.unbox(module.get_variable("params", "bias")) if module.use_bias else None
    x, _, bias = promote_dtype(x, jnp.zeros((), q.dtype), bias, dtype=module.dtype)
    return x, bias


def _why_no_dense(module: Any, q: QTensor) -> str | None:
    if getattr(module, "batch_dims", ()):
        return f"dequantized: batch_dims={module.batch_dims}"
    if module.dot_general is not None or module.dot_general_cls is not None:
        return "dequantized: the layer has its own dot_general"
    return _why_no_float_options(module, q)


def _why_no_float_options(module: Any, q: QTensor) -> str | None:
    if module.promote_dtype is not promote_dtype:
        return "dequantized: the layer has its own promote_dtype"
    if q.act is None and module.precision is not None:
        return f"dequantized: precision={module.precision} asks for its own float matmul"
    return None


def _dense(module: nn.Dense | nn.DenseGeneral, q: QTensor, inputs: Array) -> Array:
    axis = getattr(module, "axis", -1)
    axes = sorted(a % inputs.ndim for a in ((axis,) if isinstance(axis, int) else axis))
    x, bias = _promoted(module, inputs, q)
    y = foreign.contract(x, q, axes=axes, row=_row(module))
    return _add_bias(y, bias)


def _why_no_conv(module: nn.Conv, q: QTensor) -> str | None:
    if module.mask is not None or not module.shared_weights:
        return "dequantized: the layer has a mask, or weights of its own for every pixel"
    if module.conv_general_dilated is not None or module.conv_general_dilated_cls is not None:
        return "dequantized: the layer has its own conv_general_dilated"
    reason = foreign.why_no_conv(
        q,
        strides=module.strides,
        padding=module.padding,
        input_dilation=module.input_dilation,
        kernel_dilation=module.kernel_dilation,
        groups=module.feature_group_count,
    )
    return _why_no_float_options(module, q) if reason is None else f"dequantized: {reason}"


def _conv(module: nn.Conv, q: QTensor, inputs: Array) -> Array:
    x, bias = _promoted(module, inputs, q)
    strides = foreign.per_axis(module.strides)[0]
    y = foreign.convolve(x, q, strides=strides, padding=module.padding, row=_row(module))
    return _add_bias(y, bias)


def _row(module: nn.Module) -> dict[str, Array]:
    return dict(module.variables.get("quant", {}))


@dataclasses.dataclass(frozen=True)
class _LowBit:
    """How one of Flax's layers runs on a QTensor, and the reason when it cannot."""

    call: Callable[..., Array]
    why_not: Callable[[Any, QTensor], str | None]


_LOW_BIT = {
    inspect.unwrap(nn.Dense.__call__): _LowBit(_dense, _why_no_dense),
    inspect.unwrap(nn.DenseGeneral.__call__): _LowBit(_dense, _why_no_dense),
    inspect.unwrap(nn.Conv.__call__): _LowBit(_conv, _why_no_conv),
}
