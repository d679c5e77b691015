"""Unmodified NNX modules on QTensors: parameters that dequantize, and low-bit layers."""

import contextlib
import importlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax.core import foreign, serialize
from qjax.core import nnx as qnnx
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.qtensor import QTensor, from_codes
from qjax.core.quantize import dequantize, plan, quantize

W4 = WeightSpec(bits=4, granularity="per_group", group_size=(8, 4))
W8 = WeightSpec(bits=8)
A8 = ActSpec(bits=8)


class Block(nnx.Module):
    """A transformer block; attention's projections are LinearGenerals of three axes."""

    def __init__(self, width, rngs):
        self.attn = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Net(nnx.Module):
    """A small vision model; nothing in it knows of quantization."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 16, (3, 3), strides=2, padding=1, rngs=rngs)
        blocks = [Block(16, rngs)]
        self.blocks = nnx.List(blocks) if hasattr(nnx, "List") else blocks  # flax 0.11: a list
        self.head = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, images):
        x = nnx.silu(self.stem(images))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=1))


KERNELS = (
    "blocks/0/attn/key/kernel",
    "blocks/0/attn/out/kernel",
    "blocks/0/attn/query/kernel",
    "blocks/0/attn/value/kernel",
    "blocks/0/down/kernel",
    "blocks/0/up/kernel",
    "head/kernel",
    "stem/kernel",
)


def config(weight=W8, act=None):
    stem = Rule(pattern="stem/kernel", weight=W8, act=act)  # 3 input channels: no groups
    return QuantConfig(rules=(stem,), weight=weight, act=act)


@pytest.fixture
def images(key):
    return jax.random.normal(key, (2, 8, 8, 3))


@pytest.fixture(scope="module")
def net():
    return Net(nnx.Rngs(0))


@pytest.fixture(scope="module")
def w4(net):
    return quantize(net, config(W4))


@pytest.fixture(scope="module")
def w4a8(net):
    return quantize(net, config(W4, A8))


@pytest.fixture(params=["graph", "tree"])
def mode(request):
    """NNX's two ways to see a module; flax 0.11 has the first only."""
    if request.param == "graph":
        return contextlib.nullcontext()
    if not hasattr(nnx, "set_graph_mode"):
        pytest.skip("this flax has no tree mode")
    return nnx.set_graph_mode(False)


def run(module, images):
    """Split, merge and plain jax.jit, which work in every version and mode."""
    graphdef, state = nnx.split(module)
    return jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))(state, images)


def relative(y, reference):
    return float(jnp.linalg.norm(y - reference) / jnp.linalg.norm(reference))


def stored(variable):
    """What a Variable holds; flax 0.11 and 0.12 call it differently."""
    return variable.get_raw_value() if hasattr(variable, "get_raw_value") else variable.raw_value


@pytest.mark.quick_cases("graph")
def test_an_unmodified_module_reads_the_dequantized_weights(net, images, mode):
    with mode:
        quantized = quantize(net, config(W4))
        assert type(quantized) is Net
        assert isinstance(qnnx.raw(quantized.blocks[0].attn.query.kernel), QTensor)
        y = run(quantized, images)
        np.testing.assert_allclose(y, run(dequantize(quantized), images), rtol=1e-5, atol=1e-6)
        assert not np.array_equal(y, run(net, images))


def test_quantizing_shares_the_other_arrays_and_mutates_nothing(net, mode):
    with mode:
        before = jax.tree.map(np.asarray, nnx.split(net)[1])
        quantized = qnnx.low_bit(quantize(net, config(W4, A8)))
        assert stored(quantized.head.bias) is stored(net.head.bias)
        quantized.head.bias[...] = jnp.zeros(5)
        quantized.head.use_bias = False
        after = nnx.split(net)[1]
        assert jax.tree.structure(before) == jax.tree.structure(after)
        jax.tree.map(np.testing.assert_array_equal, before, after)
        assert net.head.use_bias and net.head.dot_general is jax.lax.dot_general


