"""The low-bit matmuls: what callers see, and the choice of an implementation.

`xla` is the definition and runs everywhere. A named implementation that cannot run raises
`NotImplementedError`; `auto` takes the best that can.
"""

from typing import Literal

from qjax.core.typing import Array, Float, Int
from qjax.kernels.packing import Format
from qjax.kernels.quant_matmul_xla import quant_matmul_xla, weight_matmul_xla

Implementation = Literal["auto", "xla"]


def _require(implementation: str) -> None:
    if implementation not in ("auto", "xla"):
        raise NotImplementedError(
            f"The implementations of the low-bit matmul are 'auto' and 'xla'; got "
            f"{implementation!r}."
        )


def quant_matmul(
    p: Int[Array, "m k"],
    x_scale: Float[Array, "m gx"],
    x_zero: Int[Array, "m gx"] | None,
    q: Array,
    w_scale: Float[Array, "g n"],
    w_zero: Int[Array, "g n"] | None,
    *,
    fmt: Format,
    implementation: Implementation = "auto",
) -> Float[Array, "m n"]:
    """Matmul of activation codes and weight codes; see `quant_matmul_xla` for the formula.

    Raises:
      NotImplementedError: If the implementation asked for cannot run here.
    """
    _require(implementation)
    return quant_matmul_xla(p, x_scale, x_zero, q, w_scale, w_zero, fmt=fmt)


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
      NotImplementedError: If the implementation asked for cannot run here.
    """
    _require(implementation)
    return weight_matmul_xla(x, q, w_scale, w_zero, fmt=fmt)
