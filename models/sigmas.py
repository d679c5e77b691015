"""Noise levels: the schedule by its ratio of noise to signal, and grids of it.

    sigma = sqrt((1 - alpha_bar) / alpha_bar),    alpha_bar = 1 / (1 + sigma^2)

Samplers that step through sigma visit levels between those of training, where the network is
given the timestep that belongs to the level: fractional, by interpolation.

References:
  Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022,
  https://arxiv.org/abs/2206.00364 (equation 5).
  Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, 2023,
  https://arxiv.org/abs/2305.08891 (zero terminal SNR).
"""

from __future__ import annotations

import numpy as np

from qjax.models.schedules import Schedule

__all__ = [
    "FINAL_SIGMAS",
    "final_sigma",
    "karras_sigmas",
    "sigmas_at",
    "timesteps_at",
    "training_sigmas",
]

FINAL_SIGMAS = ("zero", "sigma_min")

_KARRAS_RHO = 7.0  # Karras et al., table 1
_LAST_ALPHA_BAR = 2.0**-24  # diffusers', in place of 0: sigma would be infinite


def training_sigmas(schedule: Schedule) -> np.ndarray:
    """sigma at every timestep of training, float64 `[T]`, rising.

    With a zero terminal SNR the last alpha_bar is taken to be 2^-24, sigma 4096, as diffusers
    takes it.

    Raises:
      ValueError: If alpha_bar is 0 for another reason.
    """
    alpha_bar = schedule.alpha_bar
    if schedule.rescale_betas_zero_snr:
        alpha_bar = np.append(alpha_bar[:-1], _LAST_ALPHA_BAR)
    if not np.all(alpha_bar > 0):
        raise ValueError(
            f"noise levels need every alpha_bar above 0; it is 0 at timestep "
            f"{int(np.argmin(alpha_bar))}. Use betas below 1, or DDIM."
        )
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def sigmas_at(timesteps: np.ndarray, training: np.ndarray) -> np.ndarray:
    """sigma at timesteps that may be fractional, between the neighbours on a line."""
    return np.interp(timesteps, np.arange(len(training)), training)


def timesteps_at(sigmas: np.ndarray, training: np.ndarray) -> np.ndarray:
    """The timesteps of noise levels, float64: log sigma between its neighbours on a line."""
    return np.interp(np.log(sigmas), np.log(training), np.arange(len(training)))


def karras_sigmas(steps: int, *, sigma_min: float, sigma_max: float) -> np.ndarray:
    """`steps` levels from `sigma_max` down to `sigma_min`, even in their seventh root.

    Raises:
      ValueError: Unless 0 < sigma_min < sigma_max.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"0 < sigma_min < sigma_max must hold; got {sigma_min=}, {sigma_max=}.")
    roots = np.linspace(sigma_max ** (1 / _KARRAS_RHO), sigma_min ** (1 / _KARRAS_RHO), steps)
    return np.clip(roots**_KARRAS_RHO, sigma_min, sigma_max)


def final_sigma(kind: str, training: np.ndarray) -> float:
    """Where the last step ends: 0 (`"zero"`) or the smallest of training (`"sigma_min"`)."""
    return 0.0 if kind == "zero" else float(training[0])
