"""Blocks found and taken out, their data, and the fit of their roundings and ranges."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qjax.calibrate import adam_rows
from qjax.calibrate.blocks import alike, find_blocks, subtree
from qjax.calibrate.capture import items_within, watched
from qjax.calibrate.collect import collect, collect_whole
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.fitted import soft_kernel
from qjax.calibrate.optimize import _run_chunk, fit
from qjax.calibrate.ranges import to_fitted
from qjax.calibrate.reconstruction import (
    FitSettings,
    Fitted,
    Problem,
    block_error,
    mean_error,
    output,
)
from qjax.calibrate.serial_parallel import Calibration, SerialParallelSettings
from qjax.calibrate.student import stratified_pairs
from qjax.calibrate.work import Work
from qjax.core.config import ActSpec

pytestmark = pytest.mark.usefixtures("standard_promotion")

SETTINGS = SerialParallelSettings(
    steps=3,
    guidance_scale=2.0,
    data=CalibrationSet(items=4),
    pairs=12,
    batch=4,
    ranges="minmax",
    fit=FitSettings(iterations=60, batch=8, chunk=20),
)


class Fixed:
    """A calibration after its first roll-out, with everything that a fit needs."""

    def __init__(self, pipe, student):
        self.run = Calibration(pipe, student, SETTINGS, jax.random.key(0), Work())
        buffer = self.run.roll_out("first")
        self.run.tables = to_fitted(buffer.ranges, self.run.student.formats)
        self.samples = self.run.samples(buffer, self.run.pairs(0))
        first = self.samples[0]
        self.blocks = self.run.student.blocks(first.x_t, first.t, first.told)
        self.groups = alike(self.blocks)

    def data(self, g, i=0):
        run = self.run
        teacher = (run.teacher.apply, run.teacher.params)
        options = {"memory_gib": 1.0}
        return collect(
            run.student, teacher, self.groups, {g: i}, self.samples, run.tables, **options
        )[g]

    def problem(self, block, data):
        fixed = self.run.student.fixed(block)
        params = self.run.student.block_params(block, fixed)
        return Problem(params, fixed, data.inputs, data.target, data.group, jnp.float32(1))

    def begin(self, block, settings=SETTINGS.fit):
        student, key = self.run.student, jax.random.key(0)
        return student.begin(block, student.fixed(block), self.run.tables, settings, key)


@pytest.fixture(scope="module")
def dit_fixed(dit, quantize):
    return Fixed(dit, quantize(dit, bits=3))


@pytest.fixture(scope="module")
def unet_fixed(unet, quantize):
    return Fixed(unet, quantize(unet, bits=3))


# Blocks.


def test_blocks_cover_every_quantized_layer_once_in_order_of_execution(unet_fixed):
    run, blocks = unet_fixed.run, unet_fixed.blocks
    covered = [block.absolute(layer) for block in blocks for layer in block.layers]
    assert sorted(covered) == sorted(run.student.formats)
    paths = [block.path for block in blocks]
    assert paths.index("down_blocks_0/resnets_0") < paths.index("mid_block/resnets_0")
    assert paths.index("mid_block/resnets_0") < paths.index("up_blocks_1/resnets_1")


def test_alike_blocks_are_one_group(dit_fixed):
    assert [[b.path for b in group] for group in dit_fixed.groups] == [
        ["blocks_0", "blocks_1"],
        ["final_modulation"],
    ]


def test_a_layer_that_never_runs_is_named(dit):
    with pytest.raises(ValueError, match="did not run nowhere/layer"):
        find_blocks(lambda: None, {"nowhere/layer": 0})


# Their data.


def test_a_block_alone_gives_what_it_gives_within_the_network(unet_fixed):
    """Target and inputs both from the float network: the block, run alone, must agree."""
    run = unet_fixed.run
    first = unet_fixed.samples[0]
    chosen = [jnp.int32(0)] * len(unet_fixed.groups)
    forward = lambda: run.teacher.apply(
        {"params": run.teacher.params}, first.x_t, first.t, first.told
    )
    _, kept = watched(forward, unet_fixed.groups, chosen)
    for group, ((args, kwargs), expected) in zip(unet_fixed.groups, kept, strict=True):
        block = group[0]
        params = subtree(run.teacher.params, block.path)
        alone = block.module.apply({"params": params}, *args, **kwargs)
        np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-5)


def test_inputs_are_the_quantized_networks_and_targets_the_float_ones(dit_fixed):
    run = dit_fixed.run
    data = dit_fixed.data(0, 1)
    (h, _), _ = data.inputs
    assert len(h) == len(data.target) == len(data.group) == 2 * 12
    # What goes into the second block: not what the first was in float, but what it is now.
    first = dit_fixed.data(0, 0)
    block = dit_fixed.groups[0][0]
    problem = dit_fixed.problem(block, first)
    nearest = Fitted({layer: {} for layer in block.layers}, dit_fixed.begin(block).acts)
    now = output(run.student.runner(block), problem, nearest, jnp.arange(len(h)))
    np.testing.assert_allclose(now, h, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(first.target - h).max()) > 1e-3


def test_the_data_of_the_whole_network_are_its_samples_and_float_answers(dit_fixed):
    run = dit_fixed.run
    data = collect_whole((run.teacher.apply, run.teacher.params), dit_fixed.samples)
    (x_t, t, labels), _ = data.inputs
    expected = run.teacher.apply({"params": run.teacher.params}, x_t, t, labels)
    np.testing.assert_allclose(data.target, expected, rtol=1e-4, atol=1e-5)
    half = 4
    np.testing.assert_array_equal(x_t[:half], x_t[half : 2 * half])  # both halves of guidance


def test_memory_bounds_what_is_kept_and_too_little_is_an_error(dit_fixed):
    assert items_within(1.0, 2**20, 4096, least=8) == 1024
    with pytest.raises(ValueError, match=r"need 1.0 MiB an item.*memory_gib=0.001"):
        items_within(0.001, 2**20, 64, least=8)


def test_pairs_are_all_different_and_alike_in_every_step():
    step, item = stratified_pairs(5, 8, 23, seed=1)
    assert len({*zip(step.tolist(), item.tolist(), strict=True)}) == 23
    assert np.bincount(step).min() >= 4 and np.bincount(step).max() <= 5
    assert len(stratified_pairs(3, 2, 100, seed=0)[0]) == 6


# The fit.


@pytest.mark.quick_cases("adaround", "latent")
@pytest.mark.parametrize("weights", ["adaround", "latent", "lora", "nearest"])
def test_a_fit_lowers_the_error_of_a_block(dit_fixed, weights):
    block = dit_fixed.groups[0][1]
    rate = {"adaround": 3e-2, "latent": 3e-3, "lora": 3e-3, "nearest": 0.0}[weights]
    settings = dataclasses.replace(SETTINGS.fit, weights=weights, weight_rate=rate, act_rate=3e-3)
    problem = dit_fixed.problem(block, dit_fixed.data(0, 1))
    runner, begin = dit_fixed.run.student.runner(block), dit_fixed.begin(block, settings)
    nearest = Fitted({layer: {} for layer in block.layers}, begin.acts)
    before = mean_error(runner, problem, nearest, batch=8)
    problem = problem._replace(baseline=before)
    (fitted,) = fit(runner, [problem], [begin], settings, [jax.random.key(1)])
    student = dit_fixed.run.student.harden(block, problem.fixed, fitted)
    # What is judged are the integers.
    kernels = {layer: student.kernels[block.absolute(layer)] for layer in block.layers}
    if weights == "adaround":
        hard = {
            layer: {"v": jnp.where(one["v"] >= 0, 10.0, -10.0)}
            for layer, one in fitted.weights.items()
        }
        for layer, q in kernels.items():
            soft = _soft(dit_fixed, block, layer, problem, hard[layer])
            np.testing.assert_allclose(q.dequantize(jnp.float32), soft, rtol=1e-5, atol=1e-6)
    else:
        hard = fitted.weights
    after = mean_error(runner, problem, Fitted(hard, fitted.acts), batch=8)
    assert after < (0.999 if weights == "nearest" else 0.9) * before


def _soft(fixed, block, layer, problem, fitted):
    fmt = fixed.run.student.formats[block.absolute(layer)]
    return soft_kernel(fmt, problem.fixed[layer], fitted)


def test_alike_blocks_compile_once_and_give_the_same_together(dit_fixed):
    blocks = dit_fixed.groups[0]
    settings = dataclasses.replace(SETTINGS.fit, iterations=20)
    problems = [dit_fixed.problem(b, dit_fixed.data(0, i)) for i, b in enumerate(blocks)]
    begin = [dit_fixed.begin(b, settings) for b in blocks]
    keys = list(jax.random.split(jax.random.key(2), 2))
    runner = dit_fixed.run.student.runner(blocks[0])
    before = _run_chunk._cache_size()
    one_by_one = fit(runner, problems, begin, settings, keys, together=False)
    assert _run_chunk._cache_size() == before + 1
    together = fit(runner, problems, begin, settings, keys, together=True)
    for a, b in zip(jax.tree.leaves(one_by_one), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_row_of_a_step_has_no_gradient_where_the_batch_has_no_such_step(dit_fixed):
    block = dit_fixed.groups[0][0]
    problem = dit_fixed.problem(block, dit_fixed.data(0, 0))
    runner, begin = dit_fixed.run.student.runner(block), dit_fixed.begin(block)
    index = jnp.flatnonzero(problem.group != 1)[:6]
    gradient = jax.grad(
        lambda acts: block_error(runner, problem, Fitted(begin.weights, acts), index)
    )
    found = gradient(begin.acts)
    for table in jax.tree.leaves(found):
        assert table.shape[0] == 3 and float(jnp.abs(table[1]).max()) == 0.0
    for one in found.values():
        assert float(jnp.abs(one["log_scale"][jnp.array([0, 2])]).max()) > 0.0


@pytest.mark.slow
def test_a_convolution_block_is_fitted_without_gradients_of_convolutions_in_the_loop(unet_fixed):
    """XLA:CPU's own gradients of convolutions are 50 times slower in a scan."""
    group = next(g for g in unet_fixed.groups if "conv1" in g[0].layers)
    number = unet_fixed.groups.index(group)
    problem = unet_fixed.problem(group[0], unet_fixed.data(number))
    runner, begin = unet_fixed.run.student.runner(group[0]), unet_fixed.begin(group[0])
    before = block_error(runner, problem, begin, jnp.arange(8))
    gradient = jax.grad(
        lambda weights: block_error(runner, problem, Fitted(weights, begin.acts), jnp.arange(8))
    )(begin.weights)
    assert float(jnp.abs(gradient["conv1"]["v"]).max()) > 0 and before > 0


