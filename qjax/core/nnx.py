"""Running on QTensors inside other people's Flax NNX modules.

A quantized module is the same module with a `QuantizedParam` where an `nnx.Param` was: it
holds a QTensor and is read as the dequantized array, so the module's own code runs as it is.
`low_bit` goes further: its `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Conv` (attention's
projections included) compute with `qjax.core.ops`, through the attributes that Flax offers for
it: `dot_general`, `conv_general_dilated`, `promote_dtype`.

Functions return new modules and states that share the arrays they did not change; none
mutates its argument. Whatever reads a parameter's value dequantizes: `nnx.to_pure_dict` does,
`nnx.split` does not. `params` gives what `serialize.save` takes, `with_params` takes it back. `nnx.update` keeps the Variable types of the
module it updates, so a quantized State joins a float module's GraphDef with `nnx.merge`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from qjax.core import foreign
from qjax.core.foreign import LOW_BIT, WEIGHTS_ONLY
from qjax.core.qtensor import QTensor
from qjax.core.typing import Array, Float

Tree = TypeVar("Tree", nnx.Module, nnx.State)

# What nnx.Variable calls its settings for storing values in references, which QTensors are
# not; 0.12 also has the experimental "hijax" variables, which hold arrays only.
_PLAIN: dict[str, Any] = (
    {"hijax": False, "ref": False} if hasattr(nnx, "var_defaults") else {"use_ref": False}
)


class QuantizedParam(nnx.Variable[Any]):
    """A parameter that is stored as a QTensor and read as the float array it stands for.

    Not an `nnx.Param`: gradients and optimizers of those leave it alone. The Param's metadata
    (shardings among it) described the float array and is not kept.
    """

    def __init__(self, value: QTensor):
        if not isinstance(value, QTensor):
            raise TypeError(f"QuantizedParam holds a QTensor; got {type(value).__name__}.")
        super().__init__(value, **_PLAIN)

    def get_value(self, *, index: Any = ...) -> Float[Array, "..."]:
        """The dequantized array, or what `index` selects of it."""
        value = raw(self).dequantize()
        return value if index is ... else value[index]

    def set_value(self, value: Any, *, index: Any = ...) -> None:
        """Store another QTensor.

        Raises:
          TypeError: If `value` is a float array, which would need quantizing anew.
        """
        if not isinstance(value, QTensor) or index is not ...:
            raise TypeError(
                "A QuantizedParam can only be replaced by a whole QTensor; got "
                f"{type(value).__name__}. Quantize the new value, or keep the parameter in float."
            )
        if hasattr(nnx.Variable, "set_raw_value"):
            self.set_raw_value(value)
        else:
            self.raw_value = value

    @property
    def value(self) -> Any:
        """The dequantized array."""
        return self.get_value()

    @value.setter
    def value(self, value: Any) -> None:
        self.set_value(value)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return raw(self).shape

    def __nnx_repr__(self) -> Iterator[Any]:
        """What is stored, in one line."""
        yield nnx.reprlib.Object(type=type(self).__name__)
        yield nnx.reprlib.Attr("value", raw(self))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowBitKernel:
    """What a `LowBitParam` holds: a kernel and its layer's entries of the step's row."""

    q: QTensor
    row: dict[str, Array]

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape of the kernel."""
        return self.q.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The float dtype that the kernel stands for."""
        return self.q.dtype


class LowBitParam(QuantizedParam):
    """A QuantizedParam of a layer that `low_bit` changed: read as it is, still quantized."""

    def __init__(self, q: QTensor, row: Mapping[str, Array]):
        nnx.Variable.__init__(self, LowBitKernel(q, dict(row)), **_PLAIN)

    def get_value(self, *, index: Any = ...) -> Any:
        """The `LowBitKernel`."""
        del index  # the layer reads the whole
        return _stored(self)


def _stored(variable: nnx.Variable[Any]) -> Any:
    """What a Variable holds, without what reading it does; flax 0.11 has the attribute only."""
    if hasattr(nnx.Variable, "get_raw_value"):
        return variable.get_raw_value()
    return variable.raw_value


def raw(variable: nnx.Variable[Any]) -> QTensor:
    """The QTensor of a quantized parameter, not dequantized.

    Raises:
      TypeError: If the variable is not a `QuantizedParam`.
    """
    if not isinstance(variable, QuantizedParam):
        raise TypeError(f"raw takes a QuantizedParam; got {type(variable).__name__}.")
    stored = _stored(variable)
    return stored.q if isinstance(stored, LowBitKernel) else stored


def leaves(tree: nnx.Module | nnx.State) -> Iterator[tuple[str, Any]]:
    """Paths joined with `/`, and the arrays of Params or the QTensors of quantized ones.

    Variables of other kinds (statistics, caches, random keys) are not parameters and not here.
    """
    state = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    for path, variable in nnx.to_flat_state(state):
        if isinstance(variable, QuantizedParam):
            yield _join(path), raw(variable)
        elif isinstance(variable, nnx.Param):
            yield _join(path), _stored(variable)
        elif not isinstance(variable, nnx.Variable) and not isinstance(tree, nnx.Module):
            raise TypeError(
                f"A State must hold Variables to be quantized; {_join(path)} is a bare "
                f"{type(variable).__name__}. Pass the State that nnx.split gives, not nnx.pure's."
            )


def params(tree: nnx.Module | nnx.State) -> dict[str, Any]:
    """The parameters as nested dicts of arrays and QTensors: what `serialize.save` takes.

    Variables of other kinds (statistics, caches, random keys) are not parameters and not here.
    """
    return traverse_util.unflatten_dict(dict(leaves(tree)), sep="/")


def with_params(tree: Tree, params: Mapping[str, Any]) -> Tree:
    """A new module or state with these parameters: the inverse of `params`.

    Args:
      tree: A module or a state with parameters of the same paths and shapes, float or quantized;
        it stays as it is.
      params: As `params` gives them, or `serialize.load`.

    Raises:
      ValueError: If paths or shapes differ; the error names them all.
    """
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    mine = {path: tuple(np.shape(leaf)) for path, leaf in leaves(tree)}
    theirs = {path: tuple(np.shape(leaf)) for path, leaf in flat.items()}
    if mine != theirs:
        wrong = [
            f"{path} {theirs.get(path, 'is missing')}, here {mine.get(path, 'there is none')}"
            for path in sorted(mine.keys() | theirs.keys())
            if mine.get(path) != theirs.get(path)
        ]
        raise ValueError(
            f"params must have the paths and shapes of the module's parameters: {'; '.join(wrong)}."
        )

    def replace(path: tuple, variable: Any) -> Any:
        if not isinstance(variable, nnx.Param | QuantizedParam):
            return variable
        leaf = flat[_join(path)]
        if isinstance(leaf, QTensor):
            return QuantizedParam(leaf)
        kept = dict(variable.get_metadata()) if isinstance(variable, nnx.Param) else {}
        kind = type(variable) if isinstance(variable, nnx.Param) else nnx.Param
        return kind.from_metadata(leaf, kept) if kept else kind(leaf)

    return _map_variables(replace, tree)


def quantize_leaves(tree: Tree, quantize_leaf: Callable[[str, Any], Any]) -> Tree:
    """A new module or state with `quantize_leaf(path, array)` for every `nnx.Param`.

    Args:
      tree: A module or a state; it and its arrays stay as they are.
      quantize_leaf: Returns a QTensor; or an array, the same to leave the Param alone.
    """

    def replace(path: tuple, variable: Any) -> Any:
        if not isinstance(variable, nnx.Param):
            return variable
        before = _stored(variable)
        leaf = quantize_leaf(_join(path), before)
        if isinstance(leaf, QTensor):
            return QuantizedParam(leaf)
        if leaf is before:
            return variable
        return type(variable).from_metadata(leaf, dict(variable.get_metadata()))

    return _map_variables(replace, tree)


def dequantize(tree: Tree, *, dtype: Any = None) -> Tree:
    """A new module or state with float `nnx.Param`s for quantized parameters.

    Args:
      tree: A module or a state.
      dtype: Float dtype of these; None for that of the Params they were.
    """

    def replace(path: tuple, variable: Any) -> Any:
        if not isinstance(variable, QuantizedParam):
            return variable
        return nnx.Param(raw(variable).dequantize(dtype))

    return _map_variables(replace, tree)


def low_bit(module: nnx.Module, *, row: Mapping[str, Any] | None = None) -> Any:
    """A new module whose layers run on their QTensors at low bits where they can.

    Linear, LinearGeneral and 2-D Conv with QTensors do; the rest stays as it is, and `layers`
    says what runs how and why. To change the row of a module, call this again: it is cheap
    and may be part of what is traced.

    Args:
      module: As `qjax.quantize` returns it.
      row: Static or per-step activation ranges, in nested mappings by the module's path as in
        Linen's `"quant"` collection: `{"blocks": {"0": {"up": {"act_scale": ...}}}}`.

    Raises:
      ValueError: If the row has entries for a layer that does not run low-bit.
    """
    reasons = {path: reason for path, (_, reason) in _quantized_layers(module).items()}
    entries = {path: _entries(row or {}, path[:-1]) for path in reasons}
    lost = [_join(path[:-1]) for path, entry in entries.items() if entry and reasons[path]]
    unknown = set(_row_paths(row or {})) - {_join(path[:-1]) for path in reasons}
    if lost or unknown:
        raise ValueError(
            "The row must be for layers that run low-bit; got entries for "
            f"{', '.join(sorted({*lost, *unknown}))}. See qjax.nnx.layers(module)."
        )

    def replace(path: tuple, variable: Any) -> Any:
        if path in reasons and reasons[path] is None:
            return LowBitParam(raw(variable), entries[path])
        return variable

    new = _map_variables(replace, module)
    for _, layer in nnx.iter_graph(new):
        if isinstance(getattr(layer, "kernel", None), LowBitParam):
            layer.promote_dtype = _promote_dtype
            if isinstance(layer, nnx.Conv):
                layer.conv_general_dilated = _conv_general_dilated
            else:
                layer.dot_general = _dot_general
    return new


def layers(module: nnx.Module) -> tuple[tuple[str, str], ...]:
    """The path of every quantized kernel of a module, and how it runs.

    `"low-bit"`: integer arithmetic. `"low-bit weights, float arithmetic"`: the QTensor has no
    `act`. `"dequantized: ..."`: the module's own arithmetic, and the reason why; before
    `low_bit` that is every one.
    """

    def outcome(variable: QuantizedParam, reason: str | None) -> str:
        if isinstance(variable, LowBitParam):
            return WEIGHTS_ONLY if raw(variable).act is None else LOW_BIT
        return f"dequantized: {reason or 'low_bit has not been called on the module'}"

    found = _quantized_layers(module)
    return tuple((_join(path), outcome(*found[path])) for path in found)


def _join(path: tuple) -> str:
    return "/".join(map(str, path))


def _map_variables(function: Callable[[tuple, Any], Any], tree: Any) -> Any:
    """`function(path, variable)` over a state, or over the state of a module."""
    if isinstance(tree, nnx.Module):
        graphdef, state = nnx.split(tree)
        return nnx.merge(graphdef, _map_variables(function, state))
    flat = nnx.to_flat_state(tree)
    return nnx.from_flat_state([(path, function(path, variable)) for path, variable in flat])


def _entries(row: Mapping[str, Any], path: tuple) -> Mapping[str, Array]:
    """The arrays at the layer's own path in the row; none where the row has no such path."""
    for key in path:
        row = row.get(str(key), {})
    return {name: entry for name, entry in row.items() if not isinstance(entry, Mapping)}


