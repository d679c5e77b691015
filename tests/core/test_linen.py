"""Unmodified Linen models on QTensors: boxes that dequantize, and low-bit interception."""

import dataclasses
import functools
import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from qjax.core import foreign, linen
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.layers import Dense
from qjax.core.qtensor import QTensor, from_codes, is_qtensor
from qjax.core.quantize import dequantize, quantize, quantize_leaf

W4 = WeightSpec(bits=4, granularity="per_group", group_size=(8, 4))
W8 = WeightSpec(bits=8)
A8 = ActSpec(bits=8)


class Block(nn.Module):
    """A transformer block with everything DenseGeneral does for attention."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(nn.LayerNorm()(x))
        x = x + y
        y = nn.Dense(32, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1], use_bias=False, name="down")(nn.gelu(y)), None


class Net(nn.Module):
    """A small vision model; nothing in it knows of quantization."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(16, (3, 3), strides=2, padding=1, name="stem")(images)
        x = nn.silu(x).reshape(x.shape[0], -1, x.shape[-1])
        x, _ = Block(name="block")(x)
        return nn.Dense(5, name="head")(x.mean(axis=1))


@functools.cache
def float_params():
    key = jax.random.key(0)
    params = jax.jit(Net().init)(key, jnp.zeros((1, 8, 8, 3)))["params"]
    # Biases and norms away from 0 and 1, so that forgetting one shows.
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    moved = [w + 0.1 * jax.random.normal(k, w.shape) for w, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, moved)


@functools.cache
def quantized(weight, act=None):
    """The model's params with every kernel quantized."""
    stem = Rule(pattern="stem/kernel", weight=W8, act=act)  # 3 input channels: no groups
    return quantize(float_params(), QuantConfig(rules=(stem,), weight=weight, act=act))


@pytest.fixture
def images(key):
    return jax.random.normal(key, (2, 8, 8, 3))


@jax.jit
def apply(params, images):
    return Net().apply({"params": params}, images)


@jax.jit
def low_bit(params, images):
    with linen.intercept():
        return Net().apply({"params": params}, images)


def relative(y, reference):
    return float(jnp.linalg.norm(y - reference) / jnp.linalg.norm(reference))


@pytest.mark.quick_cases("w4")
@pytest.mark.parametrize("weight", [W8, W4], ids=["w8", "w4"])
def test_an_unmodified_model_reads_the_dequantized_weights(images, weight):
    qparams = quantized(weight)
    assert is_qtensor(qparams["block"]["attn"]["query"]["kernel"])
    np.testing.assert_allclose(
        apply(qparams, images), apply(dequantize(qparams), images), rtol=1e-6, atol=1e-6
    )


def test_it_does_under_jit_and_remat_and_its_gradient_is_that_of_dequantized_weights(images):
    qparams = quantized(W4)
    floats = dequantize(qparams)
    wrapped = nn.remat(Net)()
    loss = lambda params: lambda x: jnp.sum(wrapped.apply({"params": params}, x) ** 2)
    y, gradient = jax.jit(lambda p, x: jax.value_and_grad(loss(p))(x))(qparams, images)
    expected, expected_gradient = jax.jit(jax.value_and_grad(loss(floats)))(images)
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_float_leaves_need_no_integer_gradients(images):
    qparams = quantized(W8)
    bias = qparams["head"]["bias"]

    def loss(bias):
        return jnp.sum(apply({**qparams, "head": {**qparams["head"], "bias": bias}}, images))

    np.testing.assert_allclose(jax.grad(loss)(bias), jnp.full(5, 2.0), rtol=1e-6)


def test_vmap_over_stacked_qtensors_equals_a_loop(images):
    tree = quantized(W4)
    kernel = tree["head"]["kernel"]
    doubled = {"head": {**tree["head"], "kernel": kernel.replace(scale=2 * kernel.scale)}}
    trees = [tree, {**tree, **doubled}]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    y = jax.vmap(apply, in_axes=(0, None))(stacked, images)
    expected = jnp.stack([apply(tree, images) for tree in trees])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


