"""Elitist evolutionary search of group sizes under a budget, resumable to the same winner.

The paper's algorithm 1: a population is drawn at random, the K best of all that were ever
evaluated are kept, and every generation makes new candidates of them, half by crossover and
half by mutation. The last generation is ranked, too. Uniform group sizes that fit the budget
are in the first population, so no winner is worse than they on the search's own noise.

A search that picks the least of hundreds of noisy numbers picks luck as well (Frechet distances
of 800 pictures differ by more than candidates do), so the best are evaluated once more on
noise that the search has not seen, and the winner is the best of that.

Candidates depend on the seed, the generation and their number, and on what was ranked before;
every generation is a part of the stage's work. A search that is killed goes on after the last
generation that was finished, with the same numbers.

References:
  Chen et al., Q-DiT, CVPR 2025, https://arxiv.org/abs/2406.17343, algorithm 1; the settings are
  those of its released program; Guo et al., Single Path One-Shot Neural Architecture Search,
  2020, https://arxiv.org/abs/1904.00420 (the search that it follows).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from qjax.calibrate.genome import (
    Budget,
    Genome,
    Space,
    crossover,
    generator,
    mutation,
    random_genome,
)
from qjax.calibrate.work import Work
from qjax.core.typing import Array, Float, Int

__all__ = [
    "Evaluated",
    "EvolutionSettings",
    "Objective",
    "evaluate",
    "evolve",
    "front",
    "ranking",
    "select",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvolutionSettings:
    """How the search goes; the defaults are the paper's.

    Attributes:
      population: Candidates of the first generation.
      keep: K: the best that new candidates are made of.
      crossovers: Candidates of every later generation by crossover.
      mutations: By mutation.
      mutation: Probability with which a mutation redraws a gene.
      generations: Generations after the first.
    """

    population: int = 50
    keep: int = 10
    crossovers: int = 25
    mutations: int = 25
    mutation: float = 0.1
    generations: int = 10

    def __post_init__(self):
        for name in ("population", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("crossovers", "mutations", "generations"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}.")
        if not 0 < self.mutation <= 1:
            raise ValueError(
                f"mutation must be a probability above 0, at most 1; got {self.mutation}."
            )

    @property
    def evaluations(self) -> int:
        """Candidates of all generations: 550 with the paper's settings."""
        return self.population + self.generations * (self.crossovers + self.mutations)


class Objective(Protocol):
    """What is minimised: one number for every genome, the same whenever it is asked for."""

    @property
    def at_once(self) -> int:
        """How many genomes are best evaluated together."""
        ...

    def __call__(self, genomes: Int[np.ndarray, "n l"]) -> Float[np.ndarray, " n"]:
        """The numbers of at most `at_once` genomes; a NaN counts as infinite."""
        ...


class Evaluated(NamedTuple):
    """Genomes with their numbers.

    Attributes:
      genomes: Different ones.
      fitness: What was found of each, float32; infinite for those that have no pictures.
    """

    genomes: Int[np.ndarray, "n l"]
    fitness: Float[np.ndarray, " n"]

    def joined(self, other: "Evaluated") -> "Evaluated":
        """Both, the genomes of `other` that are new behind."""
        known = {genome.tobytes() for genome in self.genomes}
        new = [i for i, genome in enumerate(other.genomes) if genome.tobytes() not in known]
        return Evaluated(
            np.concatenate([self.genomes, other.genomes[new]]),
            np.concatenate([self.fitness, other.fitness[new]]),
        )


def ranking(space: Space, found: Evaluated) -> Int[np.ndarray, " n"]:
    """Indices from the best to the worst; of equal ones the cheaper first, then by their genes."""
    keys = [
        (float(fitness), space.bitops(genome), tuple(genome.tolist()))
        for genome, fitness in zip(found.genomes, found.fitness, strict=True)
    ]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def evaluate(
    objective: Objective,
    genomes: Sequence[Genome],
    *,
    on_done: Callable[[Genome, float], None] | None = None,
) -> Evaluated:
    """What the objective says of different genomes.

    Args:
      objective: It.
      genomes: Of which equal ones are evaluated once.
      on_done: Progress: called with every genome and its number.
    """
    unique = np.stack(list({genome.tobytes(): genome for genome in genomes}.values()))
    found = []
    for start in range(0, len(unique), objective.at_once):
        part = unique[start : start + objective.at_once]
        # In float32, as it is kept: a run that reads it ranks as the one that wrote it.
        fitness = np.asarray(objective(part), np.float32)
        found.append(np.where(np.isnan(fitness), np.float32(np.inf), fitness))
        for genome, one in zip(part, found[-1], strict=True):
            if on_done is not None:
                on_done(genome, float(one))
    return Evaluated(unique, np.concatenate(found))