def test_floats_that_the_quantizer_casts_become_new_params(net):
    half = lambda path, leaf: leaf.astype(jnp.bfloat16) if path == "head/bias" else leaf
    cast = qnnx.quantize_leaves(net, half)
    assert type(cast.head.bias) is nnx.Param and cast.head.bias.dtype == jnp.bfloat16
    assert stored(cast.head.kernel) is stored(net.head.kernel)
    assert net.head.bias.dtype == jnp.float32


def test_modules_of_hijax_variables_get_plain_quantized_ones(key):
    if not hasattr(nnx, "var_defaults"):
        pytest.skip("this flax has no hijax variables")
    x = jax.random.normal(key, (2, 16))
    with nnx.var_defaults(hijax=True):
        layer = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
        quantized = quantize(layer, QuantConfig(weight=W8, act=A8))
        assert not quantized.kernel.hijax
        assert relative(run(qnnx.low_bit(quantized), x), layer(x)) < 0.02


def test_paths_and_plan_are_those_of_the_params(net):
    entries = plan(net, config(W4)).entries
    assert tuple(e.path for e in entries if e.weight is not None) == KERNELS
    assert "blocks/0/norm/scale" in [e.path for e in entries if e.weight is None]


def test_random_state_and_statistics_are_no_params():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.linear = nnx.Linear(8, 8, rngs=rngs)

    module = Noisy(nnx.Rngs(0))
    paths = [path for path, _ in qnnx.leaves(module)]
    assert paths == ["linear/bias", "linear/kernel", "norm/bias", "norm/scale"]
    quantized = quantize(module, QuantConfig(weight=W8))
    assert isinstance(quantized.norm.mean, nnx.BatchStat)


def test_a_quantized_state_merges_with_the_float_modules_graphdef(net, w4, images):
    graphdef, state = nnx.split(net)
    quantized = quantize(state, config(W4))
    assert isinstance(quantized, nnx.State)
    y = run(nnx.merge(graphdef, quantized), images)
    np.testing.assert_array_equal(y, run(w4, images))
    restored = dequantize(quantized)
    assert all(isinstance(v, nnx.Param) for _, v in nnx.to_flat_state(restored))


def test_a_state_of_bare_arrays_raises_with_the_way_out(net):
    _, state = nnx.split(net)
    bare = nnx.from_flat_state([(p, stored(v)) for p, v in nnx.to_flat_state(state)])
    with pytest.raises(TypeError, match="nnx.split"):
        quantize(bare, config())


def test_the_low_bit_module_computes_in_int8_within_the_error_of_the_activations(net, images, mode):
    with mode:
        quantized = quantize(net, config(W4, A8))
        fast = qnnx.low_bit(quantized)
        assert qnnx.layers(fast) == tuple((path, "low-bit") for path in KERNELS)
        assert all("low_bit has not been called" in why for _, why in qnnx.layers(quantized))
        graphdef, state = nnx.split(fast)
        function = lambda state, images: nnx.merge(graphdef, state)(images)
        program = str(jax.make_jaxpr(function)(state, images))
        assert program.count("preferred_element_type=int32") >= len(KERNELS)
        error = relative(run(fast, images), run(quantized, images))
        assert 0 < error < 0.03  # eight layers of dynamic A8, each about 0.5 %


def test_low_bit_without_act_equals_the_plain_module(w4, images):
    fast = qnnx.low_bit(w4)
    assert {outcome for _, outcome in qnnx.layers(fast)} == {foreign.WEIGHTS_ONLY}
    np.testing.assert_allclose(run(fast, images), run(w4, images), rtol=1e-4, atol=1e-5)


def test_low_bit_agrees_with_linen_interception(key):
    import flax.linen as nn

    from qjax.core import linen

    x = jax.random.normal(key, (4, 16))
    layer = quantize(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), QuantConfig(weight=W4, act=A8))
    params = {"kernel": linen.box(qnnx.raw(layer.kernel)), "bias": stored(layer.bias)}
    with linen.intercept():
        expected = nn.Dense(8).apply({"params": params}, x)
    np.testing.assert_array_equal(qnnx.low_bit(layer)(x), expected)


