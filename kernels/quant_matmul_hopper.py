"""The low-bit matmul on Hopper GPUs: a Pallas kernel for Mosaic GPU.

The formula is that of `quant_matmul_xla`. A warpgroup fetches blocks of codes by TMA, two others
multiply them (`wgmma`, int8 with int32 sums) and write their halves of the rows. With one
group the sums over all input channels are integers; with more, those of a group become floats
and are added up in float32 registers.

int8 operands must both have the input channels as their last axis, so the weights are unpacked
and transposed by XLA before: for many rows a small part of the time, and no kernel for few.
"""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.core.typing import Array, Float, Int
from qjax.kernels.packing import Format
from qjax.kernels.quant_matmul_xla import shared_groups, sums_by_group

# Names of chips with `wgmma` for int8, as JAX calls their kind.
CHIPS = ("H100", "H200", "H800", "H20", "GH200")
# Input channels and columns of a block, the best first.
WIDTHS_K, WIDTHS_N = (128, 64, 32), (128, 96, 64, 32)
# A group is one step: its block of rows and columns must fit twice.
LARGEST_GROUP = 384
# What a block of threads may use of 227 KiB of shared memory, and blocks in flight.
SHARED_BYTES, STAGES = 216 * 1024, 4
WARPGROUPS = 2  # that multiply


class Tile(NamedTuple):
    """Rows of a warpgroup, columns and input channels of a block, and blocks in flight."""

    m: int
    n: int
    k: int
    stages: int


def why_not(size: int, columns: int, groups: int, chip: str) -> str | None:
    """Why the kernel does not take a weight, as half a sentence; None if it does.

    Args:
      size: Input channels.
      columns: Output channels.
      groups: Groups of input channels.
      chip: Kind of the device.
    """
    if not set(CHIPS) & set(chip.split()):
        return f"it needs a Hopper GPU ({', '.join(CHIPS)}), got {chip}"
    group = size // groups
    if groups > 1 and group > LARGEST_GROUP:
        return f"groups must have at most {LARGEST_GROUP} input channels, got {group}"
    if group % WIDTHS_K[-1]:
        return f"groups must have a multiple of {WIDTHS_K[-1]} input channels, got {group}"
    if columns % WIDTHS_N[-1]:
        return f"output channels must be a multiple of {WIDTHS_N[-1]}, got {columns}"
    return None


