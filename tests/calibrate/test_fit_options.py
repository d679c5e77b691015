"""What a fit can be told: which layers, when to stop, blocks' outputs, and in which order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.calibration import Calibration
from qjax.calibrate.capture import watched
from qjax.calibrate.collect import quantizing
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.fitted import with_kernels
from qjax.calibrate.optimize import go_on, pick, start_optimizer
from qjax.calibrate.ranges import to_fitted
from qjax.calibrate.reconstruction import (
    FitSettings,
    distillation_error,
    soft_kernels,
)
from qjax.calibrate.serial_parallel_settings import SerialParallelSettings
from qjax.calibrate.simulate import simulated
from qjax.calibrate.traces import network_problem, pairs_of
from qjax.calibrate.work import Work

pytestmark = pytest.mark.usefixtures("standard_promotion")

STEPS, ITEMS = 3, 8
LATENT = FitSettings(weights="latent", weight_rate=1e-2, iterations=40, batch=8, chunk=20)
SETTINGS = SerialParallelSettings(
    steps=STEPS, data=CalibrationSet(items=ITEMS), ranges="minmax", batch=ITEMS
)
PAIRS = pairs_of(range(STEPS), range(ITEMS))


class AfterRollOut:
    """A pipeline and its student, whose calibrations share one roll-out."""

    def __init__(self, pipe, student):
        self.pipe, self.student = pipe, student
        self.buffer = self.calibration().roll_out("first")
        run = self.calibration()
        first = run.samples(self.buffer, PAIRS)[0]
        self.blocks = run.student.blocks(first.x_t, first.t, first.told)

    def calibration(self, settings=SETTINGS, on_event=None):
        work = Work(on_event=on_event)
        run = Calibration(self.pipe, self.student, settings, jax.random.key(0), work)
        if hasattr(self, "buffer"):
            run.tables = to_fitted(self.buffer.ranges, run.student.formats)
        return run


@pytest.fixture(scope="module")
def fixed(dit, quantize):
    return AfterRollOut(dit, quantize(dit, bits=3))


def changed(before, after):
    """Layers whose integers are others."""
    return {
        path
        for path, q in before.student.kernels.items()
        if (q.codes() != after.student.kernels[path].codes()).any()
    }


# Which layers.


@pytest.mark.slow
def test_layers_left_out_keep_the_integers_of_nearest_rounding_and_ranges_may_be_left(fixed):
    """Blocks are chosen by their layers' whole paths."""
    fit = FitSettings(
        only="blocks_1/mlp", weight_rate=0.1, act_rate=0.0, iterations=40, batch=8, chunk=20
    )
    before, run = fixed.calibration(), fixed.calibration()
    run.fit_blocks(run.samples(fixed.buffer, PAIRS), 0, fit)
    assert changed(before, run) == {"blocks_1/mlp/fc1", "blocks_1/mlp/fc2"}
    jax.tree.map(np.testing.assert_array_equal, run.tables, before.tables)
    # Beside a layer that is fitted others compute with their integers, and not between them.
    left_out = np.abs(np.asarray(run.fitted["blocks_1/attn/qkv"]["v"]))
    assert set(left_out.ravel().tolist()) == {10.0}
    assert "blocks_0/mlp/fc1" not in run.fitted  # a block without any is not run at all


def test_an_expression_that_no_layer_holds_is_refused(fixed):
    settings = dataclasses.replace(SETTINGS, fit=FitSettings(only="blocks_7"))
    with pytest.raises(ValueError, match="got 'blocks_7', and layers such as blocks_0"):
        fixed.calibration(settings)
    with pytest.raises(ValueError, match="only must be a regular expression; got '\\['"):
        FitSettings(only="[")


# When to stop.


