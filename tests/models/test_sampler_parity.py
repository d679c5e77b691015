"""Claims that PNDM, Euler, DPM-Solver++ and LCM are diffusers' schedulers, step for step.

Whole trajectories on one fixed network, the tanh of a linear map, which both libraries compute
alike. The samples compared are what the network is given, and the last one. What diffusers
computes in float32 differs by rounding only; the schedules here are those where that is small,
the others are compared with `exact=True`: diffusers' scheduler on float64 values of alpha_bar.
"""

import dataclasses
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.models.dpm_solver import DPMSolver
from qjax.models.euler import Euler, EulerAncestral
from qjax.models.lcm import LCM
from qjax.models.pndm import PNDM
from qjax.models.samplers import sampler_from_diffusers
from qjax.models.schedules import Schedule

pytestmark = [
    pytest.mark.torch_oracle,
    # torch 2.13 tensors, of which diffusers makes numpy arrays.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SHAPE = (2, 4, 4, 3)
_random = np.random.default_rng(0)
MIXING = (0.7 * _random.normal(size=(3, 3))).astype(np.float32)
X_T = _random.normal(size=SHAPE).astype(np.float32)
NOISES = _random.normal(size=(60, *SHAPE)).astype(np.float32)

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPACINGS = ("leading", "trailing", "linspace")

# scheduler_config.json of the models named, as published.
COMMON = {**SD, "num_train_timesteps": 1000, "trained_betas": None, "steps_offset": 1}
OF_LATENTS = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
XL = {"interpolation_type": "linear", "sample_max_value": 1.0, "prediction_type": "epsilon"}
PUBLISHED = {
    "stable-diffusion-v1-4": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.4.0.dev0",
        **COMMON,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    },
    "stable-diffusion-2-1-base": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.10.0.dev0",
        **COMMON,
        **OF_LATENTS,
        "prediction_type": "epsilon",
    },
    "stable-diffusion-2-1": {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        **COMMON,
        **OF_LATENTS,
        "prediction_type": "v_prediction",
    },
    "stable-diffusion-xl-base-1.0": {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.19.0.dev0",
        **COMMON,
        **OF_LATENTS,
        **XL,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
    "sdxl-turbo": {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "_diffusers_version": "0.24.0.dev0",
        **COMMON,
        **OF_LATENTS,
        **XL,
        "timestep_spacing": "trailing",
    },
    "LCM_Dreamshaper_v7": {
        "_class_name": "LCMScheduler",
        "_diffusers_version": "0.22.0.dev0",
        **COMMON,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "original_inference_steps": 50,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "thresholding": False,
        "timestep_scaling": 10.0,
        "timestep_spacing": "leading",
    },
}


def network(x_t, t, tanh, mixing):
    """A prediction for arrays of either library."""
    return 0.8 * tanh(x_t @ mixing + t / 700) + 0.2 * x_t


def run(sampler, steps):
    """What the network is given in every call, and the last sample, `[s + 1, ...]`."""
    rows, mixing = sampler.rows(steps), jnp.asarray(MIXING)
    x_t = jnp.asarray(X_T)
    if "init_scale" in rows:
        x_t = x_t * rows["init_scale"][0]
    state, samples = sampler.init(x_t), [x_t]
    for i in range(len(rows["t"])):
        row = {name: value[i] for name, value in rows.items()}
        prediction = network(x_t, np.float32(row["t"]), jnp.tanh, mixing)
        x_t, state = sampler.step(row, state, x_t, prediction, jnp.asarray(NOISES[i]))
        samples.append(x_t)
    return np.stack(samples)


def run_diffusers(scheduler, steps, monkeypatch):
    """The same with a scheduler of diffusers and our noise."""
    torch = pytest.importorskip("torch")
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # it would look its first timestep up, and find a second one
    mixing = torch.tensor(MIXING)
    x_t, samples = torch.tensor(X_T) * scheduler.init_noise_sigma, []
    for t, noise in zip(scheduler.timesteps, NOISES, strict=False):
        drawn = lambda *args, noise=noise, **kwargs: torch.tensor(noise)
        module = sys.modules[type(scheduler).__module__]
        monkeypatch.setattr(module, "randn_tensor", drawn, raising=False)
        given = scheduler.scale_model_input(x_t, t)
        samples.append(given.numpy())
        prediction = network(given, float(t), torch.tanh, mixing)
        x_t = scheduler.step(prediction, t, x_t).prev_sample.float()
    return np.stack([*samples, x_t.numpy()])


