"""What a granularity search minimises: distances of pictures, errors of latents, or of layers.

| objective | what it is | costs |
|---|---|---|
| `PictureDistance` | Frechet distance of generated pictures in a feature net (the paper's FID) | a sampler's run of all pictures |
| `LatentError` | relative L2 distance of the final latents to the float model's, same noise | the same, of fewer items |
| `LayerErrors` | sum over layers of noise to signal of their outputs | nothing, once every layer was measured at every choice |

All candidates are evaluated on the same noise and labels, so differences are those of the
candidates and not of their draws (common random numbers). Errors of layers add up, so the best
sum within a budget is also an integer programme (`allocation.py`); the paper finds that both
choose worse than distances of pictures do.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate.allocation import allocate
from qjax.calibrate.genome import Budget, Genome, Space
from qjax.calibrate.genome_forward import Candidates
from qjax.calibrate.rollout import Items
from qjax.calibrate.similarity import load_feature_net
from qjax.core.metrics import FeatureStatistics, feature_statistics, frechet_distance
from qjax.core.places import local_path
from qjax.core.safetensors_io import open_tensors
from qjax.core.typing import Array, Float, Int
from qjax.models.features import penultimate
from qjax.models.pipeline import Pipeline

__all__ = [
    "Features",
    "LatentError",
    "LayerErrors",
    "PictureDistance",
    "Run",
    "least_sum",
    "load_features",
    "load_reference",
]

Features = Callable[[Float[np.ndarray, "b h w c"]], Float[np.ndarray, "b d"]]
"""`features(images)`: features of pictures in [0, 1]."""

REFERENCE = "reference.safetensors"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """The sampler's run that all candidates are put through.

    Attributes:
      items: Noise, and what the network is told.
      rows: Of the sampler.
      guidance_scale: Weight of the guidance; None for none.
      batch: Items that run at once.
    """

    items: Items
    rows: Mapping[str, np.ndarray]
    guidance_scale: Array | None
    batch: int

    def latents(self, candidates: Candidates, genomes: Int[np.ndarray, "n l"]):
        """The last samples of every genome, batch by batch, `[n, b, h, w, c]`."""
        return candidates.draw(
            genomes,
            self.items,
            self.rows,
            guidance_scale=self.guidance_scale,
            batch=self.batch,
        )

    def plain(self, candidates: Candidates) -> Float[np.ndarray, "b h w c"]:
        """The last samples of a network without genes."""
        nothing = np.zeros((candidates.at_once, 0), np.int32)
        return np.concatenate([part[0] for part in self.latents(candidates, nothing)])


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PictureDistance:
    """Frechet distance of the pictures' features to a reference.

    Attributes:
      candidates: What is drawn.
      run: Of which noise.
      pipe: Makes pictures of latents.
      features: What they are compared by.
      reference: Of the pictures they should be like.
    """

    candidates: Candidates
    run: Run
    pipe: Pipeline
    features: Features
    reference: FeatureStatistics

    @property
    def at_once(self) -> int:
        """Candidates that the devices draw together."""
        return self.candidates.at_once

    def __call__(self, genomes: Int[np.ndarray, "n l"]) -> Float[np.ndarray, " n"]:
        """The distances; infinite where pictures are not finite."""
        found: list[list[np.ndarray]] = [[] for _ in genomes]
        for part in self.run.latents(self.candidates, genomes):
            for number, latents in enumerate(part):
                found[number].append(picture_features(self.pipe, self.features, latents))
        return np.array([self._distance(np.concatenate(parts)) for parts in found], np.float32)

    def _distance(self, features: np.ndarray) -> float:
        if not np.isfinite(features).all():
            return np.inf
        return frechet_distance(features, self.reference).value


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LatentError:
    """Relative L2 distance of the last samples to those of the float network.

    Attributes:
      candidates: What is drawn.
      run: Of which noise.
      reference: The float network's samples of the same noise.
    """

    candidates: Candidates
    run: Run
    reference: Float[np.ndarray, "b h w c"]

    @property
    def at_once(self) -> int:
        """Candidates that the devices draw together."""
        return self.candidates.at_once

    def __call__(self, genomes: Int[np.ndarray, "n l"]) -> Float[np.ndarray, " n"]:
        """The distances."""
        noise, start = np.zeros(len(genomes)), 0
        for part in self.run.latents(self.candidates, genomes):
            there = self.reference[start : start + part.shape[1]].astype(np.float64)
            noise += np.sum((part - there) ** 2, axis=(1, 2, 3, 4))
            start += part.shape[1]
        signal = np.sum(self.reference.astype(np.float64) ** 2)
        return np.sqrt(noise / signal).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LayerErrors:
    """Sum of the layers' own errors.

    Attributes:
      table: Noise over signal of every layer at every choice (`measure_layers`).
    """

    table: Float[np.ndarray, "l k"]

    @property
    def at_once(self) -> int:
        """Any number; few, so that progress is told."""
        return 64

    def __call__(self, genomes: Int[np.ndarray, "n l"]) -> Float[np.ndarray, " n"]:
        """The sums."""
        rows = np.arange(len(self.table))
        return np.array([self.table[rows, genome].sum() for genome in genomes], np.float32)


def measure_layers(
    space: Space, errors: Callable[[Int[np.ndarray, " l"]], Float[np.ndarray, " l"]]
) -> Float[np.ndarray, "l k"]:
    """The errors of all layers at all choices, of as many genomes as a layer has choices.

    Args:
      space: Layers and their choices.
      errors: Of every layer alone, at a genome's choices (`Candidates.layer_errors`).
    """
    most = int(space.counts.max())
    columns = [errors(np.minimum(k, space.coarsest).astype(np.int32)) for k in range(most)]
    return np.stack(columns, axis=1)


def least_sum(
    space: Space, budget: Budget, table: Float[np.ndarray, "l k"]
) -> tuple[Genome, float, bool]:
    """The genome whose errors sum to least within one budget, the sum, and whether it is proved.

    Args:
      space: Layers and their choices.
      budget: Of BitOps or of bytes.
      table: Errors of every layer at every choice (`measure_layers`).

    Raises:
      ValueError: If both budgets are given, or neither.
    """
    if (budget.bitops is None) == (budget.stored is None):
        raise ValueError(
            f"an integer programme has one budget; got {budget.bitops} BitOps and "
            f"{budget.stored} bytes. Give one, or search by evolution."
        )
    sizes = space.bitops_table if budget.stored is None else space.stored_table
    most = budget.bitops if budget.stored is None else budget.stored
    assert most is not None
    # Sums of at most 1: `allocate` divides by the smallest of numbers.
    unit = float(table.max(axis=1).sum()) or 1.0
    found = allocate(table / unit, sizes, budget=most * (1 + 1e-12))
    # Choices beyond a layer's last one are that one again.
    genome = np.minimum(found.chosen, space.coarsest).astype(np.int32)
    return genome, found.cost * unit, found.optimal


def picture_features(
    pipe: Pipeline, features: Features, latents: Float[np.ndarray, "b h w c"]
) -> Float[np.ndarray, "b d"]:
    """Features of the pictures of last samples."""
    return features(np.asarray(pipe.images(jnp.asarray(latents))))


def load_features(folder: Path | str) -> Features:
    """The penultimate activations of a feature net's folder (`similarity.load_feature_net`)."""
    params, config = load_feature_net(folder)
    net = jax.jit(lambda images: penultimate(params, config, images)[1])
    return lambda images: np.asarray(net(np.asarray(images, np.float32)), np.float64)


