"""Genomes of the granularity search: a group size for every layer, its cost, and its budget.

A genome g has one gene for every quantized layer l: the number of one of the group sizes that
divide the layer's input channels. Weights and activations of the layer share it. What it costs
is counted twice:

    BitOps   B(g) = sum_l  m_l (b_w b_a + 32 c / g_l)
    bytes    S(g) = sum_l  stored bytes of the layer's kernel: packed integers, scales, zero points

where m_l are the layer's multiplications in one evaluation of the network for one item (n d_in
d_out for n tokens), b_w and b_a the bits of its weights and inputs, and every group ends in c
float operations of 32 bits for each output. So the cost of a layer counts by the layer's size,
it is the sum over layers, and it falls as groups grow. The paper names a budget of BitOps
without a formula; the authors' program asks for an unweighted mean of the group sizes of 128.
This formula is ours.

Operators are the paper's: genes drawn evenly, a gene from either parent with probability 1/2,
a gene redrawn with probability 0.1, and candidates beyond the budget drawn again. Each call
has a generator of its own, seeded by the run, the generation and the candidate's number: a
search that goes on after it was killed draws what it would have drawn.

References:
  Chen et al., Q-DiT, CVPR 2025, https://arxiv.org/abs/2406.17343, algorithm 1.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from qjax.core.typing import Float, Int

__all__ = [
    "Budget",
    "Gene",
    "Space",
    "crossover",
    "float_operations",
    "generator",
    "group_choices",
    "mutation",
    "random_genome",
]

PAPER_CHOICES = (32, 64, 128, 192, 288)
"""Group sizes of the paper; all divide the 1152 and 4608 channels of DiT-XL/2, whose multiples
they are."""

DIVISOR_STEP = 16
"""Where all divisors are allowed: multiples of it, below which int8 matmuls have no use of a
group."""

TRIES = 100
"""Draws of a candidate until it fits the budget and is new; then the last one is made to fit."""

Genome = Int[np.ndarray, " l"]


def float_operations(*, weight_symmetric: bool, act_symmetric: bool | None) -> int:
    """c: float operations that end a group for one output.

    The sum of integers is multiplied with both scales and added: 3. A zero point, of weights or
    of inputs, adds a multiplication with the sum of the other side's integers, and an addition.

    Args:
      weight_symmetric: Whether weights have no zero point.
      act_symmetric: The same of inputs; None where they are float: one scale, 2 operations.
    """
    if act_symmetric is None:
        return 2 + 2 * (not weight_symmetric)
    return 3 + 2 * (not weight_symmetric) + 2 * (not act_symmetric)


def group_choices(channels: int, choices: Sequence[int] | None) -> tuple[int, ...]:
    """The group sizes that a layer may have, the finest first; empty if none divides.

    Args:
      channels: Its input channels.
      choices: Group sizes to choose from; None: all multiples of 16 that divide.
    """
    candidates = range(DIVISOR_STEP, channels + 1, DIVISOR_STEP) if choices is None else choices
    return tuple(sorted({g for g in candidates if g <= channels and channels % g == 0}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gene:
    """One layer of the search.

    Attributes:
      path: The layer's, keys joined with `/`, without `/kernel`.
      macs: Multiplications in one evaluation of the network for one item.
      weight_bits: b_w.
      act_bits: b_a; 16 where the input stays in float.
      float_ops: c (`float_operations`).
      choices: Group sizes, the finest first.
      stored: Bytes of the kernel at each of them.
    """

    path: str
    macs: int
    weight_bits: int
    act_bits: int
    float_ops: int
    choices: tuple[int, ...]
    stored: tuple[int, ...]

    def __post_init__(self):
        if not self.choices or list(self.choices) != sorted(set(self.choices)):
            raise ValueError(
                f"choices must be one or more group sizes, the finest first; {self.path} has "
                f"{self.choices}."
            )
        if len(self.stored) != len(self.choices) or self.macs < 1:
            raise ValueError(
                "stored must have a number for every choice and macs be at least 1; "
                f"{self.path} has {self.stored}, {self.choices} and {self.macs}."
            )

    @property
    def bitops(self) -> tuple[float, ...]:
        """BitOps at each of the group sizes."""
        plain = self.weight_bits * self.act_bits
        return tuple(self.macs * (plain + 32 * self.float_ops / g) for g in self.choices)


@dataclasses.dataclass(frozen=True)
class Space:
    """All genomes: the layers, in the order of a genome's genes."""

    genes: tuple[Gene, ...]

    @functools.cached_property
    def counts(self) -> Int[np.ndarray, " l"]:
        """How many choices every layer has."""
        return np.array([len(gene.choices) for gene in self.genes], np.int64)

    @functools.cached_property
    def bitops_table(self) -> Float[np.ndarray, "l k"]:
        """BitOps of every layer at every choice; a layer's last one fills up its row."""
        return _table([gene.bitops for gene in self.genes])

    @functools.cached_property
    def stored_table(self) -> Float[np.ndarray, "l k"]:
        """Bytes, likewise."""
        return _table([gene.stored for gene in self.genes])

    @property
    def coarsest(self) -> Genome:
        """The genome of least BitOps and bytes."""
        return (self.counts - 1).astype(np.int32)

    @property
    def finest(self) -> Genome:
        """The genome of most."""
        return np.zeros(len(self.genes), np.int32)

    def bitops(self, genome: Genome) -> float:
        """B(g)."""
        return _of(self.bitops_table, genome)

    def stored(self, genome: Genome) -> int:
        """S(g)."""
        return int(_of(self.stored_table, genome))

    def groups(self, genome: Genome) -> dict[str, int]:
        """The group size of every layer, by path."""
        return {gene.path: gene.choices[int(k)] for gene, k in zip(self.genes, genome, strict=True)}

    def genome(self, groups: Mapping[str, int]) -> Genome:
        """The inverse of `groups`.

        Raises:
          ValueError: If a layer is missing, or a group size is not one of its choices.
        """
        wrong = [
            f"{gene.path}: {groups.get(gene.path)} (of {gene.choices})"
            for gene in self.genes
            if groups.get(gene.path) not in gene.choices
        ]
        if wrong:
            raise ValueError(f"groups must be choices of all layers; got {', '.join(wrong[:5])}.")
        return np.array([gene.choices.index(groups[gene.path]) for gene in self.genes], np.int32)

    def uniform(self, group_size: int) -> Genome:
        """All layers at one group size; where it is no choice at the next finer, or the finest."""
        below = [sum(g <= group_size for g in gene.choices) for gene in self.genes]
        return np.array([max(n - 1, 0) for n in below], np.int32)

    def uniforms(self) -> dict[int, Genome]:
        """The uniform genomes of all group sizes that are a choice of some layer, different ones."""
        sizes = sorted({g for gene in self.genes for g in gene.choices})
        found: dict[bytes, tuple[int, Genome]] = {}
        for size in sizes:
            genome = self.uniform(size)
            found.setdefault(genome.tobytes(), (size, genome))
        return dict(found.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Most that a genome may cost.

    Attributes:
      bitops: BitOps of one evaluation for one item; None for no limit.
      stored: Bytes of all layers of the search; None for no limit.
    """

    bitops: float | None = None
    stored: float | None = None

    def fits(self, space: Space, genome: Genome) -> bool:
        """Whether a genome is within the budget."""
        return all(cost(genome) <= most * (1 + 1e-12) for _, cost, most in self._limits(space))

    def check(self, space: Space) -> None:
        """That some genome fits.

        Raises:
          ValueError: If none does; it says from where to where the costs of genomes reach.
        """
        for unit, cost, most in self._limits(space):
            least, largest = cost(space.coarsest), cost(space.finest)
            if not most >= least:
                raise ValueError(
                    f"no group sizes fit the budget of {most:,.10g} {unit}: these layers take "
                    f"from {least:,.10g}, all groups as large as the choices allow, to "
                    f"{largest:,.10g}, all as small. Raise it, or add larger group sizes."
                )

    def _limits(self, space: Space) -> list[tuple[str, Callable[[Genome], float], float]]:
        limits = [("BitOps", space.bitops, self.bitops), ("bytes", space.stored, self.stored)]
        return [(unit, cost, most) for unit, cost, most in limits if most is not None]


def generator(*entropy: int) -> np.random.Generator:
    """The generator of one draw: of the run's seed, the generation and the candidate's number."""
    return np.random.default_rng(entropy)


def random_genome(
    space: Space,
    budget: Budget,
    rng: np.random.Generator,
    *,
    seen: Collection[bytes] = (),
) -> Genome:
    """A genome within the budget, every gene drawn evenly from its choices.

    Args:
      space: The layers.
      budget: Its limits; `check` has passed.
      rng: Source of the draws.
      seen: Genomes, as bytes, that are known already: another is drawn, as long as there are
        tries left.
    """
    return _fitting(lambda: _even(space, rng), space, budget, rng, seen)


def crossover(
    parents: Int[np.ndarray, "n l"],
    space: Space,
    budget: Budget,
    rng: np.random.Generator,
    *,
    seen: Collection[bytes] = (),
) -> Genome:
    """Every gene of either of two parents, with probability 1/2; else as `random_genome`."""

    def make() -> Genome:
        a, b = parents[rng.choice(len(parents), 2, replace=len(parents) < 2)]
        return np.where(rng.random(len(a)) < 0.5, a, b).astype(np.int32)

    return _fitting(make, space, budget, rng, seen)


def mutation(
    parents: Int[np.ndarray, "n l"],
    space: Space,
    budget: Budget,
    rng: np.random.Generator,
    *,
    probability: float = 0.1,
    seen: Collection[bytes] = (),
) -> Genome:
    """A parent's genes, each drawn again with that probability; else as `random_genome`."""

    def make() -> Genome:
        a = parents[rng.integers(len(parents))]
        return np.where(rng.random(len(a)) < probability, _even(space, rng), a).astype(np.int32)

    return _fitting(make, space, budget, rng, seen)


def _even(space: Space, rng: np.random.Generator) -> Genome:
    return rng.integers(space.counts).astype(np.int32)


def _fitting(
    make: Callable[[], Genome],
    space: Space,
    budget: Budget,
    rng: np.random.Generator,
    seen: Collection[bytes],
) -> Genome:
    """The first draw that fits and is new; else the last that fits; else the last, made to fit."""
    fitting = None
    for _ in range(TRIES):
        genome = make()
        if budget.fits(space, genome):
            fitting = genome
            if genome.tobytes() not in seen:
                break
    return _coarsened(genome, space, budget, rng) if fitting is None else fitting


def _coarsened(genome: Genome, space: Space, budget: Budget, rng: np.random.Generator) -> Genome:
    """The genome with single genes moved to the next coarser choice until it fits."""
    genome = genome.copy()
    while not budget.fits(space, genome):
        open_to = np.flatnonzero(genome < space.coarsest)
        assert open_to.size  # the coarsest fits: `Budget.check`
        genome[rng.choice(open_to)] += 1
    return genome


def _table(rows: Sequence[Sequence[float]]) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([[*row, *[row[-1]] * (width - len(row))] for row in rows], np.float64)


def _of(table: np.ndarray, genome: Genome) -> float:
    return float(table[np.arange(len(table)), genome].sum())