class Layer(nnx.Module):
    """A layer and a norm, for what needs no whole model."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.linear = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return self.linear(self.norm(x))


@pytest.mark.parametrize(
    ("prepare", "tolerance"), [(lambda m: m, 1e-5), (qnnx.low_bit, 0.05)], ids=["plain", "low_bit"]
)
def test_jit_and_gradients_by_inputs_and_float_params(key, prepare, tolerance):
    x = jax.random.normal(key, (4, 16))
    quantized = quantize(Layer(nnx.Rngs(0)), QuantConfig(weight=W4, act=A8))
    floats, module = dequantize(quantized), prepare(quantized)
    loss = lambda module, x: jnp.sum(module(x) ** 2)
    np.testing.assert_allclose(nnx.jit(loss)(module, x), loss(floats, x), rtol=tolerance)
    by_input = jax.grad(lambda x, module: loss(module, x))
    assert relative(by_input(x, module), by_input(x, floats)) < tolerance
    gradient, expected = nnx.grad(loss)(module, x), nnx.grad(loss)(floats, x)
    paths = ["/".join(path) for path, _ in nnx.to_flat_state(gradient)]
    assert paths == ["linear/bias", "norm/bias", "norm/scale"]
    for layer, name in (path.split("/") for path in paths):
        assert relative(stored(gradient[layer][name]), stored(expected[layer][name])) < tolerance


def test_gradients_by_params_in_either_mode_go_through_split(key, mode):
    with mode:
        x = jax.random.normal(key, (4, 16))
        module = quantize(Layer(nnx.Rngs(0)), QuantConfig(weight=W4, act=A8))
        graphdef, params, rest = nnx.split(qnnx.low_bit(module), nnx.Param, ...)

        def loss(params):
            return jnp.sum(nnx.merge(graphdef, params, rest)(x))

        gradient = jax.jit(jax.grad(loss))(params)
        np.testing.assert_allclose(stored(gradient["linear"]["bias"]), jnp.full(8, 4.0), rtol=1e-6)


def test_quantized_params_can_be_filtered_by_type(w4):
    _, low, _ = nnx.split(w4, qnnx.QuantizedParam, ...)
    assert len(nnx.to_flat_state(low)) == len(KERNELS)
    assert not any(isinstance(v, nnx.Param) for _, v in nnx.to_flat_state(low))


def test_every_way_to_read_a_variable_dequantizes_except_raw(w4):
    variable = w4.head.kernel
    expected = qnnx.raw(variable).dequantize()
    for read in (variable[...], variable.value, variable + 0.0, jnp.asarray(variable)):
        np.testing.assert_array_equal(read, expected)
    np.testing.assert_array_equal(variable[0], expected[0])
    assert variable.shape == (16, 5) and variable.dtype == jnp.float32
    assert "W4" in repr(variable)


def test_a_quantized_param_takes_only_qtensors(net, w4):
    variable = nnx.clone(w4).head.kernel
    with pytest.raises(TypeError, match="Quantize the new value"):
        variable.value = jnp.zeros((16, 5))
    q = from_codes(jnp.ones((16, 5), jnp.int8), jnp.ones((1, 5)), bits=8)
    variable.value = q
    np.testing.assert_array_equal(variable[...], jnp.ones((16, 5)))
    with pytest.raises(TypeError, match="holds a QTensor"):
        qnnx.QuantizedParam(jnp.zeros(3))
    with pytest.raises(TypeError, match="takes a QuantizedParam"):
        qnnx.raw(net.head.kernel)


def test_the_state_of_a_quantized_module_survives_pickling(key):
    # Whole modules do as far as flax can pickle them, from 0.12 on.
    x = jax.random.normal(key, (4, 16))
    module = qnnx.low_bit(quantize(Layer(nnx.Rngs(0)), QuantConfig(weight=W4, act=A8)))
    graphdef, state = nnx.split(module)
    restored = nnx.merge(graphdef, pickle.loads(pickle.dumps(state)))
    np.testing.assert_array_equal(restored(x), module(x))


def test_vmap_over_stacked_states_equals_a_loop(key):
    x = jax.random.normal(key, (4, 16))
    modules = [quantize(Layer(nnx.Rngs(i)), QuantConfig(weight=W4)) for i in range(2)]
    graphdef, _ = nnx.split(modules[0])
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *(nnx.split(m)[1] for m in modules))
    y = jax.vmap(lambda state: nnx.merge(graphdef, state)(x))(stacked)
    expected = jnp.stack([m(x) for m in modules])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_a_tied_kernel_stays_tied(key):
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(8, 8, rngs=rngs)
            self.b = nnx.Linear(8, 8, rngs=rngs)
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.b(self.a(x))

    module = Tied(nnx.Rngs(0))
    x = jax.random.normal(key, (2, 8))
    quantized = quantize(module, QuantConfig(weight=W8, act=A8))
    assert quantized.a.kernel is quantized.b.kernel
    np.testing.assert_allclose(quantized(x), dequantize(quantized)(x), rtol=1e-6)
    fast = qnnx.low_bit(quantized)
    assert fast.a.kernel is fast.b.kernel
    assert relative(fast(x), quantized(x)) < 0.02


def test_lora_layers_run_low_bit_and_keep_their_adapter(key):
    layer = nnx.LoRALinear(16, 8, lora_rank=2, rngs=nnx.Rngs(0))
    layer.lora.lora_b = nnx.LoRAParam(jax.random.normal(key, (2, 8)))
    quantized = quantize(layer, QuantConfig(weight=W4, act=A8))
    fast = qnnx.low_bit(quantized)
    x = jax.random.normal(key, (4, 16))
    assert qnnx.layers(fast) == (("kernel", "low-bit"),)
    assert relative(fast(x), quantized(x)) < 0.02


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda r: nnx.LinearGeneral((4, 8), 10, axis=(-2, -1), rngs=r), (2, 5, 4, 8)),
        (lambda r: nnx.LinearGeneral(16, (2, 3), axis=1, rngs=r), (2, 16, 5)),
        (lambda r: nnx.Linear(16, 4, dtype=jnp.bfloat16, rngs=r), (3, 16)),
        (lambda r: nnx.Conv(8, 4, (3, 3), padding="VALID", rngs=r), (2, 2, 6, 6, 8)),
        (lambda r: nnx.Conv(8, 4, (3, 3), strides=(2, 2), padding=((0, 1), 1), rngs=r), (7, 7, 8)),
    ],
)
def test_layers_of_any_form_run_low_bit_like_flax_runs_them(key, layer, shape):
    quantized = quantize(layer(nnx.Rngs(0)), QuantConfig(weight=W8, act=A8))
    fast = qnnx.low_bit(quantized)
    assert qnnx.layers(fast) == (("kernel", "low-bit"),)
    x = jax.random.normal(key, shape)
    y, expected = fast(x), quantized(x)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    assert relative(*(a.astype(jnp.float32) for a in (y, expected))) < 0.02


class Doubled(nnx.Linear):
    def __call__(self, inputs):
        return 2.0 * (inputs @ self.kernel[...])


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (lambda r: nnx.Conv(8, 8, (3, 3), strides=(2, 1), rngs=r), (2, 6, 6, 8), "strides"),
        (lambda r: nnx.Conv(8, 8, (3, 3), kernel_dilation=2, rngs=r), (2, 6, 6, 8), "dilation"),
        (lambda r: nnx.Conv(8, 8, (3, 3), padding="CIRCULAR", rngs=r), (2, 6, 6, 8), "CIRCULAR"),
        (lambda r: nnx.Conv(8, 8, 3, rngs=r), (2, 6, 8), "3 axes"),
        (lambda r: nnx.ConvTranspose(8, 8, (2, 2), rngs=r), (2, 4, 4, 8), "ConvTranspose"),
        (lambda r: Doubled(8, 8, rngs=r), (2, 8), "Doubled has no low-bit form"),
        (
            lambda r: nnx.LinearGeneral(8, 4, axis=-1, batch_axis={0: 2}, rngs=r),
            (2, 6, 8),
            "batch_axis",
        ),
    ],
)
def test_layers_without_a_low_bit_form_stay_dequantized_and_say_why(key, layer, shape, reason):
    quantized = quantize(layer(nnx.Rngs(0)), QuantConfig(weight=W8, act=A8))
    same = qnnx.low_bit(quantized)
    ((path, outcome),) = qnnx.layers(same)
    assert path == "kernel" and outcome.startswith("dequantized: ") and reason in outcome
    x = jax.random.normal(key, shape)
    np.testing.assert_array_equal(same(x), quantized(x))


def test_static_ranges_come_from_the_row(key):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(16, 16, rngs=rngs)
            self.second = nnx.ConvTranspose(16, 8, (1, 1), rngs=rngs)

        def __call__(self, x):
            return self.first(x)

    act = ActSpec(bits=8, mode="per_step", granularity="per_tensor")
    quantized = quantize(Two(nnx.Rngs(0)), QuantConfig(weight=W8, act=act))
    x = jax.random.uniform(key, (4, 16))

    @jax.jit
    def steps(state, scales):
        def step(_, scale):
            module = nnx.merge(graphdef, state)
            return None, qnnx.low_bit(module, row={"first": {"act_scale": scale}})(x)

        return jax.lax.scan(step, None, scales)[1]

    graphdef, state = nnx.split(quantized)
    scales = jnp.array([1 / 127, 1 / 31], jnp.float32)
    for y, levels in zip(steps(state, scales), (127, 31), strict=True):
        np.testing.assert_allclose(y, quantized(jnp.round(x * levels) / levels), rtol=1e-4)
    with pytest.raises(ValueError, match="calibrate first"):
        qnnx.low_bit(quantized)(x)
    for lost in ("second", "third"):
        with pytest.raises(ValueError, match=f"entries for {lost}"):
            qnnx.low_bit(quantized, row={lost: {"act_scale": scales[0]}})


@pytest.mark.parametrize("prepare", [lambda m: m, qnnx.low_bit], ids=["plain", "low_bit"])
def test_export_round_trip_of_a_quantized_module(net, images, prepare):
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
    export = importlib.import_module("jax.export")  # no attribute of jax 0.7
    module = prepare(quantize(net, config(W4, A8)))
    graphdef, state = nnx.split(module)
    # Flax does not register its Variables for serialization: the leaves go in as a list.
    arrays, structure = jax.tree.flatten(state)

    @jax.jit
    def function(arrays, images):
        return nnx.merge(graphdef, jax.tree.unflatten(structure, arrays))(images)

    exported = export.export(function)(arrays, images)
    restored = export.deserialize(bytearray(exported.serialize()))
    np.testing.assert_array_equal(restored.call(arrays, images), function(arrays, images))


def test_a_quantized_module_comes_back_from_disk_as_it_was(tmp_path):
    """Into a float module and into a quantized one; what is no parameter stays the target's."""
    module = Net(nnx.Rngs(0))
    stem = Rule(pattern="stem/kernel", weight=W8, act=A8)  # no group divides its 3 input channels
    quantized = quantize(module, QuantConfig(rules=(stem,), weight=W4, act=A8))
    serialize.save(tmp_path / "net", qnnx.params(quantized), {})
    loaded, _ = serialize.load(tmp_path / "net")
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    for target in (Net(nnx.Rngs(1)), quantize(Net(nnx.Rngs(2)), QuantConfig(weight=W8))):
        again = qnnx.with_params(target, loaded)
        assert jax.tree.all(jax.tree.map(np.array_equal, qnnx.params(again), loaded))
        np.testing.assert_array_equal(again(images), quantized(images))
        assert [how for _, how in qnnx.layers(qnnx.low_bit(again))] == [
            how for _, how in qnnx.layers(qnnx.low_bit(quantized))
        ]


def test_float_parameters_go_back_into_a_quantized_module():
    module = Net(nnx.Rngs(0))
    again = qnnx.with_params(quantize(module, QuantConfig(weight=W8)), qnnx.params(module))
    images = jnp.ones((1, 8, 8, 3))
    np.testing.assert_array_equal(again(images), module(images))
    assert all(not isinstance(leaf, QTensor) for _, leaf in qnnx.leaves(again))


def test_params_of_another_module_are_refused_and_all_differences_named():
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    other = {"kernel": jnp.ones((4, 2)), "scale": jnp.ones(3)}
    with pytest.raises(ValueError, match="bias is missing.*kernel.*4, 2.*scale.*there is none"):
        qnnx.with_params(module, other)
