"""Bits of the inputs step by step, as a stage: weights stay, rows of the step table change.

Every width of `choices` gets ranges of its own at every step, fitted layer by layer on the float
sampler's samples (the width that the layers have keeps the ranges that it has). A step takes the
rows of one width, integer range included, so a schedule is data: no other program, and the same
weights at all steps. How a schedule is chosen is told in `step_schedule.py`; what it saves is
counted in bit operations (`bit_operations.py`).

The error of b bits at step t alone is measured, and not modelled: the sampler runs with the most
bits at all steps but that one, from the same noise, and its last samples are compared with those
of the most bits throughout. With `cost="next"` it is the noise in the next sample, `g_t^2 E|D|^2`,
at the cost of a few such runs; it does not see what later steps make of it.

References:
  He et al., PTQD, NeurIPS 2023, https://arxiv.org/abs/2305.10657, section 3.5 (step-aware mixed
  precision: few bits at first, more at the end).
"""

import dataclasses
from typing import Literal

from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.ranges import Method
from qjax.calibrate.recipe import State
from qjax.calibrate.work import Work
from qjax.core.typing import PRNGKeyArray
from qjax.models.pipeline import Pipeline

__all__ = ["StepBits"]

WIDTHS = range(2, 9)
"""Bits of an input; it is stored in 8."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBits:
    """The stage of a recipe that gives every sampler step the bits of its inputs.

    One of `bits`, `mean_bits`, `max_error` and `margin` says how.

    Attributes:
      choices: Bits that a step may have.
      bits: Bits of every step, the first step first, of the choices; or those of the first steps,
        the last of which all other steps have.
      mean_bits: Most bits on average over the steps, which is a budget of bit operations.
      max_error: Largest relative L2 error of the last samples that fewer bits may bring about.
      margin: Largest ratio of the noise brought into the next sample to the noise there.
      steps: Steps of the sampler, those of its later use; None: not chosen yet, which `check`
        refuses.
      eta: Its share of fresh noise.
      guidance_scale: Weight of the guidance, that of the later use; None for none.
      data: What ranges and errors are taken on.
      ranges: How a range is found.
      cost: What `mean_bits` and `max_error` go by: the error of the `"last"` samples, or of the
        `"next"` one.
      batch: Items that run at once.
    """

    choices: tuple[int, ...] = (4, 8)
    bits: tuple[int, ...] | None = None
    mean_bits: float | None = None
    max_error: float | None = None
    margin: float | None = None
    steps: int | None = None
    eta: float = 0.0
    guidance_scale: float | None = None
    data: CalibrationSet = dataclasses.field(default_factory=lambda: CalibrationSet(items=32))
    ranges: Method = "mse"
    cost: Literal["last", "next"] = "last"
    batch: int = 64

    def __post_init__(self):
        object.__setattr__(self, "choices", tuple(sorted(set(self.choices))))
        if self.bits is not None:
            object.__setattr__(self, "bits", tuple(self.bits))
        given = ("bits", "mean_bits", "max_error", "margin")
        said = [name for name in given if getattr(self, name) is not None]
        if len(said) != 1:
            raise ValueError(
                f"a schedule is chosen by one of {', '.join(given)}; got {', '.join(said) or 'none'}."
            )
        if not self.choices or any(b not in WIDTHS for b in self.choices):
            raise ValueError(
                f"choices must be bits from {WIDTHS[0]} to {WIDTHS[-1]}; got {self.choices}."
            )
        if self.bits is not None and not (self.bits and set(self.bits) <= set(self.choices)):
            raise ValueError(f"bits must be of choices={self.choices}; got {self.bits}.")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1; got {self.batch}.")
        if self.mean_bits is not None and not self.mean_bits >= self.choices[0]:
            raise ValueError(
                f"mean_bits must be at least {self.choices[0]}, the fewest of the choices "
                f"{self.choices}; got {self.mean_bits}."
            )
        if self.max_error is not None and self.cost == "next":
            raise ValueError(
                "max_error is an error of the last samples, which cost='next' says nothing of. Use "
                "cost='last', or mean_bits."
            )
        for name, allowed in (("ranges", ("minmax", "mse")), ("cost", ("last", "next"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be {' or '.join(allowed)}; got {getattr(self, name)!r}."
                )

    def check(self, pipe: Pipeline) -> int:
        """The steps of the sampler, if all that can be told beforehand is in order.

        Raises:
          ValueError: If the steps are not chosen, are fewer than `bits`, or the calibration set
            does not suit the model.
        """
        if self.steps is None:
            raise ValueError(
                "bits are chosen for every step of the sampler, whose number is not chosen: give "
                "steps (on the command line --steps)."
            )
        calls = len(pipe.sampler.rows(self.steps, eta=self.eta)["t"])
        if self.bits is not None and len(self.bits) > calls:
            raise ValueError(f"the sampler has {calls} steps; got bits for {len(self.bits)}.")
        self.data.check(pipe)
        return self.steps

    def run(self, state: State, key: PRNGKeyArray, work: Work) -> State:
        """The state with rows of the chosen bits; a noise correction is left out, for it was
        fitted to others.

        Raises:
          ValueError: If no layer has ranges step by step, or the step table is of other steps.
        """
        from qjax.calibrate.step_bits_run import StepBitsRun  # it takes these settings

        return StepBitsRun(self, state, key, work).run()
