"""The low-bit matmuls: what callers see, and the choice of an implementation.

| implementation | runs on | takes |
|---|---|---|
| xla | everything | everything: it is the definition |
| tpu | TPUs | weights of whole tiles (`tiles_tpu.why_not`) |

A named implementation that cannot run raises `NotImplementedError`. `auto` takes the kernel of
the device where it takes the weight and has something to gain: where the weights are packed or
have groups. Of plain int8 matrices XLA makes an int8 matmul itself, and fuses what follows.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax import lax

from qjax.core.typing import Array, Float, Int
from qjax.kernels import tiles_tpu
from qjax.kernels.one_device import one_device
from qjax.kernels.packing import Format
from qjax.kernels.quant_matmul_tpu import quant_matmul_tpu
from qjax.kernels.quant_matmul_xla import quant_matmul_xla, weight_matmul_xla
from qjax.kernels.target import current_target
from qjax.kernels.weight_matmul_tpu import weight_matmul_tpu

Implementation = Literal["auto", "xla", "tpu"]


def choose(implementation: str, *, size: int, groups: int, fmt: Format, dtype: Any) -> str:
    """The implementation that runs, for the device that is traced for (`kernels.target`).

    Args:
      implementation: One of `Implementation`.
      size: Input channels.
      groups: Groups of them.
      fmt: Storage of the weight.
      dtype: Of what is multiplied.

    Raises:
      NotImplementedError: If the one that is named cannot run.
    """
    names = get_args(Implementation)
    if implementation not in names:
        raise NotImplementedError(
            f"The implementations of the low-bit matmul are {', '.join(map(repr, names))}; got "
            f"{implementation!r}."
        )
    if implementation == "xla":
        return "xla"
    platform, kind = current_target()
    reason = None
    if platform != "tpu":
        reason = f"it needs a TPU, and programs are traced for {kind} ({platform})"
    elif dtype not in (jnp.int8, jnp.bfloat16, jnp.float32):
        reason = f"activations must be bfloat16 or float32, got {jnp.dtype(dtype).name}"
    else:
        reason = tiles_tpu.why_not(size, groups, fmt)
    if implementation == "auto":
        gains = fmt.widens or groups > 1
        return "tpu" if reason is None and gains else "xla"
    if reason is not None:
        raise NotImplementedError(
            f"The implementation {implementation!r} of the low-bit matmul cannot run here: "
            f"{reason}. implementation='xla' runs everywhere, 'auto' takes what can."
        )
    return implementation


def quant_matmul(
    p: Int[Array, "m k"],
    x_scale: Float[Array, "m gx"],
    x_zero: Int[Array, "m gx"] | None,
    q: Array,
    w_scale: Float[Array, "g n"],
    w_zero: Int[Array, "g n"] | None,
    *,
    fmt: Format,
    dtype: Any = jnp.float32,
    implementation: Implementation = "auto",
) -> Float[Array, "m n"]:
    """Matmul of activation codes and weight codes; see `quant_matmul_xla` for the formula.

    Sums are in float32, and the result in `dtype`.

    Raises:
      ValueError: If the groups of activations and weights are of unequal size.
      NotImplementedError: If the implementation asked for cannot run here.
    """
    operands = (p, x_scale, x_zero, q, w_scale, w_zero)
    size, groups = p.shape[1], max(x_scale.shape[1], w_scale.shape[0])

    def by_xla(*operands: Any) -> Array:
        return quant_matmul_xla(*operands, fmt=fmt).astype(dtype)

    if {x_scale.shape[1], w_scale.shape[0]} - {1, groups} or size % groups:
        return by_xla(*operands)  # says what is wrong
    chosen = choose(implementation, size=size, groups=groups, fmt=fmt, dtype=p.dtype)
    kernel = functools.partial(quant_matmul_tpu, fmt=fmt, dtype=dtype)
    return _run(chosen, kernel, by_xla, operands)


def weight_matmul(
    x: Float[Array, "m k"],
    q: Array,
    w_scale: Float[Array, "g n"],
    w_zero: Int[Array, "g n"] | None,
    *,
    fmt: Format,
    implementation: Implementation = "auto",
) -> Float[Array, "m n"]:
    """Matmul of float activations and weight codes; see `weight_matmul_xla`.

    Raises:
      ValueError: If the groups do not divide the input channels.
      NotImplementedError: If the implementation asked for cannot run here.
    """
    operands = (x, q, w_scale, w_zero)
    by_xla = functools.partial(weight_matmul_xla, fmt=fmt)
    size, groups = x.shape[1], w_scale.shape[0]
    if size % groups:
        return by_xla(*operands)  # says what is wrong
    chosen = choose(implementation, size=size, groups=groups, fmt=fmt, dtype=x.dtype)
    kernel = functools.partial(weight_matmul_tpu, fmt=fmt)
    return _run(chosen, kernel, by_xla, operands)


def _run(
    chosen: str,
    kernel: Callable[..., Array],
    by_xla: Callable[..., Array],
    operands: tuple[Array | None, ...],
) -> Array:
    """The kernel on its platform, and XLA on others that the program may be lowered for too."""
    if chosen == "xla":
        return by_xla(*operands)
    there = [array is not None for array in operands]

    def with_nones(function: Callable[..., Array]) -> Callable[..., Array]:
        def call(*given: Array) -> Array:
            left = iter(given)
            return function(*(next(left) if one else None for one in there))

        return call

    xla = with_nones(by_xla)
    by_kernel = functools.partial(one_device, with_nones(kernel), xla)
    given = [array for array in operands if array is not None]
    return lax.platform_dependent(*given, default=xla, tpu=by_kernel)