def assert_equals_diffusers(sampler, steps, monkeypatch, *, config=None, exact=False, rtol=1e-5):
    """That timesteps and trajectory are those of the scheduler of the same config."""
    torch = pytest.importorskip("torch")
    import diffusers

    scheduler_class = getattr(diffusers, type(sampler).diffusers_class)
    scheduler = scheduler_class.from_config(config or sampler.to_diffusers())
    if exact:
        scheduler.alphas_cumprod = torch.tensor(sampler.schedule.alpha_bar)
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    theirs = run_diffusers(scheduler, steps, monkeypatch)
    ours = run(sampler, steps)
    # Where timesteps follow from noise levels, float32 levels move them by a few thousandths.
    visited = sampler.timesteps(steps)
    np.testing.assert_allclose(visited, scheduler.timesteps.numpy(), atol=1e-2)
    np.testing.assert_array_equal(sampler.rows(steps)["t"], visited)
    error = np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
    assert error <= rtol, error


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        (name, steps)
        for name, config in PUBLISHED.items()
        if config["_class_name"] != "DDIMScheduler"  # test_samplers.py
        # LCM is made for few steps; each divides by sqrt(alpha_bar), down to 0.07, and over 50
        # steps of an untrained network that takes float32 to 1e-5.
        for steps in ([4, 10, 20] if config["_class_name"] == "LCMScheduler" else [10, 20, 50])
    ],
)
def test_a_published_config_is_sampled_as_diffusers_samples_it(name, steps, monkeypatch):
    config = PUBLISHED[name]
    assert_equals_diffusers(sampler_from_diffusers(config), steps, monkeypatch, config=config)


@pytest.mark.parametrize("sampler_class", [PNDM, Euler, EulerAncestral, DPMSolver, LCM])
@pytest.mark.parametrize("name", ["stable-diffusion-2-1", "stable-diffusion-xl-base-1.0"])
def test_the_config_of_another_scheduler_is_read_as_diffusers_reads_it(
    sampler_class, name, monkeypatch
):
    config = PUBLISHED[name]
    sampler = sampler_class.from_diffusers(config)
    assert_equals_diffusers(sampler, 20, monkeypatch, config=config)


@pytest.mark.parametrize("sampler_class", [PNDM, Euler, EulerAncestral, DPMSolver, LCM])
def test_the_defaults_are_those_that_diffusers_writes(sampler_class):
    pytest.importorskip("torch")
    import diffusers

    scheduler = getattr(diffusers, sampler_class.diffusers_class)()
    config = json.loads(scheduler.to_json_string())
    assert sampler_from_diffusers(config) == sampler_class()
    again = scheduler.from_config(sampler_class().to_diffusers())
    settings = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    assert {name: again.config[name] for name in settings} == settings


