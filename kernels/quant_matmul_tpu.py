"""The low-bit matmul on TPUs: a Pallas kernel for Mosaic.

The formula is that of `quant_matmul_xla`. Weights cross HBM as they are stored and become int8
in VMEM; products are int8 with int32 sums, on the matrix unit. With one group the sums over all
input channels are integers; with more, those of a group become floats and are added up in
float32.

A group need not be a multiple of the 128 channels that are loaded at once: rows of the weights
around it are replaced by zeros, which takes no longer than the matrix unit would have idled.

The zero points of the weights take away sums of the activations' codes, which XLA adds up
where it makes the codes; those of the activations take away sums of the weights' codes, which
the matrix unit adds up by rows of ones.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax.core.typing import Array, Float, Int
from qjax.kernels.packing import Format
from qjax.kernels.quant_matmul_xla import shared_groups, sums_by_group
from qjax.kernels.tiles_tpu import (
    LANES,
    ROWS,
    Blocks,
    by_steps,
    call_by_blocks,
    choose_blocks,
    unpack_words,
)


def _dot(p: Int[Array, "m k"], q: Int[Array, "k n"]) -> Int[Array, "m n"]:
    return lax.dot_general(p, q, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def _groups(size: int, group: int) -> Iterator[tuple[slice, slice]]:
    """The channels of every group, and the whole lanes that hold them."""
    for first in range(0, size, group):
        last = first + group
        yield (
            slice(first, last),
            slice(first // LANES * LANES, min(-(-last // LANES) * LANES, size)),
        )


def _among_zeros(q: Int[Array, "k n"], inside: slice, lanes: slice) -> Int[Array, "k2 n"]:
    """The rows of a group, and zeros in place of the other rows of its lanes."""
    around = (inside.start - lanes.start, lanes.stop - inside.stop)
    zeros = [jnp.zeros((rows, q.shape[1]), q.dtype) for rows in around]
    parts = [part for part in (zeros[0], q[inside], zeros[1]) if part.shape[0]]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def _kernel(*refs: Any, names: tuple[str, ...], fmt: Format, group: int | None) -> None:
    """One block: `[m, k]` codes, `[k, n]` stored weights; sums are kept over the last axis."""
    at = dict(zip(names, refs, strict=True))
    step, steps = pl.program_id(2), pl.num_programs(2)
    total, weight_sums = at["total"], at.get("weight_sums")

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        if weight_sums is not None:
            weight_sums[...] = jnp.zeros_like(weight_sums)

    p, q = at["p"][...], unpack_words(at["q"][...], fmt)
    ones = jnp.ones((ROWS, p.shape[1]), jnp.int8)
    # Values of rows come along lanes, [groups, m]: as columns they would fill 128 lanes each.
    of_rows: dict[str, Array] = {
        name: at[name][...].T for name in ("x_scale", "x_zero", "x_sum") if name in at
    }
    of_columns: dict[str, Array] = {
        name: at[name][...] for name in ("w_scale", "w_zero") if name in at
    }

    def row(name: str, g: int) -> Array:
        array = of_rows[name]
        return array[:, g : g + 1] if array.shape[1] > 1 else array

    def column(name: str, g: int) -> Array:
        array = of_columns[name]
        return array[g : g + 1] if array.shape[0] > 1 else array

    def scaled(dot: Array, sums: Array | None, size: int, g: int) -> Array:
        """The sum over a group, without what the zero points add, in float32."""
        if "w_zero" in at:
            dot = dot - row("x_sum", g) * column("w_zero", g)
        if sums is not None:
            if "w_zero" in at:
                sums = sums - size * column("w_zero", g)
            dot = dot - row("x_zero", g) * sums
        return dot.astype(jnp.float32) * row("x_scale", g) * column("w_scale", g)

    if group is None:
        total[...] += _dot(p, q)
        if weight_sums is not None:
            weight_sums[...] += _dot(ones, q)
    else:
        for g, (inside, lanes) in enumerate(_groups(p.shape[1], group)):
            weights = _among_zeros(q, inside, lanes)
            sums = _dot(ones[:, lanes], weights)[:1] if "x_zero" in at else None
            total[...] += scaled(_dot(p[:, lanes], weights), sums, group, g)

    @pl.when(step == steps - 1)
    def _():
        y = total[...]
        if group is None:
            sums = None if weight_sums is None else weight_sums[:1]
            y = scaled(y, sums, p.shape[1] * steps, 0)
        at["y"][...] = y.astype(at["y"].dtype)


def quant_matmul_tpu(
    p: Int[Array, "m k"],
    x_scale: Float[Array, "m gx"],
    x_zero: Int[Array, "m gx"] | None,
    q: Array,
    w_scale: Float[Array, "g n"],
    w_zero: Int[Array, "g n"] | None,
    *,
    fmt: Format,
    dtype: Any = jnp.float32,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """The low-bit matmul of `quant_matmul_xla`, which says what the operands are.

    Args:
      p, x_scale, x_zero, q, w_scale, w_zero, fmt: As there; `tiles_tpu.why_not` says which
        weights are taken.
      dtype: Of the result; sums are in float32 before.
      blocks: Sizes of a step; None for `tiles_tpu.choose_blocks`.
      interpret: Whether to run on any device, slowly.
    """
    (rows, size), columns = p.shape, q.shape[1]
    groups = shared_groups(p, x_scale, w_scale)
    blocks = blocks or choose_blocks(rows, size, columns, groups=groups, fmt=fmt)
    assert blocks is not None  # what `why_not` is for
    steps = size // blocks.k
    operands = {
        "p": p,
        "q": q,
        "x_scale": by_steps(x_scale.T, steps, rows, jnp.float32),
        "w_scale": by_steps(w_scale, steps, columns, jnp.float32),
    }
    if x_zero is not None:
        operands["x_zero"] = by_steps(x_zero.T, steps, rows, jnp.int32)
    if w_zero is not None:
        operands["w_zero"] = by_steps(w_zero, steps, columns, jnp.int32)
        operands["x_sum"] = by_steps(sums_by_group(p, groups, 1).T, steps, rows, jnp.int32)
    m, n, _ = blocks
    scratch = {"total": pltpu.VMEM((m, n), jnp.int32 if groups == 1 else jnp.float32)}
    if x_zero is not None and groups == 1:
        scratch["weight_sums"] = pltpu.VMEM((ROWS, n), jnp.int32)
    return call_by_blocks(
        functools.partial(_kernel, fmt=fmt, group=size // groups if groups > 1 else None),
        operands,
        scratch,
        blocks=blocks,
        dtype=dtype,
        interpret=interpret,
        name="quant_matmul",
    )
