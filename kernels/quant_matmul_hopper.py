"""The low-bit matmul on Hopper GPUs: a Pallas kernel for Mosaic GPU.

The formula is that of `quant_matmul_xla`. A warpgroup fetches blocks of codes by TMA, two others
multiply them (`wgmma`, int8 with int32 sums) and write their halves of the rows. With one
group the sums over all input channels are integers; with more, those of a group become floats
and are added up in float32 registers.

int8 operands must both have the input channels as their last axis, so the weights are unpacked
and transposed by XLA before: for many rows a small part of the time, and no kernel for few.

A convolution is the same matmul (`windows_matmul_hopper`): with the pixels of padded images as
rows, a tap of its kernel multiplies rows that stand a fixed number further down, so that nothing
but the first row of a fetched block changes from tap to tap. TMA begins at multiples of eight rows:
for the columns of the kernel there is a copy of the images each, three instead of nine patches.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.core.typing import Array, Float, Int
from qjax.kernels.packing import Format
from qjax.kernels.quant_matmul_xla import shared_groups, sums_by_group
from qjax.kernels.tiles_hopper import (
    WARPGROUPS,
    call,
    load_vector,
    pipeline,
    shared_memory,
    swizzled,
    transposed,
    why_not_chip,
)

# Input channels and columns of a block, the best first.
WIDTHS_K, WIDTHS_N = (128, 64, 32), (128, 96, 64, 32)
# A group is one step: its block of rows and columns must fit twice.
LARGEST_GROUP = 384
# What a block of threads may use of 227 KiB of shared memory, and blocks in flight.
SHARED_BYTES, STAGES = 216 * 1024, 4
ROW_STEP = 8  # TMA begins at multiples of it


class Window(NamedTuple):
    """The taps of a convolution's kernel.

    Attributes:
      height: Of the kernel.
      width: Of the kernel; there are as many copies of the images.
      row: Pixels in a row of a copy, a multiple of `ROW_STEP`.
    """

    height: int
    width: int
    row: int

    @property
    def taps(self) -> int:
        """How many there are."""
        return self.height * self.width

    def below(self, tap: Any) -> Any:
        """Rows between the pixel at the window's corner and that of a tap, in its copy."""
        return tap // self.width * self.row


ONE_PIXEL = Window(1, 1, ROW_STEP)


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
    reason = why_not_chip(chip)
    if reason is not None:
        return reason
    group = size // groups
    if groups > 1 and group > LARGEST_GROUP:
        return f"groups must have at most {LARGEST_GROUP} input channels, got {group}"
    if group % WIDTHS_K[-1]:
        return f"groups must have a multiple of {WIDTHS_K[-1]} input channels, got {group}"
    if columns % WIDTHS_N[-1]:
        return f"output channels must be a multiple of {WIDTHS_N[-1]}, got {columns}"
    return None


def choose_tile(rows: int, size: int, columns: int, *, group: int | None, itemsize: int) -> Tile:
    """The largest of `tiles` that the rows fill."""
    return tiles(rows, size, columns, group=group, itemsize=itemsize)[0]


