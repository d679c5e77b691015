"""Smoothing: the network stays the same function, and its integers have less to lose."""

import dataclasses
import functools
from collections import ChainMap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.low_rank import LowRank
from qjax.calibrate.recipe import Recipe, State, quantize_pipeline, run
from qjax.calibrate.requantize import with_leaves
from qjax.calibrate.serial_parallel import SerialParallel
from qjax.calibrate.smoothing import GRID, Smoothing, output_errors, smoothing_scales
from qjax.calibrate.time_table import TimePrecalculation
from qjax.calibrate.work import Work
from qjax.core import ops
from qjax.core.config import ActSpec, QuantConfig, WeightSpec
from qjax.core.metrics import relative_l2
from qjax.core.qtensor import is_qtensor
from qjax.core.quantize import quantize
from qjax.core.serialize import flatten, params_digest
from qjax.models.loading import load_pipeline
from qjax.models.smoothing_pairs import foldable_pairs, folded, multiplied
from qjax.models.unet2d_condition import UNet2DConditionModel
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_inputs import abstract_inputs

pytestmark = pytest.mark.usefixtures("standard_promotion")

STAGE = Smoothing(steps=2, data=CalibrationSet(items=4), pairs=8, batch=4)
W4A4 = QuantConfig(
    weight=WeightSpec(bits=4), act=ActSpec(bits=4), float_dtype="float16", allow_unmatched=True
)
TEXT = UNet2DConditionConfig(
    sample_size=4,
    block_out_channels=(4, 8),
    layers_per_block=1,
    norm_num_groups=2,
    attention_head_dim=2,
    cross_attention_dim=8,
    only_cross_attention=(True, False),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)


def drawn(leaf, rng) -> Any:
    return jnp.asarray(rng.normal(0, 0.4, leaf.shape), leaf.dtype)


@functools.cache
def text_unet():
    """Function, params and inputs of a UNet with spatial transformers."""
    model, inputs = UNet2DConditionModel(TEXT), abstract_inputs(TEXT, batch=2, tokens=3)
    rng = np.random.default_rng(0)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    draw = functools.partial(jax.tree.map, lambda leaf: drawn(leaf, rng))
    return model.apply, draw(params), draw(inputs)


def denoiser(name, request):
    if name == "text":
        return text_unet()
    pipe = request.getfixturevalue(name)
    rng = np.random.default_rng(0)
    x_t = jnp.asarray(rng.normal(size=(2, *pipe.shape)), jnp.float32)
    return pipe.apply, pipe.params, (x_t, jnp.int32([3, 60]), jnp.int32([0, 2]))


def scaled(params, pairs, rng):
    """The params with all pairs scaled by anything from a tenth to ten."""
    leaves, changed = dict(flatten(params)), {}
    for pair in pairs:
        channels = leaves[f"{pair.consumers[0]}/kernel"].shape[-2]
        s = jnp.asarray(10 ** rng.uniform(-1, 1, channels), jnp.float32)
        changed |= folded(ChainMap(changed, leaves), pair, s)
    return with_leaves(params, changed)


@pytest.mark.quick_cases("dit-*", "unet-*")
@pytest.mark.parametrize("name, count", [("dit", 7), ("unet", 8), ("text", 28)])
def test_folding_any_scales_leaves_the_function_as_it_is(name, count, request):
    apply, params, inputs = denoiser(name, request)
    pairs = foldable_pairs(lambda: apply({"params": params}, *inputs))
    assert len(pairs) == count
    other = scaled(params, pairs, np.random.default_rng(1))
    run_it = jax.jit(apply)
    a, b = (run_it({"params": tree}, *inputs) for tree in (params, other))
    assert relative_l2(b, a) < 1e-5
    # Every pair does its part: the other half of it alone makes another function.
    half = dataclasses.replace(pairs[0], producer=())
    broken = scaled(params, [half], np.random.default_rng(1))
    assert relative_l2(run_it({"params": broken}, *inputs), a) > 1e-3