class Layer(nn.Module):
    """A layer to stack."""

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(16, name="dense")(nn.gelu(x)), None


@pytest.fixture(scope="module")
def stacked():
    """Params of three layers, quantized one by one, with a leading axis."""

    def make(key):
        params = Layer().init(key, jnp.zeros((1, 16)))["params"]
        return quantize(params, QuantConfig(weight=W4, act=A8))

    return jax.jit(jax.vmap(make))(jax.random.split(jax.random.key(0), 3))


def layer(stacked, i):
    return jax.tree.map(lambda leaf: leaf[i], stacked)


@pytest.mark.parametrize("wrap", [lambda module: module, nn.remat], ids=["plain", "remat"])
def test_scan_over_stacked_qtensors_equals_a_loop_plain_and_intercepted(key, stacked, wrap):
    x = jax.random.normal(key, (4, 16))
    scanned = nn.scan(
        wrap(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )()

    def scan(x):
        return scanned.apply({"params": stacked}, x)[0]

    def loop(x):
        for i in range(3):
            x, _ = Layer().apply({"params": layer(stacked, i)}, x)
        return x

    plain = jax.jit(loop)(x)
    np.testing.assert_allclose(jax.jit(scan)(x), plain, rtol=1e-5, atol=1e-5)
    with linen.intercept() as log:
        # New functions: jit would run the programs from outside the interception.
        y, expected = jax.jit(lambda x: (scan(x), loop(x)))(x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert log.layers == (("dense/kernel", "low-bit"),)
    assert 0 < relative(y, plain) < 0.02


def test_lifted_vmap_maps_over_stacked_qtensors(key, stacked):
    x = jax.random.normal(key, (3, 4, 16))
    mapped = nn.vmap(Layer, variable_axes={"params": 0}, split_rngs={"params": True})()
    y, _ = mapped.apply({"params": stacked}, x)
    expected = [Layer().apply({"params": layer(stacked, i)}, x[i])[0] for i in range(3)]
    np.testing.assert_allclose(y, jnp.stack(expected), rtol=1e-5, atol=1e-5)


def test_a_scan_over_layers_that_share_scales_raises():
    stacked = linen.box(from_codes(jnp.ones((3, 8, 4), jnp.int8), jnp.ones((1, 1, 4)), bits=4))
    with pytest.raises(ValueError, match="the layers share them.*jax.vmap"):
        stacked.remove_axis(0, {})


def test_a_scan_over_the_input_channels_raises():
    q = linen.box(from_codes(jnp.ones((8, 4), jnp.int8), jnp.ones((1, 4)), bits=4))
    with pytest.raises(ValueError, match="stack the layers on another axis"):
        q.remove_axis(-2, {})


@pytest.mark.parametrize("index", [0, 1, 2, -1])
def test_removing_an_axis_undoes_adding_it_wherever_it_stands(index):
    codes = jnp.arange(24, dtype=jnp.int8).reshape(6, 4) - 8
    q = linen.box(from_codes(codes, jnp.ones((1, 4)), bits=8))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf, leaf], index), q)
    there = stacked.add_axis(index, {})
    np.testing.assert_array_equal(there.unbox(), jnp.stack([q.unbox()] * 3, index))
    assert there.remove_axis(index, {}).axis == q.axis


def test_eval_shape_of_apply_needs_no_arrays(images):
    qparams = jax.eval_shape(lambda params: params, quantized(W4, A8))
    assert jax.eval_shape(apply, qparams, images).shape == (2, 5)
    assert nn.unbox(qparams)["stem"]["kernel"].shape == (3, 3, 3, 16)


