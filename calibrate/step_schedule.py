"""Which bits at which step: a schedule for the inputs of a network's layers.

All layers share the bits of a step, and the weights are the same at all of them (PTQD). With
`c[t, b]` the error that b bits at step t alone bring about, a schedule is chosen by one of

    budget    least sum of c, the mean of the bits being at most mean_bits;
    bound     fewest bits in sum, the sum of c being at most max_error^2;
    ratio     at every step the fewest bits with  g_t^2 E|D_t,b|^2 <= margin^2 (1 - a'_t).

The first two are exact (`allocation.py`, an integer programme): errors of single steps are powers
of nearly independent noise, and add up. The third is local, in the units of the next sample: the
noise that quantization brings into it, `g` being the sampler's gain, against the noise that is
there by the schedule, `a'` being alpha_bar at the next step, and that later steps will remove.
It falls to 0 at the end, where the most bits are taken.

The paper's rule, the fewest bits with `SNR_Q(t) > SNR_F(t)`, compares a ratio of norms with a
ratio of powers, and does not give the switch points that it reports; both the unit-consistent
criterion above and the budgets are ours.

References:
  He et al., PTQD, NeurIPS 2023, https://arxiv.org/abs/2305.10657, section 3.5.
"""

from collections.abc import Sequence

import numpy as np

from qjax.calibrate.allocation import allocate, allocate_mean_bits
from qjax.core.typing import Float

__all__ = ["bounded_schedule", "budget_schedule", "ratio_schedule"]


def budget_schedule(
    costs: Float[np.ndarray, "s k"], choices: Sequence[int], *, mean_bits: float
) -> list[int]:
    """The bits of every step with the least sum of costs within a mean.

    Args:
      costs: Error of every choice at every step alone, in powers.
      choices: Bits.
      mean_bits: Most that their mean over the steps may be.

    Raises:
      ValueError: If `mean_bits` is less than the fewest bits.
    """
    alike = np.ones(len(costs), np.int64)
    found = allocate_mean_bits(costs, alike, choices, mean_bits=mean_bits)
    return [int(choices[k]) for k in found.chosen]


def bounded_schedule(
    costs: Float[np.ndarray, "s k"], choices: Sequence[int], *, max_error: float
) -> list[int]:
    """The fewest bits in sum whose costs add up to at most `max_error^2`.

    Args:
      costs: As there.
      choices: As there.
      max_error: Square root of the largest sum, a relative L2 error.

    Raises:
      ValueError: If the best choices of all steps have more.
    """
    least = float(costs.min(axis=1).sum())
    if not max_error**2 >= least:
        raise ValueError(
            f"max_error must be at least {least**0.5:.4g}, what the best of the choices "
            f"{tuple(choices)} leave at all steps; got {max_error}."
        )
    sizes = np.tile(np.asarray(choices, np.float64), (len(costs), 1))
    found = allocate(sizes, costs, budget=max_error**2)
    return [int(choices[k]) for k in found.chosen]


def ratio_schedule(
    noise: Float[np.ndarray, "s k"],
    gain: Float[np.ndarray, " s"],
    left: Float[np.ndarray, " s"],
    choices: Sequence[int],
    *,
    margin: float,
) -> list[int]:
    """At every step the fewest bits whose noise in the next sample is small against its own.

    Args:
      noise: Mean square of the answer's noise, of every choice at every step.
      gain: Derivative of the next sample by the answer.
      left: `1 - alpha_bar` at the next step.
      choices: Bits.
      margin: Largest ratio of the standard deviations; where none is below the most bits.
    """
    order = np.argsort(choices)
    schedule = []
    for powers, g, room in zip(noise, gain, left, strict=True):
        fitting = [k for k in order if g**2 * powers[k] <= margin**2 * room]
        schedule.append(int(choices[fitting[0] if fitting else order[-1]]))
    return schedule
