"""QTensor: a pytree that knows its logical shape, and survives whatever trees go through."""

import copy
import dataclasses
import pickle

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from qjax.core.config import ActSpec
from qjax.core.linen import BoxedQTensor, box
from qjax.core.qtensor import QTensor, from_codes, is_qtensor, native_dtype, spread
from qjax.kernels import packing

BITS = tuple(packing.PLANES)
ACT = ActSpec(granularity="per_group", group_size=(64, None))


def make(shape=(96, 10), *, bits=4, groups=1, zero=False, axis=-2, seed=0, **static):
    """A QTensor of random codes, and the floats it stands for."""
    rng = np.random.default_rng(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = rng.integers(low, high, shape).astype(np.int8)
    scale_shape = [1] * len(shape)
    scale_shape[-1], scale_shape[axis] = shape[-1], groups
    scale = rng.uniform(0.01, 0.1, scale_shape).astype(jnp.bfloat16)
    zero_point = rng.integers(low, high, scale_shape).astype(np.int8) if zero else None
    wide = lambda a: np.repeat(a.astype(np.float64), shape[axis] // groups, axis)
    floats = (codes - (wide(zero_point) if zero else 0)) * wide(scale)
    optional = None if zero_point is None else jnp.asarray(zero_point)
    q = from_codes(jnp.asarray(codes), jnp.asarray(scale), optional, bits=bits, axis=axis, **static)
    return q, floats


@pytest.fixture(scope="module")
def grouped():
    return make(groups=3, zero=True, act=ACT, dtype_name="bfloat16")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", ("native", "packed"))
def test_the_value_is_that_of_the_formula(bits, layout):
    q, floats = make(bits=bits, layout=layout, groups=3, zero=True)
    np.testing.assert_allclose(jax.jit(QTensor.dequantize)(q), floats, rtol=1e-6)
    assert (q.shape, q.ndim, q.size, q.group_size) == ((96, 10), 2, 960, 32)


@pytest.mark.parametrize(
    "shape, axis, groups",
    [((3, 3, 40, 6), -2, 1), ((3, 3, 40, 6), -2, 5), ((48, 4, 6), -3, 3), ((4, 24, 6), -2, 3)],
)
def test_convolutions_and_heads_are_packed_along_their_input_channels(shape, axis, groups):
    q, floats = make(shape, axis=axis, groups=groups, zero=True)
    assert q.shape == shape
    assert q.qvalue.shape[axis] == shape[axis] // 2
    np.testing.assert_allclose(jax.jit(QTensor.dequantize)(q), floats, rtol=1e-6)


@pytest.mark.parametrize("size", (1, 5, 333))
def test_padding_is_not_part_of_the_shape(size):
    q, floats = make((size, 4), bits=3)
    assert q.pad > 0
    assert q.shape == (size, 4)
    np.testing.assert_allclose(jax.jit(QTensor.dequantize)(q), floats, rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", ("native", "packed"))
def test_bytes_are_counted_from_bits(bits, layout):
    q, _ = make((512, 8), bits=bits, groups=4, zero=True, layout=layout)
    scales = 4 * 8
    assert q.nbytes_packed == 512 * 8 * bits // 8 + scales * 2 + scales


def test_layouts_hold_the_same_values(grouped):
    q, _ = grouped
    native = q.with_layout("native")
    assert native.qvalue.dtype == native_dtype(4) == jnp.int4
    assert (native.layout, native.shape, native.act) == ("native", q.shape, ACT)
    np.testing.assert_array_equal(native.codes(), q.codes())
    jax.tree.map(np.testing.assert_array_equal, native.with_layout("packed"), q)
    assert q.with_layout("packed") is q


def test_the_dtype_is_that_of_the_array_it_replaced(grouped):
    q, floats = grouped
    assert q.dtype == q.dequantize().dtype == jnp.bfloat16
    assert q.dequantize(jnp.float32).dtype == jnp.float32
    np.testing.assert_allclose(q.dequantize(jnp.float32), floats, rtol=1e-6)


def test_leaves_are_named_and_everything_else_is_static(grouped):
    q, _ = grouped
    paths, _ = jax.tree_util.tree_flatten_with_path(q)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    assert names == [".qvalue", ".scale", ".zero_point"]
    assert isinstance(hash(jax.tree.structure(q)), int)
    assert jax.tree.structure(q) != jax.tree.structure(q.replace(act=None))


def test_stacking_adds_an_axis_and_nothing_else():
    tensors = [make(seed=seed, groups=3)[0] for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tensors)
    assert (stacked.shape, stacked.axis, stacked.group_size) == ((3, 96, 10), -2, 32)
    wanted = np.stack([q.dequantize() for q in tensors])
    np.testing.assert_array_equal(stacked.dequantize(), wanted)
    np.testing.assert_array_equal(jax.vmap(QTensor.dequantize)(stacked), wanted)
    _, scanned = jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, stacked)
    np.testing.assert_array_equal(scanned, wanted)


def test_shapes_alone_are_enough():
    abstract = jax.eval_shape(lambda: make(groups=3)[0])
    assert (abstract.shape, abstract.dtype, abstract.group_size) == ((96, 10), jnp.float32, 32)
    assert abstract.nbytes_packed == 96 * 10 // 2 + 3 * 10 * 2
    assert repr(abstract) == "QTensor(W4 symmetric, shape=[96, 10], packed, act=None)"


def test_is_qtensor_stops_a_tree_function(grouped):
    tree = {"kernel": grouped[0], "bias": jnp.ones(3)}
    leaves = jax.tree.leaves(tree, is_leaf=is_qtensor)
    assert [is_qtensor(leaf) for leaf in leaves] == [False, True]


@pytest.mark.parametrize("again", (copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))))
def test_a_copy_is_equal(grouped, again):
    q, _ = grouped
    other = again(q)
    assert jax.tree.structure(other) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, other, q)


