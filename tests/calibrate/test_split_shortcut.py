"""Split shortcuts: where inputs are joined, what a grouped convolution computes, that it helps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.recipe import Recipe, run
from qjax.calibrate.serial_parallel import SerialParallel
from qjax.calibrate.split_shortcut import Join, skip_joins, split_rules, with_split_shortcuts
from qjax.core import ops
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.metrics import relative_l2
from qjax.core.qtensor import from_codes
from qjax.core.quantize import plan
from qjax.core.quantizers import quantize_weight
from qjax.models.loading import load_pipeline
from qjax.models.unet2d_condition import UNet2DConditionModel
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_inputs import abstract_inputs

pytestmark = pytest.mark.usefixtures("standard_promotion")

STATIC = ActSpec(mode="static", granularity="per_group", group_size=8, symmetric=False)
W4A8 = QuantConfig(
    weight=WeightSpec(bits=4), act=ActSpec(mode="per_step", granularity="per_tensor")
)


def kernel_of(w, *, group_size=8, symmetric=True, act=STATIC, bits=4):
    granularity = "per_channel" if group_size is None else "per_group"
    spec = WeightSpec(
        bits=bits, symmetric=symmetric, granularity=granularity, group_size=group_size
    )
    return from_codes(*quantize_weight(w, spec, group_size=group_size), bits=bits, act=act)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


ROW = {"act_scale": np.float32([0.01, 0.03, 0.005]), "act_zero_point": np.int32([3, -7, 0])}


def integer_conv(x, q, row, padding):
    """The sums of every tap and group in int64, then the scales in float64."""
    scale, zero = (np.repeat(row[f"act_{name}"], 8) for name in ("scale", "zero_point"))
    codes = np.clip(np.round(x / scale) + zero, -128, 127).astype(np.int64) - zero
    codes = np.pad(codes, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    kh, kw, i, o = q.shape
    groups, wide = len(row["act_scale"]), lambda a: np.broadcast_to(a, (kh, kw, *a.shape[2:]))
    weights = np.asarray(q.codes(), np.int64)
    if q.zero_point is not None:
        zeros = np.asarray(wide(q.zero_point), np.int64)
        weights = weights - np.repeat(zeros, i // zeros.shape[2], axis=2)
    w_scale = np.repeat(wide(np.asarray(q.scale, np.float64)), groups // q.scale.shape[2], axis=2)
    h, w = (n - k + 1 for n, k in zip(codes.shape[1:3], (kh, kw), strict=True))
    y = np.zeros((len(x), h, w, o))
    for row_, column, g in np.ndindex(kh, kw, groups):
        part = slice(8 * g, 8 * g + 8)
        view = codes[:, row_ : row_ + h, column : column + w, part]
        sums = view @ weights[row_, column, part]
        y += sums * np.float64(row["act_scale"][g]) * w_scale[row_, column, g]
    return y


@pytest.mark.quick_cases("1-8-False", "3-8-True", "3-None-True")
@pytest.mark.parametrize("group_size, symmetric", [(8, True), (8, False), (None, True)])
@pytest.mark.parametrize("side", (1, 3))
def test_a_grouped_convolution_has_the_sums_of_exact_integers(side, group_size, symmetric):
    """Groups on both sides or the input's alone, zero points, and borders that count as zeros."""
    x = normal(2, 5, 4, 24) * np.repeat([1, 3, 0.3], 8).astype(np.float32)
    w = normal(side, side, 24, 6, seed=1)
    q = kernel_of(w, group_size=group_size, symmetric=symmetric)
    pad = side // 2
    conv = functools.partial(ops.conv, padding=((pad, pad), (pad, pad)))
    y = jax.jit(conv)(x, q, row=jax.tree.map(jnp.asarray, ROW))
    wanted = integer_conv(x, q, ROW, pad)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("side, strides", [(1, 2), (3, 1)])
def test_dynamic_groups_have_a_range_for_every_pixel(side, strides):
    x, w = normal(2, 6, 6, 24), normal(side, side, 24, 6, seed=1)
    act = ActSpec(granularity="per_group", group_size=8, symmetric=False)
    y = ops.conv(jnp.asarray(x), kernel_of(w, act=act), strides=strides, padding="SAME")
    assert relative_l2(y, ops.conv(x, kernel_of(w, act=None), strides=strides)) < 0.005


def test_one_scale_cannot_have_groups_and_says_so():
    q = kernel_of(normal(1, 1, 24, 6), act=ActSpec(mode="static"))
    with pytest.raises(ValueError, match="must be a scalar; got 3 groups.*'per_group'"):
        ops.conv(jnp.ones((1, 2, 2, 24)), q, row={"act_scale": jnp.ones(3)})


def test_gradients_pass_a_grouped_convolution(key):
    q = kernel_of(normal(1, 1, 24, 6))
    row = jax.tree.map(jnp.asarray, ROW)
    x = jax.random.normal(key, (1, 3, 3, 24))
    grad = jax.grad(lambda x: jnp.sum(ops.conv(x, q, padding="VALID", row=row)))(x)
    wanted = jnp.broadcast_to(jnp.sum(q.dequantize(), -1)[0, 0], x.shape)
    np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=1e-5)


