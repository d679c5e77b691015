"""quantize, dequantize and plan on trees of every container, and what they refuse."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze

from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.linen import BoxedQTensor
from qjax.core.qtensor import QTensor, is_qtensor
from qjax.core.quantize import dequantize, plan, quantize, quantize_leaf, tree_bytes

W8 = WeightSpec(bits=8)
W4 = WeightSpec(bits=4, granularity="per_group", group_size=4)
A8 = ActSpec(bits=8)
BY_LEAF = [W8, W4, WeightSpec(bits=3, symmetric=False, granularity="per_group", group_size=(3, 2))]
IDS = ["w8", "w4", "w3 asymmetric"]


def normal(*shape: int) -> jax.Array:
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32)


def tree() -> dict:
    """One leaf of every kind: matrices, heads, a convolution, an embedding, a bias."""
    return {
        "label": {"embedding": normal(5, 8)},
        "blocks_10": {"up": {"kernel": normal(8, 6), "bias": normal(6)}},
        "blocks_2": {"up": {"kernel": 2 * normal(8, 6), "bias": normal(6)}},
        "attn": {"query": {"kernel": normal(8, 2, 4)}, "out": {"kernel": normal(2, 4, 8)}},
        "stem": {"kernel": normal(3, 3, 8, 4)},
    }


def leaves(params) -> list:
    return jax.tree.leaves(params, is_leaf=is_qtensor)


def assert_same(a, b) -> None:
    """Equal structure, classes, static fields and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def sentences(error) -> int:
    return len(re.findall(r"\.(?:\s|$)", str(error.value)))


@pytest.fixture(scope="module")
def params():
    return tree()


@pytest.fixture(scope="module")
def shapes(params):
    return jax.eval_shape(lambda: params)


# What becomes of a tree.


@pytest.mark.parametrize("weight", BY_LEAF, ids=IDS)
def test_kernels_become_qtensors_and_the_structure_stays(params, weight):
    quantized = quantize(params, QuantConfig(weight=weight, act=A8))
    structure = lambda t: jax.tree.structure(t, is_leaf=is_qtensor)
    assert structure(quantized) == structure(params)
    for path, leaf in jax.tree.leaves_with_path(quantized, is_leaf=is_qtensor):
        assert is_qtensor(leaf) == ("kernel" in str(path))
        if is_qtensor(leaf):
            assert isinstance(leaf, BoxedQTensor)
            assert leaf.bits == weight.bits and leaf.act == A8


@pytest.mark.parametrize("weight", BY_LEAF, ids=IDS)
def test_dequantized_weights_are_within_half_a_step(params, weight):
    quantized = quantize(params, QuantConfig(weight=weight))
    back = dequantize(quantized)
    for w, q, again in zip(leaves(params), leaves(quantized), leaves(back), strict=True):
        assert again.shape == w.shape and again.dtype == w.dtype
        if is_qtensor(q):
            # A scale rounded down to bfloat16 clips the largest value by 0.4 % at most.
            bound = 0.5 * float(jnp.max(q.scale)) + 0.004 * float(jnp.max(jnp.abs(w)))
            assert float(jnp.max(jnp.abs(w - again))) <= bound
        else:
            assert again is w


def test_the_input_is_not_changed(params):
    before = jax.tree.map(np.array, params)
    for config in (QuantConfig(weight=W4), QuantConfig(weight=W8, float_dtype="float16")):
        quantize(params, config)
    assert_same(jax.tree.map(np.asarray, params), before)


def test_leaves_that_stay_are_the_same_objects(params):
    quantized = quantize(params, QuantConfig(weight=W8))
    assert quantized["label"]["embedding"] is params["label"]["embedding"]
    assert quantized["blocks_2"]["up"]["bias"] is params["blocks_2"]["up"]["bias"]


def test_leaves_that_stay_take_the_float_dtype(params):
    quantized = quantize(params, QuantConfig(weight=W8, float_dtype="bfloat16"))
    assert quantized["label"]["embedding"].dtype == jnp.bfloat16
    assert quantized["stem"]["kernel"].dtype == jnp.float32  # what it stands for


@pytest.mark.parametrize("weight", BY_LEAF, ids=IDS)
def test_a_plan_of_shapes_knows_the_bytes_of_the_real_thing(params, shapes, weight):
    config = QuantConfig(weight=weight, float_dtype="float16")
    planned = plan(shapes, config)
    quantized = quantize(params, config)
    assert planned.bytes_after == tree_bytes(quantized)
    assert planned.bytes_before == tree_bytes(params) == 2 * sum(w.size for w in leaves(params))
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))  # no int4 arrays here
    assert planned.bytes_after == stored


