"""The search finds what is good, keeps the best, and goes on where it was killed."""

import numpy as np
import pytest

from qjax.calibrate.evolution import (
    Evaluated,
    EvolutionSettings,
    evaluate,
    evolve,
    front,
    ranking,
    select,
)
from qjax.calibrate.genome import Budget, Gene, Space
from qjax.calibrate.genome_objectives import LayerErrors, least_sum, measure_layers
from qjax.calibrate.work import Work

LAYERS = 12
CHOICES = (32, 64, 128, 192, 288)
SETTINGS = EvolutionSettings(population=12, keep=4, crossovers=6, mutations=6, generations=5)


@pytest.fixture(scope="module")
def space():
    rng = np.random.default_rng(3)
    macs = 1000 * rng.integers(1, 9, LAYERS)
    genes = [
        Gene(
            path=f"l{i}",
            macs=int(m),
            weight_bits=4,
            act_bits=8,
            float_ops=3,
            choices=CHOICES,
            stored=tuple(int(m // 2 + 2 * m // g) for g in CHOICES),
        )
        for i, m in enumerate(macs)
    ]
    return Space(tuple(genes))


@pytest.fixture(scope="module")
def table():
    """Errors that grow with the group size, not always, and at some layers far more."""
    rng = np.random.default_rng(4)
    weight = rng.exponential(1.0, (LAYERS, 1)) ** 2
    return weight * (np.array(CHOICES) ** 0.5 + rng.normal(0, 1, (LAYERS, len(CHOICES))))


class Counting:
    """An objective that counts, and may be stopped after some evaluations."""

    def __init__(self, table, at_once=1, stop=None):
        self.sums, self.at_once, self.stop = LayerErrors(table=table), at_once, stop
        self.seen = []

    def __call__(self, genomes):
        if self.stop is not None and len(self.seen) >= self.stop:
            raise KeyboardInterrupt
        assert len(genomes) <= self.at_once
        self.seen += [genome.tobytes() for genome in genomes]
        return self.sums(genomes)


def budget_of(space):
    return Budget(bitops=space.bitops(space.uniform(128)))


def searched(space, objective, *, seed=0, work=None, settings=SETTINGS, budget=None):
    return evolve(
        space,
        budget_of(space) if budget is None else budget,
        objective,
        settings,
        entropy=(seed, 17),
        work=Work() if work is None else work,
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_the_papers_settings_beat_uniform_sizes_and_chance(space, table, seed):
    objective, budget, settings = Counting(table), budget_of(space), EvolutionSettings()
    found = searched(space, objective, seed=seed, settings=settings)
    assert len(objective.seen) == len(set(objective.seen)) == settings.evaluations == 550
    assert all(budget.fits(space, genome) for genome in found.genomes)
    uniform = [one for one in space.uniforms().values() if budget.fits(space, one)]
    assert len(uniform) == 3  # 128 and larger
    best = found.fitness[0]
    assert best < 0.9 * LayerErrors(table=table)(np.stack(uniform)).min()
    alone = EvolutionSettings(population=550, generations=0)
    assert best < searched(space, Counting(table), seed=seed, settings=alone).fitness[0]
    genome, optimum, proved = least_sum(space, budget, table)
    assert proved and budget.fits(space, genome) and optimum <= best * (1 + 1e-6)
    assert best < 1.1 * optimum


def test_the_best_are_never_lost_and_the_last_generation_is_ranked(space, table):
    events = []
    found = searched(space, Counting(table), work=Work(on_event=events.append))
    best = [e["best"] for e in events if e["event"] == "generation"]
    assert best == sorted(best, reverse=True) and len(best) == 6
    seen = [e["fitness"] for e in events if e["event"] == "candidate"]
    assert found.fitness[0] == min(seen) and len(seen) == 72
    assert (np.diff(found.fitness) >= 0).all()
    last = [e["fitness"] for e in events if e["event"] == "candidate" and e["generation"] == 5]
    assert set(np.float32(last)) <= set(found.fitness)


def test_progress_has_a_share_that_rises_to_its_end(space, table):
    events = []
    searched(space, Counting(table, at_once=5), work=Work(on_event=events.append))
    shares = [e["share"] for e in events if e["event"] == "step"]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert all(e["steps"] == 72 for e in events if e["event"] == "step")


def test_a_search_killed_after_any_generation_resumes_to_the_same_winner(space, table, tmp_path):
    whole = searched(space, Counting(table))
    counts = [12 + 12 * g for g in range(6)]
    for number, stop in enumerate([5, *counts[:-1], 40]):
        folder = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt):
            searched(space, Counting(table, stop=stop), work=Work(folder))
        kept = len(list(folder.glob("search-*.safetensors")))
        assert kept == sum(count <= stop for count in counts)
        objective = Counting(table)
        again = searched(space, objective, work=Work(folder))
        np.testing.assert_array_equal(again.genomes, whole.genomes)
        np.testing.assert_array_equal(again.fitness, whole.fitness)
        assert len(objective.seen) == 72 - 12 * kept  # nothing twice but what was under way


def test_the_result_is_that_of_the_seed_whatever_is_evaluated_together(space, table):
    one, four = (searched(space, Counting(table, at_once=n)) for n in (1, 4))
    np.testing.assert_array_equal(one.genomes, four.genomes)
    other = searched(space, Counting(table), seed=1)
    assert other.genomes.tobytes() != one.genomes.tobytes()


def test_candidates_without_pictures_are_last_and_can_be_logged(space):
    class Broken:
        at_once = 1

        def __call__(self, genomes):
            finite = (genomes != 0).all(axis=1)
            return np.where(finite, genomes.sum(axis=1), np.nan)

    found = searched(space, Broken())
    assert np.isinf(found.fitness[-1]) and np.isfinite(found.fitness[0])


def test_a_space_smaller_than_the_population_is_searched_once(table):
    genes = [
        Gene(
            path=f"l{i}",
            macs=100,
            weight_bits=4,
            act_bits=8,
            float_ops=3,
            choices=(2, 4),
            stored=(2, 1),
        )
        for i in range(2)
    ]
    objective = Counting(table[:2, :2])
    found = searched(Space(tuple(genes)), objective, budget=Budget())
    assert len(found.genomes) == len(objective.seen) == 4


def test_an_infeasible_budget_is_an_error_before_anything_is_evaluated(space, table):
    objective = Counting(table)
    with pytest.raises(ValueError, match="these layers take from"):
        searched(space, objective, budget=Budget(bitops=1.0))
    assert not objective.seen


def test_finalists_are_judged_on_fresh_noise(space, table, tmp_path):
    found = searched(space, Counting(table))
    fresh = Counting(table[:, ::-1])
    chosen = select(space, fresh, list(found.genomes[:5]), work=Work(tmp_path))
    assert chosen.fitness[0] == LayerErrors(table=table[:, ::-1])(found.genomes[:5]).min()
    again = select(space, Counting(table, stop=0), list(found.genomes[:5]), work=Work(tmp_path))
    np.testing.assert_array_equal(again.genomes, chosen.genomes)


def test_equals_are_ranked_by_cost(space):
    genomes = np.stack([space.uniform(g) for g in (32, 128, 64)])
    order = ranking(space, Evaluated(genomes, np.float32([1, 1, 0])))
    assert order.tolist() == [2, 1, 0]


def test_equal_genomes_are_evaluated_once(space, table):
    objective = Counting(table)
    found = evaluate(objective, [space.coarsest, space.finest, space.coarsest])
    assert len(objective.seen) == len(found.genomes) == 2


def test_the_front_has_what_nothing_betters_in_both():
    cost, fitness = np.array([3.0, 1, 2, 2, 4]), np.array([1.0, 5, 3, 4, 1])
    assert front(cost, fitness).tolist() == [1, 2, 0]


def test_layers_are_measured_at_every_choice_of_theirs(space, table):
    rows = np.arange(LAYERS)
    np.testing.assert_array_equal(measure_layers(space, lambda g: table[rows, g]), table)


def test_an_integer_programme_has_one_budget(space, table):
    with pytest.raises(ValueError, match="has one budget; got 1 BitOps and 2 bytes"):
        least_sum(space, Budget(bitops=1, stored=2), table)
    most = space.stored(space.uniform(192))
    genome, _, proved = least_sum(space, Budget(stored=most), table)
    assert proved and space.stored(genome) <= most


def test_settings_that_make_no_sense_are_refused():
    assert EvolutionSettings().evaluations == 550
    for changes, said in [
        ({"population": 0}, "population must be at least 1"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"mutations": -1}, "mutations must be at least 0"),
        ({"mutation": 0.0}, "probability above 0"),
    ]:
        with pytest.raises(ValueError, match=said):
            EvolutionSettings(**changes)