def evolve(
    space: Space,
    budget: Budget,
    objective: Objective,
    settings: EvolutionSettings,
    *,
    entropy: Sequence[int],
    work: Work,
    name: str = "search",
    share: tuple[float, float] = (0.0, 1.0),
) -> Evaluated:
    """All that was evaluated in the search, the best first.

    Args:
      space: Layers and their choices.
      budget: What a candidate may cost.
      objective: What is minimised.
      settings: How.
      entropy: The seed of all draws.
      work: Keeps the generations, and takes the log.
      name: Of the parts.
      share: Where the search begins and ends in the whole of the stage, for its progress.

    Raises:
      ValueError: If no group sizes fit the budget.
    """
    budget.check(space)
    found: Evaluated | None = None
    total, done = settings.evaluations, 0
    for generation in range(settings.generations + 1):
        before = found

        def make(
            generation: int = generation, before: Evaluated | None = before, done: int = done
        ) -> dict[str, Array]:
            children = _children(space, budget, settings, entropy, generation, before)
            known = {} if before is None else _known(before)
            new = [child for child in children if child.tobytes() not in known]
            ready = done + len(children) - len(new)

            def tell(genome: Genome, fitness: float) -> None:
                nonlocal ready
                ready += 1
                work.log(
                    "step",
                    part=f"{name}, generation {generation} of {settings.generations}: candidate",
                    step=ready,
                    steps=total,
                    share=round(share[0] + (share[1] - share[0]) * ready / total, 4),
                )
                log_candidate(work, space, genome, fitness, name=name, generation=generation)

            if not new:
                return {
                    "genomes": jnp.zeros((0, len(space.genes)), jnp.int32),
                    "fitness": jnp.zeros((0,), jnp.float32),
                }
            result = evaluate(objective, new, on_done=tell)
            return {"genomes": jnp.asarray(result.genomes), "fitness": jnp.asarray(result.fitness)}

        part = work.part(f"{name}-{generation}", make)
        new = Evaluated(np.asarray(part["genomes"]), np.asarray(part["fitness"]))
        found = new if found is None else found.joined(new)
        order = ranking(space, found)
        found = Evaluated(found.genomes[order], found.fitness[order])
        count = settings.population if generation == 0 else settings.crossovers + settings.mutations
        done += count
        work.log(
            "generation",
            search=name,
            generation=generation,
            generations=settings.generations,
            evaluated=len(found.genomes),
            best=_finite(found.fitness[0]),
            kept=_finite(found.fitness[min(settings.keep, len(found.fitness)) - 1]),
            bitops=space.bitops(found.genomes[0]),
        )
    assert found is not None
    return found


def select(
    space: Space,
    objective: Objective,
    finalists: Sequence[Genome],
    *,
    work: Work,
    share: tuple[float, float] = (0.0, 1.0),
) -> Evaluated:
    """Finalists by what a fresh objective says of them, the best first; a part of the work.

    Args:
      space: Layers and their choices.
      objective: On noise that the search has not seen.
      finalists: Genomes.
      work: Keeps the part, and takes the log.
      share: As in `evolve`.
    """

    total = len({genome.tobytes() for genome in finalists})

    def make() -> dict[str, Array]:
        ready = 0

        def tell(genome: Genome, fitness: float) -> None:
            nonlocal ready
            ready += 1
            work.log(
                "step",
                part="finalist",
                step=ready,
                steps=total,
                share=round(share[0] + (share[1] - share[0]) * ready / total, 4),
            )
            log_candidate(work, space, genome, fitness, name="fresh", generation=0)

        result = evaluate(objective, finalists, on_done=tell)
        return {"genomes": jnp.asarray(result.genomes), "fitness": jnp.asarray(result.fitness)}

    part = work.part("finalists", make)
    found = Evaluated(np.asarray(part["genomes"]), np.asarray(part["fitness"]))
    order = ranking(space, found)
    return Evaluated(found.genomes[order], found.fitness[order])


def front(cost: Float[np.ndarray, " n"], fitness: Float[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """Indices of the candidates that no other betters in both, by rising cost."""
    order = np.lexsort((fitness, cost))
    best, kept = np.inf, []
    for i in order:
        if fitness[i] < best:
            best = fitness[i]
            kept.append(int(i))
    return np.array(kept, np.int64)


def log_candidate(
    work: Work, space: Space, genome: Genome, fitness: float, *, name: str, generation: int
) -> None:
    """A line of the log for one evaluation, from which the front is drawn."""
    work.log(
        "candidate",
        search=name,
        generation=generation,
        fitness=_finite(fitness),
        bitops=space.bitops(genome),
        bytes=space.stored(genome),
        groups=" ".join(map(str, space.groups(genome).values())),
    )


def _children(
    space: Space,
    budget: Budget,
    settings: EvolutionSettings,
    entropy: Sequence[int],
    generation: int,
    before: Evaluated | None,
) -> list[Genome]:
    """The candidates of a generation, each from a generator of its own."""
    draw = lambda number: generator(*entropy, generation, number)
    children: list[Genome] = []
    if before is None:
        fitting = [one for one in space.uniforms().values() if budget.fits(space, one)]
        children += fitting[: settings.population]
        seen = _bytes(children)
        for number in range(len(children), settings.population):
            children.append(random_genome(space, budget, draw(number), seen=seen))
            seen.add(children[-1].tobytes())
        return children
    seen = set(_known(before))
    best = before.genomes[: settings.keep]
    for number in range(settings.crossovers + settings.mutations):
        rng = draw(number)
        if number < settings.crossovers:
            child = crossover(best, space, budget, rng, seen=seen)
        if number >= settings.crossovers or child.tobytes() in seen:
            # Parents that have grown alike have no new children but by mutation.
            child = mutation(best, space, budget, rng, probability=settings.mutation, seen=seen)
        seen.add(child.tobytes())
        children.append(child)
    return children


def _known(found: Evaluated) -> dict[bytes, float]:
    pairs = zip(found.genomes, found.fitness, strict=True)
    return {genome.tobytes(): float(fitness) for genome, fitness in pairs}


def _bytes(genomes: Sequence[Genome]) -> set[bytes]:
    return {genome.tobytes() for genome in genomes}


def _finite(fitness: float) -> float:
    """A number for JSON, which has none for infinity."""
    return float(np.clip(fitness, -3e38, 3e38))
