"""Claims about reading and writing the configs of diffusers' schedulers."""

import json
import math

import pytest

from qjax.models.dpm_solver import DPMSolver
from qjax.models.euler import Euler, EulerAncestral
from qjax.models.lcm import LCM
from qjax.models.pndm import PNDM
from qjax.models.samplers import DDIM, Sampler, sampler_from_diffusers
from qjax.models.schedules import Schedule

SD = Schedule.scaled_linear()


@pytest.mark.parametrize(
    "sampler",
    [
        PNDM(schedule=SD, skip_prk_steps=True, set_alpha_to_one=True),
        EulerAncestral(prediction_type="v_prediction", steps_offset=1),
        Euler(use_karras_sigmas=True, timestep_spacing="trailing"),
        Euler(sigma_min=0.1, sigma_max=9.0, final_sigmas_type="sigma_min"),
        DPMSolver(lambda_min_clipped=-5.1, thresholding=True, schedule=Schedule.cosine()),
        DPMSolver(algorithm_type="sde-dpmsolver++", solver_type="heun", euler_at_final=True),
        LCM(original_inference_steps=30, clip_sample=True),
    ],
    ids=lambda sampler: sampler.name,
)
def test_scheduler_config_round_trip_through_json(sampler):
    assert isinstance(sampler, Sampler)
    config = json.loads(json.dumps(sampler.to_diffusers(), allow_nan=False))
    assert sampler_from_diffusers(config) == sampler
    assert hash(sampler_from_diffusers(config)) == hash(sampler)


def test_settings_that_a_config_leaves_out_are_those_of_diffusers():
    from_name = lambda name: sampler_from_diffusers({"_class_name": f"{name}Scheduler"})
    assert from_name("PNDM") == PNDM(timestep_spacing="leading", skip_prk_steps=False)
    assert from_name("EulerDiscrete").timestep_spacing == "linspace"
    assert from_name("DPMSolverMultistep").solver_order == 2
    assert from_name("LCM").schedule == SD
    written = {"_class_name": "LCMScheduler", "clip_sample": True, "steps_offset": 1}
    written["_use_default_values"] = ["clip_sample"]
    assert LCM.from_diffusers(written) == LCM(steps_offset=1)


@pytest.mark.parametrize(
    ("name", "config", "messages"),
    [
        (
            "EulerDiscrete",
            {
                "use_exponential_sigmas": True,
                "use_beta_sigmas": True,
                "timestep_type": "continuous",
                "interpolation_type": "cubic",
                "clip_sample": True,
                "timestep_spacing": "respaced",
            },
            ["exponential", "beta_sigmas", "'continuous'", "'cubic'", "clip_sample", "'respaced'"],
        ),
        (
            "DPMSolverMultistep",
            {
                "algorithm_type": "dpmsolver",
                "solver_order": 4,
                "use_lu_lambdas": True,
                "use_flow_sigmas": True,
                "prediction_type": "flow_prediction",
            },
            ["'dpmsolver'", "solver_order=4", "use_lu_lambdas", "use_flow_sigmas", "flow_pred"],
        ),
        (
            "PNDM",
            {"prediction_type": "sample", "rescale_betas_zero_snr": True, "thresholding": True},
            ["'sample'", "rescale_betas_zero_snr=True .one of False", "thresholding=True"],
        ),
        (
            "EulerAncestralDiscrete",
            {"prediction_type": "sample", "use_karras_sigmas": True},
            ["'sample'", "use_karras_sigmas=True .unknown"],
        ),
    ],
)
def test_what_a_sampler_cannot_do_is_refused_all_at_once(name, config, messages):
    with pytest.raises(ValueError, match="(?s)" + "".join(f"(?=.*{m})" for m in messages)):
        sampler_from_diffusers({"_class_name": f"{name}Scheduler", **config})


def test_published_configs_are_accepted_verbatim():
    # Stable Diffusion 2.1, Stable Diffusion XL and PixArt-alpha: scheduler_config.json.
    latent = {
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
    sd = {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        **latent,
        "prediction_type": "v_prediction",
    }
    assert sampler_from_diffusers(sd) == DDIM(
        schedule=SD,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    xl = {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.19.0.dev0",
        **latent,
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    }
    assert sampler_from_diffusers(xl) == Euler(
        schedule=SD, timestep_spacing="leading", steps_offset=1
    )
    pixart = {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": "0.22.0.dev0",
        "algorithm_type": "dpmsolver++",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "dynamic_thresholding_ratio": 0.995,
        "euler_at_final": False,
        "lambda_min_clipped": -math.inf,
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "solver_order": 2,
        "solver_type": "midpoint",
        "steps_offset": 0,
        "thresholding": False,
        "timestep_spacing": "linspace",
        "trained_betas": None,
        "use_karras_sigmas": False,
        "use_lu_lambdas": False,
        "variance_type": None,
    }
    assert sampler_from_diffusers(json.loads(json.dumps(pixart))) == DPMSolver()