def _row_paths(row: Mapping[str, Any], path: tuple = ()) -> Iterator[str]:
    """The layers that the row has arrays for."""
    if any(not isinstance(entry, Mapping) for entry in row.values()):
        yield _join(path)
    for name, entry in row.items():
        if isinstance(entry, Mapping):
            yield from _row_paths(entry, (*path, name))


def _quantized_layers(module: nnx.Module) -> dict[tuple, tuple[QuantizedParam, str | None]]:
    """By path: each quantized parameter, and why its layer cannot run low-bit (None: it can)."""
    nodes = {id(node): node for _, node in nnx.iter_graph(module)}
    holders = {
        id(variable): (name, node)
        for node in nodes.values()
        if isinstance(node, nnx.Module)
        for name, variable in vars(node).items()
        if isinstance(variable, QuantizedParam)
    }
    variables = {id(node): node for node in nodes.values() if isinstance(node, QuantizedParam)}
    paths = {id(node): path for path, node in nnx.iter_graph(module) if id(node) in variables}
    found = {}
    for key, variable in variables.items():
        name, node = holders.get(key, ("", None))
        reason = _why_not(node, raw(variable)) if name == "kernel" else "not a layer's kernel"
        found[paths[key]] = (variable, reason)
    return found


# The methods whose use of the attributes that `low_bit` sets is known.
_CALLS = {
    nnx.Linear.__call__: lax.dot_general,
    nnx.LoRALinear.__call__: lax.dot_general,
    nnx.LinearGeneral.__call__: None,
    nnx.Conv.__call__: lax.conv_general_dilated,
}


