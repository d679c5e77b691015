"""Low bits simulated in float inside any Flax model, for as long as they are being fitted.

While a quantizer is fitted its numbers must have gradients and its range is still open, so a
layer computes in float with the values that its integers stand for: the kernel in the params
is a float array of such values, and what goes into the layer passes through a function of the
caller's first. Nothing of the model is edited: Flax hands every layer's call to us
(`nn.intercept_methods`). Layers are those of `qjax.core.layers` and Flax's own Dense,
DenseGeneral and Conv; a layer's path is its module's, without `/kernel`.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn

from qjax.core import layers, ops
from qjax.core.config import ActSpec
from qjax.core.ops import choose_group_size
from qjax.core.qtensor import QTensor, spread
from qjax.core.quantizers import Codes, quantize_activation, to_floats
from qjax.core.typing import Array, Float
from qjax.kernels import conv_gradients
from qjax.kernels.quant_conv_xla import explicit_padding

Hook = Callable[[str, nn.Module, Array], Array]
"""`hook(path, layer, x)`: the input as the layer shall see it; `x` itself leaves it alone."""

LAYERS = (layers.Dense, layers.Conv, nn.Dense, nn.DenseGeneral, nn.Conv)


def is_conv(module: nn.Module) -> bool:
    """Whether a layer convolves: its samples share a scale over all pixels."""
    return isinstance(module, layers.Conv | nn.Conv)


@contextlib.contextmanager
def simulated(hook: Hook) -> Iterator[None]:
    """Within it, the inputs of all layers pass through `hook`.

    Use it inside the function that is traced. The low-rank branch of a layer sees the input as
    it is, as at low bits. Convolutions of our layers run in a form whose gradients may stand in
    a loop (`qjax.kernels.conv_gradients`).
    """

    def run(next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if not isinstance(module, LAYERS) or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if module.scope is None or module.is_initializing() or "quantized" in kwargs:
            return next_fun(*args, **kwargs)
        x, *rest = args
        seen = hook("/".join(module.path), module, x)
        if isinstance(module, layers.Conv):
            return next_fun(x, quantized=seen, convolve=_convolve)
        if isinstance(module, layers.Dense):
            y = next_fun(_rows(x), quantized=_rows(seen))
            return y.reshape(*x.shape[:-1], y.shape[-1])
        return next_fun(seen, *rest, **kwargs)

    with nn.intercept_methods(run):
        yield


def _rows(x: Array) -> Array:
    """`[*b, i]` as a matrix: the gradient to a kernel is then a matmul of two matrices.

    With more axes JAX writes it as a contraction over several, for which XLA:CPU copies one
    operand into another order and leaves its fast matmul: two to three times slower.
    """
    return x.reshape(-1, x.shape[-1])


def _convolve(x: Array, kernel: Any, *, strides: int, padding: Any, row: Any = None) -> Array:
    del row  # the range is the hook's affair
    if isinstance(kernel, QTensor):
        return ops.conv(x, kernel, strides=strides, padding=padding)
    pads = explicit_padding(padding, x.shape[1:3], kernel.shape[:2], strides)
    return conv_gradients.conv(x, kernel.astype(x.dtype), strides=strides, pads=pads)


def fake_quantize_dynamic(
    x: Float[Array, "b *s i"], act: ActSpec, module: nn.Module
) -> Float[Array, "b *s i"]:
    """What a dynamic range makes of an input; gradients pass as if it were not there."""
    group_size = None
    if act.granularity == "per_group":
        group_size = choose_group_size(act.group_size, x.shape[-1]) or x.shape[-1]
    sample_axes = (-3, -2, -1) if is_conv(module) else (-1,)
    codes = quantize_activation(x, act, group_size=group_size, sample_axes=sample_axes)
    scale, zero_point = codes.scale, codes.zero_point
    if act.granularity == "per_group":
        scale = spread(scale, x.shape)
        zero_point = None if zero_point is None else spread(zero_point, x.shape)
    quantized = to_floats(Codes(codes.codes, scale, zero_point)).astype(x.dtype)
    return x + jax.lax.stop_gradient(quantized - x)
