"""The matmul of float activations and low-bit weights on TPUs: a Pallas kernel for Mosaic.

The formula is that of `weight_matmul_xla`. A block of the weights crosses HBM as it is stored
and is dequantized in VMEM to the dtype of the activations, once for every block of rows: meant
for few rows, where a matmul waits for its weights.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax.core.typing import Array, Float, Int
from qjax.kernels.packing import Format
from qjax.kernels.tiles_tpu import Blocks, by_steps, call_by_blocks, choose_blocks, unpack_words


def _kernel(*refs: Any, names: tuple[str, ...], fmt: Format, group: int | None) -> None:
    """One block: `[m, k]` floats, `[k, n]` stored weights; sums are kept over the last axis."""
    at = dict(zip(names, refs, strict=True))
    step, total = pl.program_id(2), at["total"]

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    x, codes = at["x"][...], unpack_words(at["q"][...], fmt)
    scales, zeros = at["w_scale"][...], at["w_zero"][...] if "w_zero" in at else None
    size, parts = group or codes.shape[0], []
    for g in range(codes.shape[0] // size):
        values = codes[g * size : (g + 1) * size].astype(jnp.float32)
        if zeros is not None:
            values = values - zeros[g : g + 1]
        if group is not None:
            values = values * scales[g : g + 1]
        parts.append(values.astype(x.dtype))
    weights = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)
    total[...] += jnp.dot(x, weights, preferred_element_type=jnp.float32)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        y = total[...] if group is not None else total[...] * scales
        at["y"][...] = y.astype(at["y"].dtype)


def weight_matmul_tpu(
    x: Float[Array, "m k"],
    q: Array,
    w_scale: Float[Array, "g n"],
    w_zero: Int[Array, "g n"] | None,
    *,
    fmt: Format,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """`x @ ((q - w_zero) * w_scale)` in the dtype of `x`, summed in float32.

    Args:
      x: Activations, bfloat16 or float32.
      q, w_scale, w_zero, fmt: As `weight_matmul_xla` has them; `tiles_tpu.why_not` says which
        weights are taken.
      blocks: Sizes of a step; None for `tiles_tpu.choose_blocks`.
      interpret: Whether to run on any device, slowly.
    """
    (rows, size), groups, columns = x.shape, w_scale.shape[0], q.shape[1]
    blocks = blocks or choose_blocks(
        rows, size, columns, groups=groups, fmt=fmt, itemsize=x.dtype.itemsize
    )
    assert blocks is not None  # what `why_not` is for
    steps = size // blocks.k
    operands = {"x": x, "q": q, "w_scale": by_steps(w_scale, steps, columns, jnp.float32)}
    if w_zero is not None:
        operands["w_zero"] = by_steps(w_zero, steps, columns, jnp.float32)
    return call_by_blocks(
        functools.partial(_kernel, fmt=fmt, group=size // groups if groups > 1 else None),
        operands,
        {"total": pltpu.VMEM((blocks.m, blocks.n), jnp.float32)},
        blocks=blocks,
        dtype=x.dtype,
        interpret=interpret,
        name="weight_matmul",
    )