def test_a_plan_says_what_stays_in_float_and_why(shapes):
    rule = Rule(pattern="stem/kernel", reason="next to the pixels")
    by_path = {e.path: e for e in plan(shapes, QuantConfig(rules=(rule,), weight=W4)).entries}
    assert by_path["label/embedding"].weight is None
    assert by_path["label/embedding"].reason == "not a layer's kernel"
    assert by_path["stem/kernel"].reason == "next to the pixels"
    assert by_path["blocks_2/up/kernel"].group_size == 4
    assert {e.kind for e in by_path.values()} == {"dense", "conv", "other"}
    assert all(e.reason for e in by_path.values() if e.weight is None)


def test_a_printed_plan_has_a_line_for_every_leaf_in_natural_order(shapes):
    text = str(plan(shapes, QuantConfig(weight=W8, act=A8)))
    lines = text.splitlines()
    assert len(lines) == 2 + len(leaves(shapes))
    assert text.index("blocks_2/up") < text.index("blocks_10/up")
    assert "A8 dynamic" in text and "bits a value" in lines[-1]


def test_projections_to_and_from_heads_share_scales_over_their_own_inputs(params):
    by_channel = quantize(params, QuantConfig(weight=W8))["attn"]
    assert by_channel["query"]["kernel"].axis == -3
    assert by_channel["query"]["kernel"].scale.shape == (1, 2, 4)
    assert by_channel["out"]["kernel"].axis == -2
    assert by_channel["out"]["kernel"].scale.shape == (1, 1, 8)
    by_group = quantize(params, QuantConfig(weight=W4))["attn"]
    assert by_group["query"]["kernel"].scale.shape == (2, 2, 4)
    assert by_group["out"]["kernel"].scale.shape == (2, 1, 8)


def test_a_convolution_has_groups_within_a_tap_and_channels_across_taps(params):
    assert quantize(params, QuantConfig(weight=W4))["stem"]["kernel"].scale.shape == (3, 3, 2, 4)
    assert quantize(params, QuantConfig(weight=W8))["stem"]["kernel"].scale.shape == (1, 1, 1, 4)


@pytest.mark.parametrize("name", ("Conv_0", "conv1d"))
def test_a_one_dimensional_convolution_has_its_channels_where_flax_has_them(name):
    tree = {name: {"kernel": normal(3, 8, 6)}}
    (entry,) = plan(tree, QuantConfig(weight=W4)).entries
    assert (entry.kind, entry.group_size) == ("conv", 4)
    q = quantize(tree, QuantConfig(weight=W4))[name]["kernel"]
    assert q.axis == -2 and q.scale.shape == (3, 2, 6)
    per_channel = quantize(tree, QuantConfig(weight=W8))[name]["kernel"]
    assert per_channel.scale.shape == (1, 1, 6)


def test_an_embedding_is_quantized_where_a_rule_asks_for_it(params):
    config = QuantConfig(rules=(Rule(pattern=".*/embedding", weight=W8),))
    quantized = quantize(params, config)
    assert is_qtensor(quantized["label"]["embedding"])
    assert sum(map(is_qtensor, leaves(quantized))) == 1


def test_the_first_rule_that_matches_decides(params):
    rules = (
        Rule(pattern="blocks_2/.*kernel"),
        Rule(pattern="blocks_.*kernel", weight=W4),
        Rule(pattern=".*/kernel", weight=W8, kind="conv"),
    )
    quantized = quantize(params, QuantConfig(rules=rules))
    assert not is_qtensor(quantized["blocks_2"]["up"]["kernel"])
    assert quantized["blocks_10"]["up"]["kernel"].bits == 4
    assert quantized["stem"]["kernel"].bits == 8
    assert not is_qtensor(quantized["attn"]["out"]["kernel"])


def test_one_leaf_is_quantized_as_the_tree_would_have_it(params):
    config = QuantConfig(rules=(Rule(pattern="nowhere"),), weight=W4, allow_unmatched=True)
    whole = quantize(params, config, box=False)["attn"]["out"]["kernel"]
    one = quantize_leaf("attn/out/kernel", params["attn"]["out"]["kernel"], config, box=False)
    assert type(one) is QTensor
    assert_same(one, whole)
    numpy = quantize_leaf("attn/out/kernel", np.asarray(params["attn"]["out"]["kernel"]), config)
    assert isinstance(numpy, BoxedQTensor)
    np.testing.assert_array_equal(numpy.qvalue, whole.qvalue)


def test_leaves_without_values_stay():
    quantized = quantize({"kernel": jnp.zeros((0, 4))}, QuantConfig(weight=W8))
    assert quantized["kernel"].shape == (0, 4)


# Containers and tracing.


def test_under_jit_it_is_what_it_is_outside(params):
    config = QuantConfig(weight=W4, float_dtype="float16")
    assert_same(jax.jit(lambda p: quantize(p, config))(params), quantize(params, config))


