"""Low-bit convolutions: the same integers by patches, by shifts and by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels import packing, quant_conv
from qjax.kernels.packing import Format
from qjax.kernels.quant_conv_xla import (
    explicit_padding,
    float_dots,
    float_dots_are_exact,
    im2col,
    native_dots,
    pad_image,
    shifted_dots,
    weight_conv_xla,
)
from qjax.kernels.quant_matmul import prefer
from qjax.kernels.target import target

# Kernel, strides, padding: those of the UNets and autoencoders, and ragged ones.
GEOMETRIES = [
    ((3, 3), 1, ((1, 1), (1, 1))),
    ((3, 3), 2, ((1, 1), (1, 1))),
    ((3, 3), 2, ((0, 1), (0, 1))),  # the downsampling of AutoencoderKL
    ((1, 1), 1, ((0, 0), (0, 0))),
    ((1, 1), 2, ((0, 0), (0, 0))),
    ((4, 2), 3, ((2, 0), (1, 3))),
]


def convolve(x, q, strides, padding, zero=0):
    """The convolution in int64 or float64, pixel by pixel; padded with `zero`."""
    x = np.pad(x, ((0, 0), *padding, (0, 0)), constant_values=zero)
    kh, kw, _, o = q.shape
    h, w = (x.shape[1] - kh) // strides + 1, (x.shape[2] - kw) // strides + 1
    y = np.zeros((x.shape[0], h, w, o), np.result_type(x, q))
    for row in range(h):
        for column in range(w):
            top, left = row * strides, column * strides
            window = x[:, top : top + kh, left : left + kw]
            y[:, row, column] = np.einsum("bhwi,hwio->bo", window, q)
    return y


def draw(kernel, i=5, o=3, bits=8):
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (2, 7, 9, i)).astype(np.int8)
    q = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (*kernel, i, o)).astype(np.int8)
    return x, q


@pytest.mark.parametrize("kernel, strides, padding", GEOMETRIES)
def test_all_forms_give_the_integers_of_the_definition(kernel, strides, padding):
    x, q = draw(kernel)

    @jax.jit
    def all_forms(x, q):
        padded = pad_image(x, padding, None)
        patches = im2col(padded, kernel, strides)
        dot = functools.partial(jnp.matmul, preferred_element_type=jnp.int32)
        return (
            dot(patches, q.reshape(-1, q.shape[-1])),
            shifted_dots(padded, q, strides, Format(bits=8)),
            float_dots(x, q, strides, padding),
            native_dots(padded, q, strides),
        )

    wanted = convolve(x.astype(np.int64), q.astype(np.int64), strides, padding)
    for result in all_forms(x, q):
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("kernel, strides, padding", GEOMETRIES[:3])
def test_codes_padded_with_their_zero_point_are_floats_padded_with_zero(kernel, strides, padding):
    """One zero point per image: what is subtracted after the sum leaves nothing of the border."""
    x, q = draw(kernel)
    zero_point = np.array([-37, 90], np.int64)[:, None, None, None]
    x64, q64 = x.astype(np.int64), q.astype(np.int64)

    @jax.jit
    def corrected(x, q):
        codes = pad_image(x, padding, jnp.asarray(zero_point, jnp.int32))
        taps = jnp.sum(q, axis=(0, 1, 2), dtype=jnp.int32)
        zero = jnp.asarray(zero_point, jnp.int32)
        return (
            shifted_dots(codes, q, strides, Format(bits=8)) - zero * taps,
            native_dots(codes, q, strides, zero),
        )

    wanted = convolve(x64 - zero_point, q64, strides, padding)
    for result in corrected(x, q):
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("kernel, strides, padding", GEOMETRIES)
@pytest.mark.parametrize("groups", (1, 3))
def test_the_convolution_of_floats_dequantizes(kernel, strides, padding, groups):
    _, q = draw(kernel, i=36, o=70, bits=4)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 7, 9, 36)).astype(np.float32)
    lead = kernel if groups > 1 else (1, 1)
    scale = rng.uniform(0.01, 0.1, (*lead, groups, 70)).astype(np.float32)
    zero = rng.integers(-8, 8, scale.shape).astype(np.int8)
    block, _, pad = packing.packed_size(36, 4)
    fmt = Format(bits=4, block=block, pad=pad, packed=True)

    @jax.jit
    def run(x, q):
        packed = packing.pack(q, bits=4)
        image = pad_image(x, padding, None)
        return weight_conv_xla(image, packed, scale, zero, strides=strides, fmt=fmt)

    spread = lambda small: np.repeat(
        np.broadcast_to(small, (*kernel, *small.shape[2:])), 36 // groups, 2
    )
    weights = (q.astype(np.float64) - spread(zero)) * spread(scale)
    wanted = convolve(x.astype(np.float64), weights, strides, padding)
    magnitude = convolve(np.abs(x).astype(np.float64), np.abs(weights), strides, padding)
    # Sums of up to 36 * 9 float32 products, in the order of the loop.
    assert (np.abs(run(x, q) - wanted) <= 36 * 9 * 2**-24 * magnitude).all()


@pytest.mark.parametrize("bits", (4, 8))
def test_float_sums_are_exact_as_far_as_claimed(bits):
    """The largest number of largest products; one more would not be sure."""
    terms = 2 ** (24 - 7 - (bits - 1))
    assert float_dots_are_exact(terms, bits)
    assert not float_dots_are_exact(terms + 1, bits)
    x = np.full((1, 1, 1, terms), -128, np.int8)
    q = np.full((1, 1, terms, 1), -(2 ** (bits - 1)), np.int8)
    q[0, 0, -1], x[..., -1] = 1, -1
    wanted = convolve(x.astype(np.int64), q.astype(np.int64), 1, ((0, 0), (0, 0)))
    np.testing.assert_array_equal(
        np.asarray(float_dots(x, q, 1, ((0, 0), (0, 0))), np.int64), wanted
    )


@pytest.mark.parametrize("strides", (1, 2, 3))
@pytest.mark.parametrize("padding", ("SAME", "VALID"))
def test_named_padding_is_that_of_xla(padding, strides):
    x, q = np.ones((1, 7, 10, 2), np.float32), np.ones((3, 4, 2, 1), np.float32)
    pads = explicit_padding(padding, (7, 10), (3, 4), strides)
    wanted = jax.eval_shape(
        lambda x, q: jax.lax.conv_general_dilated(
            x, q, (strides, strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        x,
        q,
    )
    assert convolve(x, q, strides, pads).shape == wanted.shape
    assert explicit_padding(pads, (7, 10), (3, 4), strides) == pads


def refused(*args, **kwargs):
    raise AssertionError("windows in place were not to be taken")


# Groups of input channels of the weights and of the activations, zero points, bits.
WINDOWS = [(1, 1, False, 8), (1, 1, True, 4), (2, 1, True, 8), (2, 2, True, 4), (1, 2, False, 8)]


@pytest.mark.parametrize("w_groups, x_groups, zeros, bits", WINDOWS)
def test_windows_in_place_are_the_convolution(w_groups, x_groups, zeros, bits, monkeypatch):
    """The kernel for Hopper, interpreted, against patches."""
    if jax.__version_info__ < (0, 12):
        pytest.skip("Mosaic GPU's interpreter needs jax >= 0.12")
    import jax.experimental.pallas.mosaic_gpu as plgpu

    taps, i, o, padding = (3, 2), 64, 32, ((1, 1), (0, 1))
    rng = np.random.default_rng(0)
    p = rng.integers(-128, 128, (2, 5, 6, i)).astype(np.int8)
    q = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (*taps, i, o)).astype(np.int8)
    lead = (1, 1) if w_groups == 1 else taps
    w_scale = rng.uniform(0.1, 1, (*lead, w_groups, o)).astype(np.float32)
    w_zero = rng.integers(-8, 8, w_scale.shape).astype(np.int8) if zeros else None
    x_shape = (2 if x_groups == 1 else 1, 1, 1, x_groups)
    x_scale = rng.uniform(0.1, 1, x_shape).astype(np.float32)
    x_zero = rng.integers(-99, 99, x_shape).astype(np.int32) if zeros else None
    block, _, pad = packing.packed_size(i, bits)
    fmt = Format(bits=bits, block=block, pad=pad, packed=True)

    def run(p, q, implementation):
        kernel = quant_conv.Kernel(packing.pack(q, bits=bits), w_scale, w_zero, fmt)
        return quant_conv.quant_conv(
            p, x_scale, x_zero, kernel, strides=1, padding=padding, implementation=implementation
        )

    monkeypatch.setattr(quant_conv.hopper, "windows_matmul_hopper", refused)
    wanted = jax.jit(functools.partial(run, implementation="xla"))(p, q)
    monkeypatch.undo()
    windows = quant_conv.hopper.windows_matmul_hopper
    monkeypatch.setattr(
        quant_conv.hopper,
        "windows_matmul_hopper",
        functools.partial(windows, interpret=plgpu.InterpretGPUParams()),
    )
    # On its platform it would run as it is; the interpreter runs it here.
    monkeypatch.setattr(quant_conv, "on_its_platform", lambda _, kernel, xla, given: kernel(*given))
    with target("gpu", "NVIDIA H200"):
        found = jax.jit(functools.partial(run, implementation="hopper"))(p, q)
    assert found.shape == wanted.shape == (2, 5, 6, o)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found / scale, wanted / scale, atol=1e-6)


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="needs jax >= 0.10")
@pytest.mark.parametrize("strides", [1, 2])
def test_a_convolution_on_hopper_makes_patches_only_with_strides(strides):
    fmt = Format(bits=8)
    kernel = quant_conv.Kernel(
        jnp.ones((3, 3, 64, 64), jnp.int8), jnp.ones((1, 1, 1, 64)), None, fmt
    )
    p = jax.ShapeDtypeStruct((2, 8, 8, 64), jnp.int8)
    run = functools.partial(quant_conv.quant_conv, strides=strides, padding=((1, 1), (1, 1)))
    with target("gpu", "NVIDIA H200"), prefer("hopper"):
        traced = jax.jit(lambda p: run(p, jnp.ones((1, 1, 1, 1)), None, kernel)).trace(p)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    first = re.search(r": \(tensor<([0-9x]+)xi8>", call).group(1)
    # Three copies of the images, or one of the patches.
    rows, channels = (2 * 10 * 8, 64) if strides == 1 else (2 * 4 * 4, 576)
    copies, found, width = map(int, first.split("x"))
    assert (copies, width) == (3 if strides == 1 else 1, channels) and rows <= found < rows + 300


def test_a_named_implementation_that_cannot_convolve_raises():
    kernel = quant_conv.Kernel(
        jnp.ones((3, 3, 64, 64), jnp.int8), jnp.ones((1, 1, 1, 64)), None, Format(bits=8)
    )
    p, one = jnp.ones((1, 4, 4, 64), jnp.int8), jnp.ones((1, 1, 1, 1))
    with pytest.raises(NotImplementedError, match="it needs a Hopper GPU"):
        quant_conv.quant_conv(
            p,
            one,
            None,
            kernel,
            strides=1,
            padding=((1, 1), (1, 1)),
            implementation="hopper",
        )
