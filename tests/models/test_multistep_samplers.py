"""Claims about PNDM, Euler, DPM-Solver++ and LCM that need no other library to compare with."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.core.steps import StepTable, TableKey
from qjax.models.dpm_solver import DPMSolver
from qjax.models.euler import Euler, EulerAncestral
from qjax.models.lcm import LCM
from qjax.models.pipeline import Pipeline
from qjax.models.pndm import PNDM
from qjax.models.samplers import DDIM, correct_prediction
from qjax.models.sampling import draw_noise, image_keys
from qjax.models.schedules import PREDICTION_TYPES, Schedule

SHAPE = (2, 4, 4, 4)
SD = Schedule.scaled_linear()
SAMPLERS = {
    "pndm": PNDM(schedule=SD),
    "plms": PNDM(schedule=SD, skip_prk_steps=True),
    "euler": Euler(schedule=SD),
    "euler_karras": Euler(schedule=SD, use_karras_sigmas=True),
    "euler_ancestral": EulerAncestral(schedule=SD),
    "dpm_1": DPMSolver(schedule=SD, solver_order=1),
    "dpm_2m": DPMSolver(schedule=SD),
    "dpm_3m": DPMSolver(schedule=SD, solver_order=3),
    "dpm_2m_sde": DPMSolver(schedule=SD, algorithm_type="sde-dpmsolver++"),
    "lcm": LCM(),
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
STOCHASTIC = ("euler_ancestral", "dpm_2m_sde", "lcm")


def network(x_t, t):
    return 0.8 * jnp.tanh(1.3 * x_t + t.astype(jnp.float32) / 700) + 0.2 * x_t


TRACED = []


def walk(sampler, rows, x_t, noises, predict=network):
    """The last sample, step after step; traceable."""
    TRACED.append(sampler)

    def body(carry, inputs):
        x_t, state = carry
        row, noise = inputs
        return sampler.step(row, state, x_t, predict(x_t, row["t"]), noise), None

    (x_0, _), _ = jax.lax.scan(body, (x_t, sampler.init(x_t)), (rows, noises))
    return x_0


run = jax.jit(walk, static_argnames=("sampler", "predict"))


def draw(sampler, steps, key, shape=SHAPE):
    x_T, noises = jax.random.split(key)
    calls = len(sampler.timesteps(steps))
    return jax.random.normal(x_T, shape), jax.random.normal(noises, (calls, *shape))


@every_sampler
def test_one_program_serves_other_rows_and_is_the_plain_loop(sampler, key):
    x_T, noises = draw(sampler, 6, key)
    rows = sampler.rows(6)
    x_t, state = x_T, sampler.init(x_T)
    for i in range(len(noises)):
        row = {name: value[i] for name, value in rows.items()}
        x_t, state = sampler.step(row, state, x_t, network(x_t, row["t"]), noises[i])
    np.testing.assert_allclose(run(sampler, rows, x_T, noises), x_t, rtol=1e-5, atol=1e-5)
    traced = len(TRACED)
    other = dataclasses.replace(sampler, prediction_type="v_prediction").rows(6)
    assert np.max(np.abs(run(sampler, other, x_T, noises) - x_t)) > 1e-2
    assert len(TRACED) == traced


@every_sampler
def test_an_image_is_bit_for_bit_independent_of_its_batch(sampler, key):
    # In one program; that of another batch size may round otherwise, on the CPU it does.
    x_T, noises = draw(sampler, 6, key)
    rows = sampler.rows(6)
    one = run(sampler, rows, x_T, noises)
    two = run(sampler, rows, x_T.at[0].set(3.0), noises.at[:, 0].set(-1.0))
    np.testing.assert_array_equal(one[1], two[1])
    assert np.all(np.isfinite(two)) and not np.allclose(one[0], two[0])


@pytest.mark.parametrize(
    ("sampler", "prediction_type"),
    [
        (sampler, prediction_type)
        for sampler in SAMPLERS.values()
        for prediction_type in sampler.choices.get("prediction_type", PREDICTION_TYPES)
    ],
)
def test_prediction_gain_is_the_derivative_by_the_current_prediction(sampler, prediction_type, key):
    sampler = dataclasses.replace(sampler, prediction_type=prediction_type)
    x_t = jax.random.normal(key, (1, 1, 1, 1))
    state = jax.tree.map(lambda leaf: leaf + 0.7, sampler.init(x_t))
    update = lambda p, row: sampler.step(row, state, x_t, p * x_t, x_t)[0].sum() / x_t.sum()
    slopes = jax.vmap(jax.grad(update), in_axes=(None, 0))(0.3, sampler.rows(6))
    np.testing.assert_allclose(slopes, sampler.rows(6)["prediction_gain"], rtol=1e-5, atol=2e-6)


@every_sampler
def test_absorbed_variance_is_taken_from_noise_of_the_samplers_own(sampler, key):
    one = jnp.ones((1, 1, 1, 1))
    rows, state = sampler.rows(6), sampler.init(one)
    correction = {"k": jnp.zeros(()), "mu": jnp.zeros(1), "variance": jnp.asarray(1e-3)}
    for i in range(len(rows["t"])):
        plain = {name: jnp.asarray(value[i]) for name, value in rows.items()}
        row, _ = correct_prediction(correction, plain, one)
        noisy = lambda row, noise: sampler.step(row, state, one, one, noise)[0].item()
        std = noisy(row, one) - noisy(row, 0 * one)
        left = max(plain["noise_std"] ** 2 - row["absorbed_variance"], 0)
        np.testing.assert_allclose(std, np.sqrt(left), atol=1e-5)


@pytest.mark.parametrize(("name", "sampler"), SAMPLERS.items())
def test_only_stochastic_samplers_add_noise_and_none_at_the_end(name, sampler):
    noise_std = sampler.rows(8)["noise_std"]
    assert noise_std[-1] == 0
    assert np.all(noise_std[:-1] > 0) if name in STOCHASTIC else np.all(noise_std == 0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler_is_ddim(eta, prediction_type, key):
    # Song et al., section 4.3; the ancestral variant is DDIM at eta 1. Same units, same noise.
    common = {"schedule": SD, "prediction_type": prediction_type, "steps_offset": 1}
    euler = (EulerAncestral if eta else Euler)(timestep_spacing="leading", **common)
    ddim = DDIM(clip_sample=False, **common)
    x_T, noises = draw(ddim, 20, key)
    np.testing.assert_allclose(euler.rows(20)["init_scale"], 1, rtol=1e-6)
    one = walk(euler, euler.rows(20), x_T, noises)
    np.testing.assert_allclose(one, walk(ddim, ddim.rows(20, eta=eta), x_T, noises), atol=1e-5)


def test_dpm_solver_of_order_one_is_ddim(key):
    dpm = DPMSolver(schedule=SD, solver_order=1, timestep_spacing="trailing")
    ddim = DDIM(schedule=SD, clip_sample=False, timestep_spacing="trailing")
    x_T, noises = draw(ddim, 20, key)
    one = walk(dpm, dpm.rows(20), x_T, noises)
    np.testing.assert_allclose(one, walk(ddim, ddim.rows(20), x_T, noises), atol=1e-5)


@pytest.mark.parametrize("sampler", [SAMPLERS[n] for n in SAMPLERS if n != "euler_karras"])
def test_a_perfect_prediction_returns_the_clean_sample(sampler, key):
    # Noise that stays the same: every combination of answers is that noise again.
    spacing = "leading" if "euler" in sampler.name else sampler.timestep_spacing
    sampler = dataclasses.replace(sampler, timestep_spacing=spacing)
    if sampler.name == "pndm":
        sampler = dataclasses.replace(sampler, set_alpha_to_one=True)
    x_T, noises = draw(sampler, 10, key)
    x_0 = jnp.clip(x_T[::-1], -1, 1)
    alpha_bar = jnp.asarray(sampler.schedule.alpha_bar, jnp.float32)

    def predict(x_t, t):
        return (x_t - jnp.sqrt(alpha_bar[t]) * x_0) / jnp.sqrt(1 - alpha_bar[t])

    found = walk(sampler, sampler.rows(10), x_T, noises, predict)
    np.testing.assert_allclose(found, x_0, atol=2e-4)


def error_on_gaussian_data(sampler, steps):
    """How far the last sample is from the exact flow, for data of standard deviation 0.5."""
    alpha_bar = sampler.schedule.alpha_bar
    deviation = np.sqrt(0.25 * alpha_bar + 1 - alpha_bar)
    slope = jnp.asarray(np.sqrt(1 - alpha_bar) / deviation**2, jnp.float32)
    rows, one = sampler.rows(steps), jnp.ones((1, 1, 1, 1))
    noises = jnp.zeros((len(rows["t"]), 1, 1, 1, 1))
    found = walk(sampler, rows, one, noises, lambda x_t, t: slope[t] * x_t).item()
    if sampler.name == "euler":
        found *= np.sqrt(alpha_bar[0])  # its last sample is not scaled down, at sigma_min either
    return abs(found - deviation[0] / deviation[rows["t"][0]])


def test_higher_orders_converge_faster():
    # 200 steps against 100: errors shrink by 2 to the order, less where the last steps, which
    # are long in log sigma, weigh most.
    last = {"schedule": SD, "timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}
    plms = PNDM(schedule=SD, timestep_spacing="trailing", skip_prk_steps=True)
    samplers = [Euler(**last), DPMSolver(**last), DPMSolver(**last, solver_order=3), plms]
    coarse = np.array([error_on_gaussian_data(sampler, 100) for sampler in samplers])
    fine = np.array([error_on_gaussian_data(sampler, 200) for sampler in samplers])
    assert np.all(np.diff(fine) < 0)
    assert 1.8 < coarse[0] / fine[0] < 2.2
    assert np.all(coarse[1:] / fine[1:] > [3, 4, 5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DPMSolver(algorithm_type="sde-dpmsolver++", solver_order=3), "Use solver_order=2"),
        (lambda: DPMSolver().rows(1000), "between 1 and 999 for timestep_spacing='linspace'"),
        (lambda: DPMSolver(timestep_spacing="leading", steps_offset=99).rows(20), "1039.*offset=0"),
        (lambda: Euler().rows(1001), "steps=1001"),
        (lambda: Euler(use_karras_sigmas=True, sigma_min=9.0, sigma_max=1.0).rows(5), "sigma_min="),
        (lambda: Euler(schedule=Schedule.from_betas([0.5, 1.0])).rows(2), "alpha_bar above 0"),
        (lambda: PNDM().rows(3), "at least 4 steps; got steps=3"),
        (lambda: LCM().rows(51), "steps=51, original_inference_steps=50"),
        (
            lambda: LCM(
                schedule=dataclasses.replace(SD, rescale_betas_zero_snr=True),
                original_inference_steps=1000,
            ).rows(4),
            "alpha_bar is 0 at timestep 999",
        ),
    ],
)
def test_values_outside_the_rules_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@every_sampler
def test_an_eta_is_refused_where_there_is_none(sampler):
    with pytest.raises(ValueError, match=f"{type(sampler).__name__} has no eta; got eta=0.5"):
        sampler.rows(6, eta=0.5)
    assert sampler.table_key(6, eta=0.0).eta is None


def test_calls_of_pndm_are_more_than_its_steps():
    assert SAMPLERS["plms"].timesteps(5).tolist() == [800, 600, 600, 400, 200, 0]
    assert SAMPLERS["plms"].timesteps(1).tolist() == [0]
    first = [800, 700, 700, 600, 600, 500, 500, 400, 400, 300, 300, 200]
    assert SAMPLERS["pndm"].timesteps(5).tolist() == [*first, 200, 0]


def test_timesteps_are_float32_only_where_the_network_sees_fractions():
    assert SAMPLERS["euler"].rows(20)["t"].dtype == np.float32
    assert SAMPLERS["euler"].rows(4)["t"].tolist() == [999, 666, 333, 0]
    assert SAMPLERS["euler"].rows(4)["t"].dtype == np.int32
    for sampler in SAMPLERS.values():
        rows = dataclasses.replace(sampler, timestep_spacing="leading").rows(20)
        fractional = getattr(sampler, "use_karras_sigmas", False) and sampler.name == "euler"
        assert rows["t"].dtype == (np.float32 if fractional else np.int32)


def test_a_table_key_tells_solvers_apart():
    keys = {sampler.table_key(10).sampler for sampler in SAMPLERS.values()}
    assert keys == {
        *("pndm", "euler", "euler_ancestral", "lcm"),
        *("dpmsolver++_1m", "dpmsolver++_2m", "dpmsolver++_3m", "sde-dpmsolver++_2m"),
    }
    key = SAMPLERS["euler"].table_key(20, guidance_scale=5.0)
    assert key == TableKey(**json.loads(json.dumps(dataclasses.asdict(key))))
    assert key.timesteps == tuple(SAMPLERS["euler"].rows(20)["t"].tolist())


@settings(max_examples=60, deadline=None)
@given(
    sampler=st.sampled_from(list(SAMPLERS.values())),
    steps=st.integers(4, 50),
    timestep_spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    prediction_type=st.sampled_from(["epsilon", "v_prediction"]),
    schedule=st.sampled_from([SD, Schedule.linear(), Schedule.linear(600), Schedule.cosine(300)]),
    steps_offset=st.integers(0, 1),
)
def test_rows_are_finite_and_one_for_every_call(
    sampler, steps, timestep_spacing, prediction_type, schedule, steps_offset
):
    sampler = dataclasses.replace(
        sampler,
        timestep_spacing=timestep_spacing,
        prediction_type=prediction_type,
        schedule=schedule,
        steps_offset=steps_offset,
    )
    rows, t = sampler.rows(steps), sampler.timesteps(steps)
    np.testing.assert_array_equal(rows["t"], t)
    assert 0 <= t[-1] and t[0] < schedule.num_train_timesteps and np.all(np.diff(t) <= 0)
    for name, values in rows.items():
        assert values.shape == t.shape and np.all(np.isfinite(values)), name
        assert values.dtype == np.float32 or name == "t"
    # Standard normal noise to begin with, or nearly: what the network was trained on.
    assert abs(rows.get("init_scale", np.ones(1))[0] - 1) < 0.01


def pipeline(sampler):
    gain = {"gain": jnp.asarray(0.7)}

    def apply(variables, x_t, t, labels):
        shift = t.astype(jnp.float32)[:, None, None, None] / 700
        return variables["params"]["gain"] * jnp.tanh(x_t + shift)

    return Pipeline.from_apply(apply, gain, sampler, (4, 4, 2))


@pytest.mark.parametrize("name", ["plms", "euler", "dpm_2m_sde"])
def test_a_pipeline_runs_every_call_and_keeps_what_the_network_saw(name, key):
    sampler = SAMPLERS[name]
    pipe = pipeline(sampler)
    rows = sampler.rows(6)
    x_0, trajectory = pipe(num_images=2, steps=6, key=key, output="latent", return_trajectory=True)
    keys = image_keys(key, jnp.arange(2))
    x_t = draw_noise(keys, (4, 4, 2)) * rows.get("init_scale", np.ones(1, np.float32))[0]
    state = sampler.init(x_t)
    assert len(trajectory.x_t) == len(rows["t"]) == 6 + (name == "plms")
    for i in range(len(rows["t"])):
        np.testing.assert_allclose(trajectory.x_t[i], x_t, rtol=1e-5, atol=1e-5)
        prediction = pipe.predict(x_t, rows["t"][i])
        np.testing.assert_allclose(trajectory.prediction[i], prediction, rtol=1e-5, atol=1e-5)
        row = {name: value[i] for name, value in rows.items()}
        noise = draw_noise(keys, (4, 4, 2), draw=i + 1)
        x_t, state = sampler.step(row, state, x_t, prediction, noise)
    np.testing.assert_allclose(x_0, x_t, rtol=1e-5, atol=1e-5)


def test_given_latents_are_the_noise_that_diffusers_scales(key):
    # diffusers' prepare_latents multiplies given latents by init_noise_sigma as well.
    pipe = pipeline(SAMPLERS["euler"])
    latents = draw_noise(image_keys(key, jnp.arange(2)), (4, 4, 2))
    drawn = pipe(num_images=2, steps=6, key=key)
    np.testing.assert_array_equal(drawn, pipe(steps=6, latents=latents))


def test_a_step_table_has_a_row_for_every_call_of_pndm(key):
    pipe = pipeline(SAMPLERS["plms"])
    entry = {"scale": jnp.ones(7)}
    table = StepTable().with_entry("quant", entry, key=pipe.table_key(steps=6))
    fitted = pipe.replace(step_table=table)
    np.testing.assert_array_equal(
        fitted(num_images=1, steps=6, key=key), pipe(num_images=1, steps=6, key=key)
    )
    with pytest.raises(ValueError, match="the run has"):
        fitted(num_images=1, steps=7, key=key)
