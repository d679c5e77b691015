"""Kernels in programs of several devices.

XLA's partitioner cannot look into a Pallas kernel, and JAX refuses a program that leaves one to
it. Whether a program is partitioned is known only when it is lowered, so that is where the
choice is made here: the kernel where a device computes alone (one device, or inside
`jax.shard_map`), plain XLA where the partitioner is to cut the operation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

from qjax.core.typing import Array

_one_device = Primitive("one_device")


def one_device(
    kernel: Callable[..., Array], otherwise: Callable[..., Array], *operands: Array
) -> Array:
    """`kernel(*operands)`, or `otherwise(*operands)` where XLA partitions the program.

    Both give one array of the same shape and dtype. Neither can be differentiated.
    """
    traced = [jax.make_jaxpr(function)(*operands) for function in (kernel, otherwise)]
    return _one_device.bind(*operands, kernel=traced[0], otherwise=traced[1])


@_one_device.def_impl
def _run(*operands: Array, kernel: ClosedJaxpr, otherwise: ClosedJaxpr) -> Array:
    bind = lambda *args: _one_device.bind(*args, kernel=kernel, otherwise=otherwise)
    return jax.jit(bind)(*operands)


@_one_device.def_abstract_eval
def _shape(*avals: Any, kernel: ClosedJaxpr, otherwise: ClosedJaxpr) -> Any:
    return kernel.out_avals[0]


def _batched(
    operands: Sequence[Array],
    axes: Sequence[int | None],
    *,
    kernel: ClosedJaxpr,
    otherwise: ClosedJaxpr,
) -> tuple[Array, int]:
    def mapped(jaxpr: ClosedJaxpr) -> Callable[..., Array]:
        return jax.vmap(lambda *args: jaxpr_as_fun(jaxpr)(*args)[0], in_axes=list(axes))

    return one_device(mapped(kernel), mapped(otherwise), *operands), 0


def _lowered(ctx: Any, *operands: Any, kernel: ClosedJaxpr, otherwise: ClosedJaxpr) -> Any:
    context = ctx.module_context.axis_context
    # A context of shardings has a number of devices; one of `shard_map` has manual axes.
    alone = getattr(context, "num_devices", 1) == 1
    if hasattr(context, "manual_axes"):
        alone = set(context.manual_axes) == set(context.mesh.axis_names)
    chosen = jaxpr_as_fun(kernel if alone else otherwise)
    return mlir.lower_fun(chosen, multiple_results=True)(ctx, *operands)


batching.primitive_batchers[_one_device] = _batched
mlir.register_lowering(_one_device, _lowered)
