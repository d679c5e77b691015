"""Claims about DDIM and DDPM, most of them against diffusers' schedulers.

The trajectories run on one fixed network, a smooth function of the noisy sample and the
timestep that both numpy-like libraries compute alike, so that what differs is the sampler.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.steps import TableKey
from qjax.models.linear_sampler import VARIANCES
from qjax.models.pndm import PNDM
from qjax.models.samplers import DDIM, DDPM, Sampler, correct_prediction, sampler_from_diffusers
from qjax.models.schedules import PREDICTION_TYPES, Schedule

SHAPE = (2, 4, 4, 3)
LDM = Schedule.scaled_linear(1000, 0.0015, 0.0195)

SETTINGS = {
    "defaults": {},
    "wide_clip": {"clip_sample_range": 2.5},
    "sd": {
        "schedule": Schedule.scaled_linear(),
        "clip_sample": False,
        "steps_offset": 1,
    },
    "ldm": {"schedule": LDM, "clip_sample": False},
    "cosine": {"schedule": Schedule.cosine()},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace", "clip_sample": False},
    "thresholding": {
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 1.7,
    },
    "trained_betas": {"schedule": Schedule.from_betas(np.linspace(1e-4, 0.02, 600))},
}
settings = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
every_prediction_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


def network(x_t, t, tanh):
    """A prediction for arrays of either library."""
    return 0.8 * tanh(1.3 * x_t + t / 700) + 0.2 * x_t


def log_share(x_t, tanh):
    """What a network of variance_type="learned_range" says: between -1 and 1."""
    return 0.9 * tanh(x_t - 0.3)


def positive(x_t, tanh):
    """What a network of variance_type="learned" says; diffusers takes the root as it is."""
    return 0.1 * tanh(x_t - 0.3) ** 2


def run(sampler, steps, x_T, noises, *, eta=0.0, variance=None, predict=None, corrections=None):
    """Every sample of a trajectory `[s, ...]`, step after step, with nothing compiled anew.

    That a scan over the same rows is this loop, test_pipeline.py shows.
    """

    def predict_fake(x_t, t):
        prediction = network(x_t, np.float32(t), jnp.tanh)
        if variance is None:
            return prediction
        return jnp.concatenate([prediction, variance(x_t, jnp.tanh)], axis=-1)

    rows = sampler.rows(steps, eta=eta)
    x_t, state, samples = x_T, sampler.init(x_T), []
    for i in range(steps):
        row = {name: value[i] for name, value in rows.items()}
        prediction = (predict or predict_fake)(x_t, row["t"])
        if corrections:
            correction = {name: value[i] for name, value in corrections.items()}
            row, prediction = correct_prediction(correction, row, prediction)
        x_t, state = sampler.step(row, state, x_t, prediction, noises[i])
        samples.append(x_t)
    return jnp.stack(samples)


def run_diffusers(scheduler, steps, x_T, noises, monkeypatch, *, eta=None, variance=None):
    """The same with a scheduler of diffusers: NHWC outside, NCHW inside, our noise."""
    torch = pytest.importorskip("torch")

    def nchw(x):
        return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())

    scheduler.set_timesteps(steps)
    x_t, samples = nchw(x_T), []
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        prediction = network(x_t, float(t), torch.tanh)
        if variance is not None:
            prediction = torch.cat([prediction, variance(x_t, torch.tanh)], dim=1)
        if eta is None:
            drawn = lambda *args, noise=noise, **kwargs: nchw(noise)
            monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", drawn)
            x_t = scheduler.step(prediction, t, x_t).prev_sample
        else:
            own = {"eta": eta, "variance_noise": nchw(noise) if eta else None}
            x_t = scheduler.step(prediction, t, x_t, **own).prev_sample
        samples.append(np.moveaxis(x_t.numpy(), 1, -1))
    return np.stack(samples)


def draw(steps, key, shape=SHAPE):
    x_T, noises = jax.random.split(key)
    return jax.random.normal(x_T, shape), jax.random.normal(noises, (steps, *shape))


def assert_same_trajectory(ours, theirs):
    error = np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
    assert error <= 1e-5, error


@pytest.mark.quick_cases("*-20-*")
@pytest.mark.torch_oracle
@pytest.mark.parametrize(("steps", "eta"), [(20, 0.0), (20, 1.0), (50, 0.0), (50, 0.4)])
@every_prediction_type
@settings
def test_ddim_trajectory_equals_diffusers(setting, prediction_type, steps, eta, key, monkeypatch):
    pytest.importorskip("torch")
    from diffusers import DDIMScheduler

    sampler = DDIM(**setting, prediction_type=prediction_type)
    oracle = DDIMScheduler.from_config(sampler.to_diffusers())
    x_T, noises = draw(steps, key)
    np.testing.assert_array_equal(sampler.rows(steps)["t"], sampler.timesteps(steps))
    theirs = run_diffusers(oracle, steps, x_T, noises, monkeypatch, eta=eta)
    np.testing.assert_array_equal(sampler.timesteps(steps), oracle.timesteps.numpy())
    assert_same_trajectory(run(sampler, steps, x_T, noises, eta=eta), theirs)


@pytest.mark.quick_cases("*-20*")
@pytest.mark.torch_oracle
@pytest.mark.parametrize("steps", [20, 50])
@every_prediction_type
@settings
def test_ddpm_trajectory_equals_diffusers(setting, prediction_type, steps, key, monkeypatch):
    pytest.importorskip("torch")
    from diffusers import DDPMScheduler

    sampler = DDPM(**setting, prediction_type=prediction_type)
    oracle = DDPMScheduler.from_config(sampler.to_diffusers())
    x_T, noises = draw(steps, key)
    theirs = run_diffusers(oracle, steps, x_T, noises, monkeypatch)
    assert_same_trajectory(run(sampler, steps, x_T, noises), theirs)


@pytest.mark.torch_oracle
@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    "variance_type", [variance for variance in VARIANCES if variance != "fixed_large_log"]
)
def test_ddpm_variance_equals_diffusers(variance_type, timestep_spacing, key, monkeypatch):
    pytest.importorskip("torch")
    from diffusers import DDPMScheduler

    sampler = DDPM(variance_type=variance_type, timestep_spacing=timestep_spacing)
    oracle = DDPMScheduler.from_config(sampler.to_diffusers())
    x_T, noises = draw(20, key)
    variance = {"learned": positive, "learned_range": log_share}.get(variance_type)
    theirs = run_diffusers(oracle, 20, x_T, noises, monkeypatch, variance=variance)
    assert_same_trajectory(run(sampler, 20, x_T, noises, variance=variance), theirs)


@pytest.mark.torch_oracle
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("timestep_spacing", ["trailing", "linspace", "leading"])
def test_zero_terminal_snr_equals_diffusers(prediction_type, timestep_spacing, key, monkeypatch):
    pytest.importorskip("torch")
    from diffusers import DDIMScheduler

    sampler = DDIM(
        schedule=Schedule(beta_schedule="scaled_linear", rescale_betas_zero_snr=True),
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
    )
    oracle = DDIMScheduler.from_config(sampler.to_diffusers())
    x_T, noises = draw(20, key)
    theirs = run_diffusers(oracle, 20, x_T, noises, monkeypatch, eta=0.7)
    assert_same_trajectory(run(sampler, 20, x_T, noises, eta=0.7), theirs)


@pytest.mark.torch_oracle
def test_latent_diffusion_ends_at_its_first_alpha_bar(key, monkeypatch):
    pytest.importorskip("torch")
    from diffusers import DDIMScheduler

    sampler = DDIM(schedule=LDM, clip_sample=False, steps_offset=1, set_alpha_to_one=False)
    oracle = DDIMScheduler.from_config(sampler.to_diffusers())
    x_T, noises = draw(20, key)
    theirs = run_diffusers(oracle, 20, x_T, noises, monkeypatch, eta=1.0)
    assert_same_trajectory(run(sampler, 20, x_T, noises, eta=1.0), theirs)
    last = sampler.rows(20)["mean_from_x0"][-1]
    np.testing.assert_allclose(last, np.sqrt(LDM.alpha_bar[0]), rtol=1e-6)


def test_fixed_large_log_is_fixed_large():
    large = DDPM(variance_type="fixed_large").rows(20)
    log = DDPM(variance_type="fixed_large_log").rows(20)
    np.testing.assert_array_equal(large["noise_std"], log["noise_std"])


def test_ddim_without_eta_is_independent_of_noise(key):
    x_T, noises = draw(20, key)
    one = run(DDIM(), 20, x_T, noises)
    np.testing.assert_array_equal(one, run(DDIM(), 20, x_T, 7 * noises))


@every_prediction_type
def test_ddim_with_eta_one_at_every_timestep_is_ddpm(prediction_type, key):
    # Song et al. section 4.1. Both in float32 over 60 steps: 1e-5 of the largest value.
    common = {"schedule": Schedule.linear(60, 1e-3, 0.2), "prediction_type": prediction_type}
    x_T, noises = draw(60, key)
    ddim = run(DDIM(**common, clip_sample=False), 60, x_T, noises, eta=1.0)
    ddpm = run(DDPM(**common, clip_sample=False), 60, x_T, noises)
    assert_same_trajectory(ddim, ddpm)


@pytest.mark.parametrize("sampler_class", [DDIM, DDPM])
@every_prediction_type
def test_perfect_prediction_returns_the_clean_sample(sampler_class, prediction_type, key):
    schedule = Schedule.linear()
    x_T, noises = draw(10, key)
    x_0 = jnp.clip(x_T[::-1], -1, 1)
    sampler = sampler_class(schedule=schedule, prediction_type=prediction_type, clip_sample=False)

    def predict(x_t, t):
        alpha_bar = jnp.asarray(schedule.alpha_bar, jnp.float32)[t]
        noise = (x_t - jnp.sqrt(alpha_bar) * x_0) / jnp.sqrt(1 - alpha_bar)
        return schedule.target(x_0, noise, jnp.full(SHAPE[0], t), prediction_type=prediction_type)

    samples = run(sampler, 10, x_T, noises, predict=predict)
    np.testing.assert_allclose(samples[-1], x_0, atol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "respaced"])
def test_noise_keeps_the_variance_of_the_forward_process(spacing):
    # For any eta: what is not x_0 has variance 1 - alpha_bar at the next timestep.
    for eta in (0.0, 0.5, 1.0):
        rows = DDIM(timestep_spacing=spacing).rows(50, eta=eta)
        total = rows["mean_from_x0"] ** 2 + rows["mean_from_noise"] ** 2 + rows["noise_std"] ** 2
        np.testing.assert_allclose(total, 1, atol=1e-6)


def test_respaced_goes_to_the_next_timestep_visited():
    # guided-diffusion builds a schedule of the visited timesteps; diffusers' linspace does not.
    schedule = Schedule.linear()
    respaced = DDIM(timestep_spacing="respaced").rows(50)
    linspace = DDIM(timestep_spacing="linspace").rows(50)
    np.testing.assert_array_equal(respaced["t"], linspace["t"])
    goal = np.sqrt(np.append(schedule.alpha_bar[respaced["t"][1:]], 1.0))
    np.testing.assert_allclose(respaced["mean_from_x0"], goal, rtol=1e-6)
    assert np.max(np.abs(linspace["mean_from_x0"] / goal - 1)) > 1e-3


@pytest.mark.parametrize("sampler", [DDIM(clip_sample=False), DDPM(clip_sample=False)])
@every_prediction_type
def test_prediction_gain_is_the_derivative(sampler, prediction_type):
    sampler = dataclasses.replace(sampler, prediction_type=prediction_type)
    rows = sampler.rows(5, eta=1.0)
    one = jnp.ones((1, 1, 1, 1))
    for i in range(5):
        row = {name: jnp.asarray(value[i]) for name, value in rows.items()}
        update = lambda p, row=row: sampler.step(row, (), one, p * one, one)[0].sum()
        slope = jax.grad(update)(0.3)
        # The gain is a small difference of two coefficients, here taken in float32.
        np.testing.assert_allclose(slope, row["prediction_gain"], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("t", "uncorrected", "corrected"),
    [(951, 1.04077, 0.99914), (501, 0.84169, 0.83349), (251, 0.39123, 0.38756)],
)
def test_absorbed_variance_keeps_the_total_of_the_float_sampler(t, uncorrected, corrected):
    # LDM at 20 steps and eta 1, residual variance 0.05: totals worked out by hand from the
    # formulas of PTQD's appendix, 1 - alpha_bar at the next timestep where nothing is lost.
    sampler = DDIM(schedule=LDM, clip_sample=False, steps_offset=1, set_alpha_to_one=False)
    rows = sampler.rows(20, eta=1.0)
    i = int(np.flatnonzero(rows["t"] == t)[0])
    row = {name: value[i] for name, value in rows.items()}
    error = row["prediction_gain"] ** 2 * 0.05
    total = row["mean_from_noise"] ** 2 + row["noise_std"] ** 2 + error
    np.testing.assert_allclose(total, uncorrected, atol=6e-6)
    np.testing.assert_allclose(1 - row["mean_from_x0"] ** 2, corrected, atol=6e-6)
    correction = {"k": jnp.zeros(()), "mu": jnp.zeros(1), "variance": jnp.asarray(0.05)}
    prediction = jnp.zeros((1, 1, 1, 1))
    row, prediction = correct_prediction(correction, row, prediction)
    np.testing.assert_allclose(row["absorbed_variance"], error, rtol=1e-6)
    sample, _ = sampler.step(row, (), prediction, prediction, prediction + 1)
    np.testing.assert_allclose(
        sample.item() ** 2 + row["mean_from_noise"] ** 2 + error, corrected, atol=6e-6
    )


def test_correction_recovers_the_float_prediction(key):
    # D = k eps + mu: what PTQD models, without a residual.
    noise = jax.random.normal(key, SHAPE)
    mu = jnp.array([0.3, -0.1, 0.0])
    quantized = noise + 0.1 * noise + mu
    correction = {"k": jnp.asarray(0.1), "mu": mu, "variance": jnp.zeros(())}
    row, corrected = correct_prediction(correction, {"prediction_gain": 2.0}, quantized)
    np.testing.assert_allclose(corrected, noise, atol=1e-6)
    assert row["absorbed_variance"] == 0


def test_correction_leaves_learned_variance_channels_alone(key):
    prediction = jax.random.normal(key, (1, 2, 2, 6))
    correction = {"k": jnp.asarray(0.5), "mu": jnp.ones(3), "variance": jnp.ones(())}
    _, corrected = correct_prediction(correction, {"prediction_gain": 1.0}, prediction)
    np.testing.assert_array_equal(corrected[..., 3:], prediction[..., 3:])


def test_incomplete_correction_raises():
    with pytest.raises(ValueError, match=r"k, mu and variance; got \['k'\]"):
        correct_prediction({"k": jnp.zeros(())}, {}, jnp.zeros((1, 1, 1, 1)))


def test_without_noise_of_its_own_the_sampler_absorbs_nothing(key):
    x_T, noises = draw(10, key)
    zeros = {"k": jnp.zeros(10), "mu": jnp.zeros((10, 3))}
    with_variance = {**zeros, "variance": jnp.full(10, 0.3)}
    one = run(DDIM(), 10, x_T, noises, corrections=with_variance)
    np.testing.assert_array_equal(one, run(DDIM(), 10, x_T, noises))
    gradient = jax.grad(lambda x: run(DDIM(), 10, x, noises, corrections=with_variance).sum())(x_T)
    assert np.all(np.isfinite(gradient))


def test_learned_variance_without_its_channels_raises(key):
    x_t = jnp.zeros(SHAPE)
    sampler = DDPM(variance_type="learned_range")
    row = {name: value[0] for name, value in sampler.rows(4).items()}
    with pytest.raises(ValueError, match="twice the"):
        sampler.step(row, (), x_t, x_t, x_t)


def test_ddim_takes_the_first_channels_of_a_learned_variance_network(key):
    x_T, noises = draw(4, key)
    both = lambda x, t: jnp.concatenate([jnp.tanh(x), x + 9], axis=-1)
    one = run(DDIM(), 4, x_T, noises, predict=both)
    np.testing.assert_array_equal(
        one, run(DDIM(), 4, x_T, noises, predict=lambda x, t: jnp.tanh(x))
    )


@pytest.mark.parametrize(
    "sampler",
    [DDIM(), DDIM(timestep_spacing="respaced", schedule=LDM), DDPM(variance_type="learned_range")],
)
def test_scheduler_config_round_trip_through_json(sampler):
    assert isinstance(sampler, Sampler)
    config = json.loads(json.dumps(sampler.to_diffusers()))
    assert sampler_from_diffusers(config) == sampler
    assert hash(sampler_from_diffusers(config)) == hash(sampler)


def test_ddim_reads_the_config_of_a_pndm_scheduler():
    # Stable Diffusion v1-4's scheduler_config.json.
    config = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.7.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
    sampler = DDIM.from_diffusers(config)
    assert sampler.schedule == Schedule.scaled_linear()
    assert sampler.timesteps(20)[0] == 951 and not sampler.set_alpha_to_one
    assert isinstance(sampler_from_diffusers(config), PNDM)
    with pytest.raises(ValueError, match="DDIMScheduler, DDPMScheduler, .*; got 'UniPC"):
        sampler_from_diffusers({**config, "_class_name": "UniPCMultistepScheduler"})


def test_unknown_settings_are_named_all_at_once():
    config = {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "laplace",
        "prediction_type": "flow",
        "variance_type": "huge",
        "timestep_spacing": "even",
        "use_karras_sigmas": True,
        "use_exponential_sigmas": False,
    }
    with pytest.raises(ValueError) as error:
        sampler_from_diffusers(config)
    for part in ("'laplace' (one of linear", "'flow'", "'huge'", "'even'", "use_karras_sigmas"):
        assert part in str(error.value)
    assert "exponential" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DDIM(prediction_type="noise"), "prediction_type='noise' .one of epsilon"),
        (lambda: DDIM().rows(20, eta=1.5), "eta=1.5"),
        (lambda: DDPM().rows(20, eta=0.5), "eta=0.5"),
        (lambda: DDIM().rows(1001), "steps=1001"),
        (
            lambda: DDIM(
                schedule=Schedule(rescale_betas_zero_snr=True), timestep_spacing="trailing"
            ).rows(20),
            "alpha_bar is 0 at timestep 999",
        ),
    ],
)
def test_values_outside_the_rules_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_table_key_says_what_a_run_depends_on():
    key = DDIM().table_key(4, eta=1, guidance_scale=None)
    assert key == TableKey(
        timesteps=(750, 500, 250, 0),
        sampler="ddim",
        eta=1.0,
        guidance_scale=1.0,
        prediction_type="epsilon",
        sampler_config=DDIM().digest(),
    )
    other = DDIM(clip_sample=False).table_key(4, eta=1)
    assert [problem.split()[0] for problem in key.mismatch(other)] == ["sampler_config"]
    assert DDPM().table_key(4, eta=0.0) == DDPM().table_key(4, eta=1.0)
    assert key.mismatch(DDPM().table_key(4)) == ["sampler was 'ddim', the run has 'ddpm'"]