def tiles(rows: int, size: int, columns: int, *, group: int | None, itemsize: int) -> list[Tile]:
    """Blocks that divide columns and groups, the best first; rows are padded to whole blocks.

    With groups a thread keeps integers and floats of its sums, and has half as many rows.

    Args:
      rows: Rows of the input.
      size: Input channels, of a tap if there are several.
      columns: Output channels.
      group: Input channels of a group; None where all share their scales.
      itemsize: Bytes of a value of the result.
    """
    found = []
    for m in (128, 64) if group is None and rows > WARPGROUPS * 64 else (64,):
        for n in (width for width in WIDTHS_N if columns % width == 0):
            for k in [group] if group else [width for width in WIDTHS_K if size % width == 0]:
                left = SHARED_BYTES - WARPGROUPS * m * n * itemsize
                stages = min(STAGES, size // k, left // ((WARPGROUPS * m + n) * k))
                if stages > 0 and (m == 64 or stages > 2):
                    found.append(Tile(m, n, k, stages))
    return found


def _kernel(
    *refs: Any, names: tuple[str, ...], tile: Tile, size: int, groups: int, window: Window
) -> None:
    """A block of rows and columns; the last of the warpgroups fetches for the others.

    `size` are the input channels of a tap, `groups` those of all taps.
    """
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
        return lax.broadcast_in_dim(load_vector(part, 1 - axis), (tile.m, tile.n), (axis,))

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
        plgpu.wgmma(sums, p.at[pl.ds(warpgroup * tile.m, tile.m)], transposed(q))

    def whole(accumulate: Any) -> None:
        def scope(sums: Any) -> None:
            accumulate(sums)
            write(scaled(sums[...], 0))

        pl.run_scoped(scope, plgpu.ACC((tile.m, tile.n), jnp.int32))

    def whole_step(index: Any, p: Any, q: Any, sums: Any) -> Any:
        multiply(sums, p, q)
        plgpu.wgmma_wait(late)
        return sums

    def grouped(accumulate: Any) -> None:
        zeros = jnp.zeros((tile.m, tile.n), jnp.float32)
        write(accumulate(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)))

    def grouped_step(index: Any, p: Any, q: Any, total: Array) -> Array:
        def scope(sums: Any) -> Array:
            multiply(sums, p, q)
            return sums[...]

        dot = pl.run_scoped(scope, plgpu.ACC((tile.m, tile.n), jnp.int32))
        return total + scaled(dot, index[0])

    spec = functools.partial(
        plgpu.BlockSpec, transforms=swizzled(tile.k, jnp.int8), delay_release=late
    )
    steps = size // tile.k  # of a tap

    def rows_at(step: Any) -> tuple[Any, ...]:
        tap = step // steps
        return tap % window.width, i * block_m + window.below(tap), step % steps

    run = pipeline(
        whole_step if groups == 1 else grouped_step,
        whole if groups == 1 else grouped,
        [
            spec((None, pl.Element(block_m), tile.k), index_map=rows_at),
            spec((tile.n, tile.k), index_map=lambda step: (j, step)),
        ],
        steps=window.taps * steps,
        stages=tile.stages,
    )
    run(at["p"], at["q"])


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
    groups = shared_groups(p, x_scale, w_scale)
    p, q = _here(p, q)
    rows = {"x_scale": x_scale, "x_zero": x_zero}
    if w_zero is not None:
        rows["x_sum"] = sums_by_group(p, groups, 1)
    weight = (fmt.decode(q)[: p.shape[1]], w_scale, w_zero)
    return _multiply(p[None], rows, weight, groups, ONE_PIXEL, dtype, tile, interpret)


