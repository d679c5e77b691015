"""Allocation of choices under a budget: exact, within it, and clear where nothing fits."""

import itertools

import numpy as np
import pytest
from scipy import optimize

from qjax.calibrate import allocation
from qjax.calibrate.allocation import allocate, allocate_greedily, allocate_mean_bits

BITS = (2, 3, 4, 8)


def instance(seed: int, layers: int = 6) -> tuple[np.ndarray, np.ndarray, float]:
    """Costs over eight decades that fall with the bits, sizes of layers, and a budget."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5000, layers)
    falls = np.cumsum(rng.uniform(0.2, 2, (layers, len(BITS))), axis=1)
    costs = 10.0 ** (-rng.uniform(0, 6, (layers, 1)) - falls)
    sizes = counts[:, None] * np.array(BITS)
    least, most = sizes.min(axis=1).sum(), sizes.max(axis=1).sum()
    return costs, sizes.astype(np.float64), float(rng.integers(least, most))


def brute_force(costs: np.ndarray, sizes: np.ndarray, budget: float) -> float:
    """The least cost of all choices within the budget."""
    rows = np.arange(len(costs))
    chosen = np.array(list(itertools.product(range(costs.shape[1]), repeat=len(costs))))
    fits = sizes[rows, chosen].sum(axis=1) <= budget
    return float(costs[rows, chosen].sum(axis=1)[fits].min())


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_within_the_budget_costs_less(seed):
    costs, sizes, budget = instance(seed)
    found = allocate(costs, sizes, budget=budget)
    assert found.cost == pytest.approx(brute_force(costs, sizes, budget), rel=1e-6)
    assert found.optimal and found.size <= budget


@pytest.mark.parametrize("seed", range(12))
def test_what_is_reported_is_what_was_chosen(seed):
    costs, sizes, budget = instance(seed, layers=30)
    rows = np.arange(30)
    for solve in (allocate, allocate_greedily):
        found = solve(costs, sizes, budget=budget)
        assert found.cost == pytest.approx(costs[rows, found.chosen].sum(), rel=1e-12)
        assert found.size == sizes[rows, found.chosen].sum() <= budget


@pytest.mark.parametrize("seed", range(12))
def test_greedy_is_close_and_never_better(seed):
    costs, sizes, budget = instance(seed, layers=60)
    best = allocate(costs, sizes, budget=budget).cost
    greedy = allocate_greedily(costs, sizes, budget=budget).cost
    assert best * (1 - 1e-9) <= greedy <= 2 * best


def test_greedy_can_be_worse_which_is_why_it_is_not_used_alone():
    # The small step is worth more for its size, and leaves no room for the large one.
    costs = np.array([[3.0, 0.0], [10.0, 0.0]])
    sizes = np.array([[0.0, 2.0], [0.0, 10.0]])
    assert allocate_greedily(costs, sizes, budget=10).cost == 10.0
    assert allocate(costs, sizes, budget=10).cost == 3.0


def test_uniform_bits_are_within_the_budget_of_their_own_mean():
    costs, sizes, _ = instance(0)
    counts = sizes[:, 0].astype(int) // BITS[0]
    for k, bits in enumerate(BITS):
        found = allocate_mean_bits(costs, counts, BITS, mean_bits=bits)
        assert found.cost <= costs[:, k].sum()
        assert found.size <= bits * counts.sum()


def test_a_budget_for_all_takes_the_cheapest_of_each():
    costs, sizes, _ = instance(1)
    found = allocate(costs, sizes, budget=sizes.max(axis=1).sum())
    np.testing.assert_array_equal(found.chosen, np.argmin(costs, axis=1))
    assert found.optimal


def test_a_budget_of_the_least_takes_the_smallest_of_each():
    costs, sizes, _ = instance(2)
    found = allocate(costs, sizes, budget=sizes.min(axis=1).sum())
    np.testing.assert_array_equal(found.chosen, np.zeros(len(costs)))


def test_among_choices_of_one_size_the_cheapest_is_taken():
    costs = np.array([[2.0, 1.0, 3.0], [5.0, 6.0, 4.0]])
    found = allocate(costs, np.ones_like(costs), budget=2)
    assert found.chosen.tolist() == [1, 2] and found.cost == 5.0


def test_costs_that_are_the_same_everywhere_need_no_search():
    found = allocate(np.zeros((3, 2)), np.array([[1.0, 2.0]] * 3), budget=4)
    assert found.optimal and found.size <= 4


def test_a_solver_that_takes_too_much_is_asked_again_with_less(monkeypatch):
    costs, sizes, budget = instance(3)
    solve, limits = optimize.milp, []

    def generous(c, *, constraints, **settings):
        one_each, size = constraints
        limits.append(size.ub.item())
        wider = optimize.LinearConstraint(size.A, -np.inf, 1.02 * size.ub)
        return solve(c, constraints=[one_each, wider], **settings)

    monkeypatch.setattr(allocation.optimize, "milp", generous)
    found = allocate(costs, sizes, budget=budget)
    assert found.size <= budget and limits == sorted(limits, reverse=True)


def test_a_search_without_an_end_gives_what_the_greedy_one_has_found(monkeypatch):
    costs, sizes, budget = instance(4)
    nothing = optimize.OptimizeResult(x=None, status=1)
    monkeypatch.setattr(allocation.optimize, "milp", lambda *_, **__: nothing)
    found = allocate(costs, sizes, budget=budget)
    assert found.cost <= allocate_greedily(costs, sizes, budget=budget).cost
    assert not found.optimal


def test_hundreds_of_layers_take_no_time():
    costs, sizes, _ = instance(5, layers=400)
    counts = sizes[:, 0].astype(int) // BITS[0]
    found = allocate_mean_bits(costs, counts, BITS, mean_bits=4.1)
    assert found.optimal and found.size <= 4.1 * counts.sum()


def test_a_budget_that_nothing_fits_names_what_does():
    costs, sizes, _ = instance(6)
    least = int(sizes.min(axis=1).sum())
    with pytest.raises(ValueError, match=f"at least {least:,}, .*got {least - 1:,}"):
        allocate(costs, sizes, budget=least - 1)
    with pytest.raises(ValueError, match="at least 2, the fewest bits of the choices .*got 1.5"):
        allocate_mean_bits(costs, np.ones(6, int), BITS, mean_bits=1.5)


def test_tables_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"\[layers, choices\]; got \(2, 3\) and \(3, 2\)"):
        allocate(np.ones((2, 3)), np.ones((3, 2)), budget=1)
    with pytest.raises(ValueError, match=r"those of layers \[1\] are not"):
        allocate(np.array([[1.0], [np.inf]]), np.ones((2, 1)), budget=9)
