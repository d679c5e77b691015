"""Kernels and blocks compiled by the TPUs' own compiler, on a machine without a TPU.

Needs libtpu (`pip install "jax[tpu]"`); nothing runs.
"""

import functools
import os
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax import recipes
from qjax.core import ops
from qjax.core.config import QuantConfig
from qjax.core.quantize import quantize
from qjax.kernels.packing import Format, packed_size
from qjax.kernels.quant_matmul import quant_matmul, weight_matmul
from qjax.kernels.target import target
from qjax.models.dit import DiTBlock, DiTConfig
from qjax.models.resnet import ResnetBlock
from qjax.models.transformer_2d import BasicTransformerBlock

pytest.importorskip("libtpu", reason="libtpu, the compiler of TPUs, is not installed")

TOPOLOGIES = ("v5e:2x2", "v6e:2x2")


@functools.cache
def devices(topology: str):
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the machine is not
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


@pytest.fixture(params=TOPOLOGIES)
def chips(request):
    found = devices(request.param)
    with target("tpu", found[0].device_kind):
        yield found


def compile_for(device, function, *args):
    """The program of one device, for arguments of these shapes."""
    here = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), args)
    return jax.jit(function).lower(*placed).compile()


def kernels_of(compiled) -> int:
    """How many of the program's operations are Pallas kernels."""
    return len(re.findall(r"custom_call_target=\"tpu_custom_call\"", compiled.as_text()))


def shape(dtype, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype)


def stored(bits: int, k: int, n: int):
    """Shape and format of a weight's codes."""
    if bits == 8:
        return shape(jnp.int8, k, n), Format(bits=bits)
    block, rows, pad = packed_size(k, bits)
    return shape(jnp.uint8, rows, n), Format(bits=bits, block=block, pad=pad, packed=True)


@pytest.mark.parametrize(
    ("bits", "k", "groups", "zeros"),
    [
        (4, 1152, 1, False),
        (4, 1152, 9, True),
        (4, 1152, 6, False),
        (4, 1152, 4, True),
        (4, 4608, 36, True),
        (4, 320, 5, False),
        (4, 1280, 40, False),
        (8, 1152, 9, True),
        (8, 1152, 1, False),
        (6, 2560, 1, True),
        (3, 1024, 1, False),
    ],
)
def test_the_integer_matmul_compiles(chips, bits, k, groups, zeros):
    m, n = 600, 1152
    q, fmt = stored(bits, k, n)
    zero = lambda *sizes: shape(jnp.int8, *sizes) if zeros else None
    x = (shape(jnp.int8, m, k), shape(jnp.float32, m, groups), zero(m, groups))
    w = (q, shape(jnp.bfloat16, groups, n), zero(groups, n))
    run = functools.partial(quant_matmul, fmt=fmt, dtype=jnp.bfloat16, implementation="tpu")
    compiled = compile_for(chips[0], run, *x, *w)
    assert kernels_of(compiled) == 1
    # Nothing is unpacked outside of the kernel.
    assert compiled.memory_analysis().temp_size_in_bytes < k * n / 2


@pytest.mark.parametrize("rows", [8, 600])
@pytest.mark.parametrize(("bits", "groups"), [(4, 1), (4, 9), (8, 1)])
def test_the_matmul_of_floats_compiles_and_reads_less_than_a_third(chips, bits, groups, rows):
    k, n = 1152, 4608
    q, fmt = stored(bits, k, n)
    args = (shape(jnp.bfloat16, rows, k), q, shape(jnp.bfloat16, groups, n))
    run = lambda x, q, scale: weight_matmul(x, q, scale, None, fmt=fmt, implementation="tpu")
    compiled = compile_for(chips[0], run, *args)
    assert kernels_of(compiled) == 1
    dense = lambda q: compile_for(chips[0], lambda q: q.sum(), q).memory_analysis()
    weights = dense(q).argument_size_in_bytes + dense(args[2]).argument_size_in_bytes
    limit = 0.30 if bits == 4 else 0.55
    assert weights <= limit * dense(shape(jnp.bfloat16, k, n)).argument_size_in_bytes


BLOCKS = {
    "dit-xl/2": (lambda: DiTBlock(DiTConfig.dit_xl_2()), ((256, 1152), (1152,))),
    "sd1.4 resnet": (lambda: ResnetBlock(320), ((64, 64, 320), (1280,))),
    "sd1.4 transformer": (lambda: BasicTransformerBlock(8, 40), ((4096, 320), (77, 768))),
    "sdxl resnet": (lambda: ResnetBlock(640), ((64, 64, 640), (1280,))),
    "sdxl transformer": (lambda: BasicTransformerBlock(20, 64), ((1024, 1280), (77, 2048))),
}


@pytest.mark.parametrize(
    "recipe",
    [
        "w4a8",
        "q_dit_w4a8",
        pytest.param("w8a8", marks=pytest.mark.slow),
        pytest.param("w4a16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_a_model_compiles(chips, name, recipe):
    build, shapes = BLOCKS[name]
    module = build()
    args = [shape(jnp.bfloat16, 2, *sizes) for sizes in shapes]
    floats = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    half = jax.tree.map(lambda leaf: shape(jnp.bfloat16, *leaf.shape), floats)
    quant = recipes.by_name(recipe).quant
    quant = QuantConfig(
        weight=quant.weight, act=quant.act, float_dtype="bfloat16", allow_unmatched=True
    )
    params = quantize(half, quant)
    compiled = compile_for(chips[0], lambda p, *a: module.apply({"params": p}, *a), params, *args)
    found = kernels_of(compiled)
    if recipe == "w8a8":
        assert found == 0 and "s32[" in compiled.as_text()  # XLA's own int8 matmuls
    else:
        assert found > 0


@pytest.mark.parametrize("recipe", ["w8a8", "s2p_w8a8"])
def test_a_convolution_of_8_bits_is_one_of_integers_without_patches(chips, recipe):
    quant = recipes.by_name(recipe).quant
    kernel = shape(jnp.bfloat16, 3, 3, 320, 320)
    w = quantize({"kernel": kernel}, QuantConfig(weight=quant.weight, act=quant.act))["kernel"]
    x = shape(jnp.bfloat16, 2, 64, 64, 320)
    number = shape(jnp.float32)
    row = {"act_scale": number, "act_zero_point": number, "act_qmin": number, "act_qmax": number}
    compiled = compile_for(chips[0], lambda x, w, row: ops.conv(x, w, row=row), x, w, row)
    found = re.findall(
        r"= s32\[[^\n]* convolution\([^\n]*window={size=(\d+x\d+)", compiled.as_text()
    )
    assert found == ["3x3"]


def test_several_devices_share_a_matmul_by_xla_and_do_their_own_by_the_kernel(chips):
    m, k, n = 512, 1152, 4608
    q, fmt = stored(4, k, n)
    mesh = Mesh(np.array(chips).reshape(2, 2), ("data", "model"))
    specs = [
        PartitionSpec(*axes) for axes in (("data",), ("data",), (None, "model"), (None, "model"))
    ]

    def run(p, x_scale, q, w_scale):
        return quant_matmul(p, x_scale, None, q, w_scale, None, fmt=fmt)

    args = [
        jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))
        for array, spec in zip(
            (shape(jnp.int8, m, k), shape(jnp.float32, m, 1), q, shape(jnp.float32, 1, n)),
            specs,
            strict=True,
        )
    ]
    assert kernels_of(jax.jit(run).lower(*args).compile()) == 0
    own = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=PartitionSpec("data", "model"),
        check_vma=False,
    )
    assert kernels_of(jax.jit(own).lower(*args).compile()) == 1