def choose_tile(rows: int, size: int, columns: int, *, groups: int, itemsize: int) -> Tile:
    """The largest block that divides columns and groups; rows are padded to whole blocks.

    With groups a thread keeps integers and floats of its sums, and has half as many rows.
    """
    k = next(width for width in WIDTHS_K if size % width == 0) if groups == 1 else size // groups
    n = next(width for width in WIDTHS_N if columns % width == 0)

    def stages(m: int) -> int:
        left = SHARED_BYTES - WARPGROUPS * m * n * itemsize
        return min(STAGES, size // k, left // ((WARPGROUPS * m + n) * k))

    large = groups == 1 and rows > WARPGROUPS * 64 and stages(128) > 2
    m = 128 if large else 64
    return Tile(m, n, k, stages(m))


def _kernel(*refs: Any, names: tuple[str, ...], tile: Tile, size: int, groups: int) -> None:
    """A block of rows and columns; the last of the warpgroups fetches for the others."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    at = dict(zip(names, refs, strict=True))
    i, j, warpgroup = (lax.axis_index(axis) for axis in ("m", "n", "warpgroup"))
    block_m = WARPGROUPS * tile.m
    rows = pl.ds(i * block_m + warpgroup * tile.m, tile.m)
    columns = pl.ds(j * tile.n, tile.n)
    late = 1 if groups == 1 and tile.stages > 1 else 0  # products still running at a step's end

    def vector(name: str, g: Any, axis: int) -> Array:
        """A value for every row (axis 0) or column (1) of the block, spread over it."""
        part = at[name].at[g if at[name].shape[0] > 1 else 0, rows if axis == 0 else columns]
        return lax.broadcast_in_dim(_load(part, 1 - axis), (tile.m, tile.n), (axis,))

    def scaled(dot: Array, g: Any) -> Array:
        """The sum over a group, without what the zero points add, in float32."""
        if "w_zero" in at:
            dot = dot - vector("x_sum", g, 0) * vector("w_zero", g, 1)
        if "x_zero" in at:
            dot = dot - vector("x_zero", g, 0) * vector("w_sum", g, 1)
        return dot.astype(jnp.float32) * vector("x_scale", g, 0) * vector("w_scale", g, 1)

    def write(y: Array) -> None:
        out = at["y_smem"].at[warpgroup]
        out[...] = y.astype(at["y"].dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, at["y"].at[rows, columns])
        plgpu.wait_smem_to_gmem(0)

    def multiply(sums: Any, p: Any, q: Any) -> None:
        plgpu.wgmma(sums, p.at[pl.ds(warpgroup * tile.m, tile.m)], _transposed(q))

    def whole(pipeline: Any) -> None:
        def scope(sums: Any) -> None:
            pipeline(sums)
            write(scaled(sums[...], 0))

        pl.run_scoped(scope, plgpu.ACC((tile.m, tile.n), jnp.int32))

    def whole_step(index: Any, p: Any, q: Any, sums: Any) -> Any:
        multiply(sums, p, q)
        plgpu.wgmma_wait(late)
        return sums

    def grouped(pipeline: Any) -> None:
        zeros = jnp.zeros((tile.m, tile.n), jnp.float32)
        write(pipeline(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)))

    def grouped_step(index: Any, p: Any, q: Any, total: Array) -> Array:
        def scope(sums: Any) -> Array:
            multiply(sums, p, q)
            return sums[...]

        dot = pl.run_scoped(scope, plgpu.ACC((tile.m, tile.n), jnp.int32))
        return total + scaled(dot, index[0])

    swizzle = plgpu.find_swizzle(tile.k * 8)
    transforms = (plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle))
    spec = functools.partial(
        plgpu.BlockSpec,
        index_map=lambda step: (0, step),
        transforms=transforms,
        delay_release=late,
    )
    step: Any = whole_step if groups == 1 else grouped_step
    pipeline = plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(size // tile.k,),
        memory_registers=40,
        in_specs=[spec((block_m, tile.k)), spec((tile.n, tile.k))],
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        max_concurrent_steps=tile.stages,
        compute_context=whole if groups == 1 else grouped,
    )
    pipeline(at["p"].at[pl.ds(i * block_m, block_m)], at["q"].at[columns])


def _load(ref: Any, reduced: int) -> Array:
    """A vector as the lines of sums along axis `reduced` have it."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    settings: dict[str, Any] = {"layout": plgpu.Layout.WGMMA.reduce(reduced), "optimized": False}
    if "idx" in inspect.signature(plgpu.load).parameters:  # before jax 0.11
        return plgpu.load(ref, (), **settings)
    return plgpu.load(ref, **settings)


def _transposed(ref: Any) -> Any:
    import jax.experimental.pallas.mosaic_gpu as plgpu

    if jax.__version_info__ < (0, 12):
        return plgpu.transpose_ref(ref, (1, 0))
    return ref.transpose((1, 0))


def quant_matmul_hopper(
    p: Int[Array, "m k"],
    x_scale: Float[Array, "m gx"],
    x_zero: Int[Array, "m gx"] | None,
    q: Array,
    w_scale: Float[Array, "g n"],
    w_zero: Int[Array, "g n"] | None,
    *,
    fmt: Format,
    dtype: Any = jnp.float32,
    tile: Tile | None = None,
    interpret: Any = None,
) -> Float[Array, "m n"]:
    """The low-bit matmul of `quant_matmul_xla`, which says what the operands are.

    Args:
      p, x_scale, x_zero, q, w_scale, w_zero, fmt: As there; `why_not` says which are taken.
      dtype: Of the result; sums are in float32 before.
      tile: Sizes of a block; None for `choose_tile`.
      interpret: Parameters of Mosaic GPU's interpreter (jax >= 0.12), to run anywhere, slowly.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    (rows, size), columns = p.shape, q.shape[1]
    groups = shared_groups(p, x_scale, w_scale)
    dtype = jnp.dtype(dtype)
    tile = tile or choose_tile(rows, size, columns, groups=groups, itemsize=dtype.itemsize)
    padded = -(-rows // (WARPGROUPS * tile.m)) * WARPGROUPS * tile.m
    codes = fmt.decode(q)[:size]

    def of_rows(array: Array, dtype: Any) -> Array:
        array = jnp.broadcast_to(array.astype(dtype).T, (array.shape[1], rows))
        return jnp.pad(array, ((0, 0), (0, padded - rows)))

    def of_columns(array: Array, dtype: Any) -> Array:
        return jnp.broadcast_to(array.astype(dtype), (array.shape[0], columns))

    operands = {
        "p": jnp.pad(p, ((0, padded - rows), (0, 0))),
        "q": codes.T,
        "x_scale": of_rows(x_scale, jnp.float32),
        "w_scale": of_columns(w_scale, jnp.float32),
    }
    if w_zero is not None:
        operands["w_zero"] = of_columns(w_zero, jnp.int32)
        operands["x_sum"] = of_rows(sums_by_group(p, groups, 1), jnp.int32)
    if x_zero is not None:
        operands["x_zero"] = of_rows(x_zero, jnp.int32)
        weight_sums = sums_by_group(codes, groups, 0)
        if w_zero is not None:
            weight_sums = weight_sums - size // groups * w_zero.astype(jnp.int32)
        operands["w_sum"] = of_columns(weight_sums, jnp.int32)

    width = plgpu.find_swizzle(tile.n * dtype.itemsize * 8)
    transforms = (
        plgpu.TilingTransform((8, width // dtype.itemsize)),
        plgpu.SwizzleTransform(width),
    )
    held = plgpu.SMEM((WARPGROUPS, tile.m, tile.n), dtype, transforms=transforms)
    result = jax.ShapeDtypeStruct((padded, columns), dtype)
    # Keywords got other names in jax 0.12.
    new = "out_type" in inspect.signature(plgpu.kernel).parameters
    shapes: dict[str, Any] = {"out_type" if new else "out_shape": result}
    shapes["scratch_types" if new else "scratch_shapes"] = [held]
    if interpret is not None:
        shapes["interpret"] = interpret
    run = plgpu.kernel(
        functools.partial(
            _kernel, names=(*operands, "y", "y_smem"), tile=tile, size=size, groups=groups
        ),
        grid=(padded // (WARPGROUPS * tile.m), columns // tile.n),
        grid_names=("m", "n"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=False),
        **shapes,
    )
    return run(*operands.values())[:rows]