def test_flax_unbox_dequantizes_and_unbox_tree_does_not():
    qparams = quantized(W4)
    kernel = nn.unbox(qparams)["head"]["kernel"]
    np.testing.assert_array_equal(kernel, qparams["head"]["kernel"].dequantize())
    bare = linen.unbox_tree(qparams)["head"]["kernel"]
    assert type(bare) is QTensor and bare.bits == 4
    boxed = linen.box_tree(linen.unbox_tree(qparams))
    assert jax.tree.structure(boxed) == jax.tree.structure(qparams)


def test_a_box_is_replaced_by_qtensors_only():
    q = from_codes(jnp.ones((8, 4), jnp.int8), jnp.ones((1, 4)), bits=4)
    assert isinstance(linen.box(q).replace_boxed(q), linen.BoxedQTensor)
    with pytest.raises(TypeError, match="Quantize the new value"):
        linen.box(q).replace_boxed(jnp.ones((8, 4)))


def test_boxes_nest_in_partitioned(images):
    qparams = quantized(W4, A8)
    names = lambda leaf: (None,) * (leaf.ndim - 1) + ("model",)
    nested = jax.tree.map(
        lambda leaf: nn.Partitioned(leaf, names=names(leaf)), qparams, is_leaf=is_qtensor
    )
    np.testing.assert_array_equal(apply(nested, images), apply(qparams, images))
    np.testing.assert_array_equal(low_bit(nested, images), low_bit(qparams, images))
    kernel = meta.unbox(nested)["head"]["kernel"]
    np.testing.assert_array_equal(kernel, qparams["head"]["kernel"].dequantize())


