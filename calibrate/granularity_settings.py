"""The settings of the granularity search; `granularity_search.py` says what it makes of them."""

import dataclasses
from typing import Literal

from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.evolution import EvolutionSettings
from qjax.calibrate.genome import PAPER_CHOICES
from qjax.calibrate.genome_objectives import load_features, load_reference
from qjax.models.pipeline import Pipeline

IMAGES = 800
"""Pictures of a Frechet distance in the paper's search."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GranularitySettings:
    """What is searched, within which budget, and by what.

    Attributes:
      bitops: Most BitOps of one evaluation of the network for one item, in the layers of the
        search (`genome.py` has the formula); None for what `uniform` takes.
      stored_bytes: Most bytes of these layers, with scales and zero points; None for no limit.
      uniform: The budget is what this group size takes in all layers (where it does not divide,
        the next finer); None for no such limit.
      choices: Group sizes; every layer has those that divide its input channels. None: all
        multiples of 16 that divide.
      layers: Regular expression for the paths of the layers of the search, without `/kernel`;
        the others keep their groups. None: all quantized layers.
      objective: What is minimised: `"fd"`, the Frechet distance of generated pictures;
        `"latent"`, the distance of final latents to the float model's; `"layers"`, the sum of
        the layers' own errors.
      solver: `"evolution"`, or with `objective="layers"` and one budget `"ilp"`, exactly.
      features: Folder of the feature net of `"fd"` (`similarity.load_feature_net`).
      reference: Whether `"fd"` compares with the statistics of real pictures in that folder, as
        the paper does, or with the float model's pictures of the same noise.
      steps: Steps of the sampler, those of its later use; None: not chosen yet, which `check`
        refuses.
      eta: Its share of fresh noise.
      guidance_scale: Weight of the guidance; None for none, as in the paper's search.
      data: What pictures are drawn of, 800 in the paper; as many, of other noise, judge the
        finalists.
      pairs: Pairs of an item and a step at which `"layers"` measures.
      finalists: How many of the best are evaluated on fresh noise.
      evolution: How the search goes.
      batch: Items that run at once.
    """

    bitops: float | None = None
    stored_bytes: int | None = None
    uniform: int | None = 128
    choices: tuple[int, ...] | None = PAPER_CHOICES
    layers: str | None = None
    objective: Literal["fd", "latent", "layers"] = "fd"
    solver: Literal["evolution", "ilp"] = "evolution"
    features: str | None = None
    reference: Literal["real", "float"] = "real"
    steps: int | None = None
    eta: float = 0.0
    guidance_scale: float | None = None
    data: CalibrationSet = dataclasses.field(default_factory=lambda: CalibrationSet(items=IMAGES))
    pairs: int = 64
    finalists: int = 10
    evolution: EvolutionSettings = dataclasses.field(default_factory=EvolutionSettings)
    batch: int = 64

    def __post_init__(self):
        if self.choices is not None:
            object.__setattr__(self, "choices", tuple(sorted(set(self.choices))))
            if wrong := [g for g in self.choices if type(g) is not int or g < 1]:
                raise ValueError(f"choices must be group sizes of at least 1; got {wrong}.")
        for name, allowed in (
            ("objective", ("fd", "latent", "layers")),
            ("solver", ("evolution", "ilp")),
            ("reference", ("real", "float")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be {' or '.join(allowed)}; got {getattr(self, name)!r}."
                )
        if self.bitops is not None and self.uniform is not None:
            raise ValueError(
                "the budget of BitOps must be bitops or uniform, one of them; got "
                f"bitops={self.bitops}, uniform={self.uniform}. Set uniform=None."
            )
        if self.bitops is None and self.uniform is None and self.stored_bytes is None:
            raise ValueError(
                "the search needs a budget, or the finest groups always win; give bitops, "
                "stored_bytes or uniform."
            )
        if self.objective == "fd" and self.features is None:
            raise ValueError(
                "objective='fd' needs features, the folder of a feature net; got None. Give one, "
                "or use objective='latent' or 'layers'."
            )
        budgets = (self.bitops, self.uniform, self.stored_bytes)
        if self.solver == "ilp" and (
            self.objective != "layers" or sum(b is not None for b in budgets) != 1
        ):
            raise ValueError(
                "solver='ilp' needs errors that add up and one budget: objective='layers', and one "
                f"of bitops, stored_bytes and uniform; got objective={self.objective!r} and "
                f"{budgets}."
            )
        for name in ("pairs", "finalists", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")

    def check(self, pipe: Pipeline) -> int:
        """The steps of the sampler, if all that can be told beforehand is in order.

        Args:
          pipe: The float pipeline.

        Raises:
          ValueError: If the steps are not chosen, the items do not suit the model, or the
            folder of features lacks the statistics that are compared with.
          FileNotFoundError: If there is no feature net.
        """
        if self.steps is None:
            raise ValueError(
                "pictures are drawn with the sampler, whose number of steps is not chosen: give "
                "steps (on the command line --steps), and the guidance_scale of the later use."
            )
        self.data.check(pipe)
        if self.objective == "fd" and self.features is not None:
            load_features(self.features)
            if self.reference == "real":
                load_reference(self.features)
        return self.steps
