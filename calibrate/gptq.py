"""GPTQ: round a kernel input by input, and let the inputs still to come make up for the error.

With `H = X^T X` of a layer's inputs the error of its outputs is `tr(D^T H D)`, `D` being the
change of the kernel. Inputs are rounded in order; the error of one, over the diagonal of the
upper Cholesky factor `U` of `H^-1`, times its row of `U`, is taken from those after it: that
minimises the error over what is not rounded yet. Updates beyond a block of inputs wait for its
end and are one matmul.

Plain arrays, `[i, o]` kernels; one program, `lax.scan` over blocks and a loop over the inputs of
a block, fit for `vmap` over layers of one shape.

References:
  Frantar et al., GPTQ, ICLR 2023, https://arxiv.org/abs/2210.17323, algorithm 1;
  Chen et al., Q-DiT, CVPR 2025, https://arxiv.org/abs/2406.17343 (scales refreshed at every
  group; its code reads kernels that miss the updates of the running block, `refresh="stale"`).
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from qjax.core.config import WeightSpec
from qjax.core.quantizers import Codes, integer_range, quantize_weight, round_to_codes, to_floats
from qjax.core.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQSettings:
    """How kernels are rounded.

    Attributes:
      damping: Added to the diagonal of `H`, as a share of its mean.
      block: Inputs after which the later ones are updated, where there are no groups or with
        `refresh="stale"`; groups are blocks else.
      act_order: Whether inputs with a large diagonal of `H` come first; scales of groups are
        those of the kernel as it was, then.
      refresh: When a group's scale is read from a kernel with all updates (`"aligned"`), or as
        it was at the last end of a block (`"stale"`, the released code of Q-DiT).
    """

    damping: float = 0.01
    block: int = 128
    act_order: bool = False
    refresh: Literal["aligned", "stale"] = "aligned"

    def __post_init__(self):
        if not 0 < self.damping:
            raise ValueError(f"damping must be positive; got {self.damping}.")
        if self.block < 1:
            raise ValueError(f"block must be at least 1; got {self.block}.")
        if self.refresh not in ("aligned", "stale"):
            raise ValueError(f"refresh must be aligned or stale; got {self.refresh!r}.")


class _Block(NamedTuple):
    """What a block hands to the next: the kernel so far, and the grid of the current group."""

    w: Float[Array, "i o"]
    scale: Float[Array, "1 o"]
    zero: Int[Array, "1 o"]


def factor_of(hessian: Float[Array, "i i"], *, damping: float) -> Float[Array, "i i"]:
    """The upper Cholesky factor of the inverse of the damped `H`.

    Inputs that are always 0 get a diagonal of 1: nothing is known of them.
    """
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    hessian = hessian + jnp.diag(dead.astype(hessian.dtype))
    size = hessian.shape[0]
    damp = damping * jnp.mean(jnp.where(dead, 1.0, diagonal))
    lower = jnp.linalg.cholesky(hessian + damp * jnp.eye(size, dtype=hessian.dtype))
    inverse = cho_solve((lower, True), jnp.eye(size, dtype=hessian.dtype))
    return jnp.linalg.cholesky(inverse).T


@functools.partial(jax.jit, static_argnames=("spec", "group_size", "scale_dtype", "settings"))
def gptq(
    w: Float[Array, "i o"],
    hessian: Float[Array, "i i"],
    spec: WeightSpec,
    *,
    group_size: int | None = None,
    scale_dtype: jnp.dtype = jnp.bfloat16,
    settings: GPTQSettings = GPTQSettings(),
) -> Codes:
    """Codes of a kernel with the least error of its outputs that rounding in order finds.

    Args:
      w: Kernel.
      hessian: `X^T X` of its inputs, or any multiple; float32.
      spec: Bits, symmetry, and how ranges are found.
      group_size: Inputs that share a scale; must divide i. None: all.
      scale_dtype: Dtype of the scales, with which the codes are computed.
      settings: How.

    Returns:
      As `quantize_weight` gives them: codes `[i, o]`, scale and zero point `[i / group_size, o]`,
      `[1, o]`, or `[1, 1]` with granularity `"per_tensor"`. Rows of inputs that are always 0 are
      set to 0.
    """
    inputs = w.shape[0]
    dead = jnp.diagonal(hessian) == 0
    w = jnp.where(dead[:, None], 0.0, w.astype(jnp.float32))
    grid = functools.partial(_grid, spec=spec, group_size=group_size, scale_dtype=scale_dtype)
    order = jnp.arange(inputs)
    fixed: tuple[Array, Array] | None = None
    if group_size is None or settings.act_order:
        scale, zero = grid(w)
        repeats = inputs // scale.shape[0]
        fixed = tuple(jnp.repeat(a, repeats, axis=0) for a in (scale, zero))  # type: ignore[assignment]
    if settings.act_order:
        order = jnp.argsort(-jnp.diagonal(hessian), stable=True)
        assert fixed is not None
        fixed = (fixed[0][order], fixed[1][order])
    upper = factor_of(hessian[order][:, order], damping=settings.damping)
    aligned = group_size is not None and settings.refresh == "aligned" and fixed is None
    block = group_size if aligned and group_size is not None else min(settings.block, inputs)
    codes, scales, zeros = _round_in_order(
        w[order], upper, fixed, spec, group_size, block, scale_dtype
    )
    codes = jnp.zeros_like(codes).at[order].set(codes)
    if fixed is not None:
        scales, zeros = grid(w)
    else:
        assert group_size is not None
        scales, zeros = scales[::group_size], zeros[::group_size]
    return Codes(codes, scales, None if spec.symmetric else zeros)


def _grid(
    w: Float[Array, "i o"], spec: WeightSpec, group_size: int | None, scale_dtype: jnp.dtype
) -> tuple[Array, Array]:
    """Scales and zero points (0 where there are none) of rounding to nearest."""
    found = quantize_weight(w, spec, group_size=group_size, scale_dtype=scale_dtype)
    zero = jnp.zeros(found.scale.shape, jnp.int32)
    return found.scale, zero if found.zero_point is None else found.zero_point


def _round_in_order(w, upper, fixed, spec, group_size, block, scale_dtype):
    """Codes of every row in the order given, and the scale and zero point each was given."""
    inputs, outputs = w.shape
    blocks = -(-inputs // block)
    pad = blocks * block - inputs
    qmin, qmax = integer_range(spec.bits, symmetric=spec.symmetric)
    # What is padded is rounded last and changes nothing: its row of U is that of a dead input.
    upper = jnp.pad(upper, ((0, pad), (0, pad)))
    upper = upper + jnp.diag((jnp.arange(blocks * block) >= inputs).astype(upper.dtype))
    w = jnp.pad(w, ((0, pad), (0, 0)))
    one = group_size or 1
    columns = jnp.arange(blocks * block)
    if fixed is not None:
        fixed = tuple(jnp.pad(a, ((0, pad), (0, 0)), constant_values=1) for a in fixed)

    def refreshed(whole: Array, at: Array) -> tuple[Array, Array]:
        """The grid of the group that begins at row `at` of the kernel so far."""
        rows = jax.lax.dynamic_slice_in_dim(whole, at, one, axis=0)
        alone = dataclasses.replace(spec, granularity="per_channel", group_size=None)
        return _grid(rows, alone, None, scale_dtype)

    def per_block(state: _Block, number: Array):
        first = number * block
        here = jax.lax.dynamic_slice_in_dim(state.w, first, block, axis=0)
        rows = jax.lax.dynamic_slice_in_dim(upper, first, block, axis=0)
        inner = jax.lax.dynamic_slice_in_dim(rows, first, block, axis=1)

        def per_row(j, carry):
            here, errors, codes, scales, zeros, scale, zero = carry
            at = first + j
            if fixed is not None:
                wide = lambda a: jnp.broadcast_to(a, (1, outputs))
                scale, zero = (wide(jax.lax.dynamic_slice_in_dim(a, at, 1, axis=0)) for a in fixed)
            else:
                scale, zero = jax.lax.cond(
                    at % one == 0,
                    lambda: refreshed(state.w, at),
                    lambda: (scale, zero),
                )
            row = jax.lax.dynamic_slice_in_dim(here, j, 1, axis=0)
            code = round_to_codes(row, scale, zero, qmin=qmin, qmax=qmax)
            error = (row - to_floats(Codes(code, scale, zero))) / inner[j, j]
            here = here - inner[j][:, None] * error
            put = lambda array, value: jax.lax.dynamic_update_slice_in_dim(array, value, j, axis=0)
            return (
                here,
                put(errors, error),
                put(codes, code),
                put(scales, scale),
                put(zeros, zero),
                scale,
                zero,
            )

        begin = (
            here,
            jnp.zeros((block, outputs), jnp.float32),
            jnp.zeros((block, outputs), jnp.int8),
            jnp.zeros((block, outputs), scale_dtype),
            jnp.zeros((block, outputs), jnp.int32),
            state.scale,
            state.zero,
        )
        here, errors, codes, scales, zeros, scale, zero = jax.lax.fori_loop(
            0, block, per_row, begin
        )
        later = jnp.where(columns >= first + block, rows, 0.0)
        w = state.w - later.T @ errors
        return _Block(w, scale, zero), (codes, scales, zeros)

    start = _Block(w, jnp.ones((1, outputs), scale_dtype), jnp.zeros((1, outputs), jnp.int32))
    _, found = jax.lax.scan(per_block, start, jnp.arange(blocks))
    codes, scales, zeros = (a.reshape(blocks * block, outputs)[:inputs] for a in found)
    return codes, scales, zeros


def output_error(
    w: Float[Array, "i o"], w_hat: Float[Array, "i o"], hessian: Float[Array, "i i"]
) -> Float[Array, ""]:
    """`tr(D^T H D)` for `D = w_hat - w`: the squared error of the outputs, summed."""
    change = w_hat.astype(jnp.float32) - w.astype(jnp.float32)
    return jnp.sum(change * (hessian @ change))