@pytest.mark.parametrize("weight", [W8, W4], ids=["w8a8", "w4a8"])
def test_interception_computes_in_int8_within_the_error_of_the_activations(
    images, weight, products
):
    qparams = quantized(weight, A8)
    with linen.intercept() as log:
        y = jax.jit(Net().apply)({"params": qparams}, images)
    kernels = [path for path, _ in log.layers]
    assert sorted(kernels) == sorted(
        "/".join(str(key.key) for key in path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(qparams, is_leaf=is_qtensor)
        if is_qtensor(leaf)
    )
    assert {outcome for _, outcome in log.layers} == {"low-bit"}
    dots = lambda function: [
        dtypes
        for (name, dtypes), count in products(function, qparams, images).items()
        for _ in range(count if name == "dot_general" else 0)
    ]
    dtypes = dots(low_bit)
    integer = [dtype for dtype in dtypes if dtype[0] == "int8"]
    assert len(integer) >= 7 and {dtype[2] for dtype in integer} == {"int32"}
    assert not any(dtype[0] == "int8" for dtype in dots(apply))
    error = relative(y, apply(qparams, images))
    assert 0 < error < 0.03  # eight layers of dynamic A8, each about 0.5 %
    np.testing.assert_allclose(low_bit(qparams, images), y, rtol=1e-2, atol=1e-2)


def test_interception_without_act_equals_the_plain_model(images):
    qparams = quantized(W4)
    with linen.intercept() as log:
        y = Net().apply({"params": qparams}, images)
    assert {outcome for _, outcome in log.layers} == {foreign.WEIGHTS_ONLY}
    np.testing.assert_allclose(y, apply(qparams, images), rtol=1e-4, atol=1e-5)


def test_no_rank_is_promoted_for_whoever_forbids_it(images):
    qparams = quantized(W4, A8)
    with jax.numpy_rank_promotion("raise"):
        plain = jax.eval_shape(lambda params: Net().apply({"params": params}, images), qparams)
        with linen.intercept():
            found = jax.eval_shape(lambda params: Net().apply({"params": params}, images), qparams)
    assert found.shape == plain.shape == apply(qparams, images).shape


def test_interception_leaves_a_float_model_as_it_is(key):
    x = jax.random.normal(key, (2, 16))
    params = Layer().init(key, x)["params"]
    with linen.intercept() as log:
        y, _ = Layer().apply({"params": params}, x)
        Layer().init(key, x)
    assert log.layers == (("dense/kernel", "float"),)
    np.testing.assert_array_equal(y, Layer().apply({"params": params}, x)[0])


def test_bare_qtensors_run_where_intercepted(images):
    qparams = linen.unbox_tree(quantized(W4, A8))
    np.testing.assert_array_equal(
        low_bit(qparams, images), low_bit(linen.box_tree(qparams), images)
    )


@pytest.mark.parametrize("weight", [W4, W8], ids=["packed", "native"])
def test_the_error_for_a_bare_qtensor_in_another_layer_names_it_and_the_way_out(key, weight):
    model = nn.Sequential([nn.ConvTranspose(4, (2, 2))])
    x = jnp.ones((1, 4, 4, 8))
    params = model.init(key, x)["params"]
    bare = quantize(params, QuantConfig(weight=weight), box=False)
    with linen.intercept(), pytest.raises(Exception, match=r"layers_0/kernel[\s\S]*box_tree"):
        model.apply({"params": bare}, x)


def test_our_own_layers_stay_low_bit_within_interception(key):
    model = nn.Sequential([Dense(8), nn.Dense(8)])
    x = jax.random.normal(key, (4, 16))
    params = model.init(key, x)["params"]
    bare = quantize(params, QuantConfig(weight=W8, act=A8), box=False)
    with linen.intercept() as log:
        y = model.apply({"params": bare}, x)
    assert log.layers == (("layers_0/kernel", "low-bit"), ("layers_1/kernel", "low-bit"))
    assert relative(y, model.apply({"params": dequantize(bare)}, x)) < 0.02


def dense_like(kernel_path, module, x, key, act=A8, weight=W4):
    params = jax.jit(module.init)(key, x)["params"]
    leaf = quantize_leaf(kernel_path, params["kernel"], QuantConfig(weight=weight, act=act))
    qparams = {**params, "kernel": leaf}
    run = lambda params, x: module.apply({"params": params}, x)
    with linen.intercept() as log:
        y = jax.jit(lambda *args: run(*args))(qparams, x)
    return y, jax.jit(run)(qparams, x), log.layers


@pytest.mark.quick_cases("True-*", "False-query*", "False-conv/kernel-module4*")
@pytest.mark.parametrize(
    ("path", "module", "shape"),
    [
        ("query/kernel", nn.DenseGeneral((3, 8)), (2, 5, 24)),
        ("out/kernel", nn.DenseGeneral(10, axis=(-2, -1)), (2, 5, 4, 8)),
        ("first/kernel", nn.DenseGeneral(10, axis=1), (2, 16, 7)),
        ("one/kernel", nn.DenseGeneral(6, dtype=jnp.bfloat16), (2, 24)),
        ("conv/kernel", nn.Conv(6, (3, 3), padding=((0, 1), (1, 0)), strides=(2, 2)), (2, 7, 7, 8)),
        ("conv/kernel", nn.Conv(6, (3, 3), padding="VALID"), (3, 2, 7, 7, 8)),
        ("conv/kernel", nn.Conv(6, (1, 1)), (7, 7, 8)),
    ],
)
@pytest.mark.parametrize("symmetric", (True, False))
def test_layers_of_any_form_run_low_bit_like_flax_runs_them(key, path, module, shape, symmetric):
    x = jax.random.normal(key, shape)
    act, weight = (dataclasses.replace(spec, symmetric=symmetric) for spec in (A8, W4))
    y, expected, layers = dense_like(path, module, x, key, act, weight)
    assert layers == (("kernel", "low-bit"),)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    assert relative(*(a.astype(jnp.float32) for a in (y, expected))) < 0.02


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (nn.Conv(8, (3, 3), strides=(2, 1)), (2, 6, 6, 8), "strides"),
        (nn.Conv(8, (3, 3), kernel_dilation=2), (2, 6, 6, 8), "dilation"),
        (nn.Conv(8, (3, 3), feature_group_count=2), (2, 6, 6, 8), "feature_group_count"),
        (nn.Conv(8, (3, 3), padding="CIRCULAR"), (2, 6, 6, 8), "CIRCULAR"),
        (nn.Conv(8, 3), (2, 6, 8), "3 axes"),
        (nn.DenseGeneral(8, batch_dims=(0,)), (2, 6, 8), "batch_dims"),
        (nn.Dense(8, dot_general=jax.lax.dot_general), (2, 8), "dot_general"),
        (nn.ConvTranspose(8, (2, 2)), (2, 4, 4, 8), "ConvTranspose has no low-bit form"),
    ],
)
def test_layers_without_a_low_bit_form_are_dequantized_and_say_why(key, module, shape, reason):
    # Named `out` so that the rank-3 kernel of the 1-D convolution has its channels before last.
    y, expected, layers = dense_like("out/kernel", module, jax.random.normal(key, shape), key)
    ((path, outcome),) = layers
    assert path == "kernel" and outcome.startswith("dequantized: ") and reason in outcome
    np.testing.assert_array_equal(y, expected)