def test_shapes_in_shapes_out(params, shapes):
    config = QuantConfig(weight=W4, act=A8, float_dtype="float16")
    abstract = quantize(shapes, config)
    assert abstract == jax.eval_shape(lambda p: quantize(p, config), params)
    real = quantize(params, config)
    assert abstract == jax.eval_shape(lambda: real)


def test_frozen_dicts_and_lists_keep_their_kind(params):
    frozen = quantize(freeze(params), QuantConfig(weight=W8))
    assert isinstance(frozen, FrozenDict) and is_qtensor(frozen["stem"]["kernel"])
    assert isinstance(dequantize(frozen), FrozenDict)
    listed = quantize(
        [{"kernel": params["blocks_2"]["up"]["kernel"]}, None], QuantConfig(weight=W8)
    )
    assert isinstance(listed, list) and listed[1] is None
    assert plan(listed[1:] + [params], QuantConfig(weight=W8)).entries[0].path.startswith("1/")


def test_what_partitioned_boxes_hold_is_quantized_inside_them(params):
    nested = jax.tree.map(lambda w: nn.Partitioned(w, names=(None,) * w.ndim), params)
    config = QuantConfig(rules=(Rule(pattern="stem/kernel", weight=W8),), weight=W4)
    quantized = quantize(nested, config)
    stem = quantized["stem"]["kernel"]
    assert isinstance(stem, nn.Partitioned) and stem.value.bits == 8
    unboxed = jax.tree.map(
        lambda box: box.value, quantized, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )
    assert_same(unboxed, quantize(params, config))


def test_dequantize_returns_floats_in_the_asked_dtype(params):
    back = dequantize(quantize(params, QuantConfig(weight=W8)), dtype=jnp.bfloat16)
    assert back["stem"]["kernel"].dtype == jnp.bfloat16
    assert back["label"]["embedding"].dtype == jnp.float32  # it never was quantized
    assert_same(dequantize(params), params)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 6, rngs=rngs)
        self.label = nnx.Embed(3, 8, rngs=rngs)


@pytest.fixture(scope="module")
def net():
    return Net(nnx.Rngs(0))


def test_nnx_modules_and_states_are_quantized_and_planned_alike(net):
    rules = (Rule(pattern="up/kernel", weight=W8),)
    config = QuantConfig(rules=rules, float_dtype="float16")
    before = np.array(net.up.kernel[...])
    module = quantize(net, config)
    assert isinstance(module, Net) and module is not net
    state = quantize(nnx.state(net), config)
    assert isinstance(state, nnx.State)
    assert plan(net, config) == plan(nnx.state(net), config)
    assert plan(net, config).bytes_after == tree_bytes(module) == tree_bytes(state)
    assert module.label.embedding[...].dtype == jnp.float16
    np.testing.assert_array_equal(net.up.kernel[...], before)
    w = quantize({"up": {"kernel": jnp.asarray(before)}}, config)["up"]["kernel"].dequantize()
    np.testing.assert_array_equal(dequantize(module).up.kernel[...], w)


# What is refused, with nothing returned.


def test_a_rule_that_matches_nothing_names_near_misses(params):
    config = QuantConfig(rules=(Rule(pattern="up/kernel", weight=W8),), weight=W4)
    with pytest.raises(ValueError, match=r"'up/kernel' matches no leaf.*near misses: ") as error:
        quantize(params, config)
    assert "blocks_2/up/kernel" in str(error.value) and sentences(error) == 2
    typo = QuantConfig(rules=(Rule(pattern="stemm/kernel", weight=W8),))
    with pytest.raises(ValueError, match=r"near misses: stem/kernel"):
        plan(params, typo)


def test_a_rule_behind_another_that_takes_its_leaves_is_named(params):
    rules = (Rule(pattern=".*/kernel", weight=W8), Rule(pattern="stem/.*", weight=W4))
    with pytest.raises(ValueError, match=r"an earlier rule takes stem/kernel. Put it first"):
        plan(params, QuantConfig(rules=rules))


def test_a_rule_for_another_kind_of_layer_is_named(params):
    rules = (Rule(pattern="stem/kernel", weight=W8, kind="dense"),)
    with pytest.raises(ValueError, match="kind='dense' and matches only leaves of another kind"):
        plan(params, QuantConfig(rules=rules))


def test_unmatched_rules_pass_where_they_are_allowed(params):
    config = QuantConfig(rules=(Rule(pattern="nowhere"),), weight=W8, allow_unmatched=True)
    assert is_qtensor(quantize(params, config)["stem"]["kernel"])


