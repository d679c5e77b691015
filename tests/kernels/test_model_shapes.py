"""Every layer of the published models is one that the kernels take, and lowers for a GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest

from qjax import recipes
from qjax.core import ops
from qjax.core.qtensor import is_qtensor
from qjax.core.quantize import quantize
from qjax.core.serialize import flatten
from qjax.kernels import quant_matmul_hopper, tiles_tpu
from qjax.kernels.packing import Format, packed_size
from qjax.kernels.quant_matmul import quant_matmul, weight_matmul
from qjax.kernels.target import target
from qjax.models.published import published_shapes


@functools.cache
def shapes(model: str):
    return published_shapes(model)


@pytest.mark.quick_cases("dit-xl-2-256-w4a8", "sd-v1-4-w8a8")
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "q_dit_w4a8"])
@pytest.mark.parametrize(
    "model", ["dit-xl-2-256", "sd-v1-4", pytest.param("sdxl-1.0", marks=pytest.mark.slow)]
)
def test_every_layer_is_taken_as_a_matmul_of_patches(model, recipe):
    found = quantize(shapes(model), recipes.by_name(recipe).quant)
    layers = [(path, leaf) for path, leaf in flatten(found) if is_qtensor(leaf)]
    assert len(layers) > 100
    for path, q in layers:
        *taps, inputs, outputs = q.shape
        taps = taps[0] * taps[1] if taps else 1
        size = taps * inputs
        groups = taps * q.num_groups if q.num_groups > 1 else 1
        on_gpu = quant_matmul_hopper.why_not(size, outputs, groups, "NVIDIA H200")
        assert on_gpu is None, (path, on_gpu)
        fmt = ops._kernel(q).fmt
        # Padding between taps is cut out of a matrix of patches.
        fmt = Format(bits=fmt.bits) if fmt.pad and taps > 1 else fmt
        on_tpu = tiles_tpu.why_not(size, groups, fmt)
        assert on_tpu is None, (path, on_tpu)


needs_jax_for_gpus = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="kernels for GPUs need jax >= 0.10"
)


def shape(dtype, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype)


def assert_lowers_to_a_kernel(matmul, fmt, *operands, **settings):
    run = functools.partial(matmul, fmt=fmt, implementation="hopper", **settings)
    with target("gpu", "NVIDIA H200"):
        lowered = jax.jit(run).trace(*operands).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@needs_jax_for_gpus
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("m", "k", "n", "groups", "zeros"),
    [
        (8192, 1152, 4608, 1, False),
        (8192, 4608, 1152, 36, True),
        (4096, 320, 2560, 1, True),
        (4096, 2880, 320, 45, True),
        (1000, 1152, 3456, 4, True),
        (77, 768, 320, 1, False),
    ],
)
def test_the_kernel_for_hopper_lowers_without_a_gpu(m, k, n, groups, zeros, dtype):
    zero = lambda *sizes: shape(jnp.int8, *sizes) if zeros else None
    x = shape(jnp.int8, m, k), shape(jnp.float32, m, groups), zero(m, groups)
    w = shape(jnp.int8, k, n), shape(jnp.bfloat16, groups, n), zero(groups, n)
    assert_lowers_to_a_kernel(quant_matmul, Format(bits=8), *x, *w, dtype=dtype)


@needs_jax_for_gpus
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("m", "k", "n", "groups", "zeros"),
    [
        (16, 1152, 6912, 1, False),
        (16, 1152, 6912, 9, True),
        (2, 4608, 1152, 36, True),
        (64, 1280, 1280, 10, False),
    ],
)
def test_the_kernel_of_few_rows_lowers_without_a_gpu(m, k, n, groups, zeros, dtype):
    block, length, _ = packed_size(k, 4)
    fmt = Format(bits=4, block=block, packed=True)
    zero = shape(jnp.int8, groups, n) if zeros else None
    operands = shape(dtype, m, k), shape(jnp.uint8, length, n), shape(dtype, groups, n), zero
    assert_lowers_to_a_kernel(weight_matmul, fmt, *operands)
