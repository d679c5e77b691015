"""The serial roll-out: own samples, cached history, ranges in forward order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.ranges import Range, empty, observe, to_fitted, to_rows, union
from qjax.calibrate.rollout import Network, roll_out, shared_steps, staleness
from qjax.calibrate.student import Student
from qjax.core.config import ActSpec
from qjax.core.steps import StepTable, TableKey
from qjax.models.pndm import PNDM

STEPS = 4
SCALE = jnp.float32(2.0)


@pytest.fixture(scope="module")
def setting(dit, quantize):
    """A student, its items and its rows: guided DDIM with fresh noise."""
    student = Student.of(quantize(dit), dit.params)
    items = CalibrationSet(items=6).draw(dit, jax.random.key(1), guidance_scale=2.0)
    return student, items, dit.sampler.rows(STEPS, eta=1.0)


def run(setting, pipe, *, method="minmax", **options):
    student, items, rows = setting
    options.setdefault("group", shared_steps(STEPS, None))
    network = student.network(pipe, method)
    return roll_out(network, student.params, items, rows, guidance_scale=SCALE, **options)


def assert_same_ranges(a, b):
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for path in one:
            np.testing.assert_array_equal(one[path].low, other[path].low)
            np.testing.assert_array_equal(one[path].high, other[path].high)


def test_keeping_samples_gives_the_bits_of_simulating_anew_for_every_step(setting, dit):
    _, items, _ = setting
    whole = run(setting, dit)
    fitted = []
    for i in range(STEPS):
        # From the noise again to step i with the ranges found so far, then fit those of step i.
        known = [*fitted, *[whole.ranges[0]] * (STEPS - i)]
        again = run(setting, dit, ranges=known)
        np.testing.assert_array_equal(again.x_t[: i + 1], whole.x_t[: i + 1])
        fitted.append(whole.ranges[i])
    last = run(setting, dit, ranges=fitted)
    np.testing.assert_array_equal(last.x_0, whole.x_0)
    assert whole.forwards == STEPS * len(items.x_T)


def test_the_quantized_network_makes_its_own_samples(setting, dit):
    _, items, _ = setting
    own = run(setting, dit)
    free = Network(dit.apply, dit.sampler, dit.guidance_channels, (), "minmax")
    driven = run(setting, dit, driver=(free, dit.params))
    np.testing.assert_array_equal(driven.x_t[0], own.x_t[0])
    labels = np.asarray(items.told)
    _, trajectory = dit(
        labels=labels,
        steps=STEPS,
        eta=1.0,
        guidance_scale=2.0,
        key=jax.random.key(1),
        return_trajectory=True,
    )
    np.testing.assert_allclose(driven.x_t, trajectory.x_t, rtol=1e-4, atol=1e-4)
    assert np.abs(own.x_t[-1] - trajectory.x_t[-1]).max() > 1e-3


def test_the_calibrated_table_draws_what_the_roll_out_drew(setting, dit, quantize):
    """At low bits, and with the rows of the table in place of the hook."""
    student, items, rows = setting
    buffer = run(setting, dit)
    tables = to_fitted(buffer.ranges, student.formats)
    entry = to_rows(tables, student.formats, jnp.arange(STEPS))
    key = TableKey(timesteps=tuple(rows["t"].tolist()))
    pipe = quantize(dit).replace(step_table=StepTable().with_entry("quant", entry, key=key))
    x_0 = pipe(
        labels=np.asarray(items.told),
        steps=STEPS,
        eta=1.0,
        guidance_scale=2.0,
        key=jax.random.key(1),
        output="latent",
    )
    np.testing.assert_allclose(x_0, buffer.x_0, rtol=2e-3, atol=2e-3)


def test_batches_give_the_moving_average_and_one_batch_its_own_range(setting, dit):
    whole, parts = run(setting, dit), run(setting, dit, batch=3)
    path = next(iter(whole.ranges[0]))
    lows = [float(r[0][path].low) for r in (whole.ranges, parts.ranges)]
    assert lows[0] <= lows[1] <= 0 and len(parts.x_0) == 6
    assert parts.forwards == 2 * whole.forwards  # ranges first, then the step


def test_ranges_of_a_layer_are_of_inputs_quantized_before_it(dit, quantize):
    """With 2-bit inputs the second layer sees something else than in float."""
    coarse = ActSpec(bits=2, mode="per_step", granularity="per_tensor", symmetric=False)
    rough = Student.of(quantize(dit, act=coarse), dit.params)
    items = CalibrationSet(items=4).draw(dit, jax.random.key(1))
    rows = dit.sampler.rows(1)
    options = {"group": shared_steps(1, None)}
    fine = Student.of(quantize(dit), dit.params)
    found = [
        roll_out(s.network(dit, "minmax"), s.params, items, rows, **options).ranges[0]
        for s in (rough, fine)
    ]
    first, last = "blocks_0/modulation", "blocks_1/mlp/fc2"
    assert float(found[0][first].high) == pytest.approx(float(found[1][first].high), rel=1e-5)
    assert abs(float(found[0][last].high / found[1][last].high) - 1) > 1e-3


@pytest.mark.parametrize(
    ("steps", "groups", "expected"),
    [(4, None, [0, 1, 2, 3]), (4, 1, [0, 0, 0, 0]), (5, 2, [0, 0, 0, 1, 1])],
)
def test_steps_are_shared_in_runs_of_nearly_equal_length(steps, groups, expected):
    assert shared_steps(steps, groups).tolist() == expected
    with pytest.raises(ValueError, match="between 1 and 4; got 5"):
        shared_steps(4, 5)


def test_steps_that_share_a_range_have_the_union_of_theirs(setting, dit):
    single = run(setting, dit, group=shared_steps(STEPS, 1))
    assert len(single.ranges) == 1
    own = run(setting, dit)
    first = {path: r for path, r in own.ranges[0].items()}
    for path, found in single.ranges[0].items():
        assert found.low <= first[path].low and found.high >= first[path].high


def test_a_multistep_sampler_is_indexed_by_call_and_keeps_its_history(dit, quantize):
    pipe = dit.replace(sampler=PNDM(schedule=dit.sampler.schedule))
    student = Student.of(quantize(pipe), pipe.params)
    items = CalibrationSet(items=2).draw(pipe, jax.random.key(0))
    rows = pipe.sampler.rows(5)
    calls = len(rows["t"])
    assert calls > 5 and len(set(rows["t"].tolist())) < calls  # a timestep is visited twice
    network, group = student.network(pipe, "minmax"), shared_steps(calls, None)
    whole = roll_out(network, student.params, items, rows, group=group)
    assert len(whole.ranges) == calls
    again = roll_out(network, student.params, items, rows, group=group, ranges=whole.ranges)
    np.testing.assert_array_equal(again.x_0, whole.x_0)


def test_staleness_is_zero_for_the_same_roll_out(setting, dit):
    buffer = run(setting, dit)
    assert staleness(buffer, buffer).tolist() == [0.0] * STEPS
    moved = buffer._replace(x_t=buffer.x_t * 1.5)
    np.testing.assert_allclose(staleness(moved, buffer), 0.5)


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_a_range_holds_zero_and_lies_within_the_extremes(method, key):
    x = jax.random.normal(key, (3, 5, 8)) + 4
    found = observe(x, ActSpec(mode="static", granularity="per_tensor"), method=method)
    assert found.low == 0 and 0 < found.high <= x.max()


def test_groups_of_channels_have_ranges_of_their_own(key):
    act = ActSpec(mode="static", granularity="per_group", group_size=4)
    x = jax.random.normal(key, (3, 5, 8)) * jnp.repeat(jnp.array([1.0, 9.0]), 4)
    found = observe(x, act, method="minmax")
    np.testing.assert_allclose(found.high, x.reshape(-1, 2, 4).max(axis=(0, 2)))


def test_dynamic_ranges_need_no_fitting(dit, quantize):
    student = Student.of(quantize(dit, act=ActSpec()), dit.params)
    assert empty(student.formats) == {}
    items = CalibrationSet(items=4).draw(dit, jax.random.key(1))
    buffer = roll_out(
        student.network(dit, "minmax"),
        student.params,
        items,
        dit.sampler.rows(2),
        group=shared_steps(2, None),
        batch=2,
    )
    assert buffer.ranges == [{}, {}] and buffer.forwards == 8


def test_the_union_of_ranges_holds_both():
    a = {"x": Range(jnp.float32(-1), jnp.float32(2))}
    b = {"x": Range(jnp.float32(-3), jnp.float32(1))}
    assert tuple(map(float, union(a, b)["x"])) == (-3.0, 2.0)