def test_a_single_group_size_must_divide_every_layer_it_is_for(params):
    config = QuantConfig(weight=WeightSpec(bits=4, granularity="per_group", group_size=3))
    with pytest.raises(ValueError, match=r"group_size must divide the 8 input channels") as error:
        quantize(params, config)
    for path in ("blocks_2/up/kernel", "attn/query/kernel", "stem/kernel"):
        assert path in str(error.value)
    assert "Use 8" in str(error.value)


def test_of_a_tuple_of_group_sizes_the_first_that_divides_is_taken(shapes):
    spec = WeightSpec(bits=4, granularity="per_group", group_size=(3, 4, 2, None))
    by_path = {e.path: e.group_size for e in plan(shapes, QuantConfig(weight=spec)).entries}
    assert by_path["blocks_2/up/kernel"] == 4
    none = WeightSpec(bits=4, granularity="per_group", group_size=(3, None))
    by_path = {e.path: e.group_size for e in plan(shapes, QuantConfig(weight=none)).entries}
    assert by_path["blocks_2/up/kernel"] is None


@pytest.mark.parametrize("bits", [0, 1, 7, 9, 16, -4])
def test_bits_outside_the_set_are_refused(bits):
    with pytest.raises(ValueError, match=rf"must be one of 2, 3, 4, 5, 6, 8; got {bits}"):
        WeightSpec(bits=bits)
    with pytest.raises(ValueError, match=rf"act bits must be one of .*; got {bits}"):
        ActSpec(bits=bits)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_all_named(params, value):
    broken = tree()
    for layer in (broken["stem"], broken["blocks_2"]["up"]):
        layer["kernel"] = layer["kernel"].at[0, 0].set(value)
    with pytest.raises(
        ValueError, match="must be finite; blocks_2/up/kernel, stem/kernel hold"
    ) as e:
        quantize(broken, QuantConfig(weight=W8))
    assert sentences(e) == 2
    with pytest.raises(ValueError, match="stem/kernel"):
        quantize_leaf("stem/kernel", np.asarray(broken["stem"]["kernel"]), QuantConfig(weight=W8))
    left = QuantConfig(rules=(Rule(pattern="stem/.*|blocks_2/.*"),), weight=W8)
    assert is_qtensor(quantize(broken, left)["blocks_10"]["up"]["kernel"])


def test_an_integer_leaf_is_refused(params):
    for leaf in (jnp.arange(3), np.zeros(2, np.bool_), jax.random.key(0)):
        with pytest.raises(ValueError, match="counter/step: leaves must be of a float dtype") as e:
            quantize({**params, "counter": {"step": leaf}}, QuantConfig(weight=W8))
        assert sentences(e) == 2


def test_a_quantized_tree_is_not_quantized_again(params):
    quantized = quantize(params, QuantConfig(weight=W8))
    with pytest.raises(ValueError, match="must not be quantized already; quantize the float"):
        quantize(quantized, QuantConfig(weight=W4))


def test_all_that_is_wrong_comes_in_one_error(params):
    rules = (Rule(pattern="nowhere"), Rule(pattern=".*/bias", weight=W8))
    config = QuantConfig(rules=rules, weight=W4)
    with pytest.raises(ValueError) as error:
        plan({**params, "step": jnp.arange(2)}, config)
    for part in ("'nowhere'", "blocks_2/up/bias: a leaf to be quantized must have", "step: leaves"):
        assert part in str(error.value)


def test_leaves_and_trees_of_another_kind_are_refused(params):
    with pytest.raises(TypeError, match="name: leaves must be arrays; got str"):
        quantize({**params, "name": "dit"}, QuantConfig(weight=W8))
    for wrong in (params["stem"]["kernel"], 3, "params"):
        with pytest.raises(TypeError, match="params must be a tree of arrays"):
            plan(wrong, QuantConfig(weight=W8))


def test_activation_groups_must_be_the_weight_groups(params):
    two = ActSpec(granularity="per_group", group_size=2)
    with pytest.raises(ValueError, match="must share their groups; got 4 and 2"):
        plan({"up": params["blocks_2"]["up"]}, QuantConfig(weight=W4, act=two))
    with pytest.raises(ValueError, match="stem/kernel: weights and activations must share"):
        plan({"stem": params["stem"]}, QuantConfig(weight=W4, act=two))


def test_what_a_narrow_dtype_cannot_hold_is_named(params):
    large = {**params, "up": {"kernel": jnp.full((8, 6), 1e9), "bias": jnp.full(6, 1e6)}}
    with pytest.raises(
        ValueError, match=r"up/kernel must have scales that fit .*'float16'.*1e\+09"
    ):
        quantize(large, QuantConfig(weight=W8, scale_dtype="float16"))
    with pytest.raises(ValueError, match=r"up/bias must stay finite in float_dtype='float16'"):
        quantize(large, QuantConfig(weight=W8, float_dtype="float16"))
