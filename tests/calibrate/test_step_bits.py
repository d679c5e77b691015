"""Tests for bits step by step: the schedules, what they save, and the stage."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.bit_operations import LayerOperations, bops, gain, gain_of_share, operations_of
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.noise_correction import ENTRY, NoiseCorrection
from qjax.calibrate.recipe import Recipe, State, run
from qjax.calibrate.serial_parallel import SerialParallel
from qjax.calibrate.step_bits import StepBits
from qjax.calibrate.step_bits_run import noise_after, scheduled
from qjax.calibrate.step_schedule import bounded_schedule, budget_schedule, ratio_schedule
from qjax.calibrate.work import Work
from qjax.core.config import ActSpec, QuantConfig, WeightSpec
from qjax.core.metrics import relative_l2

DATA = CalibrationSet(items=12)
STEPS = 4
SETTINGS = {"steps": STEPS, "guidance_scale": 2.0, "data": DATA}
ACT = ActSpec(bits=8, mode="per_step", granularity="per_tensor", symmetric=False)
CONFIG = QuantConfig(weight=WeightSpec(bits=8), act=ACT, allow_unmatched=True)
RANGES = SerialParallel(fits="ranges", **SETTINGS)


# Schedules.


def costs_of(seed, steps=5, choices=(3, 4, 6, 8)):
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-4, 0, steps)
    return scale[:, None] * 4.0 ** -np.asarray(choices, np.float64)


@pytest.mark.parametrize("seed", range(5))
def test_no_schedule_within_the_budget_has_less_error(seed):
    choices, costs = (3, 4, 6, 8), costs_of(seed)
    found = budget_schedule(costs, choices, mean_bits=5.0)
    assert np.mean(found) <= 5.0
    error = lambda one: sum(costs[i, choices.index(b)] for i, b in enumerate(one))
    every = [one for one in itertools.product(choices, repeat=5) if np.mean(one) <= 5.0]
    assert error(found) == pytest.approx(min(map(error, every)), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_no_schedule_within_the_bound_has_fewer_bits(seed):
    choices, costs = (3, 4, 6, 8), costs_of(seed)
    error = lambda one: sum(costs[i, choices.index(b)] for i, b in enumerate(one))
    bound = error((4, 4, 6, 4, 6))
    found = bounded_schedule(costs, choices, max_error=bound**0.5)
    assert error(found) <= bound * (1 + 1e-9)
    every = [one for one in itertools.product(choices, repeat=5) if error(one) <= bound]
    assert sum(found) == min(map(sum, every))


def test_a_ratio_takes_the_fewest_bits_whose_noise_is_small_against_the_samples():
    noise = np.array([[0.5, 0.01]] * 3)
    found = ratio_schedule(
        noise, np.array([0.1, 0.2, 1.0]), np.array([0.9, 0.5, 0.0]), (4, 8), margin=0.1
    )
    # 0.01 * 0.5 <= 0.01 * 0.9; 0.04 * 0.5 > 0.01 * 0.5; nothing is below 0.
    assert found == [4, 8, 8]


def test_what_cannot_be_met_is_named_with_what_can():
    costs = costs_of(0)
    with pytest.raises(ValueError, match="mean_bits must be at least 3"):
        budget_schedule(costs, (3, 4, 6, 8), mean_bits=2.0)
    with pytest.raises(ValueError, match="max_error must be at least"):
        bounded_schedule(costs, (3, 4, 6, 8), max_error=1e-9)


# Bit operations.


def test_the_gains_of_the_paper_are_those_of_its_schedules():
    # 19.96 at W4A8 leaves 1.95 % in float; the schedules are W4A4 for the first steps.
    share = 0.0195
    assert gain_of_share(share, 4, 8) == pytest.approx(19.96, abs=0.03)
    of_250 = (48 * 4 + 202 * 8) / 250
    assert gain_of_share(share, 4, of_250) == pytest.approx(21.21, abs=0.05)
    of_20 = (5 * 4 + 15 * 8) / 20
    assert gain_of_share(share, 4, of_20) == pytest.approx(21.61, abs=0.03)


def test_bops_count_the_bits_of_what_is_multiplied():
    layers = [LayerOperations(1000, 4, 8, True), LayerOperations(10, 8, 8), LayerOperations(5)]
    assert bops(layers) == 1000 * 32 + 10 * 64 + 5 * 1024
    assert bops(layers, 4) == 1000 * 16 + 10 * 64 + 5 * 1024
    whole = 1015 * 1024
    assert gain(layers, [4, 8]) == pytest.approx(whole / ((bops(layers, 4) + bops(layers)) / 2))


def test_operations_are_those_of_the_layers_that_a_step_runs(dit, quantize):
    told = jnp.zeros((1,), jnp.int32)
    plain, quantized = operations_of(dit, told), operations_of(quantize(dit), told)
    assert plain.keys() == quantized.keys()
    assert {one.weight_bits for one in plain.values()} == {32}
    # 4 tokens of a 4x4 sample in patches of 2; the MLP is 16 wide and four times that.
    mlp = next(one for path, one in quantized.items() if path.endswith("mlp/fc1"))
    assert mlp == LayerOperations(4 * 16 * 64, 4, 8, True)


# The stage.


def draw(pipe, **changes):
    settings = {"steps": STEPS, "guidance_scale": 2.0, "key": jax.random.key(1), "output": "latent"}
    return np.asarray(pipe(labels=np.arange(16) % 3, **(settings | changes)))


@pytest.fixture(scope="module")
def made(dit, tmp_path_factory):
    """The pipelines of some settings, and the events of their logs."""
    kept = {}

    def made(**settings):
        name = json.dumps(settings, sort_keys=True)
        if name not in kept:
            events = []
            stages = (RANGES, StepBits(**SETTINGS, **settings))
            pipe = run(dit, Recipe(quant=CONFIG, stages=stages), on_event=events.append)
            kept[name] = pipe, events
        return kept[name]

    return made


def limits(pipe):
    """Integers that an input may have at every step, of one layer."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(pipe.step_table.entries["quant"]):
        if "act_qmax" in jax.tree_util.keystr(path):
            high = leaf
        if "act_qmin" in jax.tree_util.keystr(path):
            low = leaf
    return (np.asarray(high) - np.asarray(low) + 1).tolist()


