"""Which choice for which layer, so that the sum of costs is least within a budget.

Layer l takes one of its choices k, at a cost `c[l, k]` and a size `n[l, k]`:

    minimise    sum_lk  c[l, k] z[l, k]
    subject to  sum_k   z[l, k] = 1 for every l,     z[l, k] in {0, 1}
                sum_lk  n[l, k] z[l, k] <= budget

which is a knapsack of multiple choice. It is solved exactly, as an integer programme, by the
branch and bound of HiGHS (`scipy.optimize.milp`); a greedy solution is where it begins and what
it is checked against. Costs add up where they are powers of independent noise, as the ratios
of noise to signal of single layers are (`sensitivity.py`).

References:
  Huangfu and Hall, Parallelizing the dual revised simplex method, 2018,
  https://arxiv.org/abs/1503.01889 (HiGHS); Sinha and Zoltners, The Multiple-Choice Knapsack
  Problem, 1979; Zhao et al., MixDQ, 2024, https://arxiv.org/abs/2405.17873 (bits of layers by an
  integer programme over their sensitivities).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, sparse

from qjax.core.typing import Float, Int

__all__ = ["Allocation", "allocate", "allocate_greedily", "allocate_mean_bits"]

NODES = 100_000
"""Nodes of the search tree after which the best that was found is taken: a count and not a time,
so that the answer is the same on every machine."""

_SCALE = 1e3  # of the objective: HiGHS stops at an absolute gap of 1e-6
_ATTEMPTS = 8


class Allocation(NamedTuple):
    """One choice for every layer.

    Attributes:
      chosen: Number of the choice of every layer.
      cost: Sum of the costs.
      size: Sum of the sizes, at most the budget.
      optimal: Whether no other choice within the budget costs less; unknown where False.
    """

    chosen: Int[np.ndarray, " l"]
    cost: float
    size: float
    optimal: bool


def allocate(
    costs: Float[np.ndarray, "l k"], sizes: Float[np.ndarray, "l k"], *, budget: float
) -> Allocation:
    """The choices of least total cost whose sizes sum to at most `budget`.

    Args:
      costs: What every choice of every layer costs; finite, of either sign.
      sizes: What it takes, in the unit of the budget (bytes, or bits).
      budget: Most that all together may take.

    Raises:
      ValueError: If the shapes differ, a number is not finite, or the budget is less than the
        smallest choices of all layers take; the error names what they take.
    """
    costs, sizes = _checked(costs, sizes, budget)
    best = _best_of_simple(costs, sizes, budget)
    # What is left once every layer has its smallest choice, and what every choice loses to the
    # layer's cheapest. A choice that alone takes or loses too much is none.
    extra = sizes - sizes.min(axis=1, keepdims=True)
    loss = costs - costs.min(axis=1, keepdims=True)
    room = float(budget - sizes.min(axis=1).sum())
    most = _of(best.chosen, loss)
    if most <= 0:
        return best._replace(optimal=True)
    possible = (loss <= most * (1 + 1e-9)) & (extra <= room)
    limit = room
    for _ in range(_ATTEMPTS):
        chosen, optimal = _solve(loss / most, extra / (room or 1.0), possible, limit / (room or 1))
        if chosen is None:
            break
        found = _allocation(chosen, costs, sizes, optimal=optimal and limit == room)
        if found.size <= budget:
            return found if found.cost <= best.cost else best._replace(optimal=found.optimal)
        # The solver keeps to its constraints within 1e-6; what it took too much is taken off.
        limit -= 2 * (found.size - budget)
    return best


def allocate_mean_bits(
    costs: Float[np.ndarray, "l k"],
    counts: Int[np.ndarray, " l"],
    bits: Sequence[int],
    *,
    mean_bits: float,
) -> Allocation:
    """The bits of least total cost whose mean over all weights is at most `mean_bits`.

    Args:
      costs: What every width costs every layer.
      counts: Weights of every layer.
      bits: The widths, the same for all layers.
      mean_bits: Most that the mean, weighted by `counts`, may be.

    Returns:
      The allocation; its size is in bits.

    Raises:
      ValueError: As `allocate`; a mean below the fewest bits is named as such.
    """
    if not mean_bits >= min(bits):
        raise ValueError(
            f"mean_bits must be at least {min(bits)}, the fewest bits of the choices "
            f"{tuple(bits)}; got {mean_bits}. Raise it, or add a choice of fewer bits."
        )
    weights = np.asarray(counts, np.int64)
    sizes = weights[:, None] * np.asarray(bits, np.int64)
    # Sums of whole bits: what a product of floats falls short by is none.
    most = np.floor(mean_bits * int(weights.sum()) * (1 + 1e-12))
    return allocate(costs, sizes, budget=float(most))


def allocate_greedily(
    costs: Float[np.ndarray, "l k"], sizes: Float[np.ndarray, "l k"], *, budget: float
) -> Allocation:
    """From the smallest choices up, always the step that saves most for what it takes.

    Within the budget, but not always the best; `allocate` is.

    Raises:
      ValueError: As `allocate`.
    """
    costs, sizes = _checked(costs, sizes, budget)
    rows = np.arange(len(costs))
    smallest = sizes == sizes.min(axis=1, keepdims=True)
    chosen = np.argmin(np.where(smallest, costs, np.inf), axis=1)
    while True:
        taken = sizes[rows, chosen]
        saved = costs[rows, chosen][:, None] - costs
        more = sizes - taken[:, None]
        fits = (saved > 0) & (taken.sum() + more <= budget)
        if not fits.any():
            return _allocation(chosen, costs, sizes, optimal=False)
        # What saves and takes nothing comes first.
        worth = np.divide(saved, more, out=np.full_like(saved, np.inf), where=more > 0)
        layer, choice = np.unravel_index(np.argmax(np.where(fits, worth, -np.inf)), worth.shape)
        chosen[layer] = choice


def _best_of_simple(costs: np.ndarray, sizes: np.ndarray, budget: float) -> Allocation:
    """The greedy solution, or one choice for all layers where that is cheaper and fits."""
    found = [allocate_greedily(costs, sizes, budget=budget)]
    for k in range(costs.shape[1]):
        same = _allocation(np.full(len(costs), k), costs, sizes, optimal=False)
        if same.size <= budget:
            found.append(same)
    return min(found, key=lambda one: one.cost)


def _solve(
    loss: np.ndarray, extra: np.ndarray, possible: np.ndarray, limit: float
) -> tuple[np.ndarray | None, bool]:
    """The solver's choices, None without any, and whether it has proved them best."""
    layers, choices = loss.shape
    one_each = sparse.kron(sparse.eye(layers), np.ones((1, choices)), format="csr")
    size = sparse.csr_array(np.where(possible, extra, 0.0).reshape(1, -1))
    result = optimize.milp(
        _SCALE * np.where(possible, loss, 0.0).ravel(),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(size, -np.inf, limit),
        ],
        integrality=np.ones(layers * choices),
        bounds=optimize.Bounds(0, possible.ravel().astype(np.float64)),
        options={"mip_rel_gap": 0.0, "node_limit": NODES},
    )
    if result.x is None:
        return None, False
    return np.argmax(result.x.reshape(loss.shape), axis=1), result.status == 0


