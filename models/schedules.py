"""Noise schedules of training, and the timesteps at which a sampler visits them.

A schedule is `beta[t]`, `t = 0 ... T-1`, and what follows from it, with `alpha_bar` the
cumulative product of `1 - beta`:

    x_t = sqrt(alpha_bar[t]) x_0 + sqrt(1 - alpha_bar[t]) noise
    v_t = sqrt(alpha_bar[t]) noise - sqrt(1 - alpha_bar[t]) x_0

Everything is computed in float64. diffusers computes in float32, where `1 - alpha_bar`
loses up to 4e-3 of itself at the smallest timesteps; in `x_t` that is below 1e-6.

References:
  Ho et al., Denoising Diffusion Probabilistic Models, 2020, https://arxiv.org/abs/2006.11239.
  Nichol and Dhariwal, Improved DDPM, 2021, https://arxiv.org/abs/2102.09672 (cosine).
  Rombach et al., Latent Diffusion, 2022, https://arxiv.org/abs/2112.10752 (scaled linear).
  Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, 2023,
  https://arxiv.org/abs/2305.08891 (zero terminal SNR, spacings).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.core.typing import Array, Float, Int

__all__ = ["BETA_SCHEDULES", "PREDICTION_TYPES", "SPACINGS", "Schedule", "spaced_timesteps"]

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace", "respaced")

_MAX_COSINE_BETA = 0.999  # Improved DDPM, section 3.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The noise schedule a model was trained with; hashable, built by the methods below."""

    beta_schedule: str = "linear"
    """Rule for beta, one of `BETA_SCHEDULES`."""
    num_train_timesteps: int = 1000
    """T."""
    beta_start: float = 1e-4
    """beta[0] of the linear rules and lower end of the sigmoid; the cosine has no use for it."""
    beta_end: float = 0.02
    """beta[T-1], likewise."""
    trained_betas: tuple[float, ...] | None = None
    """The betas themselves, in place of a rule."""
    rescale_betas_zero_snr: bool = False
    """Whether alpha_bar is stretched so that the last timestep is pure noise."""

    def __post_init__(self) -> None:
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", tuple(map(float, self.trained_betas)))
            if len(self.trained_betas) != self.num_train_timesteps:
                raise ValueError(
                    f"trained_betas must have one value per timestep; got "
                    f"{len(self.trained_betas)} for num_train_timesteps="
                    f"{self.num_train_timesteps}. Use Schedule.from_betas(betas)."
                )
        elif self.beta_schedule not in BETA_SCHEDULES:
            raise ValueError(
                f"beta_schedule must be one of {BETA_SCHEDULES}; got {self.beta_schedule!r}. "
                f"Pass any other as trained_betas."
            )
        if not (0 <= self.beta_start <= 1 and 0 <= self.beta_end <= 1):
            raise ValueError(
                f"beta_start and beta_end must lie in [0, 1]; got {self.beta_start} and "
                f"{self.beta_end}."
            )
        betas = self._betas()
        if not (betas.size and np.all((betas > 0) & (betas <= 1))):
            raise ValueError(
                f"every beta must be above 0 and at most 1; got {betas.size} betas from "
                f"{betas.min(initial=np.inf):g} to {betas.max(initial=-np.inf):g}. "
                f"Check beta_start={self.beta_start}, beta_end={self.beta_end}, trained_betas."
            )

    @classmethod
    def linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> Schedule:
        """Betas on a line, as DDPM and DiT have them."""
        return cls(
            beta_schedule="linear",
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
        )

    @classmethod
    def scaled_linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> Schedule:
        """Square roots of beta on a line, as latent diffusion has them (default: SD 1 and 2)."""
        return cls(
            beta_schedule="scaled_linear",
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
        )

    @classmethod
    def cosine(cls, num_train_timesteps: int = 1000) -> Schedule:
        """alpha_bar a squared cosine, each beta at most 0.999 (Improved DDPM, equation 17)."""
        return cls(beta_schedule="squaredcos_cap_v2", num_train_timesteps=num_train_timesteps)

    @classmethod
    def sigmoid(
        cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> Schedule:
        """Betas on a sigmoid from -6 to 6 (GeoDiff, https://arxiv.org/abs/2203.02923)."""
        return cls(
            beta_schedule="sigmoid",
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
        )

    @classmethod
    def from_betas(cls, betas: Sequence[float] | np.ndarray) -> Schedule:
        """Given betas, above 0 and at most 1, in the order of the timesteps."""
        return cls(trained_betas=tuple(betas), num_train_timesteps=len(betas))

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Schedule:
        """The schedule of any diffusers scheduler's config; other keys are left alone."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: config[name] for name in names if name in config})

    def to_diffusers(self) -> dict[str, Any]:
        """The keys of a diffusers scheduler's config that `from_diffusers` reads."""
        config = dataclasses.asdict(self)
        if self.trained_betas is not None:
            config["trained_betas"] = list(self.trained_betas)
        return config

    def _betas(self) -> np.ndarray:
        """[T], before any rescaling."""
        steps = self.num_train_timesteps
        if self.trained_betas is not None:
            return np.asarray(self.trained_betas, np.float64)
        if self.beta_schedule == "linear":
            return np.linspace(self.beta_start, self.beta_end, steps)
        if self.beta_schedule == "scaled_linear":
            return np.linspace(self.beta_start**0.5, self.beta_end**0.5, steps) ** 2
        if self.beta_schedule == "sigmoid":
            sigmoid = 1 / (1 + np.exp(-np.linspace(-6, 6, steps)))
            return sigmoid * (self.beta_end - self.beta_start) + self.beta_start
        edges = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - edges[1:] / edges[:-1], _MAX_COSINE_BETA)

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:
        """Share of the signal's power at every timestep, float64 `[T]`, falling; read-only."""
        alpha_bar = np.cumprod(1 - self._betas())
        if self.rescale_betas_zero_snr:
            # Lin et al., algorithm 1: shift the root to 0 at the end, keep it at the start.
            root = np.sqrt(alpha_bar)
            alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alpha_bar.flags.writeable = False
        return alpha_bar

    def at(self, timesteps: Any) -> np.ndarray:
        """`alpha_bar` at timesteps, in between where they are fractional, float64."""
        return np.interp(timesteps, np.arange(len(self.alpha_bar)), self.alpha_bar)

    @property
    def log_snr(self) -> np.ndarray:
        """log(alpha_bar / (1 - alpha_bar)), `[T]`, falling; -inf where all is noise."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha_bar) - np.log1p(-self.alpha_bar)

    def add_noise(
        self, x_0: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], t: Int[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        """`x_t`: the clean sample with the noise of its own timestep."""
        signal, sigma = self._roots(t, x_0.ndim)
        return signal * x_0 + sigma * noise

    def target(
        self,
        x_0: Float[Array, "b h w c"],
        noise: Float[Array, "b h w c"],
        t: Int[Array, " b"],
        *,
        prediction_type: str = "epsilon",
    ) -> Float[Array, "b h w c"]:
        """What the network should answer at `add_noise(x_0, noise, t)`.

        Raises:
          ValueError: If `prediction_type` is not one of `PREDICTION_TYPES`.
        """
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return x_0
        if prediction_type == "v_prediction":
            signal, sigma = self._roots(t, x_0.ndim)
            return signal * noise - sigma * x_0
        raise ValueError(
            f"prediction_type must be one of {PREDICTION_TYPES}; got {prediction_type!r}."
        )

    def _roots(self, t: Int[Array, " b"], ndim: int) -> tuple[Array, Array]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at `t`, float32, ready to broadcast."""
        shape = (-1, *[1] * (ndim - 1))
        signal = jnp.asarray(np.sqrt(self.alpha_bar), jnp.float32)[t]
        sigma = jnp.asarray(np.sqrt(1 - self.alpha_bar), jnp.float32)[t]
        return signal.reshape(shape), sigma.reshape(shape)