def test_given_bits_become_integer_ranges_of_the_steps(made):
    pipe, events = made(bits=(4, 4, 8))
    assert limits(pipe) == [16, 16, 256, 256]  # the last is repeated
    said = next(event for event in events if event["event"] == "schedule")
    assert said["bits"] == "4 4 8 8"
    assert said["gain"] > said["gain_most"]


def test_the_widths_own_ranges_stay_as_they_were_fitted(dit, made):
    before = run(dit, Recipe(quant=CONFIG, stages=(RANGES,)))
    pipe, _ = made(bits=(8,))
    jax.tree.map(
        np.testing.assert_array_equal,
        before.step_table.entries["quant"],
        pipe.step_table.entries["quant"],
    )


def test_schedules_share_one_program(dit, made):
    traces = []

    def counted(variables, x_t, t, labels):
        traces.append(1)
        return dit.apply(variables, x_t, t, labels)

    pipes = [made(bits=bits)[0].replace(apply=counted) for bits in ((4, 4, 8), (8,))]
    images = [draw(pipe) for pipe in pipes]
    assert len(traces) == 1
    assert np.abs(images[0] - images[1]).max() > 0


def test_a_budget_is_kept_and_its_schedule_is_better_than_its_reverse(dit, made):
    pipe, events = made(choices=(3, 8), mean_bits=5.5)
    bits = [int(b) for b in next(e for e in events if e["event"] == "schedule")["bits"].split()]
    assert np.mean(bits) == 5.5
    reverse, _ = made(choices=(3, 8), bits=tuple(11 - b for b in bits))
    reference = draw(run(dit, Recipe(quant=CONFIG, stages=(RANGES,))))
    errors = [relative_l2(draw(one), reference) for one in (pipe, reverse)]
    assert errors[0] < errors[1]