def windows_matmul_hopper(
    image: Int[Array, "b h w i"],
    x_scale: Float[Array, "#b 1 1 gx"],
    x_zero: Int[Array, "#b 1 1 gx"] | None,
    q: Array,
    w_scale: Float[Array, "g o"],
    w_zero: Int[Array, "g o"] | None,
    *,
    taps: tuple[int, int],
    fmt: Format,
    dtype: Any = jnp.float32,
    tile: Tile | None = None,
    interpret: Any = None,
) -> Float[Array, "b h2 w2 o"]:
    """A low-bit convolution of stride 1 as a matmul of windows that are found in place.

    Windows that would leave the image below are computed too and dropped: two rows of every
    image for a kernel of 3. So are those that fill a row up to a multiple of eight.

    Args:
      image: Codes of the padded images, int8.
      x_scale: Steps of the activations: of an image or of all, of groups of channels or of all.
      x_zero: Zero points, shaped as `x_scale`, or None. The border must be made of them.
      q: Weight codes of the matrix `[taps * i, o]`, as `fmt` stores them along the first axis.
      w_scale: Steps of the weights, of one group or of as many in every tap.
      w_zero: Zero points of the weights, shaped as `w_scale`, or None.
      taps: Height and width of the kernel.
      fmt: Storage of `q`.
      dtype, tile, interpret: As for `quant_matmul_hopper`.
    """
    b, h, w, i = image.shape
    h2, w2 = h - taps[0] + 1, w - taps[1] + 1
    window = Window(*taps, -(-w2 // ROW_STEP) * ROW_STEP)
    image, q = _here(image, q)
    image = jnp.pad(image, ((0, 0), (0, 0), (0, window.row - w2), (0, 0)))
    copies = [image[:, :, column : column + window.row] for column in range(window.width)]
    p = jnp.stack(copies).reshape(window.width, -1, i)
    groups = w_scale.shape[0]
    if x_scale.shape[-1] > 1:
        groups = window.taps * x_scale.shape[-1]

    def by_pixel(array: Array | None) -> Array | None:
        if array is None:
            return None
        spread = jnp.broadcast_to(array, (b, h, window.row, array.shape[-1]))
        spread = spread.reshape(-1, array.shape[-1])
        return jnp.tile(spread, (1, window.taps)) if spread.shape[1] > 1 else spread

    rows: dict[str, Array | None] = {"x_scale": by_pixel(x_scale), "x_zero": by_pixel(x_zero)}
    if w_zero is not None:
        of_tap = max(groups // window.taps, 1)
        sums = [sums_by_group(copy, of_tap, 1) for copy in p]
        views = [
            jnp.pad(sums[tap % window.width][window.below(tap) :], ((0, window.below(tap)), (0, 0)))
            for tap in range(window.taps)
        ]
        rows["x_sum"] = (
            jnp.concatenate(views, axis=1) if groups > 1 else jnp.sum(jnp.stack(views), 0)
        )
    weight = (fmt.decode(q)[: window.taps * i], w_scale, w_zero)
    y = _multiply(p, rows, weight, groups, window, dtype, tile, interpret)
    return y.reshape(b, h, window.row, -1)[:, :h2, :w2]


def _here(p: Array, q: Array) -> tuple[Array, Array]:
    """The operands, such that a loop of a sampler does not keep what is made of the weights.

    XLA would take the unpacked weights of all layers out of the loop, and hold them.
    """
    return lax.optimization_barrier((p, q))


def _multiply(
    p: Int[Array, "copies m k"],
    rows_of: Mapping[str, Array | None],
    weight: tuple[Int[Array, "k2 n"], Array, Array | None],
    groups: int,
    window: Window,
    dtype: Any,
    tile: Tile | None,
    interpret: Any,
) -> Float[Array, "m n"]:
    """Every row's window and the weights' codes, in as many groups.

    `p` has a copy of the rows for each column of the window.
    """
    (codes, w_scale, w_zero), (_, rows, size) = weight, p.shape
    columns, length = codes.shape[1], codes.shape[0] // groups
    dtype = jnp.dtype(dtype)
    tile = tile or choose_tile(
        rows, size, columns, group=length if groups > 1 else None, itemsize=dtype.itemsize
    )
    padded = -(-rows // (WARPGROUPS * tile.m)) * WARPGROUPS * tile.m

    def of_rows(array: Array, dtype: Any) -> Array:
        array = jnp.broadcast_to(array.astype(dtype).T, (array.shape[1], rows))
        return jnp.pad(array, ((0, 0), (0, padded - rows)))

    def of_columns(array: Array, dtype: Any) -> Array:
        return jnp.broadcast_to(array.astype(dtype), (array.shape[0], columns))

    below = padded - rows + window.below(window.taps - 1)
    operands = {
        "p": jnp.pad(p, ((0, 0), (0, below), (0, 0))),
        "q": codes.T,
        "w_scale": of_columns(w_scale, jnp.float32),
    }
    for name, array in rows_of.items():
        if array is not None:
            operands[name] = of_rows(array, jnp.float32 if name == "x_scale" else jnp.int32)
    if w_zero is not None:
        operands["w_zero"] = of_columns(w_zero, jnp.int32)
    if "x_zero" in operands:
        weight_sums = sums_by_group(codes, groups, 0)
        if w_zero is not None:
            weight_sums = weight_sums - length * w_zero.astype(jnp.int32)
        operands["w_sum"] = of_columns(weight_sums, jnp.int32)

    y = call(
        functools.partial(_kernel, tile=tile, size=size, groups=groups, window=window),
        operands,
        {"y_smem": shared_memory((WARPGROUPS, tile.m, tile.n), dtype)},
        result=jax.ShapeDtypeStruct((padded, columns), dtype),
        grid={"m": padded // (WARPGROUPS * tile.m), "n": columns // tile.n},
        interpret=interpret,
    )
    return y[:rows]
