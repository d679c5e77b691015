"""PNDM: pseudo linear multistep (PLMS) and Runge-Kutta (PRK) steps on the probability flow.

With `a` and `a'` for alpha_bar where a step begins and ends, a noise `e` carries a sample
along by (Liu et al., equation 9)

    transfer(x, e) = sqrt(a' / a) x - (a' - a) / (a sqrt(1 - a') + sqrt(a (1 - a) a')) e

and what is carried is a combination of the network's last answers, `p` now and `p_1 p_2 p_3`
before (equation 12):

    e = (55 p - 59 p_1 + 37 p_2 - 9 p_3) / 24

The first answers have no predecessors. With `skip_prk_steps`, as in Stable Diffusion, they are
combined by lower orders: p; then (p + p_1) / 2 once more from the same sample; then
(3 p - p_1) / 2 and (23 p - 16 p_1 + 5 p_2) / 12. So the second timestep is visited twice, and
`steps` steps make steps + 1 calls of the network. Without it the first three steps are
Runge-Kutta steps of four calls each, at the timesteps and half-way (equation 13), and all
make steps + 9 calls.

A row belongs to a call. Every update is linear,

    x_prev = mean_from_x x_t + mean_from_anchor x_anchor + mean_from_sum sum
             + mean_from_prediction p + mean_from_prediction_1 p_1 + ... + mean_from_prediction_3 p_3

where x_anchor is the sample at which a step of several calls began and `sum` what its calls have
added up, and the coefficients that a call does not use are 0. `prediction_gain` is
`mean_from_prediction`: how this call's answer moves the next sample. That the answer comes back
in later steps, through p_1 to p_3, is not in it.

References:
  Liu et al., Pseudo Numerical Methods for Diffusion Models on Manifolds, 2022,
  https://arxiv.org/abs/2202.09778.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from qjax.core.steps import TableKey
from qjax.core.typing import Array, Float
from qjax.models.sampler_settings import DIFFUSERS_SPACINGS, Row, SamplerSettings, as_rows

__all__ = ["PNDM", "PNDMState"]

# Weights of p, p_1, p_2 and p_3 by how many answers there are (Liu et al., equation 12 for four).
_ADAMS_BASHFORTH = {
    1: (1, 0, 0, 0),
    2: (3 / 2, -1 / 2, 0, 0),
    3: (23 / 12, -16 / 12, 5 / 12, 0),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
_PRK_STEPS = 3
_PRK_CALLS = _PRK_STEPS * len(_RUNGE_KUTTA)


class _Call(NamedTuple):
    """What one call of the network is good for, before it becomes coefficients."""

    begin: int
    """Timestep at which the step begins."""
    end: int
    """And at which it ends."""
    weights: tuple[float, ...]
    """Of p, p_1, p_2 and p_3."""
    from_anchor: bool = False
    """Whether the step begins at the anchor, not at `x_t`."""
    from_sum: float = 0.0
    """Weight of the sum."""
    sum_from_sum: float = 0.0
    """How much of the sum is kept."""
    sum_from_prediction: float = 0.0
    """Weight of p in the sum from then on."""
    keep_sample: bool = False
    """Whether `x_t` becomes the anchor."""
    keep_prediction: bool = True
    """Whether p is p_1 from then on."""


class PNDMState(NamedTuple):
    """What a call leaves to the next ones."""

    anchor: Float[Array, "b h w c"]
    """The sample at which the step began."""
    predictions: tuple[Float[Array, "b h w c"], ...]
    """The last three answers that count, the newest first."""
    sum: Float[Array, "b h w c"]
    """The weighted answers of the Runge-Kutta step so far."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PNDM(SamplerSettings):
    """Pseudo numerical methods: deterministic, fourth order, one call a step after a start.

    As in diffusers, a step goes from timestep t to `t - T // s`, which is not always the one
    that is visited next, and nothing is clipped.
    """

    name: ClassVar[str] = "pndm"
    diffusers_class: ClassVar[str] = "PNDMScheduler"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "prediction_type": ("epsilon", "v_prediction"),
        "timestep_spacing": DIFFUSERS_SPACINGS,
        "rescale_betas_zero_snr": (False,),
    }

    skip_prk_steps: bool = False
    """Whether to start by multistep formulas of lower order, not by Runge-Kutta steps."""
    set_alpha_to_one: bool = False
    """Whether the last step ends at alpha_bar = 1, or at alpha_bar[0] as latent diffusion."""

    def timesteps(self, steps: int) -> np.ndarray:
        """The timestep of every call, int64, never rising: `steps + 1` of them, or `steps + 9`.

        Raises:
          ValueError: If `steps` does not fit into the training schedule, or is below 4 with
            Runge-Kutta steps.
        """
        t = self._spaced(steps)
        if self.skip_prk_steps:
            return np.insert(t, 2, t[1]) if steps > 1 else t
        if steps <= _PRK_STEPS:
            raise ValueError(
                f"Runge-Kutta steps need at least {_PRK_STEPS + 1} steps; got {steps=}. Use more, "
                f"or skip_prk_steps=True."
            )
        half = self._stride(steps) // 2
        start = [(t[i], t[i + 1] + half, t[i + 1] + half, t[i + 1]) for i in range(_PRK_STEPS)]
        return np.concatenate([np.ravel(start), t[_PRK_STEPS:]]).astype(np.int64)

    def rows(self, steps: int, *, eta: float = 0.0) -> dict[str, np.ndarray]:
        """The coefficients of every call, as the module names them.

        Args:
          steps: s, 1 to T, and at least 4 with Runge-Kutta steps.
          eta: 0; PNDM adds no noise.

        Raises:
          ValueError: If `eta` or `steps` is outside its range.
        """
        self._check_eta(eta)
        t, stride = self.timesteps(steps), self._stride(steps)
        calls = _multistep_calls(t, stride) if self.skip_prk_steps else _prk_calls(t, stride)
        call = {name: np.array([getattr(c, name) for c in calls]) for name in _Call._fields}
        from_x, from_prediction = self._transfer(call["begin"], call["end"])
        weights = from_prediction[:, None] * call["weights"]
        return as_rows(
            t,
            mean_from_x=np.where(call["from_anchor"], 0, from_x),
            mean_from_anchor=np.where(call["from_anchor"], from_x, 0),
            mean_from_sum=from_prediction * call["from_sum"],
            mean_from_prediction=weights[:, 0],
            mean_from_prediction_1=weights[:, 1],
            mean_from_prediction_2=weights[:, 2],
            mean_from_prediction_3=weights[:, 3],
            sum_from_sum=call["sum_from_sum"],
            sum_from_prediction=call["sum_from_prediction"],
            keep_sample=call["keep_sample"],
            keep_prediction=call["keep_prediction"],
            prediction_gain=weights[:, 0],
            noise_std=np.zeros(len(t)),
        )

    def table_key(
        self, steps: int, *, eta: float = 0.0, guidance_scale: float | None = None
    ) -> TableKey:
        """The settings of a run, without `eta`."""
        return self._key(steps, guidance_scale)

    def init(self, x_t: Float[Array, "b h w c"]) -> PNDMState:
        """Zeros; rows of the first calls do not use them."""
        zero = jnp.zeros_like(x_t)
        return PNDMState(anchor=zero, predictions=(zero, zero, zero), sum=zero)

    def step(
        self,
        row: Row,
        state: PNDMState,
        x_t: Float[Array, "b h w c"],
        prediction: Float[Array, "b h w c2"],
        noise: Float[Array, "b h w c"],
    ) -> tuple[Float[Array, "b h w c"], PNDMState]:
        """The sample of the next call, and the state.

        Args:
          row: One call of `rows`; an `absorbed_variance` has no noise to be taken from.
          state: From the call before, or `init`.
          x_t: Noisy sample, float32.
          prediction: The network's answer in its first c channels, float32.
          noise: Not used.
        """
        prediction = prediction[..., : x_t.shape[-1]]
        x_prev = (
            row["mean_from_x"] * x_t
            + row["mean_from_anchor"] * state.anchor
            + row["mean_from_sum"] * state.sum
            + row["mean_from_prediction"] * prediction
        )
        for i, earlier in enumerate(state.predictions, start=1):
            x_prev = x_prev + row[f"mean_from_prediction_{i}"] * earlier
        shifted = (prediction, *state.predictions[:-1])
        keep = row["keep_prediction"] > 0
        return x_prev, PNDMState(
            anchor=jnp.where(row["keep_sample"] > 0, x_t, state.anchor),
            predictions=tuple(
                jnp.where(keep, new, old)
                for new, old in zip(shifted, state.predictions, strict=True)
            ),
            sum=row["sum_from_sum"] * state.sum + row["sum_from_prediction"] * prediction,
        )

    def _stride(self, steps: int) -> int:
        return self.schedule.num_train_timesteps // steps

    def _transfer(self, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients of the sample and of the prediction, from timestep `begin` to `end`."""
        alpha_bar = self.schedule.alpha_bar
        final = 1.0 if self.set_alpha_to_one else alpha_bar[0]
        a, a_prev = alpha_bar[begin], np.where(end >= 0, alpha_bar[end], final)
        from_x = np.sqrt(a_prev / a)
        from_noise = -(a_prev - a) / (a * np.sqrt(1 - a_prev) + np.sqrt(a * (1 - a) * a_prev))
        if self.prediction_type == "epsilon":
            return from_x, from_noise
        return from_x + np.sqrt(1 - a) * from_noise, np.sqrt(a) * from_noise


def _multistep_calls(t: np.ndarray, stride: int) -> list[_Call]:
    """PLMS: after one improved step, in two calls, as many answers as there are, up to four."""
    calls = []
    for i, now in enumerate(t.tolist()):
        if i == 1:
            average = (1 / 2, 1 / 2, 0, 0)
            calls.append(_Call(now + stride, now, average, from_anchor=True, keep_prediction=False))
        else:
            weights = _ADAMS_BASHFORTH[min(max(i, 1), 4)]
            calls.append(_Call(now, now - stride, weights, keep_sample=i == 0))
    return calls


def _prk_calls(t: np.ndarray, stride: int) -> list[_Call]:
    """Three Runge-Kutta steps of four calls, then the formula of four answers."""
    calls = []
    for i, now in enumerate(t[:_PRK_CALLS].tolist()):
        stage, last = i % 4, i % 4 == 3
        calls.append(
            _Call(
                begin=int(t[i - stage]),
                end=now if i % 2 else now - stride // 2,
                weights=(_RUNGE_KUTTA[3] if last else 1.0, 0, 0, 0),
                from_anchor=stage > 0,
                from_sum=float(last),
                sum_from_sum=float(stage in (1, 2)),
                sum_from_prediction=0.0 if last else _RUNGE_KUTTA[stage],
                keep_sample=stage == 0,
                keep_prediction=stage == 0,
            )
        )
    weights = _ADAMS_BASHFORTH[4]
    calls += [_Call(now, now - stride, weights) for now in t[_PRK_CALLS:].tolist()]
    return calls
