"""Sharded QTensors: whole bytes and groups on every device, and the same results."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.core.qtensor import from_codes
from qjax.core.sharding import sharding_for

MESH = AbstractMesh((2, 4), ("data", "model"))


def tensor(shape, *, groups=1, bits=4, zero=False, layout="packed"):
    """The shapes of a QTensor; nothing is computed."""
    small = [1] * len(shape)
    small[-2], small[-1] = groups, shape[-1]

    def build():
        zero_point = jnp.zeros(small, jnp.int8) if zero else None
        codes = jnp.zeros(shape, jnp.int8)
        return from_codes(codes, jnp.ones(small), zero_point, bits=bits, layout=layout)

    return jax.eval_shape(build)


def specs(q, spec):
    placed = sharding_for(q, NamedSharding(MESH, spec))
    assert jax.tree.structure(placed) == jax.tree.structure(q)
    return [leaf.spec for leaf in jax.tree.leaves(placed)]


def test_output_channels_take_their_scales_along():
    assert specs(tensor((512, 64), zero=True), P(None, "model")) == [P(None, "model")] * 3


def test_scales_that_are_shared_are_everywhere():
    shared = tensor((2048, 64))
    assert specs(shared, P("model", None)) == [P("model", None), P(None, None)]
    assert specs(shared, P("data", "model")) == [P("data", "model"), P(None, "model")]


def test_groups_are_cut_with_their_channels():
    q = tensor((2048, 64), groups=8)
    assert specs(q, P("model", "data")) == [P("model", "data")] * 2
    assert specs(q, P(("data", "model"))) == [P(("data", "model"), None)] * 2


def test_the_axes_of_a_convolution_keep_their_places():
    q = tensor((3, 3, 512, 64), groups=1)
    assert specs(q, P(None, None, "data", "model")) == [
        P(None, None, "data", "model"),
        P(None, None, None, "model"),
    ]


def test_an_axis_of_stacked_layers_is_one_more():
    layers = [tensor((512, 64), groups=4)] * 8
    stacked = jax.eval_shape(lambda *q: jax.tree.map(lambda *a: jnp.stack(a), *q), *layers)
    assert specs(stacked, P("model", None, "data")) == [P("model", None, "data")] * 2


def test_unpacked_values_may_be_cut_anywhere():
    assert specs(tensor((100, 6), bits=8, layout="native"), P("model"))[0] == P("model", None)


@pytest.mark.parametrize(
    "q, spec, message",
    [
        (tensor((1024, 64), groups=2), P("model"), "has 2 groups of 512"),
        (tensor((512, 64)), P("model"), "has 2 packed blocks of 256"),
        (tensor((1027, 64)), P("model"), "has 1027 values"),
        (tensor((1028, 64), bits=3), P("data"), "has 1 packed blocks of 256"),
        (tensor((512, 66)), P(None, "model"), "has 66 values"),
        (tensor((512, 64)), P(None, None, "model"), "more axes than a kernel of shape"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_cuts_through_bytes_and_groups_raise(q, spec, message):
    with pytest.raises(ValueError, match=message):
        specs(q, spec)


FOUR_DEVICES = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from qjax.core import ops
from qjax.core.config import ActSpec, WeightSpec
from qjax.core.qtensor import from_codes
from qjax.core.quantizers import quantize_weight
from qjax.core.sharding import sharding_for

jax.config.update("jax_numpy_dtype_promotion", "strict")
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((8, 512)), jnp.float32)
w = jnp.asarray(rng.standard_normal((512, 256)), jnp.float32)
spec = WeightSpec(bits=4, symmetric=False, granularity="per_group", group_size=128)

quantized = jax.jit(lambda w: from_codes(*quantize_weight(w, spec, group_size=128), bits=4))(w)

def check(act, axes):
    q = quantized.replace(act=act)
    where = sharding_for(q, NamedSharding(mesh, P(*axes)))
    placed = jax.device_put(q, where)
    assert placed.qvalue.sharding == where.qvalue and placed.scale.sharding == where.scale
    rows = NamedSharding(mesh, P("data", None))
    run = jax.jit(ops.matmul, in_shardings=(rows, where))
    y = run(jax.device_put(x, rows), placed)
    np.testing.assert_allclose(y, jax.jit(ops.matmul)(x, q), rtol=1e-5, atol=1e-5)

assert jax.device_count() == 4
check(None, (None, "model"))
check(ActSpec(), (None, "model"))
check(ActSpec(), ("model", None))
"""


def test_four_devices_compute_what_one_does():
    """Columns in parts, and input channels in parts, which the compiler sums over devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(FOUR_DEVICES)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
