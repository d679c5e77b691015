"""Tests for PTQD's corrections as a stage."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.noise_correction import ENTRY, NoiseCorrection, noise_std_left
from qjax.calibrate.noise_refit import refit, settings_of
from qjax.calibrate.noise_rollout import NoiseRollout, pack_step, unpack_step
from qjax.calibrate.noise_statistics import Correction
from qjax.calibrate.recipe import Recipe, State, run
from qjax.calibrate.serial_parallel import SerialParallel
from qjax.calibrate.work import Work
from qjax.core.config import ActSpec, QuantConfig, WeightSpec
from qjax.core.metrics import relative_l2
from qjax.core.steps import StepTable
from qjax.models import linear_sampler
from qjax.models.dpm_solver import DPMSolver
from qjax.models.euler import EulerAncestral
from qjax.models.lcm import LCM
from qjax.models.loading import load_pipeline
from qjax.models.pipeline import Pipeline
from qjax.models.pndm import PNDM
from qjax.models.samplers import DDIM, DDPM
from qjax.models.schedules import Schedule

pytestmark = pytest.mark.optimized  # some numbers must have equal bits

STEPS = 4
K = jnp.array([0.3, 0.2, 0.1, 0.05])
MU = jnp.array([0.2, -0.1])
SCHEDULE = Schedule.linear(100, 1e-3, 0.1)
DATA = CalibrationSet(items=24)
KEY = jax.random.key(0)


def plain(variables, x_t, t, labels):
    """A denoiser in closed form: of data of variance 1/4, told nothing."""
    a = jnp.asarray(SCHEDULE.alpha_bar, jnp.float32)[t][:, None, None, None]
    return jnp.sqrt(1 - a) / (a * 0.25 + 1 - a) * x_t * variables["params"]["gain"]


def noisy(variables, x_t, t, labels):
    """Off by k times the answer, a bias, and noise that only the sample knows."""
    k = jnp.interp(t.astype(jnp.float32), jnp.array([0.0, 25, 50, 75]), K[::-1])
    rest = jnp.sin(1e4 * x_t) * variables["params"]["rest"]
    answer = plain(variables, x_t, t, labels)
    return (1 + k[:, None, None, None]) * answer + MU + rest


def pipe_of(apply, sampler=None, rest=0.0, **fields) -> Pipeline:
    params = {"gain": jnp.ones(()), "rest": jnp.float32(rest)}
    sampler = sampler or DDIM(schedule=SCHEDULE, clip_sample=False)
    return Pipeline.from_apply(apply, params, sampler, (8, 8, 2), **fields)


def corrected(stage, rest=0.0, sampler=None, events=None) -> Pipeline:
    """The noisy pipeline with the table that the stage has fitted."""
    state = State(pipe_of(plain, sampler, rest), pipe_of(noisy, sampler, rest))
    on_event = None if events is None else events.append
    return stage.run(state, KEY, Work(None, on_event)).student


def draw(pipe, eta=1.0, steps=STEPS, **settings):
    settings = {"key": jax.random.key(5), "num_images": 64, "output": "latent"} | settings
    return np.asarray(pipe(steps=steps, eta=eta, **settings))


@pytest.mark.quick_cases("quantized")
@pytest.mark.parametrize("driver", ["float", "quantized"])
def test_known_noise_is_found_and_taken_back(driver):
    stage = NoiseCorrection(steps=STEPS, eta=1.0, data=DATA, driver=driver, slope="within")
    pipe = corrected(stage)
    entry = pipe.step_table.entries[ENTRY]
    np.testing.assert_allclose(entry["k"], K, rtol=1e-4)
    np.testing.assert_allclose(entry["mu"], np.tile(MU, (STEPS, 1)), atol=1e-4)
    np.testing.assert_allclose(entry["variance"], np.zeros(STEPS), atol=1e-8)
    expected = draw(pipe_of(plain))
    np.testing.assert_allclose(draw(pipe), expected, atol=2e-3)
    assert np.abs(draw(pipe_of(noisy)) - expected).max() > 0.1


@pytest.mark.parametrize("rest", [0.1, 0.2])
def test_variance_calibration_keeps_the_variance_of_the_float_samples(rest):
    # Of the samples at step 2: there is too little noise in step 2 to take the rest from.
    def variance(pipe):
        settings = {"num_images": 512, "batch_size": 512, "key": KEY, "return_trajectory": True}
        return float(np.var(pipe(steps=STEPS, eta=1.0, **settings)[1].x_t[2]))

    events = []
    stage = NoiseCorrection(steps=STEPS, eta=1.0, data=DATA)
    without = dataclasses.replace(stage, variance="none")
    wanted = variance(pipe_of(plain, rest=rest))
    errors = [abs(variance(corrected(s, rest, events=events)) - wanted) for s in (stage, without)]
    assert errors[0] < 0.15 * errors[1]
    clipped = [event["clipped"] for event in events if event["event"] == "noise"]
    assert clipped[:STEPS] == [False, False, True, False]  # the last step adds none


def test_without_noise_of_the_samplers_own_the_variance_changes_nothing():
    stage = NoiseCorrection(steps=STEPS, eta=0.0, data=DATA)
    without = dataclasses.replace(stage, variance="none")
    images = [draw(corrected(one, rest=0.3), eta=0.0) for one in (stage, without)]
    np.testing.assert_array_equal(*images)


def test_ddpm_and_ddim_absorb_the_same_of_their_noise(monkeypatch):
    # At eta 1 their updates are the same. Rows in float64, to see no rounding but the last.
    monkeypatch.setattr(linear_sampler, "as_rows", lambda timesteps, **columns: columns)
    settings = {
        "schedule": Schedule.scaled_linear(),
        "clip_sample": False,
        "timestep_spacing": "leading",
    }
    k, variance = np.linspace(0, 0.3, 19), np.full(19, 0.05)
    left = []
    for sampler in (DDIM(**settings), DDPM(**settings)):
        # The last step ends at alpha_bar 1, where DDPM adds no noise and DDIM has none.
        rows = {name: column[:-1] for name, column in sampler.rows(20, eta=1.0).items()}
        left.append(noise_std_left(k, variance, rows))
    assert left[0].dtype == np.float64
    np.testing.assert_allclose(*left, rtol=1e-10)


def test_the_released_mode_leaves_more_noise_than_the_paper():
    sampler = DDIM(
        schedule=Schedule.scaled_linear(beta_start=0.0015, beta_end=0.0195),
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    rows = {name: np.asarray(c, np.float64) for name, c in sampler.rows(20, eta=1.0).items()}
    variance = np.full(20, 0.05)
    stage = NoiseCorrection(steps=20, eta=1.0, variance="released")
    entry = stage.entry([Correction(0.0, np.zeros(4), v) for v in variance], rows)
    left = noise_std_left(np.zeros(20), variance, rows)
    direction = np.asarray(entry["mean_from_noise"], np.float64)
    gain = rows["prediction_gain"] - rows["mean_from_noise"] + direction
    total = direction**2 + left**2 + gain**2 * variance
    paper = rows["mean_from_noise"] ** 2 + left**2 + rows["prediction_gain"] ** 2 * variance
    at = {int(t): i for i, t in enumerate(rows["t"])}
    # The table of the authors' program and of the paper's form, for a variance of 0.05.
    for t, expected, released in (
        (951, 0.99914, 1.03793),
        (501, 0.83349, 0.84146),
        (251, 0.38756, 0.39114),
    ):
        assert paper[at[t]] == pytest.approx(expected, abs=1e-5)
        assert total[at[t]] == pytest.approx(released, abs=1e-5)
    # Where there is more than the schedule's noise none is left.
    assert left[at[51]] == 0
    assert paper[at[51]] == pytest.approx(0.00444, abs=1e-5)
    assert total[at[51]] == pytest.approx(0.00612, abs=1e-5)


def test_a_sampler_without_noise_takes_the_prediction_corrections():
    sampler = PNDM(schedule=SCHEDULE, skip_prk_steps=True)
    calls = len(sampler.rows(6)["t"])
    stage = NoiseCorrection(steps=6, data=DATA, slope="within")
    pipe = corrected(stage, sampler=sampler)
    assert pipe.step_table.entries[ENTRY]["k"].shape == (calls,)
    wanted = draw(pipe_of(plain, sampler), eta=0.0, steps=6)
    assert relative_l2(draw(pipe, eta=0.0, steps=6), wanted) < 0.02
    assert relative_l2(draw(pipe_of(noisy, sampler), eta=0.0, steps=6), wanted) > 0.1


def test_a_learned_variance_stays_as_the_network_says():
    def with_variance(apply):
        def both(variables, x_t, t, labels):
            answer = apply(variables, x_t, t, labels)
            return jnp.concatenate([answer, 0.1 + 0 * answer], -1)

        return both

    sampler = DDPM(schedule=SCHEDULE, clip_sample=False, variance_type="learned_range")
    teacher = pipe_of(with_variance(plain), sampler)
    student = pipe_of(with_variance(noisy), sampler)
    stage = NoiseCorrection(steps=STEPS, data=DATA, slope="within")
    pipe = stage.run(State(teacher, student), KEY, Work()).student
    assert pipe.step_table.entries[ENTRY]["mu"].shape == (STEPS, 2)
    np.testing.assert_allclose(draw(pipe, eta=0.0), draw(teacher, eta=0.0), atol=5e-3)


def test_a_run_that_goes_on_from_a_part_gives_the_same_bits(tmp_path):
    stage = NoiseCorrection(steps=STEPS, eta=1.0, data=DATA, driver="quantized")
    state = State(pipe_of(plain, rest=0.1), pipe_of(noisy, rest=0.1))

    class Killed(Exception):
        pass

    def kill(event):
        if event["event"] == "step" and event["step"] == 2:
            raise Killed

    with pytest.raises(Killed):
        stage.run(state, KEY, Work(tmp_path, kill))
    events = []
    resumed = stage.run(state, KEY, Work(tmp_path, events.append)).student
    assert [event["part"] for event in events if event["event"] == "read"] == ["noise-1"]
    once = stage.run(state, KEY, Work()).student
    for name, column in once.step_table.entries[ENTRY].items():
        np.testing.assert_array_equal(column, resumed.step_table.entries[ENTRY][name])


def test_a_packed_step_is_the_same_when_unpacked():
    rollout = NoiseRollout.of(
        pipe_of(plain),
        pipe_of(noisy),
        StepTable(),
        DDIM(schedule=SCHEDULE).rows(STEPS),
        DATA.draw(pipe_of(plain), KEY),
        guidance_scale=None,
        batch=16,
    )
    carry, noise = rollout.step(0, rollout.begin(), driver="float")
    packed = {name: jnp.asarray(value) for name, value in pack_step(carry, [noise]).items()}
    again, (found,) = unpack_step(packed, carry)
    np.testing.assert_array_equal(again.x_t, carry.x_t)
    assert dataclasses.astuple(found.moments)[0] == noise.moments.count
    np.testing.assert_array_equal(found.moments.ed, noise.moments.ed)
    np.testing.assert_array_equal(found.d, noise.d)


@pytest.mark.parametrize("variance", ["paper", "released", "none"])
def test_own_samples_are_those_that_the_corrected_sampler_makes(variance):
    slope = "mmse" if variance == "none" else "pooled"
    stage = NoiseCorrection(
        steps=STEPS, eta=1.0, data=DATA, driver="quantized", variance=variance, slope=slope
    )
    state = State(pipe_of(plain, rest=0.2), pipe_of(noisy, rest=0.2))
    rollout, _ = stage.collect(state, KEY, Work())
    carry, seen = rollout.begin(), []
    for i in range(STEPS):
        seen.append(carry.x_t)
        carry, _ = rollout.step(i, carry, driver="quantized", correct=stage.row)
    pipe = stage.run(state, KEY, Work()).student
    key = jax.random.fold_in(KEY, 0)  # of the stage's items
    settings = {"num_images": DATA.items, "key": key, "eta": 1.0, "return_trajectory": True}
    x_0, trajectory = pipe(steps=STEPS, output="latent", **settings)
    np.testing.assert_allclose(trajectory.x_t, jnp.stack(seen), atol=1e-4)
    np.testing.assert_allclose(x_0, carry.x_t, atol=1e-4)


@pytest.mark.parametrize(
    "prediction_type", ["v_prediction", pytest.param("sample", marks=pytest.mark.slow)]
)
def test_noise_of_other_predictions_is_found_and_taken_back(prediction_type):
    sampler = DDIM(schedule=SCHEDULE, clip_sample=False, prediction_type=prediction_type)
    stage = NoiseCorrection(steps=STEPS, eta=1.0, data=DATA, slope="within")
    pipe = corrected(stage, sampler=sampler)
    np.testing.assert_allclose(pipe.step_table.entries[ENTRY]["k"], K, rtol=1e-3)
    expected = draw(pipe_of(plain, sampler))
    assert relative_l2(draw(pipe), expected) < 0.01
    assert relative_l2(draw(pipe_of(noisy, sampler)), expected) > 0.1


@pytest.mark.quick_cases("euler_ancestral")
@pytest.mark.parametrize(
    "sampler",
    [
        EulerAncestral(schedule=SCHEDULE, timestep_spacing="leading"),
        DPMSolver(schedule=SCHEDULE, algorithm_type="sde-dpmsolver++"),
        LCM(schedule=SCHEDULE, original_inference_steps=20),
    ],
    ids=["euler_ancestral", "dpm_solver_sde", "lcm"],
)
def test_other_samplers_that_add_noise_are_corrected(sampler):
    stage = NoiseCorrection(steps=STEPS, data=DATA, slope="within")
    pipe = corrected(stage, rest=0.1, sampler=sampler)
    variance = np.asarray(pipe.step_table.entries[ENTRY]["variance"])
    adds = sampler.rows(STEPS)["noise_std"] > 0
    assert adds.any() and (variance[adds] > 0).all() and not variance[~adds].any()
    wanted = draw(pipe_of(plain, sampler, rest=0.1), eta=0.0)
    errors = [relative_l2(draw(p, eta=0.0), wanted) for p in (pipe, pipe_of(noisy, sampler, 0.1))]
    assert errors[0] < 0.6 * errors[1]


def test_other_settings_of_the_sampler_or_a_rescale_are_refused():
    pipe = corrected(NoiseCorrection(steps=STEPS, eta=1.0, data=DATA))
    other = DDIM(schedule=SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    with pytest.raises(ValueError, match="sampler_config was"):
        draw(pipe.replace(sampler=other))
    key = pipe.table_key(steps=STEPS, eta=1.0, guidance_rescale=0.7)
    with pytest.raises(ValueError, match=r"guidance_rescale was 0\.0, the run has 0\.7"):
        pipe.step_table.check(key)


def test_a_correction_fitted_again_is_that_of_a_fresh_fit():
    stage = NoiseCorrection(steps=STEPS, eta=1.0, data=DATA, slope="within", driver="quantized")
    pipe, teacher = corrected(stage), pipe_of(plain)
    settings = settings_of(pipe, steps=STEPS, eta=0.5, data=CalibrationSet(items=3))
    assert settings == dataclasses.replace(stage, eta=0.5)
    with pytest.warns(UserWarning, match="left out what was fitted for another run"):
        plain_again = pipe.retarget(steps=STEPS, eta=0.5)
    again = refit(plain_again, teacher, settings)
    fresh = corrected(settings)
    for name, column in fresh.step_table.entries[ENTRY].items():
        np.testing.assert_array_equal(column, again.step_table.entries[ENTRY][name])
    assert draw(again, eta=0.5).shape == (64, 8, 8, 2)


PER_STEP = ActSpec(bits=4, mode="per_step", granularity="per_tensor", symmetric=False)
HARSH = QuantConfig(weight=WeightSpec(bits=3), act=PER_STEP, allow_unmatched=True)
SETTINGS = {"steps": 3, "eta": 1.0, "guidance_scale": 2.0, "data": DATA}


@pytest.fixture(scope="module")
def calibrated(dit, tmp_path_factory):
    """A quantized network with per-step ranges and a noise correction, and where it was saved."""
    recipe = Recipe(
        quant=HARSH,
        stages=(SerialParallel(fits="ranges", **SETTINGS), NoiseCorrection(**SETTINGS)),
    )
    out = tmp_path_factory.mktemp("run")
    return run(dit, recipe, out=out), out / "final"


def guided(pipe, **changes):
    settings = {"steps": 3, "eta": 1.0, "guidance_scale": 2.0, "key": jax.random.key(1)}
    return np.asarray(pipe(labels=[0, 1, 2], **(settings | changes)))


def test_a_correction_stands_beside_the_ranges_of_a_stage_before(calibrated):
    pipe, _ = calibrated
    assert set(pipe.step_table.entries) == {"quant", ENTRY}
    assert pipe.step_table.key(ENTRY).method == pipe.method is not None
    assert pipe.step_table.key(ENTRY).guidance_scale == 2.0


@pytest.mark.slow
def test_a_saved_correction_draws_the_same_bits_in_a_new_process(calibrated, tmp_path):
    pipe, folder = calibrated
    np.testing.assert_array_equal(guided(load_pipeline(folder)), guided(pipe))
    code = (
        "import sys, jax, numpy, qjax;"
        "images = qjax.load(sys.argv[1])(labels=[0, 1, 2], steps=3, eta=1.0, guidance_scale=2.0,"
        " key=jax.random.key(1));"
        "numpy.save(sys.argv[2], images)"
    )
    made = tmp_path / "images.npy"
    # Compiled as here.
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    subprocess.run([sys.executable, "-c", code, str(folder), str(made)], check=True, env=env)
    np.testing.assert_array_equal(np.load(made), guided(pipe))
    plain = pipe.replace(step_table=pipe.step_table.drop(ENTRY))
    assert np.abs(guided(plain) - guided(pipe)).max() > 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 4}, "timesteps were"),
        ({"eta": 0.0}, "eta was 1.0, the run has 0.0"),
        ({"guidance_scale": 3.0}, "guidance_scale was 2.0, the run has 3.0"),
    ],
)
def test_another_run_is_an_error_that_names_what_differs(calibrated, changes, named):
    with pytest.raises(ValueError, match=named):
        guided(calibrated[0], **changes)


def test_the_log_tells_of_every_step(dit, tmp_path):
    recipe = Recipe(
        quant=HARSH, stages=(SerialParallel(fits="ranges", **SETTINGS), NoiseCorrection(**SETTINGS))
    )
    run(dit, recipe, out=tmp_path)
    lines = (tmp_path / "stage-1-noisecorrection-parts" / "log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    found = [event for event in events if event["event"] == "noise"]
    assert [event["step"] for event in found] == [0, 1, 2]
    for event in found:
        assert event["k"] == max(event["slope"], 0)
        assert event["snr_corrected"] >= event["snr"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "mean"}, "bias must be one of residual, total, none"),
        ({"slope": "mmse"}, "nothing to absorb"),
        ({"batch": 0}, "batch must be at least 1"),
    ],
)
def test_settings_that_do_not_go_together_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        NoiseCorrection(**settings)


def test_what_does_not_suit_the_pipeline_raises_before_anything_is_computed():
    with pytest.raises(ValueError, match="whose number is not chosen: give steps"):
        NoiseCorrection().check(pipe_of(plain))
    with pytest.raises(ValueError, match="a deviation within DDIM; got DDPM"):
        NoiseCorrection(steps=4, variance="released").check(pipe_of(plain, DDPM()))


def test_ranges_of_other_steps_are_refused(dit):
    other = SETTINGS | {"steps": 4}
    recipe = Recipe(
        quant=HARSH, stages=(SerialParallel(fits="ranges", **other), NoiseCorrection(**SETTINGS))
    )
    with pytest.raises(ValueError, match="a step table serves the settings it was fitted for"):
        run(dit, recipe)
