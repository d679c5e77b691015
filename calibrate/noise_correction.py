"""PTQD as a stage: what quantization does to the network's answer is taken back in the sampler.

The noise of every step is collected with both networks side by side (`noise_rollout.py`), split
into what follows the answer, a bias and a rest (`noise_statistics.py`), and kept as rows of the
step table, which every sampler reads (`samplers.correct_prediction`):

1. correlated: the answer is divided by `1 + k`;
2. bias: `mu` is taken from it, channel by channel;
3. variance: samplers that add noise add less of it, so that with the rest the sum is what the
   schedule wants.

With the gain `g` of a step, the derivative of the next sample by the answer, the rest arrives
there with the variance `(g / (1 + k))^2 variance`, and that is taken from `sigma^2`:

| sampler | `g`, for an answer that is the noise |
|---|---|
| DDIM | `sqrt(1 - a' - sigma^2) - sqrt(a' (1 - a) / a)` |
| DDPM | `-beta / sqrt(alpha (1 - a))`; the same as DDIM's for `eta` 1 |
| Euler ancestral | `sigma_down - sigma`, in units of the next sample |
| DPM-Solver++ SDE | of this call; that it comes back in the next steps is left out |
| LCM | `-c_out sqrt(a' (1 - a) / a)` |
| DDIM with `eta` 0, Euler, PNDM, DPM-Solver++ ODE | they add no noise: only 1 and 2 act |

For other predictions `g` is multiplied by their part in it (`prediction_gain` of the rows), and
k, mu and variance are of that prediction, be it v or x_0. A learned variance, in channels of
its own, stays as the quantized network says. Where the rest is more than the schedule's noise
none is added. Too much is taken off where x_0 is clipped, since less of the rest arrives than `g`
says, and where k was below 0 (`noise_statistics.py`).

What was found holds for one quantized network, sampler with all its settings, number of steps,
eta, guidance scale and rescale, which is what its key says: any other run is refused until it is
fitted anew (`noise_refit.py`) or left out (`Pipeline.retarget`).

References:
  He et al., PTQD: Accurate Post-Training Quantization for Diffusion Models, NeurIPS 2023,
  https://arxiv.org/abs/2305.10657, sections 3.3 to 3.5 and the appendix's DDIM.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.noise_rollout import NoiseRollout, StepNoise, pack_step, unpack_step
from qjax.calibrate.noise_statistics import (
    Bias,
    Correction,
    Moments,
    Slope,
    fit_correction,
    residual_test,
)
from qjax.calibrate.recipe import State
from qjax.calibrate.rollout import Driver
from qjax.calibrate.work import Work
from qjax.core.steps import StepTable, TableKey
from qjax.core.typing import Array, Float, PRNGKeyArray
from qjax.models.linear_sampler import absorbed_variance
from qjax.models.pipeline import Pipeline
from qjax.models.samplers import DDIM

__all__ = ["ENTRY", "HOW", "NoiseCorrection", "noise_std_left"]

ENTRY = "noise_correction"
"""Name of the entry in the step table."""

HOW = ("driver", "correlated", "bias", "slope", "variance")
"""Settings that the entry's key keeps, for whoever fits it again."""