@pytest.mark.parametrize("steps", [4, 20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
@pytest.mark.parametrize("skip_prk_steps", [True, False])
def test_pndm_equals_diffusers(
    skip_prk_steps, timestep_spacing, prediction_type, steps, monkeypatch
):
    sampler = PNDM(
        schedule=Schedule.scaled_linear(),
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
        skip_prk_steps=skip_prk_steps,
        set_alpha_to_one=steps == 20,
    )
    assert_equals_diffusers(sampler, steps, monkeypatch)


EULER = {
    "plain": {},
    "offset": {"steps_offset": 1},
    "karras": {"use_karras_sigmas": True},
    "karras_range": {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0},
    "sigma_min": {"final_sigmas_type": "sigma_min"},
    "log_linear": {"interpolation_type": "log_linear"},
    "log_linear_karras": {"interpolation_type": "log_linear", "use_karras_sigmas": True},
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
@pytest.mark.parametrize("setting", EULER.values(), ids=EULER.keys())
def test_euler_equals_diffusers(setting, timestep_spacing, prediction_type, monkeypatch):
    sampler = Euler(
        schedule=Schedule.scaled_linear(),
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
        **setting,
    )
    assert_equals_diffusers(sampler, 20, monkeypatch)


@pytest.mark.parametrize("steps", [3, 10, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
def test_ancestral_euler_equals_diffusers(timestep_spacing, prediction_type, steps, monkeypatch):
    sampler = EulerAncestral(
        schedule=Schedule.scaled_linear(),
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
    )
    assert_equals_diffusers(sampler, steps, monkeypatch)


DPM = {
    "1": {"solver_order": 1},
    "2m": {},
    "3m": {"solver_order": 3},
    "2m_heun": {"solver_type": "heun", "steps_offset": 1},
    "2m_karras": {"use_karras_sigmas": True},
    "3m_karras_no_lower": {
        "solver_order": 3,
        "use_karras_sigmas": True,
        "lower_order_final": False,
        "euler_at_final": True,
    },
    "2m_sigma_min": {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    "2m_clipped": {"lambda_min_clipped": -2.0},
    "3m_thresholding": {
        "solver_order": 3,
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 1.7,
    },
    "sde_1": {"algorithm_type": "sde-dpmsolver++", "solver_order": 1},
    "sde_2m": {"algorithm_type": "sde-dpmsolver++"},
    "sde_2m_heun_karras": {
        "algorithm_type": "sde-dpmsolver++",
        "solver_type": "heun",
        "use_karras_sigmas": True,
        "final_sigmas_type": "sigma_min",
        "euler_at_final": True,
    },
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
@pytest.mark.parametrize("setting", DPM.values(), ids=DPM.keys())
def test_dpm_solver_equals_diffusers(setting, timestep_spacing, prediction_type, monkeypatch):
    sampler = DPMSolver(
        schedule=Schedule.scaled_linear(),
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
        **setting,
    )
    steps = {"leading": 10, "trailing": 20, "linspace": 14}[timestep_spacing]
    assert_equals_diffusers(sampler, steps, monkeypatch)


@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 50])
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
def test_dpm_solver_changes_its_order_where_diffusers_does(
    final_sigmas_type, lower_order_final, steps, monkeypatch
):
    sampler = DPMSolver(
        schedule=Schedule.scaled_linear(),
        solver_order=3,
        lower_order_final=lower_order_final,
        final_sigmas_type=final_sigmas_type,
    )
    assert_equals_diffusers(sampler, steps, monkeypatch)


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "setting",
    [
        {"original_inference_steps": 37, "timestep_scaling": 3.0},
        {"clip_sample": True, "clip_sample_range": 1.5},
        {"thresholding": True, "sample_max_value": 1.7, "dynamic_thresholding_ratio": 0.9},
    ],
    ids=["scaling", "clip", "thresholding"],
)
def test_lcm_equals_diffusers(setting, prediction_type, steps, monkeypatch):
    assert_equals_diffusers(LCM(prediction_type=prediction_type, **setting), steps, monkeypatch)


@pytest.mark.parametrize("timestep_spacing", ["trailing", "linspace"])
@pytest.mark.parametrize(
    "sampler",
    [
        Euler(prediction_type="v_prediction"),
        EulerAncestral(prediction_type="v_prediction"),
        DPMSolver(prediction_type="v_prediction"),
        DPMSolver(prediction_type="sample", algorithm_type="sde-dpmsolver++"),
        LCM(prediction_type="v_prediction"),
    ],
    ids=lambda sampler: sampler.name,
)
def test_zero_terminal_snr_equals_diffusers(sampler, timestep_spacing, monkeypatch):
    # 50 steps: the first sample is 4096 times noise in diffusers' Euler, and what its float32
    # loses there (2.5e-4) has to shrink with the noise level before it is compared.
    schedule = Schedule(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    sampler = dataclasses.replace(sampler, schedule=schedule, timestep_spacing=timestep_spacing)
    assert_equals_diffusers(sampler, 50, monkeypatch)


@pytest.mark.parametrize(
    "sampler",
    [
        PNDM(),
        Euler(use_karras_sigmas=True),
        EulerAncestral(timestep_spacing="leading"),
        DPMSolver(use_karras_sigmas=True),
        DPMSolver(solver_order=3, final_sigmas_type="sigma_min"),
    ],
    ids=["pndm", "euler", "euler_ancestral", "dpm_solver", "dpm_solver_3"],
)
@pytest.mark.parametrize(
    "schedule",
    [Schedule.linear(), Schedule.cosine(), Schedule.from_betas(np.linspace(1e-4, 0.02, 600))],
    ids=["linear", "cosine", "trained_betas"],
)
def test_other_schedules_equal_diffusers_up_to_its_float32(schedule, sampler, monkeypatch):
    sampler = dataclasses.replace(sampler, schedule=schedule)
    assert_equals_diffusers(sampler, 20, monkeypatch, exact=True)
