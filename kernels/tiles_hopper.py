"""What the kernels for Hopper share: chips, warpgroups, layouts in shared memory, the call."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.typing import Array

# Names of chips with `wgmma` for int8, as JAX calls their kind.
CHIPS = ("H100", "H200", "H800", "H20", "GH200")
WARPGROUPS = 2  # that multiply; another one fetches


def why_not_chip(chip: str) -> str | None:
    """Why kernels for Hopper do not run on a chip, as half a sentence; None if they do."""
    if set(CHIPS) & set(chip.split()):
        return None
    return f"it needs a Hopper GPU ({', '.join(CHIPS)}), got {chip}"


def swizzled(columns: int, dtype: Any) -> tuple[Any, ...]:
    """How blocks of rows lie in shared memory: tiles of eight rows, swizzled as wide as can be.

    Args:
      columns: Of a block; they take a multiple of 16 bytes.
      dtype: Of a value.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    itemsize = jnp.dtype(dtype).itemsize
    width = plgpu.find_swizzle(columns * itemsize * 8)
    return plgpu.TilingTransform((8, width // itemsize)), plgpu.SwizzleTransform(width)


def shared_memory(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array in shared memory that is `swizzled` along its last axis."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    return plgpu.SMEM(shape, dtype, transforms=swizzled(shape[-1], dtype))


def load_vector(ref: Any, reduced: int) -> Array:
    """A vector from memory, laid out as sums of registers along axis `reduced`."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    return load(ref, plgpu.Layout.WGMMA.reduce(reduced))


def load(ref: Any, layout: Any) -> Array:
    """An array from memory, in registers of a layout."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    settings: dict[str, Any] = {"layout": layout, "optimized": False}
    if "idx" in inspect.signature(plgpu.load).parameters:  # before jax 0.11
        return plgpu.load(ref, (), **settings)
    return plgpu.load(ref, **settings)


def transposed(ref: Any) -> Any:
    """A matrix in memory with its axes exchanged."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    if jax.__version_info__ < (0, 12):
        return plgpu.transpose_ref(ref, (1, 0))
    return ref.transpose((1, 0))


def pipeline(
    step: Callable[..., Any],
    compute: Callable[..., None],
    in_specs: Sequence[Any],
    *,
    steps: int,
    stages: int,
) -> Callable[..., None]:
    """Takes references of operands: a warpgroup fetches their blocks, the others multiply them.

    Args:
      step: Takes the index of a step, its blocks and what is carried, and gives the latter.
      compute: Takes a function from what is carried at first to what is carried at last.
      in_specs: Of the operands.
      steps: How many there are.
      stages: Steps whose blocks are in flight.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        memory_registers=40,
        in_specs=in_specs,
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        max_concurrent_steps=stages,
        compute_context=compute,
    )


def call(
    kernel: Callable[..., None],
    operands: Mapping[str, Array],
    scratch: Mapping[str, Any],
    *,
    result: jax.ShapeDtypeStruct,
    grid: Mapping[str, int],
    interpret: Any,
) -> Array:
    """Runs a kernel for every block of its grid.

    Args:
      kernel: Takes references of the operands, of the result (`y`) and of `scratch`, and their
        names as `names`. Its axes are those of the grid, and `warpgroup`.
      operands: Arrays, by name.
      scratch: Shared memory of a block, by name.
      result: Shape and dtype.
      grid: Blocks, by name of the axis.
      interpret: Parameters of Mosaic GPU's interpreter (jax >= 0.12), or None.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    # Keywords got other names in jax 0.12.
    new = "out_type" in inspect.signature(plgpu.kernel).parameters
    settings: dict[str, Any] = {"out_type" if new else "out_shape": result}
    settings["scratch_types" if new else "scratch_shapes"] = list(scratch.values())
    if interpret is not None:
        settings["interpret"] = interpret
    run = plgpu.kernel(
        functools.partial(kernel, names=(*operands, "y", *scratch)),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=False),
        **settings,
    )
    return run(*operands.values())
