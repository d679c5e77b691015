"""The convolution for loops: value and gradients of the plain one, at their speed in a loop."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qjax.kernels.conv_gradients import conv
from qjax.kernels.quant_conv_xla import IMAGE

ONE = ((1, 1), (1, 1))
NONE = ((0, 0), (0, 0))
# Kernel, strides, padding, image: those of the UNets and autoencoders, and ragged ones.
GEOMETRIES = [
    ((3, 3), 1, ONE, (8, 8)),
    ((3, 3), 1, NONE, (7, 9)),
    ((3, 3), 2, ONE, (8, 8)),
    ((3, 3), 2, ONE, (7, 9)),
    ((3, 3), 2, ((0, 1), (0, 1)), (8, 8)),  # the downsampling of AutoencoderKL
    ((3, 3), 2, NONE, (8, 8)),  # a last row and column that no output reads
    ((1, 1), 1, NONE, (7, 9)),
    ((1, 1), 2, NONE, (7, 9)),
    ((1, 1), 2, ONE, (8, 8)),
    ((4, 2), 3, ((2, 0), (1, 3)), (7, 9)),  # more padding than the kernel is wide
    ((8, 8), 8, NONE, (16, 16)),  # a patch embedding
]


def plain(x, w, *, strides, pads):
    return lax.conv_general_dilated(x, w, (strides, strides), pads, dimension_numbers=IMAGE)


def draw(kernel, image, i=5, o=3, b=2):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((b, *image, i)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((*kernel, i, o)), jnp.float32)
    return x, w


def value_and_gradients(form, x, w, dy):
    y, pull = jax.vjp(form, x, w)
    return y, *pull(dy.astype(y.dtype))


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("kernel, strides, pads, image", GEOMETRIES)
def test_value_and_gradients_are_those_of_the_plain_convolution(kernel, strides, pads, image):
    x, w = draw(kernel, image)
    geometry = {"strides": strides, "pads": pads}
    dy = jnp.asarray(
        np.random.default_rng(1).standard_normal(plain(x, w, **geometry).shape), jnp.float32
    )
    ours, wanted = (
        jax.jit(functools.partial(value_and_gradients, functools.partial(form, **geometry)))(
            x, w, dy
        )
        for form in (conv, plain)
    )
    for mine, theirs in zip(ours, wanted, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        assert relative(mine, theirs) <= 1e-5


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)])
def test_bfloat16_sums_in_float32(kernel):
    """Against the float32 convolution of the same numbers: one rounding at the end, 2**-8."""
    pads = ONE if kernel == (3, 3) else NONE
    x, w = (array.astype(jnp.bfloat16) for array in draw(kernel, (8, 8), i=96))
    form = functools.partial(conv, strides=1, pads=pads)
    dy = jnp.ones((2, 8, 8, 3), jnp.bfloat16)
    run = jax.jit(functools.partial(value_and_gradients, form))
    ours = run(x, w, dy)
    wanted = run(*(array.astype(jnp.float32) for array in (x, w, dy)))
    for mine, theirs in zip(ours, wanted, strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(mine, np.float32), theirs, rtol=2**-8, atol=1e-3 * jnp.abs(theirs).max()
        )


def test_gradients_are_the_same_inside_a_loop():
    x, w = draw((3, 3), (8, 8), i=4, o=4)

    def step(w, x):
        loss = lambda w: jnp.mean(jnp.square(conv(x, w, strides=2, pads=ONE)))
        return w - 0.01 * jax.grad(loss)(w), None

    images = jnp.stack([x, x + 1.0, x - 1.0])
    looped, _ = jax.jit(functools.partial(lax.scan, step))(w, images)
    for image in images:
        w, _ = jax.jit(step)(w, image)
    np.testing.assert_allclose(looped, w, rtol=1e-6, atol=1e-7)


def convolutions(text):
    """The dimension labels of every convolution of a compiled program."""
    return re.findall(r"convolution\(.*?dim_labels=(\w+)", text)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the order that XLA:CPU runs fast")
@pytest.mark.parametrize("strides", [1, 2])
def test_every_convolution_in_a_loop_is_in_the_fast_order_of_a_cpu(strides):
    """And those of JAX's gradients are not, which is why this one exists."""

    def labels(form):
        def step(w, x):
            y, pull = jax.vjp(functools.partial(form, strides=strides, pads=ONE), x, w)
            dx, dw = pull(y)
            return w - dw, dx

        x, w = draw((3, 3), (8, 8), i=4, o=4)
        run = jax.jit(functools.partial(lax.scan, step))
        return convolutions(run.lower(w, jnp.stack([x, x])).compile().as_text())

    assert len(labels(conv)) == 3
    assert {label.partition("->")[0] for label in labels(conv)} == {"b01f_01io"}
    assert {label.partition("->")[0] for label in labels(plain)} != {"b01f_01io"}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_other_platforms_get_the_gradients_that_jax_writes(platform, dtype):
    def lowered(form):
        def gradients(x, w):
            loss = lambda x, w: jnp.sum(jnp.square(form(x, w, strides=2, pads=ONE)))
            return jax.grad(loss, argnums=(0, 1))(x, w)

        args = (array.astype(dtype) for array in draw((3, 3), (8, 8)))
        text = jax.jit(gradients).trace(*args).lower(lowering_platforms=(platform,)).as_text()
        return sorted(re.findall(r"stablehlo.convolution\(.*?\) (dim_numbers.*?) \{", text))

    assert lowered(conv) == lowered(plain) != []


def test_no_patches_are_stored():
    """Temporaries: the transposed operands, not nine times the input."""
    b, h, i = 8, 32, 32
    x = jax.ShapeDtypeStruct((b, h, h, i), jnp.float32)
    w = jax.ShapeDtypeStruct((3, 3, i, i), jnp.float32)
    loss = lambda x, w: jnp.sum(jnp.square(conv(x, w, strides=1, pads=ONE)))
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, w).compile()
    image = 4 * b * h * h * i
    assert compiled.memory_analysis().temp_size_in_bytes <= 5 * image


def test_vmap_over_images_and_over_kernels_is_a_loop_over_them():
    x, w = draw((3, 3), (6, 6), i=4, o=4)
    xs, ws = jnp.stack([x, 2 * x]), jnp.stack([w, -w])

    def gradients(x, w):
        loss = lambda x, w: jnp.sum(jnp.square(conv(x, w, strides=1, pads=ONE)))
        return jax.grad(loss, argnums=(0, 1))(x, w)

    together = jax.jit(jax.vmap(gradients))(xs, ws)
    one_by_one = jax.jit(lambda *z: lax.map(lambda z: gradients(*z), z))(xs, ws)
    for mine, wanted in zip(together, one_by_one, strict=True):
        assert relative(mine, wanted) <= 1e-5


def test_dtypes_that_differ_raise():
    x, w = draw((3, 3), (8, 8))
    with pytest.raises(TypeError, match="bfloat16 and float32"):
        conv(x.astype(jnp.bfloat16), w, strides=1, pads=ONE)