def _why_not(layer: Any, q: QTensor) -> str | None:
    call = type(layer).__call__
    if call not in _CALLS:
        return f"{type(layer).__name__} has no low-bit form"
    name = "conv_general_dilated" if isinstance(layer, nnx.Conv) else "dot_general"
    ours = (_CALLS[call], _dot_general, _conv_general_dilated)
    if getattr(layer, name) not in ours or getattr(layer, "dot_general_cls", None) is not None:
        return f"the layer has its own {name}"
    if layer.promote_dtype not in (promote_dtype, _promote_dtype):
        return "the layer has its own promote_dtype"
    if q.act is None and layer.precision is not None:
        return f"precision={layer.precision} asks for its own float matmul"
    if getattr(layer, "batch_axis", None):
        return f"batch_axis={dict(layer.batch_axis)}"
    if not isinstance(layer, nnx.Conv):
        return None
    if layer.mask is not None:
        return "the layer has a mask"
    return foreign.why_no_conv(
        q,
        strides=layer.strides,
        padding=layer.padding,
        input_dilation=layer.input_dilation,
        kernel_dilation=layer.kernel_dilation,
        groups=layer.feature_group_count,
    )


def _promote_dtype(args: tuple, /, *, dtype: Any = None, inexact: bool = True) -> tuple:
    """Flax's promotion, around a kernel that stays as it is."""
    x, kernel, *rest = args
    stand_in = jnp.zeros((), kernel.dtype) if isinstance(kernel, LowBitKernel) else kernel
    x, promoted, *rest = promote_dtype((x, stand_in, *rest), dtype=dtype, inexact=inexact)
    return x, kernel if isinstance(kernel, LowBitKernel) else promoted, *rest


def _dot_general(x: Array, kernel: Any, dimension_numbers: Any, **options: Any) -> Array:
    if not isinstance(kernel, LowBitKernel):
        return lax.dot_general(x, kernel, dimension_numbers, **options)
    (axes, _), _ = dimension_numbers
    return _finish(foreign.contract(x, kernel.q, axes=axes, row=kernel.row), options)


def _conv_general_dilated(
    x: Array, kernel: Any, window_strides: Any, padding: Any, **options: Any
) -> Array:
    if not isinstance(kernel, LowBitKernel):
        return lax.conv_general_dilated(x, kernel, window_strides, padding, **options)
    y = foreign.convolve(x, kernel.q, strides=window_strides[0], padding=padding, row=kernel.row)
    return _finish(y, options)


def _finish(y: Array, options: Mapping[str, Any]) -> Array:
    if options.get("out_sharding") is not None:
        raise NotImplementedError(
            "Low-bit layers take no out_sharding; constrain their output instead "
            "(jax.lax.with_sharding_constraint, or jax.sharding.reshard)."
        )
    dtype = options.get("preferred_element_type")
    return y if dtype is None else y.astype(dtype)
