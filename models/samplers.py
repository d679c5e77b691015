"""What a pipeline asks of a sampler, DDIM and DDPM, and all samplers by their diffusers class.

DDIM and DDPM are tables of coefficients for the update in `linear_sampler`.

With `a` and `a'` for alpha_bar at this and at the next step, DDIM is (Song et al., equations
12 and 16)

    sigma = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')
    x_prev = sqrt(a') x_0 + sqrt(1 - a' - sigma^2) noise + sigma z

and DDPM, with `beta = 1 - a / a'` (Ho et al., equation 7),

    x_prev = sqrt(a') beta / (1 - a) x_0 + sqrt(a / a') (1 - a') / (1 - a) x_t + std z

Adding a sampler: one class that meets `Sampler` in a file of its own, and a line in `_SAMPLERS`.

References:
  Ho et al., Denoising Diffusion Probabilistic Models, 2020, https://arxiv.org/abs/2006.11239.
  Song et al., Denoising Diffusion Implicit Models, 2021, https://arxiv.org/abs/2010.02502.
  Nichol and Dhariwal, Improved DDPM, 2021, https://arxiv.org/abs/2102.09672 (variances).
  He et al., PTQD, 2023, https://arxiv.org/abs/2305.10657 (`correct_prediction`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from qjax.core.steps import TableKey
from qjax.core.typing import Array, Float
from qjax.models.dpm_solver import DPMSolver
from qjax.models.euler import Euler, EulerAncestral
from qjax.models.lcm import LCM
from qjax.models.linear_sampler import VARIANCES, LinearSampler, absorbed_variance
from qjax.models.pndm import PNDM
from qjax.models.sampler_settings import Row, SamplerSettings

__all__ = ["DDIM", "DDPM", "Row", "Sampler", "correct_prediction", "sampler_from_diffusers"]

_MIN_VARIANCE = 1e-20  # the log of a variance is taken, which is 0 at the last step (diffusers)


@runtime_checkable
class Sampler(Protocol):
    """What a pipeline asks of a sampler: frozen, hashable settings and these methods."""

    def timesteps(self, steps: int) -> np.ndarray:
        """The timestep of every call of the network, `[s]`, never rising."""
        ...

    def rows(self, steps: int, *, eta: float = 0.0) -> dict[str, np.ndarray]:
        """The coefficients of every call of the network, each `[s]`; s may differ from `steps`.

        Every sampler has `t`, the timestep (int32, or float32 where it visits fractional
        ones), `noise_std`, 0 where a step adds no noise, and `prediction_gain`, the
        derivative of the next sample by this call's prediction, nothing being clipped. One
        that begins with other than standard normal noise has `init_scale` as well, the same
        in all rows: the factor from `x_T` to the first sample.
        """
        ...

    def table_key(
        self, steps: int, *, eta: float = 0.0, guidance_scale: float | None = None
    ) -> TableKey:
        """The settings of a run, as the entries of a step table are compared with them."""
        ...

    def init(self, x_t: Float[Array, "b h w c"]) -> Any:
        """The state before the first step: what a multistep sampler remembers, else `()`."""
        ...

    def step(
        self,
        row: Row,
        state: Any,
        x_t: Float[Array, "b h w c"],
        prediction: Float[Array, "b h w c2"],
        noise: Float[Array, "b h w c"],
    ) -> tuple[Float[Array, "b h w c"], Any]:
        """The next sample and state. Pure; no Python branch depends on a row's values."""
        ...

    def to_diffusers(self) -> dict[str, Any]:
        """The scheduler config that `sampler_from_diffusers` turns back into this."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(LinearSampler):
    """Denoising diffusion implicit models: deterministic at `eta=0`, ancestral at `eta=1`.

    As in diffusers, a step goes from timestep t to `t - T // s`, which for `"linspace"` and
    `"trailing"` is not always the timestep that is visited next. With `"respaced"` it is, as
    in guided-diffusion and DiT.
    """

    name: ClassVar[str] = "ddim"
    diffusers_class: ClassVar[str] = "DDIMScheduler"

    set_alpha_to_one: bool = True
    """Whether the last step ends at alpha_bar = 1, or at alpha_bar[0] as latent diffusion."""

    def timesteps(self, steps: int) -> np.ndarray:
        """The timesteps visited in `steps` steps, int64 `[s]`, falling."""
        return self._spaced(steps)

    def rows(self, steps: int, *, eta: float = 0.0) -> dict[str, np.ndarray]:
        """The coefficients of every step, each `[s]`.

        Args:
          steps: s, 1 to T.
          eta: Share of fresh noise, 0 (none) to 1 (as much as DDPM).

        Raises:
          ValueError: If `eta` or `steps` is outside its range, or x_0 cannot be told from
            the prediction at one of the timesteps.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie between 0 and 1; got {eta=}.")
        t = self.timesteps(steps)
        if self.timestep_spacing == "respaced":
            previous = np.append(t[1:], -1)
        else:
            previous = t - self.schedule.num_train_timesteps // steps
        final = 1.0 if self.set_alpha_to_one else self.schedule.alpha_bar[0]
        a = self.schedule.alpha_bar[t]
        a_prev = np.where(previous >= 0, self.schedule.alpha_bar[previous], final)
        variance = eta**2 * (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        return self._rows(
            t,
            a,
            mean_from_x0=np.sqrt(a_prev),
            mean_from_x=np.zeros(steps),
            mean_from_noise=np.sqrt(np.maximum(1 - a_prev - variance, 0)),
            noise_std=np.sqrt(variance),
        )

    def table_key(
        self, steps: int, *, eta: float = 0.0, guidance_scale: float | None = None
    ) -> TableKey:
        """The settings of a run, as the entries of a step table are compared with them."""
        return self._key(steps, guidance_scale, eta=float(eta))

    def noise_scale(self, row: Row, variance: Array | None) -> Array:
        """The row's; a variance the network has learned has no part in DDIM."""
        return row["noise_std"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM(LinearSampler):
    """Ancestral sampling: the posterior mean plus noise, none of it at timestep 0.

    The last step ends at alpha_bar = 1. DDPM has no `eta`: 0 and 1 are accepted and mean the
    same.
    """

    name: ClassVar[str] = "ddpm"
    diffusers_class: ClassVar[str] = "DDPMScheduler"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"variance_type": VARIANCES}

    variance_type: str = "fixed_small"
    """Variance of the noise, one of `VARIANCES`: the posterior's (small), beta (large), or
    from the network's second c channels, as they are (learned) or as the place between the
    two in the logarithm (learned_range). A `_log` type is the same number as its plain twin;
    diffusers takes the root of a logarithm for `fixed_large_log` and gives NaN."""

    def timesteps(self, steps: int) -> np.ndarray:
        """The timesteps visited in `steps` steps, int64 `[s]`, falling."""
        return self._spaced(steps)

    def rows(self, steps: int, *, eta: float = 0.0) -> dict[str, np.ndarray]:
        """The coefficients of every step, each `[s]`.

        With a learned variance `noise_std` is a factor on what the network says: 1, or 0 at
        timestep 0.

        Args:
          steps: s, 1 to T.
          eta: 0 or 1.

        Raises:
          ValueError: If `eta` or `steps` is outside its range, or x_0 cannot be told from
            the prediction at one of the timesteps.
        """
        if eta not in (0, 1):
            raise ValueError(f"DDPM has no eta; got {eta=}. Leave it out, or use DDIM to vary it.")
        t = self.timesteps(steps)
        a = self.schedule.alpha_bar[t]
        a_prev = np.append(a[1:], 1.0)
        beta = 1 - a / a_prev
        small = np.maximum((1 - a_prev) / (1 - a) * beta, _MIN_VARIANCE)
        variance = {"fixed_small": small, "fixed_large": beta}.get(
            self.variance_type.removesuffix("_log"), np.ones(steps)
        )
        own = {
            "mean_from_x0": np.sqrt(a_prev) * beta / (1 - a),
            "mean_from_x": np.sqrt(a / a_prev) * (1 - a_prev) / (1 - a),
            "mean_from_noise": np.zeros(steps),
            "noise_std": np.where(t > 0, np.sqrt(variance), 0),
        }
        if self.variance_type == "learned_range":
            own |= {"log_variance_min": np.log(small), "log_variance_max": np.log(beta)}
        return self._rows(t, a, **own)

    def table_key(
        self, steps: int, *, eta: float = 0.0, guidance_scale: float | None = None
    ) -> TableKey:
        """The settings of a run, without `eta`."""
        return self._key(steps, guidance_scale)

    def noise_scale(self, row: Row, variance: Array | None) -> Array:
        """The row's, times what the network says where the variance is learned.

        Raises:
          ValueError: If the variance is learned and the prediction has no channels for it.
        """
        if not self.variance_type.startswith("learned"):
            return row["noise_std"]
        if variance is None:
            raise ValueError(
                f"variance_type={self.variance_type!r} needs a prediction with twice the "
                f"sample's channels. Use variance_type='fixed_small', or DDIM."
            )
        if self.variance_type == "learned":
            return row["noise_std"] * jnp.sqrt(jnp.maximum(variance, 0))
        share = (variance + 1) / 2
        log_variance = share * row["log_variance_max"] + (1 - share) * row["log_variance_min"]
        return row["noise_std"] * jnp.exp(log_variance / 2)


def correct_prediction(
    correction: Mapping[str, Array], row: Row, prediction: Float[Array, "b h w c2"]
) -> tuple[dict[str, Array], Float[Array, "b h w c2"]]:
    """The row and the prediction after PTQD's three corrections, for `Sampler.step`.

    The error of a quantized prediction is taken to be `k` times the float prediction plus a
    residual of mean `mu` and variance `variance`, so the prediction becomes
    `(prediction - mu) / (1 + k)`, and what is left of the residual,
    `(prediction_gain / (1 + k))^2 variance` in the next sample, is taken from the sampler's
    own noise. Where x_0 is clipped less of it arrives, and too much is taken.

    Args:
      correction: One row of the step table's entry `"noise_correction"`: `k` and `variance`
        scalars, `mu` `[c]`. Zeros switch a correction off. A `mean_from_noise`, if there is one,
        takes the place of the row's (`NoiseCorrection(variance="released")`).
      row: One row of the sampler, with `prediction_gain`.
      prediction: Quantized and guided; a learned variance in channels beyond c stays as it is.

    Raises:
      ValueError: If one of the three is missing.

    References:
      He et al., PTQD, 2023, https://arxiv.org/abs/2305.10657.
    """
    missing = {"k", "mu", "variance"} - set(correction)
    if missing:
        raise ValueError(
            f"the entry 'noise_correction' needs k, mu and variance; got {sorted(correction)}. "
            f"Zeros switch a correction off."
        )
    k, mu = correction["k"], correction["mu"]
    c = mu.shape[-1]
    corrected = (prediction[..., :c] - mu) / (1 + k)
    absorbed = absorbed_variance(row["prediction_gain"], k, correction["variance"])
    changed = {"absorbed_variance": absorbed}
    if "mean_from_noise" in correction:
        changed["mean_from_noise"] = correction["mean_from_noise"]
    return (
        {**row, **changed},
        jnp.concatenate([corrected, prediction[..., c:]], axis=-1),
    )


_SAMPLERS: dict[str, type[SamplerSettings]] = {
    sampler.diffusers_class: sampler
    for sampler in (DDIM, DDPM, PNDM, Euler, EulerAncestral, DPMSolver, LCM)
}


def sampler_from_diffusers(config: Mapping[str, Any]) -> SamplerSettings:
    """The sampler that a diffusers `scheduler_config.json` describes.

    Raises:
      ValueError: If its `_class_name` is not a sampler of ours, or a key or value is unknown;
        it names all of them.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in _SAMPLERS:
        raise ValueError(
            f"_class_name must be one of {', '.join(_SAMPLERS)}; got {name!r}. To sample with "
            f"DDIM all the same, read the config with DDIM.from_diffusers."
        )
    return _SAMPLERS[name].from_diffusers(config)