@pytest.mark.parametrize("small", [(1, 1), (2, 1), (4, 6), (1, 3)])
def test_spread_repeats_runs(small):
    array = np.arange(np.prod(small)).reshape(small)
    wanted = np.kron(array, np.ones((4 // small[0], 6 // small[1]), int))
    np.testing.assert_array_equal(spread(jnp.asarray(array), (4, 6)), wanted)


@pytest.mark.parametrize(
    "scale_shape", [(10,), (5, 10), (96, 10, 1), (3, 4)], ids=lambda shape: str(list(shape))
)
def test_scales_that_do_not_fit_raise(scale_shape):
    with pytest.raises(ValueError, match="axes of size 1 or a divisor"):
        from_codes(jnp.zeros((96, 10), jnp.int8), jnp.ones(scale_shape), bits=4)


def test_static_fields_are_checked():
    codes, scale = jnp.zeros((96, 10), jnp.int8), jnp.ones((1, 10))
    with pytest.raises(ValueError, match=r"bits must be one of \[2, 3, 4, 5, 6, 8\]; got 7"):
        from_codes(codes, scale, bits=7)
    with pytest.raises(ValueError, match="axis must be negative"):
        from_codes(codes, scale, bits=4, axis=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        from_codes(codes, scale, bits=4).bits = 8


# jax.export and flax.serialization, for the class and for its box.

WRAPPERS = pytest.mark.parametrize("wrap", (lambda q: q, box), ids=("QTensor", "BoxedQTensor"))


@WRAPPERS
@pytest.mark.parametrize("zero", (False, True))
def test_an_exported_function_takes_qtensors(wrap, zero):
    pytest.importorskip("flatbuffers")
    q, floats = make(groups=3, zero=zero, act=ACT)
    params = {"kernel": wrap(q)}
    exported = jax.export.export(jax.jit(lambda p: {"kernel": p["kernel"].dequantize()}))(params)
    restored = jax.export.deserialize(exported.serialize())
    assert restored.in_tree == exported.in_tree
    np.testing.assert_allclose(restored.call(params)["kernel"], floats, rtol=1e-6)


@WRAPPERS
@pytest.mark.parametrize("layout", ("native", "packed"))
@pytest.mark.parametrize("zero", (False, True))
def test_flax_bytes_come_back_as_they_went(wrap, layout, zero):
    saved = {"kernel": wrap(make(layout=layout, zero=zero, act=ACT)[0]), "bias": jnp.ones(3)}
    target = jax.tree.map(jnp.zeros_like, saved)
    restored = serialization.from_bytes(target, serialization.to_bytes(saved))
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert type(restored["kernel"]) is type(saved["kernel"])
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    assert restored["kernel"].scale.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "target", [{"bits": 3}, {"zero": True}, {"layout": "native"}, {"act": None}], ids=str
)
def test_flax_bytes_of_another_format_raise(target):
    data = serialization.to_bytes({"layer": {"kernel": make(act=ACT)[0]}})
    other = {"layer": {"kernel": make(**{"act": ACT} | target)[0]}}
    with pytest.raises(ValueError, match="layer/kernel must be of a QTensor with the static"):
        serialization.from_bytes(other, data)


def test_flax_bytes_of_a_float_kernel_raise():
    state = {"kernel": {"something": np.ones(3)}}
    with pytest.raises(ValueError, match="got None with something"):
        serialization.from_state_dict({"kernel": make()[0]}, state)


def test_a_box_is_another_class_with_the_same_fields():
    q, _ = make(act=ACT)
    boxed = box(q)
    assert type(boxed) is BoxedQTensor
    assert jax.tree.structure(boxed) != jax.tree.structure(q)
    assert type(boxed.with_layout("native")) is BoxedQTensor
    assert repr(boxed).startswith("BoxedQTensor(W4")