def test_a_split_lowers_the_error_of_an_input_of_two_sizes():
    """Hidden channels a twentieth of the skip's, with weights that make up for it."""
    size = np.repeat([0.05, 1.0], 8).astype(np.float32)
    x, w = normal(4, 8, 8, 16) * size, normal(1, 1, 16, 12, seed=1) / size[:, None]
    wanted = np.einsum("bhwi,io->bhwo", x, w[0, 0])
    largest = lambda values: np.float32(np.abs(values).max() / 127)
    one = {"act_scale": largest(x)}
    two = {"act_scale": np.array([largest(x[..., :8]), largest(x[..., 8:])])}
    per_tensor = ActSpec(mode="static", granularity="per_tensor")
    grouped = ActSpec(mode="static", granularity="per_group", group_size=8)
    conv = lambda q, row: ops.conv(jnp.asarray(x), q, row=jax.tree.map(jnp.asarray, row))
    plain = relative_l2(conv(kernel_of(w, group_size=None, act=per_tensor), one), wanted)
    inputs = relative_l2(conv(kernel_of(w, group_size=None, act=grouped), two), wanted)
    both = relative_l2(conv(kernel_of(w, act=grouped), two), wanted)
    assert both < 0.8 * plain and both < inputs <= plain


def test_joins_are_those_of_the_way_up_with_hidden_first(unet):
    inputs = (jnp.zeros((1, 8, 8, 1)), jnp.zeros((1,), jnp.int32), jnp.zeros((1,), jnp.int32))
    joins = skip_joins(lambda: unet.apply({"params": unet.params}, *inputs))
    assert joins == (
        Join("up_blocks_0/resnets_0", 16, 16),
        Join("up_blocks_0/resnets_1", 16, 8),
        Join("up_blocks_1/resnets_0", 16, 8),
        Join("up_blocks_1/resnets_1", 8, 8),
    )


def test_joins_of_a_text_unet_add_up_to_the_channels_that_its_shortcuts_read():
    config = UNet2DConditionConfig(
        sample_size=4,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=6,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    model, inputs = UNet2DConditionModel(config), abstract_inputs(config)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    zeros = functools.partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype))
    joins = skip_joins(lambda: model.apply({"params": zeros(params)}, *zeros(inputs)))
    assert len(joins) == 4
    for join in joins:
        up, resnet = join.block.split("/")
        channels = params[up][resnet]["conv1"]["kernel"].shape[2]
        assert join.hidden + join.skip == channels and {join.hidden, join.skip} <= {4, 8}


def test_rules_split_at_the_border_and_keep_the_rest(unet):
    narrow = WeightSpec(bits=3, granularity="per_group", group_size=(12, 4))
    mine = Rule(pattern="up_blocks_1/.*kernel", weight=narrow, act=W4A8.act)
    config = QuantConfig(rules=(mine,), weight=W4A8.weight, act=W4A8.act)
    rules = split_rules(unet, config)
    assert [rule.weight.group_size for rule in rules] == [16, 8, 4, 4]
    assert [rule.act.group_size for rule in rules] == [16, 8, 4, 4]
    assert [rule.weight.bits for rule in rules] == [4, 4, 3, 3]
    assert all(rule.act.mode == "per_step" for rule in rules)
    assert rules[1].reason == "split at channel 16 of 24"
    entries = {e.path: e for e in plan(unet.params, with_split_shortcuts(unet, W4A8)).entries}
    assert entries["up_blocks_0/resnets_1/conv_shortcut/kernel"].group_size == 8
    assert entries["up_blocks_0/resnets_1/conv1/kernel"].group_size is None


def test_the_first_convolution_is_split_on_request(unet):
    config = with_split_shortcuts(unet, W4A8, conv1=True)
    entries = {e.path: e for e in plan(unet.params, config).entries}
    conv1 = entries["up_blocks_0/resnets_1/conv1/kernel"]
    assert conv1.group_size == conv1.act.group_size == 8
    dynamic = QuantConfig(weight=WeightSpec(bits=4), act=ActSpec())
    assert [rule.act.granularity for rule in split_rules(unet, dynamic, conv1=True)] == [
        "per_group",
        "per_token",
    ] * 4


def test_what_is_not_quantized_is_not_split(unet, dit):
    config = QuantConfig(
        rules=(Rule(pattern=".*/conv_shortcut/kernel", reason="kept"),), weight=W4A8.weight
    )
    assert split_rules(unet, config) == ()
    with pytest.raises(ValueError, match="DiT has none"):
        split_rules(dit, config)


def test_a_rule_that_is_left_nothing_is_left_out(unet):
    shortcuts = Rule(pattern="up_.*/conv_shortcut/kernel", weight=WeightSpec(bits=4))
    config = with_split_shortcuts(unet, QuantConfig(rules=(shortcuts,)))
    assert shortcuts not in config.rules and len(config.rules) == 4
    assert plan(unet.params, config).bytes_after > 0


@pytest.mark.slow
def test_a_calibrated_pipeline_has_a_range_for_each_part_and_is_saved(unet, tmp_path):
    recipe = Recipe(
        quant=with_split_shortcuts(unet, W4A8, conv1=True),
        stages=(
            SerialParallel(
                steps=2, data=CalibrationSet(items=4), fits="ranges", batch=4, ranges="minmax"
            ),
        ),
    )
    made = run(unet, recipe)
    block = made.step_table.entries["quant"]["up_blocks_0"]["resnets_1"]
    assert block["conv_shortcut"]["act_scale"].shape == (2, 3)
    assert block["conv1"]["act_scale"].shape == (2, 3)
    assert block["conv2"]["act_scale"].shape == (2,)
    made.save(tmp_path / "saved")
    settings = {"steps": 2, "labels": [0, 1], "key": jax.random.key(0), "output": "latent"}
    again = load_pipeline(tmp_path / "saved")
    np.testing.assert_array_equal(again(**settings), made(**settings))