def _checked(costs: np.ndarray, sizes: np.ndarray, budget: float) -> tuple[np.ndarray, np.ndarray]:
    costs, sizes = np.asarray(costs, np.float64), np.asarray(sizes, np.float64)
    if costs.ndim != 2 or costs.shape != sizes.shape or not costs.size:
        raise ValueError(
            f"costs and sizes must both be [layers, choices]; got {costs.shape} and {sizes.shape}."
        )
    if not (np.isfinite(costs).all() and np.isfinite(sizes).all()):
        wrong = np.flatnonzero(~(np.isfinite(costs) & np.isfinite(sizes)).all(axis=1))
        raise ValueError(
            f"costs and sizes must be finite; those of layers {wrong[:5].tolist()} are not. Leave "
            "out the choices that cannot be measured."
        )
    least = sizes.min(axis=1).sum()
    if not budget >= least:
        raise ValueError(
            f"the budget must be at least {least:,.10g}, what the smallest choices of all layers "
            f"take; got {budget:,.10g}. Raise it, or add smaller choices."
        )
    return costs, sizes


def _of(chosen: np.ndarray, table: np.ndarray) -> float:
    return float(table[np.arange(len(table)), chosen].sum())


def _allocation(
    chosen: np.ndarray, costs: np.ndarray, sizes: np.ndarray, *, optimal: bool
) -> Allocation:
    return Allocation(chosen, _of(chosen, costs), _of(chosen, sizes), optimal)