def test_an_interrupted_span_goes_on_to_the_same_schedule(dit_fixed):
    """Two spans differ from one only by Adam's fresh start in the second."""
    block = dit_fixed.groups[0][0]
    problem = dit_fixed.problem(block, dit_fixed.data(0, 0))
    runner, begin = dit_fixed.run.student.runner(block), dit_fixed.begin(block)
    key = jax.random.key(5)
    (half,) = fit(runner, [problem], [begin], SETTINGS.fit, [key], span=(0, 40))
    seen = []
    (whole,) = fit(
        runner,
        [problem],
        [half],
        SETTINGS.fit,
        [key],
        span=(40, 60),
        on_chunk=lambda done, errors: seen.append((done, len(errors))),
    )
    assert seen == [(60, 20)]
    v = jnp.concatenate([one["v"].ravel() for one in whole.weights.values()])
    assert bool(jnp.isfinite(v).all())


def test_settings_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="weights must be one of adaround, lora"):
        FitSettings(weights="magic")
    with pytest.raises(ValueError, match="iterations, batch and chunk"):
        FitSettings(iterations=0)
    with pytest.raises(ValueError, match="drop must lie in"):
        FitSettings(drop=1.0)
    with pytest.raises(ValueError, match="samples must be quantized or float"):
        SerialParallelSettings(samples="mine")


