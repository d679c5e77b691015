"""The low-bit matmuls: what callers see, and the choice of an implementation.

| implementation | runs on | takes (`problem.why_not`) |
|---|---|---|
| xla | everything | everything: it is the definition |
| tpu | TPUs | weights of whole tiles |
| hopper | H100, H200 and their like, jax >= 0.10 | codes of whole blocks; few rows of floats with packed weights of 4 bits |

A named implementation that cannot run raises `NotImplementedError`. `auto` takes on a TPU the
kernel where it takes the weight and has something to gain: where the weights are packed or have
groups; of plain int8 matrices XLA makes an int8 matmul itself, and fuses what follows. On a GPU
it takes XLA: the kernels for Hopper have run in an interpreter only. What
`qjax tune` measured on the machine goes before (`kernels.tuning`), and `prefer` before that.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax.numpy as jnp

from qjax.core.typing import Array, Float, Int
from qjax.kernels import quant_matmul_hopper as hopper
from qjax.kernels import tuning
from qjax.kernels.one_device import one_device
from qjax.kernels.packing import Format
from qjax.kernels.problem import Problem, why_not
from qjax.kernels.quant_matmul_tpu import quant_matmul_tpu
from qjax.kernels.quant_matmul_xla import quant_matmul_xla, shared_groups, weight_matmul_xla
from qjax.kernels.target import by_platform, current_target
from qjax.kernels.tiles_tpu import Blocks
from qjax.kernels.tuning import Choice
from qjax.kernels.weight_matmul_hopper import Cut, weight_matmul_hopper
from qjax.kernels.weight_matmul_tpu import weight_matmul_tpu

Implementation = Literal["auto", "xla", "tpu", "hopper"]

_PREFERRED: contextvars.ContextVar[str | None] = contextvars.ContextVar("preferred", default=None)


@contextlib.contextmanager
def prefer(implementation: Implementation) -> Iterator[None]:
    """Programs traced within take this one for `auto` where it can run, and else XLA.

    Raises:
      NotImplementedError: If there is none of that name.
    """
    _check_name(implementation)
    token = _PREFERRED.set(None if implementation == "auto" else implementation)
    try:
        yield
    finally:
        _PREFERRED.reset(token)


def choose(implementation: str, problem: Problem) -> Choice:
    """The implementation that runs, for the device that is traced for (`kernels.target`).

    Raises:
      NotImplementedError: If the one that is named cannot run.
    """
    _check_name(implementation)
    tuning.record(problem)
    if implementation == "auto":
        preferred = _PREFERRED.get()
        tuned = tuning.choice(problem) if preferred is None else None
        if tuned is not None:
            return tuned
        gains = problem.fmt.widens or problem.groups > 1
        wanted = preferred or ("tpu" if gains and current_target().platform == "tpu" else "xla")
        return Choice(wanted if why_not(wanted, problem) is None else "xla")
    reason = why_not(implementation, problem)
    if reason is not None:
        raise NotImplementedError(
            f"The implementation {implementation!r} of the low-bit matmul cannot run here: "
            f"{reason}. implementation='xla' runs everywhere, 'auto' takes what can."
        )
    return Choice(implementation)


def _check_name(implementation: str) -> None:
    names = get_args(Implementation)
    if implementation not in names:
        raise NotImplementedError(
            f"The implementations of the low-bit matmul are {', '.join(map(repr, names))}; got "
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
    groups = shared_groups(p, x_scale, w_scale)
    zeros = x_zero is not None, w_zero is not None
    shape = p.shape[0], p.shape[1], q.shape[1]
    chosen = choose(implementation, Problem(*shape, groups, fmt, p.dtype, jnp.dtype(dtype), *zeros))

    def by_xla(*operands: Any) -> Array:
        piece = _piece(chosen)
        return quant_matmul_xla(*operands, fmt=fmt, piece=piece).astype(dtype)

    def by_kernel(*operands: Any) -> Array:
        if chosen.implementation == "tpu":
            blocks = None if chosen.blocks is None else Blocks(*chosen.blocks)
            return quant_matmul_tpu(*operands, fmt=fmt, dtype=dtype, blocks=blocks)
        tile = None if chosen.blocks is None else hopper.Tile(*chosen.blocks)
        return hopper.quant_matmul_hopper(*operands, fmt=fmt, dtype=dtype, tile=tile)

    if chosen.implementation == "xla":
        return by_xla(*operands)
    return on_its_platform(chosen.implementation, by_kernel, by_xla, operands)


def _piece(chosen: Choice) -> int | None:
    """Columns at once, if XLA was chosen with its own."""
    return chosen.blocks[0] if chosen.implementation == "xla" and chosen.blocks else None


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
    size, groups = x.shape[1], w_scale.shape[0]
    if size % groups:
        return weight_matmul_xla(*operands, fmt=fmt)  # says what is wrong
    zeros, shape = (False, w_zero is not None), (x.shape[0], size, q.shape[1])
    chosen = choose(implementation, Problem(*shape, groups, fmt, x.dtype, x.dtype, *zeros))
    by_xla = functools.partial(weight_matmul_xla, fmt=fmt, piece=_piece(chosen))

    def by_kernel(*operands: Any) -> Array:
        if chosen.implementation == "tpu":
            blocks = None if chosen.blocks is None else Blocks(*chosen.blocks)
            return weight_matmul_tpu(*operands, fmt=fmt, blocks=blocks)
        cut = None if chosen.blocks is None else Cut(*chosen.blocks)
        return weight_matmul_hopper(*operands, fmt=fmt, cut=cut)

    if chosen.implementation == "xla":
        return by_xla(*operands)
    return on_its_platform(chosen.implementation, by_kernel, by_xla, operands)


def on_its_platform(
    chosen: str,
    kernel: Callable[..., Array],
    by_xla: Callable[..., Array],
    operands: tuple[Array | None, ...],
) -> Array:
    """The kernel on its platform, and XLA on others that the program may be lowered for too."""
    there = [array is not None for array in operands]

    def with_nones(function: Callable[..., Array]) -> Callable[..., Array]:
        def call(*given: Array) -> Array:
            left = iter(given)
            return function(*(next(left) if one else None for one in there))

        return call

    xla = with_nones(by_xla)
    by_kernel = functools.partial(one_device, with_nones(kernel), xla)
    given = [array for array in operands if array is not None]
    platform = {"tpu": "tpu", "hopper": "cuda"}[chosen]
    return by_platform(*given, default=xla, **{platform: by_kernel})