def test_what_reads_a_text_is_in_no_pair():
    apply, params, inputs = text_unet()
    pairs = foldable_pairs(lambda: apply({"params": params}, *inputs))
    reading = {layer for pair in pairs for layer in pair.consumers}
    cross = "down_blocks_0/attentions_0/transformer_blocks_0"
    assert f"{cross}/attn1/to_q" in reading and f"{cross}/ff/net_2" in reading
    assert not {f"{cross}/attn{i}/to_{x}" for i in (1, 2) for x in "kv"} & reading
    own = "mid_block/attentions_0/transformer_blocks_0"
    assert {f"{own}/attn1/to_{x}" for x in "qkv"} <= reading


def test_scales_are_those_of_the_paper_and_1_for_dead_channels():
    x, w = jnp.array([4.0, 100.0, 0.0, 1.0]), jnp.array([1.0, 1.0, 1.0, 0.0])
    np.testing.assert_allclose(smoothing_scales(x, w, 0.5), [2, 10, 1, 1], rtol=1e-5)
    np.testing.assert_allclose(smoothing_scales(x, w, 1.0), [4, 100, 1, 1], rtol=1e-5)
    np.testing.assert_allclose(smoothing_scales(x, 4 * w, 0.0), [0.25, 0.25, 1, 1], rtol=1e-5)


@pytest.mark.quick_cases("None", "*static*")
@pytest.mark.parametrize("act", [None, ActSpec(bits=4), ActSpec(mode="static")], ids=str)
def test_the_error_of_a_search_is_that_of_the_integers(act):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((32, 64), (64, 48)))
    x = x * jnp.ones(64).at[::9].set(20)
    config = QuantConfig(weight=WeightSpec(bits=4), act=act, scale_dtype="float32")
    quantized = lambda w: quantize({"kernel": w}, config)["kernel"]
    amax_x, amax_w = jnp.max(jnp.abs(x), 0), jnp.max(jnp.abs(w), 1)
    found = output_errors(x, amax_x, amax_w, (w,), (quantized(w),), "minmax")
    for alpha, error in zip((None, *GRID), found, strict=True):
        s = jnp.ones(64) if alpha is None else smoothing_scales(amax_x, amax_w, alpha)
        seen, row = x / s, {}
        if act is not None and act.mode == "static":
            row = {"act_scale": jnp.max(jnp.abs(seen)) / 127}
        y = ops.matmul(seen, quantized(multiplied(w, s)), row=row)
        np.testing.assert_allclose(error, relative_l2(y, x @ w) ** 2, rtol=1e-3)


# The stage.


@pytest.fixture(scope="module")
def outliers(dit):
    """The pipeline with a few input channels thirty times as large, its function unchanged."""
    leaves, changed = dict(flatten(dit.params)), {}
    none = (jnp.zeros((1, *dit.shape)), jnp.zeros((1,), jnp.int32), jnp.zeros((1,), jnp.int32))
    for pair in foldable_pairs(lambda: dit.apply({"params": dit.params}, *none)):
        path = f"{pair.consumers[0]}/kernel"
        s = jnp.ones(leaves[path].shape[0]).at[::7].set(1 / 30)
        changed |= folded(ChainMap(changed, leaves), pair, s)
    return dit.replace(params=with_leaves(dit.params, changed))


@pytest.fixture(scope="module")
def smoothed(outliers):
    events: list = []
    before = State(outliers, quantize_pipeline(outliers, W4A4))
    after = STAGE.run(before, jax.random.key(0), Work(None, events.append))
    return before, after, events


def draw(pipe, **settings):
    settings = {"steps": 2, "labels": np.arange(8) % 3, "key": jax.random.key(5)} | settings
    return np.asarray(pipe(**settings, output="latent"))


def test_outliers_cost_less_after_smoothing(outliers, smoothed):
    before, after, _ = smoothed
    reference = draw(outliers)
    errors = [relative_l2(draw(state.student), reference) for state in (before, after)]
    assert errors[1] < 0.6 * errors[0]
    whole = outliers.replace(params=after.floats)
    assert relative_l2(draw(whole), reference) < 1e-5


def test_the_student_stands_for_the_floats_in_its_old_formats(smoothed):
    before, after, _ = smoothed
    floats, old = dict(flatten(after.floats)), dict(flatten(before.student.params))
    new = quantize_pipeline(before.teacher.replace(params=after.floats), W4A4)
    for path, leaf in flatten(after.student.params):
        assert jax.tree.structure(leaf) == jax.tree.structure(old[path])
        if is_qtensor(leaf):
            jax.tree.map(np.testing.assert_array_equal, leaf, dict(flatten(new.params))[path])
        else:
            assert leaf.dtype == old[path].dtype == jnp.float16
            np.testing.assert_array_equal(leaf, np.asarray(floats[path], np.float16))