_LOGGED = 200.0  # dB, for an infinite ratio, which JSON has no number for


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseCorrection:
    """The stage of a recipe that corrects quantization noise in the sampler; the last of them.

    Attributes:
      steps: Steps of the sampler, those of its later use; None: not chosen yet, which `check`
        refuses.
      eta: Its share of fresh noise.
      guidance_scale: Weight of the guidance, that of the later use; None for none.
      data: What the noise is collected on; the paper has 1,024 items.
      driver: Whose samples it is collected on.
      correlated: Whether the answer is divided by `1 + k`.
      bias: What is subtracted from it (`fit_correction`).
      slope: How k is found (`noise_statistics.py`).
      variance: `"paper"`; `"none"`; or `"released"`, for comparison: the authors' program also
        takes the smaller noise for the one that the direction towards the sample has to leave
        room for, which brings back most of what was absorbed. DDIM alone.
      batch: Items that run at once.
    """

    steps: int | None = None
    eta: float = 0.0
    guidance_scale: float | None = None
    data: CalibrationSet = dataclasses.field(default_factory=lambda: CalibrationSet(items=256))
    driver: Driver = "float"
    correlated: bool = True
    bias: Bias = "residual"
    slope: Slope = "pooled"
    variance: Literal["paper", "released", "none"] = "paper"
    batch: int = 64

    comes_last: ClassVar[bool] = True

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1; got {self.batch}.")
        for name, allowed in (
            ("driver", ("float", "quantized")),
            ("bias", ("residual", "total", "none")),
            ("slope", ("pooled", "within", "signed", "mmse")),
            ("variance", ("paper", "released", "none")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}."
                )
        if self.slope == "mmse" and self.variance != "none":
            raise ValueError(
                "slope='mmse' makes the answer's variance smaller, not larger: there is nothing to "
                f"absorb, and variance must be 'none'; got {self.variance!r}."
            )

    def check(self, pipe: Pipeline) -> int:
        """The steps of the sampler, if all that can be told beforehand is in order.

        Raises:
          ValueError: If the steps are not chosen, the calibration set does not suit the model,
            or its sampler does not suit `eta` or `variance`.
        """
        if self.steps is None:
            raise ValueError(
                "noise is corrected for every step of the sampler, whose number is not chosen: give "
                "steps (on the command line --steps), with the eta and guidance_scale of the later "
                "use."
            )
        pipe.sampler.rows(self.steps, eta=self.eta)
        self.data.check(pipe)
        if self.variance == "released" and not isinstance(pipe.sampler, DDIM):
            raise ValueError(
                "variance='released' is a deviation within DDIM; got "
                f"{type(pipe.sampler).__name__}. Use 'paper'."
            )
        return self.steps

    def run(self, state: State, key: PRNGKeyArray, work: Work) -> State:
        """The state with a noise correction in the student's step table.

        Raises:
          ValueError: If the student's step table is of other settings, or an answer is not
            finite.
        """
        rollout, noises = self.collect(state, key, work)
        corrections = [self.fit(noise.moments) for noise in noises]
        entry = self.entry(corrections, rollout.rows)
        for i, noise in enumerate(noises):
            work.log("noise", **self._words(i, noise, corrections[i], entry, rollout))
        work.log(
            "corrected",
            items=self.data.items,
            against=sum(noise.moments.slope <= 0 for noise in noises),
            steps=len(noises),
        )
        table = rollout.table.with_entry(ENTRY, entry, key=self.key(state.student))
        return dataclasses.replace(state, student=state.student.replace(step_table=table))

    def collect(
        self, state: State, key: PRNGKeyArray, work: Work
    ) -> tuple[NoiseRollout, list[StepNoise]]:
        """Both networks side by side, and the noise of all steps.

        Args:
          state: As for `run`.
          key: Of the items.
          work: Each step is a part of it, and holds those before.

        Raises:
          ValueError: As `run`.
        """
        steps, teacher, student = self.check(state.teacher), state.teacher, state.student
        table = student.step_table or StepTable()
        table = table.drop(ENTRY) if ENTRY in table.entries else table
        table.check(self.key(student))
        scale = self.guidance_scale
        items = self.data.draw(teacher, jax.random.fold_in(key, 0), guidance_scale=scale)
        rows = student.sampler.rows(steps, eta=self.eta)
        rollout = NoiseRollout.of(
            teacher, student, table, rows, items, guidance_scale=scale, batch=self.batch
        )
        return rollout, self._steps(rollout, work)

    def key(self, student: Pipeline) -> TableKey:
        """Of the run that the correction is for, and how it was fitted."""
        assert self.steps is not None  # `check` has seen to it
        how = {"items": self.data.items} | {name: getattr(self, name) for name in HOW}
        key = student.table_key(steps=self.steps, eta=self.eta, guidance_scale=self.guidance_scale)
        return dataclasses.replace(key, settings=json.dumps(how, sort_keys=True))

    def fit(self, moments: Moments) -> Correction:
        """What these settings correct of a step's noise."""
        return fit_correction(moments, correlated=self.correlated, bias=self.bias, slope=self.slope)

    def row(self, moments: Moments, row: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """`entry` of one step.

        Args:
          moments: Of the step.
          row: The sampler's.
        """
        rows = {name: np.asarray(value)[None] for name, value in row.items()}
        entry = self.entry([self.fit(moments)], rows)
        return {name: column[0] for name, column in entry.items()}

    def entry(
        self, corrections: Sequence[Correction], rows: Mapping[str, np.ndarray]
    ) -> dict[str, Array]:
        """The step table's entry: `k` and `variance` `[s]`, `mu` `[s, c]`.

        Args:
          corrections: Of every step.
          rows: Of the sampler.
        """
        k, variance = (
            np.asarray([getattr(one, name) for one in corrections]) for name in ("k", "variance")
        )
        # Where a step adds no noise there is nothing to take it from.
        used = (rows["noise_std"] > 0) & (self.variance != "none")
        variance = np.where(used, variance, 0.0)
        entry = {"k": k, "mu": np.stack([one.mu for one in corrections]), "variance": variance}
        if self.variance == "released":
            left = noise_std_left(k, variance, rows)
            direction = rows["mean_from_noise"] ** 2 + rows["noise_std"] ** 2 - left**2
            entry["mean_from_noise"] = np.sqrt(np.maximum(direction, 0))
        return {name: jnp.asarray(column, jnp.float32) for name, column in entry.items()}

    def _steps(self, rollout: NoiseRollout, work: Work) -> list[StepNoise]:
        """The noise of all steps."""
        calls, carry = len(rollout.rows["t"]), rollout.begin()
        noises: list[StepNoise] = []
        done = [i for i in range(calls) if work.has(f"noise-{i}")]
        for i in range(done[-1] if done else 0, calls):

            def make(i: int = i, carry: Any = carry, before: Any = tuple(noises)) -> dict:
                moved, found = rollout.step(i, carry, driver=self.driver, correct=self.row)
                return pack_step(moved, [*before, found])

            carry, noises = unpack_step(work.part(f"noise-{i}", make), carry)
            work.drop(f"noise-{i - 1}")
            share = round((i + 1) / calls, 4)
            work.log("step", part="noise", step=i + 1, steps=calls, share=share)
        return noises

    def _words(
        self,
        i: int,
        noise: StepNoise,
        correction: Correction,
        entry: dict[str, Array],
        rollout: NoiseRollout,
    ) -> dict[str, Any]:
        """What the log says of a step."""
        moments = noise.moments
        std, left = float(rollout.rows["noise_std"][i]), None
        if not is_learned(rollout.sampler):  # else the network says how much noise there is
            k, variance = (np.asarray(entry[name], np.float64) for name in ("k", "variance"))
            left = float(noise_std_left(k, variance, rollout.rows)[i])
        test = residual_test(noise.e, noise.d, noise.channel, correction)
        return {
            "step": i,
            "t": float(rollout.rows["t"][i]),
            "slope": moments.slope,
            "k": correction.k,
            "correlation": moments.correlation,
            "bias": float(np.sqrt(np.mean(moments.bias**2))),
            "std": float(np.sqrt(correction.variance)),
            "snr": _decibels(moments.signal, moments.error()),
            "snr_corrected": _decibels(moments.signal, moments.error(correction)),
            "noise_std": None if left is None else std,
            "noise_std_left": left,
            "clipped": bool(std > 0 and left == 0),
            "skewness": test.skewness,
            "kurtosis": test.kurtosis,
            "p_normal": test.p_value,
        }


def is_learned(sampler: Any) -> bool:
    """Whether the variance of the sampler's noise is the network's to say."""
    return str(getattr(sampler, "variance_type", "")).startswith("learned")


def noise_std_left(
    k: Float[np.ndarray, " s"], variance: Float[np.ndarray, " s"], rows: Mapping[str, np.ndarray]
) -> Float[np.ndarray, " s"]:
    """The standard deviation that is left of the sampler's noise, as `linear_sampler.noise_left`.

    Args:
      k: Of every step.
      variance: Of the rest, at every step.
      rows: Of the sampler, with `noise_std` and `prediction_gain`; where the variance is learned
        `noise_std` is a factor, and what is left is unknown here.
    """
    absorbed = absorbed_variance(rows["prediction_gain"], k, variance)
    return np.sqrt(np.maximum(rows["noise_std"] ** 2 - absorbed, 0))


def _decibels(signal: float, noise: float) -> float:
    ratio = 10 * np.log10(signal / noise) if signal > 0 and noise > 0 else np.inf
    return round(float(np.clip(ratio, -_LOGGED, _LOGGED)), 3)