@pytest.mark.slow
def test_layers_stop_once_their_integers_have_come_to_rest_and_not_without_freezing(fixed):
    run = fixed.calibration()
    block = run.student.whole()
    problem, runner = network_problem(run, fixed.buffer, PAIRS), run.student.runner(block)
    ends = {}
    for freeze in (0.0, 0.99):
        fit = dataclasses.replace(
            LATENT,
            freeze=freeze,
            only="blocks_1",
            iterations=200,
            batch=4,
            chunk=100,
            act_rate=0.0,
        )
        begin = run.student.begin(block, problem.fixed, run.tables, fit, jax.random.key(0))
        carry = start_optimizer(jax.tree.map(jnp.copy, begin), STEPS, fit, runner, problem)
        states = []
        for span in ((0, 100), (100, 200)):
            carry = go_on(runner, problem, carry, fit, jax.random.key(1), span)
            states.append(jax.tree.map(np.asarray, carry.fitted.weights))
        ends[freeze] = states
        if freeze:
            assert not any(carry.rest.moving.values())

    def moved(states):
        one, other = states
        return {path for path in one if (one[path]["w"] != other[path]["w"]).any()}

    chosen = {path for path in run.student.formats if path.startswith("blocks_1/")}
    assert moved(ends[0.99]) == set() and moved(ends[0.0]) == chosen
    # Until the first look at the integers nothing is different.
    jax.tree.map(np.testing.assert_array_equal, ends[0.0][0], ends[0.99][0])


# Blocks' outputs.


@pytest.mark.slow
def test_distillation_is_the_mean_relative_error_of_the_blocks_and_lowers_it(fixed):
    run = fixed.calibration()
    problem = network_problem(run, fixed.buffer, PAIRS)
    block = run.student.whole()
    runner = dataclasses.replace(
        run.student.runner(block), watched=tuple(one.path for one in fixed.blocks)
    )
    assert runner.watched == ("blocks_0", "blocks_1", "final_modulation")
    fit = dataclasses.replace(LATENT, distillation=1.0)
    begin = run.student.begin(block, problem.fixed, run.tables, fit, jax.random.key(0))
    index = jnp.arange(STEPS * ITEMS)
    both = jax.jit(lambda fitted: distillation_error(runner, problem, fitted, index))
    error, extra = both(begin)

    # Once more, by what a capture of the blocks sees.
    (x_t, t, told), _ = problem.args
    groups = tuple((one,) for one in fixed.blocks)
    chosen = [jnp.int32(0)] * len(groups)

    @jax.jit
    def outputs(params, tables):
        forward = lambda: run.student.apply({"params": params}, x_t, t, told)
        if tables is None:
            return [output for _, output in watched(forward, groups, chosen)[1]]
        with simulated(quantizing(run.student.formats, tables, problem.group)):
            return [output for _, output in watched(forward, groups, chosen)[1]]

    kernels = soft_kernels(runner, problem.params, problem.fixed, begin)
    found = outputs(with_kernels(problem.params, kernels), run.tables)
    wanted = outputs(fixed.pipe.params, None)
    square = lambda a: float(jnp.sum(jnp.square(a)))
    direct = [square(a - b) / square(b) for a, b in zip(found, wanted, strict=True)]
    assert float(extra) == pytest.approx(np.mean(direct), rel=1e-3)

    problem = problem._replace(baseline=error)
    carry = start_optimizer(jax.tree.map(jnp.copy, begin), STEPS, fit, runner, problem)
    carry = go_on(runner, problem, carry, fit, jax.random.key(1), (0, 40))
    after = both(carry.fitted)
    assert after[1] < 0.8 * extra and after[0] < 0.9 * error


# The order.


def test_in_serial_order_an_iteration_is_of_one_step_and_steps_take_turns():
    group = jnp.asarray(np.arange(30) % STEPS, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 7)
    serial = dataclasses.replace(LATENT, order="serial", batch=12)
    for number, key in enumerate(keys):
        index = pick(serial, group, STEPS, jnp.int32(number), key)
        assert index.shape == (12,) and set(group[index].tolist()) == {number % STEPS}
        assert len(set(index.tolist())) > 3  # any of its items
        shuffled = pick(LATENT, group, STEPS, jnp.int32(number), key)
        assert len(set(group[shuffled].tolist())) > 1