def test_what_is_not_smoothed_is_named(smoothed):
    events = smoothed[2]
    (left,) = [event for event in events if event["event"] == "not_smoothed"]
    assert "blocks_0/mlp/fc2" in left["layers"] and "attn" not in left["layers"]
    pairs = [event["pair"] for event in events if event["event"] == "smoothed"]
    assert "blocks_0/modulation -> blocks_0/attn/qkv" in pairs and len(pairs) == 7


def test_a_search_finds_no_more_error_than_a_fixed_alpha(outliers, smoothed):
    before, after, _ = smoothed
    events: list = []
    stage = dataclasses.replace(STAGE, alpha=None, rows=64)
    found = stage.run(before, jax.random.key(0), Work(None, events.append))
    errors = [(e["error"], e["without"]) for e in events if e["event"] == "smoothed"]
    assert len(errors) == 7 and all(best <= without for best, without in errors)
    assert sum(best for best, _ in errors) < 0.5 * sum(without for _, without in errors)
    reference = draw(outliers)
    searched, fixed = (relative_l2(draw(s.student), reference) for s in (found, after))
    assert searched < 1.2 * fixed


@pytest.mark.slow
def test_stages_after_it_start_from_the_folded_floats(outliers, tmp_path):
    ranges = SerialParallel(
        steps=2, data=CalibrationSet(items=4), fits="ranges", batch=4, ranges="minmax"
    )
    act = ActSpec(mode="per_step", granularity="per_tensor")
    low_rank = LowRank(rank=1, iterations=1, pattern="blocks_0/attn/qkv/kernel")
    recipe = Recipe(
        quant=dataclasses.replace(W4A4, act=act),
        stages=(STAGE, low_rank, ranges, TimePrecalculation(steps=2)),
    )
    made = run(outliers, recipe, out=tmp_path)
    alone = run(outliers, dataclasses.replace(recipe, stages=(ranges,)))
    reference = draw(outliers)
    assert relative_l2(draw(made), reference) < relative_l2(draw(alone), reference)
    assert params_digest(load_pipeline(tmp_path / "final").params) == params_digest(made.params)
    assert sorted(made.step_table.entries) == ["quant", "time"]


def test_a_time_table_is_of_the_floats_of_the_state(dit):
    """Stages before may change time layers too."""
    layer = dit.params["conditioning"]["time_out"]
    other = with_leaves(dit.params, {"conditioning/time_out/bias": layer["bias"] + 1})
    student = quantize_pipeline(dit, W4A4)
    tables = [
        TimePrecalculation(steps=2)
        .run(State(dit, student, floats), jax.random.key(0), Work())
        .student.step_table.entries["time"]["conditioning"]["time_out"]
        for floats in (None, other)
    ]
    np.testing.assert_allclose(tables[1] - tables[0], 1, rtol=1e-5)


def test_what_comes_too_late_is_refused(dit, smoothed):
    _, after, _ = smoothed
    branched = LowRank(rank=1, iterations=1).run(after, jax.random.key(0), Work())
    with pytest.raises(ValueError, match="nothing beside them; got blocks_0/attn/proj/lora_down"):
        STAGE.run(branched, jax.random.key(0), Work())
    act = ActSpec(mode="per_step", granularity="per_tensor")
    recipe = Recipe(
        quant=dataclasses.replace(W4A4, act=act),
        stages=(
            SerialParallel(
                steps=2, data=CalibrationSet(items=4), fits="ranges", batch=4, ranges="minmax"
            ),
            STAGE,
        ),
    )
    with pytest.raises(ValueError, match="their ranges were fitted already"):
        run(dit, recipe)
    plain = State(dit, quantize_pipeline(dit, QuantConfig()))
    with pytest.raises(ValueError, match="needs a quantized layer that reads a normalisation"):
        STAGE.run(plain, jax.random.key(0), Work())
    for wrong in ({"alpha": 1.5}, {"rows": 0}):
        with pytest.raises(ValueError, match="must"):
            dataclasses.replace(STAGE, **wrong)
