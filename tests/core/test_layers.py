"""Dense and Conv: Flax's own layers in float, low-bit ones where the kernel is a QTensor."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core import ops
from qjax.core.config import ActSpec, WeightSpec
from qjax.core.layers import Conv, Dense
from qjax.core.linen import box
from qjax.core.qtensor import from_codes
from qjax.core.quantizers import quantize_weight


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@functools.partial(jax.jit, static_argnames=("bits", "act"))
def quantize(w, *, bits=4, act=None):
    return from_codes(*quantize_weight(w, WeightSpec(bits=bits)), bits=bits, act=act)


def dense_params(*, act=None, seed=0, size=24, features=6):
    kernel = quantize(normal(size, features, seed=seed), act=act)
    return {"kernel": kernel, "bias": normal(features, seed=seed + 1)}


# Both layers as (ours, Flax's, input), and their settings.
PAIRS = {
    "Dense": (Dense(6), nn.Dense(6), (2, 5, 24)),
    "Dense without bias": (Dense(6, use_bias=False), nn.Dense(6, use_bias=False), (5, 24)),
    "Conv": (Conv(6), nn.Conv(6, (3, 3)), (2, 5, 7, 8)),
    "Conv 1x1": (Conv(6, (1, 1)), nn.Conv(6, (1, 1)), (2, 5, 7, 8)),
    "Conv with strides": (
        Conv(6, strides=2, padding=((1, 1), (0, 1)), use_bias=False),
        nn.Conv(6, (3, 3), strides=2, padding=((1, 1), (0, 1)), use_bias=False),
        (2, 5, 7, 8),
    ),
    "Conv valid": (
        Conv(6, (3, 2), padding="VALID"),
        nn.Conv(6, (3, 2), padding="VALID"),
        (1, 5, 7, 8),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_float_layers_are_those_of_flax(name):
    ours, theirs, shape = PAIRS[name]
    x = normal(*shape)
    variables = jax.jit(ours.init)(jax.random.key(0), x)
    same = jax.eval_shape(theirs.init, jax.random.key(0), x)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), variables) == jax.tree.map(
        lambda a: (a.shape, a.dtype), same
    )
    np.testing.assert_allclose(
        jax.jit(ours.apply)(variables, x), jax.jit(theirs.apply)(variables, x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("layer, shape", [(Dense(6), (5, 24)), (Conv(6), (2, 5, 7, 8))])
def test_a_layer_computes_in_its_dtype(layer, shape):
    x = normal(*shape)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    low = layer.clone(dtype=jnp.bfloat16).apply(variables, x)
    assert low.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    same = layer.apply(variables, x.astype(jnp.bfloat16))
    assert same.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, same)


@pytest.mark.parametrize("wrap", (lambda q: q, box, lambda q: nn.Partitioned(box(q), (None, None))))
@pytest.mark.parametrize("act", (None, ActSpec()), ids=str)
def test_a_quantized_kernel_is_used_as_it_is(wrap, act):
    x, params = normal(2, 5, 24), dense_params(act=act)
    wanted = jax.jit(ops.matmul)(x, params["kernel"]) + params["bias"]
    y = jax.jit(Dense(6).apply)({"params": params | {"kernel": wrap(params["kernel"])}}, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("act", (None, ActSpec()), ids=str)
def test_a_quantized_convolution_is_used_as_it_is(act):
    x, kernel = normal(2, 5, 7, 8), quantize(normal(3, 3, 8, 6), act=act)
    padding = ((0, 1), (0, 1))
    layer = Conv(6, strides=2, padding=padding, use_bias=False)
    y = jax.jit(layer.apply)({"params": {"kernel": kernel}}, x)
    wanted = jax.jit(functools.partial(ops.conv, strides=2, padding=padding))(x, kernel)
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-6)


def test_bfloat16_inputs_give_bfloat16_outputs():
    variables = {"params": dense_params(act=ActSpec())}
    x = normal(5, 24)
    y = jax.jit(Dense(6).apply)(variables, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    exact = jax.jit(Dense(6).apply)(variables, x.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-6, atol=2**-6)


# The row of the step table.

TRACES = []


class Block(nn.Module):
    """Two layers, of which the row has entries; says when it is traced."""

    @nn.compact
    def __call__(self, x):
        TRACES.append(x.shape)
        h = nn.tanh(Dense(24, name="up")(x))
        return Dense(24, name="down")(h)


def block_params(act, seed=0):
    settings = {"act": act, "features": 24}
    return {
        "up": dense_params(seed=seed, **settings),
        "down": dense_params(seed=seed + 2, **settings),
    }


STEPS = 5
ROWS = {
    "up": {
        "act_scale": jnp.linspace(0.02, 0.3, STEPS),
        # Bits from step to step: 8, 8, 6, 4 and 3.
        "act_qmin": -jnp.array([127, 127, 31, 7, 3]),
        "act_qmax": jnp.array([127, 127, 31, 7, 3]),
    },
    "down": {"act_scale": jnp.linspace(0.01, 0.02, STEPS)},
}


def test_a_scan_over_rows_traces_once_and_is_the_loop():
    """Scales and bits are data: nothing recompiles from step to step, nor for another table."""
    variables, x = {"params": block_params(ActSpec(mode="per_step"))}, normal(3, 24)
    apply = lambda x, row: Block().apply(variables | {"quant": row}, x)

    @jax.jit
    def sample(x, rows):
        return jax.lax.scan(lambda x, row: (apply(x, row), None), x, rows)[0]

    TRACES.clear()
    scanned = sample(x, ROWS)
    sample(x, jax.tree.map(lambda rows: rows[::-1], ROWS))
    assert len(TRACES) == 1
    step = jax.jit(apply)
    for i in range(STEPS):
        x = step(x, jax.tree.map(lambda rows, i=i: rows[i], ROWS))
    assert len(TRACES) == 2
    np.testing.assert_allclose(scanned, x, rtol=1e-5, atol=1e-5)


def test_a_row_of_fewer_bits_is_a_layer_of_fewer_bits():
    x = normal(3, 24)
    row = {"act_scale": jnp.float32(0.3), "act_qmin": jnp.int32(-7), "act_qmax": jnp.int32(7)}
    by_row = Dense(6).apply({"params": dense_params(act=ActSpec(mode="per_step")), "quant": row}, x)
    fixed = dense_params(act=ActSpec(mode="per_step", bits=4))
    by_setting = Dense(6).apply({"params": fixed, "quant": {"act_scale": jnp.float32(0.3)}}, x)
    np.testing.assert_array_equal(by_row, by_setting)


@pytest.mark.parametrize("mode", ("static", "per_step"))
def test_a_layer_without_its_row_says_which_and_how(mode):
    variables, x = {"params": block_params(ActSpec(mode=mode))}, normal(3, 24)
    with pytest.raises(ValueError, match=f"up quantizes its input with mode='{mode}'.*got nothing"):
        Block().apply(variables, x)
    rows = {"up": {"act_scale": jnp.float32(1)}, "down": {"act_qmax": jnp.int32(7)}}
    with pytest.raises(ValueError, match=r"down quantizes .*got \['act_qmax'\]. Apply the model"):
        Block().apply(variables | {"quant": rows}, x)


def test_dynamic_ranges_need_no_row():
    variables, x = {"params": block_params(ActSpec())}, normal(3, 24)
    apply = jax.jit(Block().apply)
    other = {"quant": {"elsewhere": {"act_scale": jnp.float32(1)}}}
    np.testing.assert_array_equal(apply(variables, x), apply(variables | other, x))


# Flax's and JAX's transformations.


@pytest.mark.parametrize("act", (None, ActSpec()), ids=str)
def test_remat_changes_neither_values_nor_gradients(act):
    variables, x = {"params": block_params(act)}, normal(3, 24)
    loss = lambda module: lambda x: jnp.sum(module.apply(variables, x) ** 2)
    plain = jax.jit(jax.value_and_grad(loss(Block())))(x)
    again = jax.jit(jax.value_and_grad(loss(nn.remat(Block)())))(x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), again, plain)


@pytest.mark.parametrize("boxed", (False, True))
def test_nn_scan_over_stacked_tensors_is_the_loop(boxed):
    layers = [block_params(ActSpec(mode="per_step"), seed=10 * i) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    if boxed:
        is_kernel = lambda leaf: hasattr(leaf, "qvalue")
        wrap = lambda leaf: box(leaf) if is_kernel(leaf) else leaf
        stacked = jax.tree.map(wrap, stacked, is_leaf=is_kernel)
    rows = jax.tree.map(lambda rows: rows[:3], ROWS)

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = lambda block, x, _: (block(x), None)
            scan = nn.scan(body, variable_axes={"params": 0, "quant": 0}, length=3)
            return scan(Block(name="blocks"), x, None)[0]

    x = normal(3, 24)
    scanned = jax.jit(Stack().apply)({"params": {"blocks": stacked}, "quant": {"blocks": rows}}, x)
    apply = jax.jit(Block().apply)
    for i, params in enumerate(layers):
        row = jax.tree.map(lambda rows, i=i: rows[i], rows)
        x = apply({"params": params, "quant": row}, x)
    np.testing.assert_allclose(scanned, x, rtol=1e-5, atol=1e-5)


def test_vmap_over_stacked_tensors_is_the_loop():
    """Alike blocks, calibrated side by side."""
    layers = [block_params(ActSpec(), seed=10 * i) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = normal(3, 5, 24)
    apply = lambda params, x: Block().apply({"params": params}, x)
    together = jax.jit(jax.vmap(apply))(stacked, x)
    one = jax.jit(apply)
    for y, params, part in zip(together, layers, x, strict=True):
        np.testing.assert_allclose(y, one(params, part), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", (None, ActSpec()), ids=str)
def test_gradients_and_tangents_are_those_of_the_dequantized_layer(act):
    params, x, direction = dense_params(act=act), normal(5, 24), normal(5, 24, seed=9)
    floats = params | {"kernel": params["kernel"].dequantize()}

    @jax.jit
    def derivatives(params):
        apply = lambda x: Dense(6).apply({"params": params}, x)
        gradient = jax.grad(lambda x: jnp.sum(apply(x) * normal(5, 6)))(x)
        return gradient, jax.jvp(apply, (x,), (direction,))[1]

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, derivatives(params), derivatives(floats))


def test_the_bias_of_a_quantized_layer_can_be_trained():
    params, x = dense_params(act=ActSpec()), normal(5, 24)
    loss = lambda bias: jnp.sum(Dense(6).apply({"params": params | {"bias": bias}}, x))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(params["bias"]), 5.0)
