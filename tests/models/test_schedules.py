import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.models.schedules import PREDICTION_TYPES, SPACINGS, Schedule, spaced_timesteps

SCHEDULES = {
    "ddpm": Schedule.linear(),
    "sd": Schedule.scaled_linear(),
    "ldm": Schedule.scaled_linear(1000, 0.0015, 0.0195),
    "cosine": Schedule.cosine(),
    "cosine_short": Schedule.cosine(50),
    "sigmoid": Schedule.sigmoid(),
    "trained": Schedule.from_betas(np.linspace(0.001, 0.3, 40)),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


@every_schedule
def test_alpha_bar_falls_between_one_and_zero(schedule):
    alpha_bar = schedule.alpha_bar
    assert alpha_bar.shape == (schedule.num_train_timesteps,)
    assert alpha_bar.dtype == np.float64 and not alpha_bar.flags.writeable
    assert np.all(np.diff(alpha_bar) < 0) and 0 < alpha_bar[-1] < alpha_bar[0] < 1


@every_schedule
def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_start(schedule):
    rescaled = dataclasses.replace(schedule, rescale_betas_zero_snr=True)
    assert rescaled.alpha_bar[-1] == 0
    np.testing.assert_allclose(rescaled.alpha_bar[0], schedule.alpha_bar[0], rtol=1e-12)
    assert rescaled.log_snr[-1] == -np.inf and np.all(np.diff(rescaled.log_snr) < 0)


@every_schedule
def test_diffusers_config_round_trip(schedule):
    assert Schedule.from_diffusers(schedule.to_diffusers()) == schedule
    assert hash(Schedule.from_diffusers(schedule.to_diffusers())) == hash(schedule)


@pytest.mark.torch_oracle
@pytest.mark.parametrize("rescale_betas_zero_snr", [False, True])
@every_schedule
def test_alpha_bar_equals_diffusers_to_float32(schedule, rescale_betas_zero_snr):
    pytest.importorskip("torch")
    from diffusers import DDPMScheduler

    config = {**schedule.to_diffusers(), "rescale_betas_zero_snr": rescale_betas_zero_snr}
    oracle = DDPMScheduler(**config).alphas_cumprod.numpy().astype(np.float64)
    alpha_bar = Schedule.from_diffusers(config).alpha_bar
    np.testing.assert_allclose(oracle, alpha_bar, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.sqrt(oracle), np.sqrt(alpha_bar), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_noisy_sample_and_target_give_back_the_clean_sample(prediction_type, key):
    schedule = SCHEDULES["sd"]
    x_0, noise = jax.random.normal(key, (2, 3, 2, 2, 1))
    t = jnp.array([0, 400, 999])
    x_t = schedule.add_noise(x_0, noise, t)
    target = schedule.target(x_0, noise, t, prediction_type=prediction_type)
    signal = np.sqrt(schedule.alpha_bar[t]).reshape(3, 1, 1, 1)
    sigma = np.sqrt(1 - schedule.alpha_bar[t]).reshape(3, 1, 1, 1)
    found = {
        "epsilon": (x_t - sigma * np.asarray(target)) / signal,
        "sample": target,
        "v_prediction": signal * np.asarray(x_t) - sigma * np.asarray(target),
    }[prediction_type]
    np.testing.assert_allclose(found, x_0, atol=2e-5)  # 1 / sqrt(alpha_bar[999]) = 15 roundings


def test_add_noise_is_the_same_under_jit(key):
    x_0, noise = jax.random.normal(key, (2, 3, 2, 2, 1))
    t = jnp.array([0, 400, 999])
    add_noise = SCHEDULES["cosine"].add_noise
    np.testing.assert_allclose(jax.jit(add_noise)(x_0, noise, t), add_noise(x_0, noise, t), 1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(beta_schedule="laplace"), "linear.*got 'laplace'"),
        (lambda: Schedule.linear(10, 0.5, 1.5), r"in \[0, 1\]"),
        (lambda: Schedule.linear(0), "got 0 betas"),
        (lambda: Schedule(trained_betas=(0.1, 0.2)), "2 for num_train_timesteps=1000"),
        (lambda: SCHEDULES["sd"].target(0, 0, 0, prediction_type="noise"), "'noise'"),
    ],
)
def test_values_outside_the_rules_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(T=st.integers(1, 300), data=st.data(), spacing=st.sampled_from(SPACINGS))
def test_timesteps_fall_strictly_within_the_schedule(T, data, spacing):
    steps = data.draw(st.integers(1, T))
    timesteps = spaced_timesteps(steps, num_train_timesteps=T, spacing=spacing)
    assert timesteps.shape == (steps,)
    assert np.all(np.diff(timesteps) < 0)
    assert timesteps[0] < T and timesteps[-1] >= 0


@pytest.mark.parametrize("spacing", SPACINGS)
def test_as_many_steps_as_in_training_visit_every_timestep(spacing):
    timesteps = spaced_timesteps(37, num_train_timesteps=37, spacing=spacing)
    np.testing.assert_array_equal(timesteps, np.arange(37)[::-1])


def test_respaced_is_the_grid_of_dit():
    # Peebles and Xie's sampler at "50": stride 999/49, both ends included.
    timesteps = spaced_timesteps(50, num_train_timesteps=1000, spacing="respaced")
    assert timesteps[::-1][:4].tolist() == [0, 20, 41, 61]
    assert timesteps[:2].tolist() == [999, 979]


def test_respaced_rounds_a_running_sum():
    # guided-diffusion adds up strides, and the sum may fall on the other side of a half: with
    # 21 steps the middle one, at 499.5, is timestep 499 there and 500 in linspace.
    for steps in range(2, 1001):
        position, expected = 0.0, []
        for _ in range(steps):
            expected.append(round(position))
            position += 999 / (steps - 1)
        timesteps = spaced_timesteps(steps, num_train_timesteps=1000, spacing="respaced")
        assert timesteps[::-1].tolist() == expected
    linspace = spaced_timesteps(21, num_train_timesteps=1000, spacing="linspace")
    respaced = spaced_timesteps(21, num_train_timesteps=1000, spacing="respaced")
    assert np.flatnonzero(linspace != respaced).tolist() == [10]
    assert (linspace[10], respaced[10]) == (500, 499)


def test_leading_with_offset_is_the_grid_of_latent_diffusion():
    timesteps = spaced_timesteps(20, num_train_timesteps=1000, spacing="leading", steps_offset=1)
    assert timesteps.tolist() == list(range(951, 0, -50))


@pytest.mark.torch_oracle
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_equal_diffusers_for_every_number_of_steps(spacing):
    pytest.importorskip("torch")
    from diffusers import DDIMScheduler

    oracle = DDIMScheduler(timestep_spacing=spacing)
    for steps in range(1, 1001):
        oracle.set_timesteps(steps)
        timesteps = spaced_timesteps(steps, num_train_timesteps=1000, spacing=spacing)
        # For 62 of the numbers "trailing" there has one timestep more, -1.
        np.testing.assert_array_equal(timesteps, oracle.timesteps.numpy()[:steps])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0, "spacing": "leading"}, "steps=0"),
        ({"steps": 11, "spacing": "linspace"}, "steps=11"),
        ({"steps": 10, "spacing": "leading", "steps_offset": 1}, "1 to 10.*steps_offset=1"),
        ({"steps": 5, "spacing": "even"}, "'leading'.*got 'even'"),
    ],
)
def test_timesteps_that_do_not_exist_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        spaced_timesteps(num_train_timesteps=10, **settings)
