"""Where a program is partitioned, its kernels are not used; where a device works alone, they are."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np

from qjax.kernels.one_device import one_device


def run(x, y):
    """Says which it took: the one adds, the other subtracts."""
    return one_device(lambda x, y: x + y, lambda x, y: x - y, x, y)


def test_one_device_takes_the_kernel_traced_or_not():
    x, y = jnp.arange(6.0).reshape(2, 3), jnp.full((2, 3), 10.0)
    np.testing.assert_array_equal(run(x, y), x + y)
    np.testing.assert_array_equal(jax.jit(run)(x, y), x + y)


def test_it_is_mapped_over_any_axis_of_any_operand():
    x, y = jnp.arange(6.0).reshape(2, 3), jnp.full((3,), 10.0)
    mapped = jax.jit(jax.vmap(run, in_axes=(0, None)))
    np.testing.assert_array_equal(mapped(x, y), x + y)
    columns = jax.vmap(run, in_axes=(1, 0))
    np.testing.assert_array_equal(columns(x, y), (x + y).T)
    twice = jax.vmap(jax.vmap(run, in_axes=(0, None)), in_axes=(0, 0))
    np.testing.assert_array_equal(twice(x[None], y[None]), (x + y)[None])


def test_a_scan_takes_it_along():
    y = jnp.ones(3)
    last, _ = jax.lax.scan(lambda x, _: (run(x, y), None), jnp.zeros(3), None, length=4)
    np.testing.assert_array_equal(last, 4 * y)


def test_a_partitioned_program_takes_the_other_unless_each_device_works_alone():
    code = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from qjax.kernels.one_device import one_device
        def run(x, y):
            return one_device(lambda x, y: x + y, lambda x, y: x - y, x, y)
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("data")))
        np.testing.assert_array_equal(jax.jit(run)(x, x), x - x)
        alone = jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"))
        np.testing.assert_array_equal(jax.jit(alone)(x, x), x + x)
        one = jax.device_put(jnp.arange(8.0), jax.devices()[1])
        np.testing.assert_array_equal(jax.jit(run)(one, one), one + one)
    """
    flags = "--xla_force_host_platform_device_count=4"
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
