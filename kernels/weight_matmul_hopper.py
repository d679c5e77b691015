"""The matmul of few float rows and 4-bit weights on Hopper GPUs: a Pallas kernel for Mosaic GPU.

The formula is that of `weight_matmul_xla`. Such a matmul waits for its weights, so these are
fetched as they are stored, two to a byte, and nothing is made of them in memory: a warpgroup
fetches blocks of bytes by TMA, two others unpack them in registers, scale them, put them as
bfloat16 into shared memory, and multiply (`wgmma`, float32 sums). Few columns do not keep a whole
GPU busy: the input channels are cut into parts that run at once, and XLA adds up their sums.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.core.typing import Array, Float, Int
from qjax.kernels.packing import Format
from qjax.kernels.tiles_hopper import (
    WARPGROUPS,
    call,
    load,
    load_vector,
    pipeline,
    shared_memory,
    swizzled,
    why_not_chip,
)

# Rows of one `wgmma`, columns of a warpgroup, and blocks in flight.
ROWS, COLUMNS, STAGES = 64, 64, 4
# Blocks of threads that keep the 132 multiprocessors of an H100 busy.
BUSY = 132


def why_not(rows: Any, size: int, columns: int, groups: int, fmt: Format, chip: str) -> str | None:
    """Why the kernel does not take a matmul, as half a sentence; None if it does.

    Args:
      rows: Rows of the activations.
      size: Input channels.
      columns: Output channels.
      groups: Groups of input channels.
      fmt: Storage of the weight.
      chip: Kind of the device.
    """
    reason = why_not_chip(chip)
    if reason is not None:
        return reason
    if not isinstance(rows, int) or rows > ROWS:
        return f"it is for at most {ROWS} rows, got {rows}"
    if not fmt.packed or fmt.bits != 4 or fmt.pad or fmt.block % (2 * ROWS):
        return f"it unpacks 4 bits in blocks of a multiple of {2 * ROWS} input channels, got {fmt}"
    if groups > 1 and (size // groups) % (fmt.block // 2):
        return (
            f"groups must have a multiple of {fmt.block // 2} input channels, which share a half "
            f"of their bytes, got {size // groups}"
        )
    if columns % (WARPGROUPS * COLUMNS):
        return f"output channels must be a multiple of {WARPGROUPS * COLUMNS}, got {columns}"
    return None


class Cut(NamedTuple):
    """Input channels in as many parts at once, and blocks of a part that are in flight."""

    parts: int
    stages: int


def choose_cut(size: int, columns: int, fmt: Format) -> Cut:
    """The fewest parts that keep a GPU busy, of whole packing blocks."""
    wide, known = columns // (WARPGROUPS * COLUMNS), cuts(size, fmt)
    return next((cut for cut in known if cut.parts * wide >= BUSY), known[-1])


def cuts(size: int, fmt: Format) -> list[Cut]:
    """All cuts into whole packing blocks, the fewest parts first."""
    blocks = size // fmt.block
    divisors = [n for n in range(1, blocks + 1) if blocks % n == 0]
    return [Cut(n, min(STAGES, blocks // n)) for n in divisors]


def _kernel(*refs: Any, names: tuple[str, ...], fmt: Format, group: int | None, cut: Cut) -> None:
    """A block of columns and a part of the input channels; the last warpgroup fetches."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    at = dict(zip(names, refs, strict=True))
    part, j, warpgroup = (lax.axis_index(axis) for axis in ("part", "n", "warpgroup"))
    half, width = fmt.block // 2, WARPGROUPS * COLUMNS
    steps = at["x"].shape[1] // fmt.block // cut.parts
    mine = pl.ds(warpgroup * COLUMNS, COLUMNS)
    columns = pl.ds(j * width + warpgroup * COLUMNS, COLUMNS)
    dtype = at["x"].dtype

    def vector(name: str, first: Any) -> Array:
        """A value for every column of the half of a block that begins at a channel."""
        g = 0 if group is None else first // group
        found = load_vector(at[name].at[g, columns], 0)
        return lax.broadcast_in_dim(found, (half, COLUMNS), (1,))

    def weights(values: Array, first: Any) -> Array:
        if "w_zero" in at:
            values = values - vector("w_zero", first)
        if group is not None:
            values = values * vector("w_scale", first)
        return values.astype(dtype)

    def step(index: Any, q: Any, low: Any, high: Any, sums: Any) -> Any:
        stored = load(q.at[:, mine], plgpu.Layout.WGMMA)
        first = (part * steps + index[0]) * fmt.block
        # Bytes have bitwise operations alone. With its sign bit turned round a byte is 16 times
        # its upper code, when the lower is masked off.
        low_codes = (stored & 15).astype(jnp.float32) - 8
        high_codes = ((stored ^ -128) & -16).astype(jnp.float32) * (1 / 16)
        for i, codes in enumerate((low_codes, high_codes)):
            at["w"].at[warpgroup, i][...] = weights(codes, first + i * half)
        plgpu.commit_smem()
        for i, x in enumerate((low, high)):
            plgpu.wgmma(sums, x, at["w"].at[warpgroup, i])
        plgpu.wgmma_wait(0)
        return sums

    def compute(accumulate: Any) -> None:
        def scope(sums: Any) -> None:
            accumulate(sums)
            y = sums[...]
            if group is None:
                scale = load_vector(at["w_scale"].at[0, columns], 0)
                y = y * lax.broadcast_in_dim(scale, (ROWS, COLUMNS), (1,))
            out = at["y_smem"].at[warpgroup]
            out[...] = y
            plgpu.commit_smem()
            rows = at["y"].shape[1]
            plgpu.copy_smem_to_gmem(out.at[pl.ds(0, rows)], at["y"].at[part, :, columns])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(scope, plgpu.ACC((ROWS, COLUMNS), jnp.float32))

    of_x = functools.partial(plgpu.BlockSpec, (ROWS, half), transforms=swizzled(half, dtype))
    at_block = lambda s: part * steps + s
    run = pipeline(
        step,
        compute,
        [
            plgpu.BlockSpec(
                (half, width),
                lambda s: (at_block(s), j),
                transforms=swizzled(COLUMNS, jnp.int8),
            ),
            of_x(index_map=lambda s: (0, 2 * at_block(s))),
            of_x(index_map=lambda s: (0, 2 * at_block(s) + 1)),
        ],
        steps=steps,
        stages=cut.stages,
    )
    run(at["q"], at["x"], at["x"])