def load_reference(folder: Path | str, *, name: str = "test") -> FeatureStatistics:
    """Statistics of real pictures' features that a feature net's folder holds.

    Args:
      folder: Holds `reference.safetensors` with `NAME/mean`, `NAME/cov` and `NAME/n`, as the
        zoo's classifier does.
      name: Of the set of pictures.

    Raises:
      ValueError: If it holds none.
    """
    path = local_path(folder) / REFERENCE
    keys = [f"{name}/{part}" for part in ("mean", "cov", "n")]
    tensors = open_tensors(path) if path.exists() else {}
    if any(key not in tensors for key in keys):
        raise ValueError(
            f"{path} must hold {', '.join(keys)}, the statistics of real pictures. Use a folder "
            "that has them, or reference='float' to compare with the float model's pictures."
        )
    mean, cov, n = (tensors[key].read() for key in keys)
    cov = cov.astype(np.float64)
    return FeatureStatistics(
        mean=mean.astype(np.float64), cov=(cov + cov.T) / 2, n=int(n.reshape(-1)[0])
    )


def statistics_of(
    pipe: Pipeline, features: Features, latents: Float[np.ndarray, "b h w c"], *, batch: int
) -> FeatureStatistics:
    """Statistics of the features of pictures of last samples."""
    parts: Sequence[np.ndarray] = [
        picture_features(pipe, features, latents[start : start + batch])
        for start in range(0, len(latents), batch)
    ]
    return feature_statistics(np.concatenate(parts))