def test_a_bound_on_the_error_is_about_kept(made):
    _, events = made(choices=(4, 8), max_error=0.05)
    said = next(event for event in events if event["event"] == "schedule")
    assert said["error"] <= 0.05 * 1.5  # single steps add up nearly


@pytest.mark.parametrize("settings", [{"margin": 0.05}, {"mean_bits": 6.0, "cost": "next"}])
def test_costs_of_the_next_sample_give_a_schedule(made, settings):
    _, events = made(**settings)
    costs = [event for event in events if event["event"] == "cost"]
    assert [event["step"] for event in costs] == list(range(STEPS))
    assert all(event["cost_4"] > event["cost_8"] for event in costs)


def test_a_schedule_leaves_out_a_correction_that_was_fitted_before_it(dit):
    bits, correction = StepBits(bits=(4, 8), **SETTINGS), NoiseCorrection(**SETTINGS)
    pipe = run(dit, Recipe(quant=CONFIG, stages=(RANGES, correction)))
    assert set(pipe.step_table.entries) == {"quant", ENTRY}
    pipe = bits.run(State(dit, pipe), jax.random.key(0), Work()).student
    assert set(pipe.step_table.entries) == {"quant"}
    with pytest.raises(ValueError, match="NoiseCorrection is fitted to what all others have made"):
        Recipe(quant=CONFIG, stages=(RANGES, correction, bits))


def test_sums_of_bits_are_whole():
    # 4.64 * 25 is a little less than 116 in floats: four steps of 8 bits, the others of 4.
    costs = np.stack([np.linspace(1, 2, 25), np.zeros(25)], axis=1)
    assert sum(budget_schedule(costs, (4, 8), mean_bits=4.64)) == 116


def test_progress_never_goes_back_and_ends_at_1(made):
    for settings in ({"bits": (4, 4, 8)}, {"choices": (3, 8), "mean_bits": 5.5}):
        shares = [event["share"] for event in made(**settings)[1] if event["event"] == "step"]
        own = shares[STEPS:]  # after those of the stage before
        assert own == sorted(own) and own[-1] == 1.0


def test_rows_of_a_schedule_are_those_of_its_widths():
    rows = {4: {"a": jnp.arange(3)}, 8: {"a": jnp.arange(3) + 10}}
    np.testing.assert_array_equal(scheduled(rows, [8, 4, 8])["a"], [10, 1, 12])


def test_the_noise_after_a_step_is_that_of_the_next_timestep(dit):
    rows = dit.sampler.rows(STEPS)
    left = noise_after(dit, rows)
    np.testing.assert_allclose(left[:-1], 1 - dit.sampler.schedule.alpha_bar[rows["t"][1:]])
    assert left[-1] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of bits, mean_bits, max_error, margin; got none"),
        ({"bits": (4,), "margin": 0.1}, "got bits, margin"),
        ({"bits": (5,)}, r"bits must be of choices=\(4, 8\); got \(5,\)"),
        ({"margin": 0.1, "choices": (4, 9)}, "choices must be bits from 2 to 8"),
        ({"margin": 0.1, "cost": "all"}, "cost must be last or next"),
        ({"mean_bits": 3.0}, "mean_bits must be at least 4"),
        ({"max_error": 0.1, "cost": "next"}, "an error of the last samples"),
    ],
)
def test_settings_that_do_not_go_together_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        StepBits(**settings)


def test_what_does_not_suit_the_pipeline_raises(dit):
    with pytest.raises(ValueError, match="whose number is not chosen: give steps"):
        StepBits(bits=(4,)).check(dit)
    with pytest.raises(ValueError, match="the sampler has 2 steps; got bits for 3"):
        StepBits(bits=(4, 4, 8), steps=2).check(dit)
    dynamic = dataclasses.replace(CONFIG, act=ActSpec(bits=8))
    with pytest.raises(ValueError, match="no quantized layer reads its range from there"):
        run(dit, Recipe(quant=dynamic, stages=(StepBits(bits=(4,), **SETTINGS),)))