def weight_matmul_hopper(
    x: Float[Array, "m k"],
    q: Array,
    w_scale: Float[Array, "g n"],
    w_zero: Int[Array, "g n"] | None,
    *,
    fmt: Format,
    cut: Cut | None = None,
    interpret: Any = None,
) -> Float[Array, "m n"]:
    """`x @ ((q - w_zero) * w_scale)` in the dtype of `x`, summed in float32.

    Args:
      x: Activations, bfloat16 or float16.
      q, w_scale, w_zero, fmt: As `weight_matmul_xla` has them; `why_not` says which are taken.
      cut: Of the input channels; None for `choose_cut`.
      interpret: Parameters of Mosaic GPU's interpreter (jax >= 0.12), to run anywhere, slowly.
    """
    (rows, size), groups, columns = x.shape, w_scale.shape[0], q.shape[1]
    cut = cut or choose_cut(size, columns, fmt)
    written = -(-rows // 8) * 8
    spread = lambda array: jnp.broadcast_to(array.astype(jnp.float32), (groups, columns))
    operands = {
        "x": jnp.pad(x, ((0, ROWS - rows), (0, 0))),
        "q": lax.bitcast_convert_type(q, jnp.int8),
        "w_scale": spread(w_scale),
    }
    if w_zero is not None:
        operands["w_zero"] = spread(w_zero)
    parts = call(
        functools.partial(_kernel, fmt=fmt, group=size // groups if groups > 1 else None, cut=cut),
        operands,
        {
            "w": shared_memory((WARPGROUPS, 2, fmt.block // 2, COLUMNS), x.dtype),
            "y_smem": shared_memory((WARPGROUPS, ROWS, COLUMNS), jnp.float32),
        },
        result=jax.ShapeDtypeStruct((cut.parts, written, columns), jnp.float32),
        grid={"part": cut.parts, "n": columns // (WARPGROUPS * COLUMNS)},
        interpret=interpret,
    )
    return jnp.sum(parts, axis=0)[:rows].astype(x.dtype)
