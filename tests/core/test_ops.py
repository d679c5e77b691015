"""matmul and conv over QTensors: the formula, the gradient, the memory they take."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core import ops
from qjax.core.config import ActSpec, WeightSpec
from qjax.core.qtensor import QTensor, from_codes
from qjax.core.quantizers import quantize_activation, quantize_weight, to_floats
from qjax.kernels import quant_conv, quant_matmul_xla


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@functools.partial(jax.jit, static_argnames=("bits", "group_size", "symmetric", "layout"))
def quantize_weights(w, *, bits=4, group_size=None, symmetric=True, layout="packed"):
    granularity = "per_channel" if group_size is None else "per_group"
    spec = WeightSpec(
        bits=bits, symmetric=symmetric, granularity=granularity, group_size=group_size
    )
    codes = quantize_weight(w, spec, group_size=group_size)
    return from_codes(*codes, bits=bits, layout=layout)


def quantize(w, *, act=None, **settings):
    """One program for all activations."""
    return quantize_weights(w, **settings).replace(act=act)


@functools.partial(jax.jit, static_argnames=("act", "sample_axes", "group_size"))
def expected_input(x, act, row, *, sample_axes, group_size):
    codes = quantize_activation(x, act, row=row, sample_axes=sample_axes, group_size=group_size)
    wide = lambda a: None if a is None else jnp.repeat(a, x.shape[-1] // a.shape[-1], axis=-1)
    codes = codes._replace(scale=wide(codes.scale), zero_point=wide(codes.zero_point))
    return to_floats(codes)


expected_weights = jax.jit(QTensor.dequantize)


def expected(x, q, row, sample_axes=(-1,), group_size=None):
    """What `x` becomes when it is quantized, and the dequantized weights."""
    floats = expected_input(x, q.act, row, sample_axes=sample_axes, group_size=group_size)
    return floats, expected_weights(q.replace(act=None))


ROW = {"act_scale": jnp.float32(0.02), "act_zero_point": jnp.int32(5)}

ACTS = [
    (ActSpec(), {}),
    (ActSpec(symmetric=False), {}),
    (ActSpec(bits=4, granularity="per_tensor"), {}),
    (ActSpec(granularity="per_group", group_size=32), {}),
    (ActSpec(granularity="per_group", group_size=(36, 32), symmetric=False), {}),
    (ActSpec(mode="static"), {"act_scale": ROW["act_scale"]}),
    (ActSpec(mode="per_step", symmetric=False), ROW),
    (ActSpec(mode="per_step"), {"act_scale": jnp.linspace(0.02, 0.03, 3)}),
]


@pytest.mark.parametrize("act, row", ACTS, ids=str)
@pytest.mark.parametrize("group_size", (None, 32))
def test_matmul_is_that_of_the_quantized_operands(act, row, group_size):
    x, w = normal(2, 3, 96), normal(96, 10, seed=1)
    q = quantize(w, group_size=group_size, symmetric=group_size is None, act=act)
    y = jax.jit(ops.matmul)(x, q, row=row)
    group = 32 if act.granularity == "per_group" else None
    p, weights = expected(x, q, row, group_size=group)
    assert y.shape == (2, 3, 10)
    np.testing.assert_allclose(y, np.asarray(p) @ weights, rtol=1e-5, atol=1e-4)


def float_conv(x, w, strides, padding):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (strides, strides), padding, dimension_numbers=dimensions
    )


GEOMETRIES = [
    ((3, 3), 1, "SAME"),
    ((3, 3), 2, ((0, 1), (0, 1))),
    ((1, 1), 2, "VALID"),
]
CONV_ACTS = [acts for acts in ACTS if acts[0].granularity != "per_group"][:-1]
GROUPED = [
    (ActSpec(granularity="per_group", group_size=8), {}),
    (ActSpec(granularity="per_group", group_size=(7, 8), symmetric=False), {}),
    (
        ActSpec(mode="static", granularity="per_group", group_size=8, symmetric=False),
        {"act_scale": jnp.array([0.02, 0.03]), "act_zero_point": jnp.array([5, -9])},
    ),
]


@pytest.mark.parametrize("act, row", CONV_ACTS + GROUPED, ids=str)
@pytest.mark.parametrize("kernel, strides, padding", GEOMETRIES)
def test_conv_is_that_of_the_quantized_operands(act, row, kernel, strides, padding):
    """Zero points on either side: the border must count as zeros, not as codes."""
    x, w = normal(2, 6, 7, 16), normal(*kernel, 16, 5, seed=1)
    symmetric = act.mode != "dynamic"
    q = quantize(w, group_size=None if act.symmetric else 8, symmetric=symmetric, act=act)
    y = jax.jit(functools.partial(ops.conv, strides=strides, padding=padding))(x, q, row=row)
    group = 8 if act.granularity == "per_group" else None
    p, weights = expected(x, q, row, sample_axes=(-3, -2, -1), group_size=group)
    wanted = float_conv(p, weights, strides, padding)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", (8, 48))
@pytest.mark.parametrize("bits", (4, 8))
def test_every_form_of_a_convolution_gives_the_same(monkeypatch, channels, bits):
    monkeypatch.setattr(quant_conv, "SHIFT_FROM_CHANNELS", 48)
    x, w = normal(2, 6, 7, channels), normal(3, 3, channels, 5, seed=1)
    q = quantize(w, bits=bits, act=ActSpec(), layout="native" if bits == 8 else "packed")
    chosen = jax.jit(lambda x, q: ops.conv(x, q))(x, q)
    monkeypatch.setattr(quant_conv, "SHIFT_FROM_CHANNELS", 1000)
    monkeypatch.setattr(quant_conv, "FLOAT_BELOW_CHANNELS", 0)
    by_patches = jax.jit(lambda x, q: ops.conv(x, q))(x, q)
    np.testing.assert_allclose(chosen, by_patches, rtol=1e-6)


@pytest.mark.parametrize("group_size, symmetric", [(None, True), (32, False)])
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_weights_alone_compute_in_the_dtype_of_x(group_size, symmetric, dtype):
    q = quantize(normal(64, 10), group_size=group_size, symmetric=symmetric)
    x = jnp.asarray(normal(3, 64, seed=1), dtype)
    y = jax.jit(ops.matmul)(x, q)
    assert y.dtype == dtype
    # bfloat16: 2**-8 for every product of a weight, and of the sum.
    rtol = 1e-5 if dtype == jnp.float32 else 2**-6
    wanted = np.asarray(x, np.float64) @ np.asarray(q.dequantize(), np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=rtol, atol=rtol * 4)


@pytest.mark.parametrize("piece_values", (2**18, 1), ids=("whole", "by taps"))
@pytest.mark.parametrize("kernel, strides, padding", GEOMETRIES)
def test_a_convolution_with_low_bit_weights_alone(
    monkeypatch, piece_values, kernel, strides, padding
):
    monkeypatch.setattr(ops, "PIECE_VALUES", piece_values)
    x, w = normal(2, 6, 7, 20), normal(*kernel, 20, 5, seed=1)
    q = quantize(w, bits=3, group_size=10, symmetric=False)
    y = jax.jit(functools.partial(ops.conv, strides=strides, padding=padding))(x, q)
    wanted = float_conv(x, q.dequantize(), strides, padding)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)


def test_floats_are_plain_floats():
    x, w = normal(3, 8), normal(8, 4, seed=1)
    np.testing.assert_array_equal(ops.matmul(x, jnp.asarray(w)), jnp.matmul(x, w))
    images, kernel = normal(1, 4, 4, 8), normal(3, 3, 8, 2, seed=1)
    y = ops.conv(jnp.asarray(images), jnp.asarray(kernel), padding="VALID")
    np.testing.assert_array_equal(y, float_conv(images, kernel, 1, "VALID"))


def test_bfloat16_inputs_are_quantized_in_float32():
    """In bfloat16 the steps would be off by three quarters; the sum is rounded once."""
    q = quantize(normal(64, 10), bits=8, act=ActSpec())
    x = jnp.asarray(normal(3, 64, seed=1), jnp.bfloat16)
    y = jax.jit(ops.matmul)(x, q)
    wanted = jax.jit(ops.matmul)(x.astype(jnp.float32), q)
    np.testing.assert_array_equal(y, wanted.astype(jnp.bfloat16))


# Gradients.


@pytest.mark.parametrize("act", (None, ActSpec(), ActSpec(symmetric=False)), ids=str)
def test_the_gradient_is_that_of_the_dequantized_weights(act):
    x, cotangent = normal(3, 64), normal(3, 10, seed=2)
    q = quantize(normal(64, 10, seed=1), act=act)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(ops.matmul(x, q) * cotangent)))(x)
    np.testing.assert_allclose(gradient, cotangent @ q.dequantize().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", (None, ActSpec()), ids=str)
@pytest.mark.parametrize("kernel, strides, padding", GEOMETRIES)
def test_the_gradient_of_a_convolution_is_that_of_the_dequantized(act, kernel, strides, padding):
    x = normal(2, 6, 7, 16)
    q = quantize(normal(*kernel, 16, 5, seed=1), act=act)
    low_bit = functools.partial(ops.conv, strides=strides, padding=padding)
    in_float = lambda x: jnp.sum(jnp.sin(float_conv(x, q.dequantize(), strides, padding)))

    @jax.jit
    def both(x):
        # The same cotangents for both: those of the float convolution.
        y, pull = jax.vjp(lambda x: low_bit(x, q), x)
        exact = float_conv(x, q.dequantize(), strides, padding)
        return pull(jnp.cos(exact))[0], jax.grad(in_float)(x), y

    through, wanted, _ = both(x)
    np.testing.assert_allclose(through, wanted, rtol=1e-4, atol=1e-4)


def test_forward_tangents_pass_the_rounding():
    x, direction = normal(3, 64), normal(3, 64, seed=2)
    q = quantize(normal(64, 10, seed=1), act=ActSpec())
    y, tangent = jax.jit(lambda x, d: jax.jvp(lambda x: ops.matmul(x, q), (x,), (d,)))(x, direction)
    np.testing.assert_array_equal(y, jax.jit(ops.matmul)(x, q))
    np.testing.assert_allclose(tangent, direction @ q.dequantize(), rtol=1e-4, atol=1e-4)


def test_rows_may_be_differentiated_through_and_have_no_gradient():
    q = quantize(normal(64, 10), act=ActSpec(mode="static"))
    loss = lambda scale: jnp.sum(ops.matmul(normal(3, 64), q, row={"act_scale": scale}))
    assert jax.grad(loss)(jnp.float32(0.1)) == 0.0


# Transformations.


@pytest.mark.parametrize("act", (None, ActSpec()), ids=str)
def test_vmap_over_stacked_tensors_is_the_loop(act):
    x = normal(3, 5, 64)
    tensors = [quantize(normal(64, 10, seed=seed), act=act) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *tensors)
    together = jax.jit(jax.vmap(ops.matmul))(x, stacked)
    for one, part, q in zip(together, x, tensors, strict=True):
        np.testing.assert_allclose(one, jax.jit(ops.matmul)(part, q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", (None, ActSpec()), ids=str)
def test_vmap_over_stacked_convolutions_is_the_loop(act):
    x = normal(3, 2, 5, 5, 16)
    tensors = [quantize(normal(3, 3, 16, 5, seed=seed), act=act) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *tensors)
    together = jax.jit(jax.vmap(ops.conv))(x, stacked)
    for one, part, q in zip(together, x, tensors, strict=True):
        np.testing.assert_allclose(one, jax.jit(ops.conv)(part, q), rtol=1e-4, atol=1e-4)


# Errors.


def test_shapes_that_do_not_fit_raise():
    q = quantize(normal(64, 10))
    with pytest.raises(ValueError, match=r"w.shape=\(64, 10\), w.axis=-2, x.shape=\(3, 32\)"):
        ops.matmul(jnp.ones((3, 32)), q)
    heads = from_codes(jnp.zeros((64, 2, 5), jnp.int8), jnp.ones((1, 2, 5)), bits=4, axis=-3)
    with pytest.raises(ValueError, match=r"w.shape=\(64, 2, 5\), w.axis=-3"):
        ops.matmul(jnp.ones((3, 64)), heads)
    with pytest.raises(ValueError, match="images .* and a kernel"):
        ops.conv(jnp.ones((1, 4, 4, 64)), q)
    with pytest.raises(ValueError, match="of the same i"):
        ops.conv(jnp.ones((1, 4, 4, 8)), quantize(normal(3, 3, 16, 5)))


@pytest.mark.parametrize("act", [None, *(act for act, row in ACTS if not row)], ids=str)
def test_an_empty_batch_gives_an_empty_result(act):
    q = quantize(normal(96, 10), group_size=32, act=act)
    assert jax.jit(ops.matmul)(jnp.zeros((0, 96)), q).shape == (0, 10)
    if act is None or act.granularity != "per_group":
        kernel = quantize(normal(3, 3, 32, 5), group_size=16, act=act)
        assert jax.jit(ops.conv)(jnp.zeros((0, 4, 4, 32)), kernel).shape == (0, 4, 4, 5)


@pytest.mark.parametrize("bits, act", [(8, ActSpec()), (4, ActSpec()), (8, None)], ids=str)
def test_an_exported_function_takes_any_batch(bits, act):
    export = importlib.import_module("jax.export")  # no attribute of jax 0.7
    (b,) = export.symbolic_shape("b")
    w, kernel = normal(96, 128), normal(3, 3, 64, 4, seed=1)
    for function, weight, shape in ((ops.matmul, w, (96,)), (ops.conv, kernel, (4, 4, 64))):
        q = quantize(weight, bits=bits, act=act)
        x = jax.ShapeDtypeStruct((b, *shape), jnp.float32)
        exported = export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(x, q)
        three = normal(3, *shape, seed=2)
        np.testing.assert_array_equal(exported.call(three, q), jax.jit(function)(three, q))


@pytest.mark.parametrize("act, row", [(None, {}), *ACTS], ids=str)
def test_no_rank_is_promoted_for_whoever_forbids_it(act, row):
    q = quantize(normal(96, 10), group_size=32, symmetric=False, act=act)
    kernel = quantize(normal(3, 3, 16, 5), group_size=8, symmetric=False, act=act)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(functools.partial(ops.matmul, row=row), normal(2, 3, 96), q)
        if (act, row) in [(None, {}), *CONV_ACTS]:
            jax.eval_shape(functools.partial(ops.conv, row=row), normal(2, 6, 7, 16), kernel)


def test_integers_are_no_input():
    x, image = jnp.ones((2, 96), jnp.int32), jnp.ones((1, 4, 4, 8), jnp.int32)
    for w in (normal(96, 10), quantize(normal(96, 10), act=ActSpec())):
        with pytest.raises(TypeError, match="float dtype; got int32"):
            ops.matmul(x, w)
    with pytest.raises(TypeError, match="float dtype; got int32"):
        ops.conv(image, normal(3, 3, 8, 5))


def test_what_the_row_lacks_is_named():
    q = quantize(normal(64, 10), act=ActSpec(mode="per_step"))
    with pytest.raises(ValueError, match="act_scale from the step's row"):
        ops.matmul(jnp.ones((3, 64)), q)


def test_a_convolution_takes_groups_of_activations_only_where_its_act_says_so():
    x, w = jnp.ones((1, 4, 4, 16)), normal(3, 3, 16, 5)
    with pytest.raises(ValueError, match="act_scale must be a scalar; got 2 groups"):
        ops.conv(x, quantize(w, act=ActSpec(mode="static")), row={"act_scale": jnp.ones(2)})


@pytest.mark.parametrize(
    "group_size, size, wanted",
    [
        (64, 320, 64),
        ((128, 64), 320, 64),
        ((128, None), 320, None),
        (320, 320, None),
        ((512, 96), 96, None),
        (None, 7, None),
    ],
)
def test_the_first_group_size_that_divides_is_taken(group_size, size, wanted):
    assert ops.choose_group_size(group_size, size) == wanted


@pytest.mark.parametrize("group_size, size", [(128, 320), ((128, 96), 320), (8, 7), (64, 32)])
def test_group_sizes_that_do_not_divide_raise(group_size, size):
    with pytest.raises(ValueError, match=f"must divide the {size} input channels"):
        ops.choose_group_size(group_size, size)


# Memory: four layers whose packed weights XLA must not unpack all at once.


def abstract(bits, act, group_size, size):
    groups = 1 if group_size is None else size // group_size
    shape = jax.ShapeDtypeStruct
    return jax.eval_shape(
        functools.partial(from_codes, bits=bits, act=act),
        shape((size, size), jnp.int8),
        shape((groups, size), jnp.bfloat16),
    )


@pytest.mark.parametrize("size, steps", [(1024, None), (2048, 10)], ids=("once", "in a scan"))
@pytest.mark.parametrize("act", (None, ActSpec()), ids=("W4A16", "W4A8"))
@pytest.mark.parametrize("group_size", (None, 128))
def test_four_layers_need_the_workspace_of_one(size, act, group_size, steps):
    rows = 64
    tensors = [abstract(4, act, group_size, size)] * 4

    def layers(x, tensors):
        return functools.reduce(ops.matmul, tensors, x)

    def sampler(x, tensors):
        if steps is None:
            return layers(x, tensors)
        return jax.lax.scan(lambda x, _: (layers(x, tensors), None), x, length=steps)[0]

    x = jax.ShapeDtypeStruct((rows, size), jnp.float32)
    compiled = jax.jit(sampler).lower(x, tensors).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    q: QTensor = tensors[0]
    workspace = quant_matmul_xla.workspace_bytes(
        rows,
        size,
        size,
        fmt=ops._format(q),
        groups=q.num_groups,
        itemsize=4 if act is None else None,
    )
    # Before jaxlib 0.10 XLA:CPU converted the operands of int8 matmuls to int32.
    assert temporary <= (1.5 if jax.__version_info__ >= (0, 10) else 2.2) * workspace
    dequantized = 4 * size * size
    assert temporary < dequantized * (0.7 if size == 1024 else 0.3)


@pytest.mark.parametrize("act", (None, ActSpec()), ids=("W4A16", "W4A8"))
@pytest.mark.parametrize("channels", (320, quant_conv.SHIFT_FROM_CHANNELS))
def test_four_convolutions_need_less_than_half_of_one_dequantized(channels, act):
    kernel = jax.eval_shape(
        functools.partial(from_codes, bits=4, act=act),
        jax.ShapeDtypeStruct((3, 3, channels, channels), jnp.int8),
        jax.ShapeDtypeStruct((1, 1, 1, channels), jnp.bfloat16),
    )
    image = jax.ShapeDtypeStruct((1, 8, 8, channels), jnp.float32)
    layers = lambda x, kernels: functools.reduce(ops.conv, kernels, x)
    compiled = jax.jit(layers).lower(image, [kernel] * 4).compile()
    dequantized = 4 * 9 * channels**2
    assert compiled.memory_analysis().temp_size_in_bytes < dequantized / 2