@pytest.mark.slow
def test_without_ranges_to_fit_the_input_may_be_dynamic(dit, quantize):
    fixed = Fixed(dit, quantize(dit, act=ActSpec()))
    block = fixed.groups[0][0]
    problem, begin = fixed.problem(block, fixed.data(0)), fixed.begin(block)
    assert begin.acts == {}
    found = output(fixed.run.student.runner(block), problem, begin, jnp.arange(4))
    assert found.shape == problem.target[:4].shape


# Adam by rows.


def test_adam_by_rows_is_adam_where_every_row_is_there(key):
    table, gradient = jax.random.normal(key, (4, 3)), jax.random.normal(key, (4, 3)) + 1
    state, adam = adam_rows.init(table, 4), optax.adam(0.1)
    theirs = adam.init(table)
    for _ in range(3):
        change, state = adam_rows.update(gradient, state, jnp.ones(4, bool), 0.1)
        expected, theirs = adam.update(gradient, theirs)
        np.testing.assert_allclose(change, expected, rtol=1e-5)


def test_an_absent_row_keeps_its_moments_and_counts_its_own_updates(key):
    table, gradient = jnp.zeros((2, 3)), jnp.ones((2, 3))
    state = adam_rows.init(table, 2)
    first = jnp.array([True, False])
    for _ in range(5):
        change, state = adam_rows.update(gradient, state, first, 0.1)
        assert float(jnp.abs(change[1]).max()) == 0.0
    assert state.updates.tolist() == [5, 0]
    # Its first update is a first update of Adam: the whole rate, not a fifth of a moment.
    change, state = adam_rows.update(gradient, state, ~first, 0.1)
    np.testing.assert_allclose(change[1], -0.1, rtol=1e-4)
    assert float(jnp.abs(change[0]).max()) == 0.0