def test_a_precision_that_is_asked_for_is_that_of_the_float_matmul_only(key):
    x, layer = jax.random.normal(key, (2, 8)), nn.Dense(8, precision="highest")
    ((_, outcome),) = dense_like("k/kernel", layer, x, key, act=None)[2]
    assert outcome.startswith("dequantized: precision")
    assert dense_like("k/kernel", layer, x, key)[2] == (("kernel", "low-bit"),)


def test_a_subclass_keeps_what_it_does_around_the_call_of_its_parent(key):
    class Doubled(nn.Dense):
        def __call__(self, inputs):
            return 2.0 * super().__call__(inputs)

    x = jax.random.normal(key, (2, 16))
    y, expected, layers = dense_like("l/kernel", Doubled(8), x, key)
    assert layers == (("kernel", "low-bit"),)
    assert relative(y, expected) < 0.02


def test_static_ranges_come_from_the_quant_collection(key):
    x = jax.random.uniform(key, (4, 16))
    model = nn.Sequential([nn.Dense(8)])
    act = ActSpec(bits=8, mode="static", granularity="per_tensor")
    params = quantize(model.init(key, x)["params"], QuantConfig(weight=W8, act=act))
    row = {"layers_0": {"act_scale": jnp.float32(1 / 127)}}
    with linen.intercept():
        y = model.apply({"params": params, "quant": row}, x)
        with pytest.raises(ValueError, match="calibrate first"):
            model.apply({"params": params}, x)
    grid = jnp.round(x * 127) / 127
    np.testing.assert_allclose(y, model.apply({"params": params}, grid), rtol=1e-5, atol=1e-6)


def test_a_kernel_of_any_rank_is_the_same_matrix_packed_and_native(key):
    codes = jax.random.randint(key, (3, 20, 2, 4), -8, 8).astype(jnp.int8)
    for axis, n, scale_shape in [
        (-3, 2, (3, 5, 1, 4)),
        (-3, 2, (1, 1, 2, 4)),
        (-2, 2, (3, 4, 1, 1)),
    ]:
        scale = jax.random.uniform(key, scale_shape, jnp.float32, 0.5, 1.0)
        zero_point = jax.random.randint(key, scale_shape, -8, 8)
        for layout in ("packed", "native"):
            make = functools.partial(from_codes, bits=4, axis=axis, layout=layout)

            @jax.jit
            def both(*arrays, make=make, n=n):
                q = make(*arrays)
                matrix = foreign.as_matrix(q, n)
                assert matrix.shape == (60, 8)
                return matrix.dequantize(), q.dequantize().reshape(60, 8)

            np.testing.assert_array_equal(*both(codes, scale, zero_point))


def test_export_round_trip_of_apply_on_quantized_params(images):
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
    export = importlib.import_module("jax.export")  # no attribute of jax 0.7
    qparams = quantized(W4, A8)
    exported = export.export(low_bit)(qparams, images)
    restored = export.deserialize(bytearray(exported.serialize()))
    np.testing.assert_array_equal(restored.call(qparams, images), low_bit(qparams, images))