def spaced_timesteps(
    steps: int, *, num_train_timesteps: int, spacing: str, steps_offset: int = 0
) -> np.ndarray:
    """The timesteps a sampler of `steps` steps visits, int64 `[s]`, falling.

    With T training timesteps and 0 <= i < s:

    - `"leading"`: multiples of `T // s`, plus `steps_offset`: 0, 50, ..., 950 for T=1000, s=20;
    - `"trailing"`: back from `T - 1` in strides of `T / s`: 49, 99, ..., 999;
    - `"linspace"`: `i (T-1) / (s-1)`, both ends included: 0, 20, 41, ..., 979, 999 for s=50;
    - `"respaced"`: the same grid as guided-diffusion and DiT compute it (their "50"), a sum of
      strides, which rounds some halves the other way where s - 1 and T - 1 allow for halves.
      They also differ in where DDIM steps to (`samplers.DDIM`).

    Args:
      steps: s, 1 to T.
      num_train_timesteps: T.
      spacing: One of `SPACINGS`.
      steps_offset: Added to the timesteps of `"leading"`; the others ignore it.

    Raises:
      ValueError: If `spacing` is unknown, or the steps do not fit into the training schedule.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"timestep_spacing must be one of {SPACINGS}; got {spacing!r}.")
    if not 1 <= steps <= num_train_timesteps:
        raise ValueError(
            f"steps must lie between 1 and the timesteps of training; got {steps=}, "
            f"{num_train_timesteps=}."
        )
    if spacing == "leading":
        timesteps: np.ndarray = (
            np.arange(steps)[::-1] * (num_train_timesteps // steps) + steps_offset
        )
        if timesteps[0] >= num_train_timesteps or timesteps[-1] < 0:
            raise ValueError(
                f"timesteps must lie between 0 and {num_train_timesteps - 1}; got "
                f"{timesteps[-1]} to {timesteps[0]} for {steps=}, {steps_offset=}. "
                f"Use fewer steps or steps_offset=0."
            )
    elif spacing == "trailing":
        # [:steps]: rounding of the stride can make arange one longer, with a timestep of -1.
        back = np.arange(num_train_timesteps, 0, -num_train_timesteps / steps)[:steps]
        timesteps = np.round(back).astype(np.int64) - 1
    elif spacing == "linspace":
        timesteps = np.linspace(0, num_train_timesteps - 1, steps).round()[::-1]
    else:
        strides = np.full(steps, (num_train_timesteps - 1) / max(steps - 1, 1))
        strides[0] = 0
        timesteps = np.cumsum(strides).round()[::-1]
    return timesteps.astype(np.int64)
