"""DPM-Solver++: multistep solvers of the probability flow and of the reverse SDE.

With alpha and sigma for sqrt(alpha_bar) and sqrt(1 - alpha_bar), `lambda = log(alpha / sigma)`
and `h` the difference of lambda over a step, the step is exact but for how x_0 changes, and that
is taken from the last answers (Lu et al. 2022b, proposition 4.1 and algorithm 2). In terms of
differences, with `h_1`, `h_2` of the two steps before and `x_1`, `x_2` for x_0 there,

    x_prev = sigma'/sigma x_t + f_1 x_0 + f_2 D_1 - f_3 D_2
    d = (x_0 - x_1) h / h_1,    d_1 = (x_1 - x_2) h / h_2

    order 1:  D_1 = D_2 = 0                                    (DDIM)
    order 2:  D_1 = d, D_2 = 0,                                f_2 = f_1 / 2 for "midpoint"
    order 3:  D_1 = d + (d - d_1) h_1 / (h_1 + h_2),  D_2 = (d - d_1) h / (h_1 + h_2)

    f_1 = alpha' (1 - e^-H),   f_2 = alpha' ((e^-H - 1) / H + 1),
    f_3 = alpha' ((e^-H - 1 + H) / H^2 - 1/2),   H = h

and for the SDE (`"sde-dpmsolver++"`) `H = 2h`, the first coefficient is sigma'/sigma e^-h, and
the step adds `sigma' sqrt(1 - e^-2h) z`. The orders are no branches but coefficients: each row
has

    x_0    = x0_from_x x_t + x0_from_prediction p                     then thresholded
    x_prev = mean_from_x x_t + mean_from_x0 x_0 + mean_from_x0_1 x_1 + mean_from_x0_2 x_2
             + noise_std z

with zeros for answers that are not there yet, or not used in the last steps. `prediction_gain`
is `mean_from_x0 x0_from_prediction`: how this call's answer moves the next sample. That it comes
back in later steps, through x_1 and x_2, is not in it.

References:
  Lu et al., DPM-Solver, 2022, https://arxiv.org/abs/2206.00927.
  Lu et al., DPM-Solver++, 2022, https://arxiv.org/abs/2211.01095.
  Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022,
  https://arxiv.org/abs/2206.00364 (the levels of `use_karras_sigmas`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from qjax.core.steps import TableKey
from qjax.core.typing import Array, Float
from qjax.models.linear_sampler import noise_left, prediction_coefficients, threshold
from qjax.models.sampler_settings import DIFFUSERS_SPACINGS, Row, SamplerSettings, as_rows
from qjax.models.sigmas import (
    FINAL_SIGMAS,
    final_sigma,
    karras_sigmas,
    sigmas_at,
    timesteps_at,
    training_sigmas,
)

__all__ = ["DPMSolver"]

_FEW_STEPS = 15  # diffusers': lower_order_final holds below


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolver(SamplerSettings):
    """DPM-Solver++ of order 1 to 3, as an ODE or an SDE; "2M" is order 2."""

    name: ClassVar[str] = "dpm_solver"
    diffusers_class: ClassVar[str] = "DPMSolverMultistepScheduler"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "timestep_spacing": DIFFUSERS_SPACINGS,
        "solver_order": (1, 2, 3),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
        "final_sigmas_type": FINAL_SIGMAS,
    }

    timestep_spacing: str = "linspace"
    """Which timesteps are visited; `"leading"` and `"linspace"` are the grids of one step more,
    without its last timestep."""
    solver_order: int = 2
    """1 to 3: how many answers a step uses, once there are as many."""
    algorithm_type: str = "dpmsolver++"
    """The probability flow, or `"sde-dpmsolver++"`, the reverse SDE, up to order 2."""
    solver_type: str = "midpoint"
    """How order 2 weighs the difference of the answers; `"heun"` is the other one."""
    lower_order_final: bool = True
    """Whether runs of less than 15 steps end with orders 2 and 1."""
    euler_at_final: bool = False
    """Whether the last step has order 1 in any run; where it ends at no noise it has."""
    use_karras_sigmas: bool = False
    """Whether the levels are even in the seventh root, over all of training; the network is
    given the nearest timesteps (with cosine betas the ones below)."""
    final_sigmas_type: str = "zero"
    """Where the last step ends: at no noise or at the smallest level of training."""
    lambda_min_clipped: float = -math.inf
    """Smallest lambda that is visited, for schedules that reach very small ones (cosine: -5.1)."""
    thresholding: bool = False
    """Dynamic thresholding of x_0: the range is a quantile of each image. Not for latents."""
    dynamic_thresholding_ratio: float = 0.995
    """That quantile of |x_0|, 0 to 1."""
    sample_max_value: float = 1.0
    """Upper bound of the range, whose lower bound is 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._is_sde and self.solver_order == 3:
            # diffusers has one, whose second difference keeps its weight as h goes to 0.
            raise ValueError(
                "sde-dpmsolver++ has the orders 1 and 2; got solver_order=3. Use solver_order=2."
            )

    @property
    def _is_sde(self) -> bool:
        return self.algorithm_type.startswith("sde")

    def timesteps(self, steps: int) -> np.ndarray:
        """The timestep of every call, int64, never rising.

        There are `steps` of them, but fewer with `"trailing"` where `lambda_min_clipped` cuts
        the largest timesteps off.

        Raises:
          ValueError: If the steps do not fit into the timesteps that are visited.
        """
        return self._grid(steps)[0]

    def rows(self, steps: int, *, eta: float = 0.0) -> dict[str, np.ndarray]:
        """The coefficients of every call, as the module names them.

        Args:
          steps: s, 1 to T - 1; T as well with `"trailing"`.
          eta: 0; how much noise there is depends on `algorithm_type`.

        Raises:
          ValueError: If `eta` or `steps` is outside its range.
        """
        self._check_eta(eta)
        t, levels = self._grid(steps)
        alpha, sigma = 1 / np.sqrt(1 + levels**2), levels / np.sqrt(1 + levels**2)
        given = prediction_coefficients(self.prediction_type, alpha[:-1] ** 2)
        with np.errstate(divide="ignore"):
            h = -np.diff(np.log(levels))  # infinite where a step ends at no noise
        stretch = 2 if self._is_sde else 1
        weights = np.array(
            [
                _multistep_weights(
                    order, h[: i + 1], alpha[i + 1], stretch=stretch, solver_type=self.solver_type
                )
                for i, order in enumerate(self._orders(len(t)))
            ]
        )
        columns = {f"mean_from_x0_{i}": weights[:, i] for i in range(1, self.solver_order)}
        return as_rows(
            t,
            x0_from_x=given["x0_from_x"],
            x0_from_prediction=given["x0_from_prediction"],
            mean_from_x=sigma[1:] / sigma[:-1] * (levels[1:] / levels[:-1]) ** (stretch - 1),
            mean_from_x0=weights[:, 0],
            noise_std=sigma[1:] * np.sqrt(-np.expm1(-2 * h)) * (stretch - 1),
            prediction_gain=weights[:, 0] * given["x0_from_prediction"],
            **columns,
        )

    def table_key(
        self, steps: int, *, eta: float = 0.0, guidance_scale: float | None = None
    ) -> TableKey:
        """The settings of a run, without `eta`; the sampler is `"dpmsolver++_2m"`, say."""
        return self._key(
            steps, guidance_scale, sampler=f"{self.algorithm_type}_{self.solver_order}m"
        )

    def init(self, x_t: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w c"], ...]:
        """The clean samples before the first, the newest first: zeros that no row uses."""
        return (jnp.zeros_like(x_t),) * (self.solver_order - 1)

    def step(
        self,
        row: Row,
        state: tuple[Float[Array, "b h w c"], ...],
        x_t: Float[Array, "b h w c"],
        prediction: Float[Array, "b h w c2"],
        noise: Float[Array, "b h w c"],
    ) -> tuple[Float[Array, "b h w c"], tuple[Float[Array, "b h w c"], ...]]:
        """The sample of the next step, and the state.

        Args:
          row: One step of `rows`; optionally with `absorbed_variance`, which is taken from
            the variance of the noise, down to 0 at most.
          state: The clean samples of the steps before, the newest first.
          x_t: Noisy sample, float32.
          prediction: The network's answer in its first c channels, float32.
          noise: Standard normal noise, float32.
        """
        prediction = prediction[..., : x_t.shape[-1]]
        x_0 = row["x0_from_x"] * x_t + row["x0_from_prediction"] * prediction
        if self.thresholding:
            x_0 = threshold(
                x_0, ratio=self.dynamic_thresholding_ratio, max_value=self.sample_max_value
            )
        x_prev = row["mean_from_x"] * x_t + row["mean_from_x0"] * x_0
        for i, earlier in enumerate(state, start=1):
            x_prev = x_prev + row[f"mean_from_x0_{i}"] * earlier
        x_prev = x_prev + noise_left(row, row["noise_std"]) * noise
        return x_prev, (x_0, *state)[: len(state)]

    def _grid(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps `[s]` and levels sigma / alpha `[s + 1]`."""
        train, training = self.schedule.num_train_timesteps, training_sigmas(self.schedule)
        visited = int(np.sum(-np.log(training) >= self.lambda_min_clipped))
        most = visited if self.timestep_spacing == "trailing" else visited - 1
        if not 1 <= steps <= most:
            raise ValueError(
                f"steps must lie between 1 and {most} for timestep_spacing="
                f"{self.timestep_spacing!r} and {visited} timesteps; got {steps=}."
            )
        if self.timestep_spacing == "linspace":
            t: np.ndarray = np.linspace(0, visited - 1, steps + 1).round()[:0:-1]
        elif self.timestep_spacing == "leading":
            t = np.arange(steps, 0, -1) * (visited // (steps + 1)) + self.steps_offset
        else:
            t = np.arange(visited, 0, -train / steps)[:steps].round() - 1
            t = t[t >= 0]
        if t[0] >= train or t[-1] < 0:
            raise ValueError(
                f"timesteps must lie between 0 and {train - 1}; got {t[-1]} to {t[0]} for "
                f"{steps=}, steps_offset={self.steps_offset}. Use steps_offset=0."
            )
        levels = sigmas_at(t, training)
        if self.use_karras_sigmas:
            levels = karras_sigmas(steps, sigma_min=training[0], sigma_max=training[-1])
            t = timesteps_at(levels, training)
            # As diffusers, whose float32 may come out just below a whole number and lose 1.
            cosine = self.schedule.beta_schedule == "squaredcos_cap_v2"
            t = np.floor(t) if cosine else t.round()
        return t.astype(np.int64), np.append(levels, final_sigma(self.final_sigmas_type, training))

    def _orders(self, calls: int) -> np.ndarray:
        """The order of every step, `[s]`: rising at the start, falling at the end."""
        orders = np.minimum(np.arange(1, calls + 1), self.solver_order)
        few = self.lower_order_final and calls < _FEW_STEPS
        if few and calls > 1:
            orders[-2] = min(orders[-2], 2)
        if few or self.euler_at_final or self.final_sigmas_type == "zero":
            orders[-1] = 1
        return orders


def _multistep_weights(
    order: int, h: np.ndarray, alpha: float, *, stretch: int, solver_type: str
) -> np.ndarray:
    """Coefficients of x_0, x_1 and x_2 in one step, `[3]`.

    Args:
      order: 1 to 3.
      h: Differences of lambda, this step's last; as many as the order at least.
      alpha: At the end of the step.
      stretch: H / h: 1 for the ODE, 2 for the SDE.
      solver_type: For order 2.
    """
    step = h[-1]
    wide = stretch * step
    weights = -alpha * np.expm1(-wide) * np.array([1.0, 0.0, 0.0])
    if order == 1 or step == 0:  # a step of no length, from sigma_min to sigma_min, changes nothing
        return weights
    f_2 = alpha * (np.expm1(-wide) / wide + 1)
    d = step / h[-2] * np.array([1.0, -1.0, 0.0])
    if order == 2:
        return weights + (weights[0] / 2 if solver_type == "midpoint" else f_2) * d
    f_3 = alpha * ((np.expm1(-wide) + wide) / wide**2 - 1 / 2)
    change = (d - step / h[-3] * np.array([0.0, 1.0, -1.0])) / (h[-2] + h[-3])
    return weights + f_2 * (d + h[-2] * change) - f_3 * step * change
