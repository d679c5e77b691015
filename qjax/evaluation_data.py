"""What an evaluation has found: scores with intervals, and all that it takes to repeat it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from qjax.cli_output import grid

__all__ = ["Evaluation", "LeftOut", "NetUsed", "Score", "as_dict", "score_table"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """One number.

    Attributes:
      metric: Its name, `"FID"` for example.
      of: Whose pictures: a model's name, or `"A - B"` for a paired difference.
      value: The number.
      low: Lower end of the interval; None without one.
      high: Upper end.
      level: Coverage that the interval aims at.
      n: Pictures behind it, of the first set where there are two.
      against: What the pictures are held against; None where nothing is.
      net: Whose features it is of; None for metrics of pixels.
      unit: `"dB"` for example; empty for none.
      note: What else has to be known to read it.
    """

    metric: str
    of: str
    value: float
    low: float | None = None
    high: float | None = None
    level: float = 0.95
    n: int
    against: str | None = None
    net: str | None = None
    unit: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A metric that was not computed.

    Attributes:
      metric: As it is asked for, `"fid"`.
      reason: What it would have needed.
    """

    metric: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetUsed:
    """A network that looked at the pictures.

    Attributes:
      name: What scores call it.
      files: Where its weights came from.
      sha256: Of each of these files; of a network that ships with the package, of its params.
      verified: Whether these are the published weights for certain; None where nobody can tell.
    """

    name: str
    files: tuple[str, ...]
    sha256: tuple[str, ...]
    verified: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of a model.

    Attributes:
      model: Name of the model that was evaluated.
      reference: Name of the model it is held against; None without.
      images: Name of the folder of pictures it is held against; None without.
      scores: In the order of the metrics.
      left_out: Metrics that were not computed.
      num_images: Pictures of each model; picture i has noise of its own, from `seed` and i.
      seed: Of the noise.
      steps: Of the sampler.
      guidance_scale: Weight of classifier-free guidance; None for none.
      eta: Share of fresh noise.
      told: What was drawn, in words: which labels or prompts.
      nets: The networks that looked at the pictures.
      resamples: Of the intervals of sets of pictures, by metric; of means of one number a picture
        there are 10,000.
      device: What it ran on.
      versions: Of the packages, by name.
    """

    model: str
    reference: str | None
    images: str | None
    scores: tuple[Score, ...]
    left_out: tuple[LeftOut, ...]
    num_images: int
    seed: int
    steps: int
    guidance_scale: float | None
    eta: float
    told: str
    nets: tuple[NetUsed, ...]
    resamples: Mapping[str, int]
    device: str
    versions: Mapping[str, str]

    def score(self, metric: str, *, of: str | None = None, against: str | None = None) -> Score:
        """The one score of that name; `of` and `against` choose where there are several.

        Raises:
          KeyError: If there is none, or more than one.
        """
        found = [
            score
            for score in self.scores
            if score.metric == metric
            and of in (None, score.of)
            and against in (None, score.against)
        ]
        if len(found) != 1:
            have = ", ".join(f"{s.metric} of {s.of} against {s.against}" for s in self.scores)
            raise KeyError(f"{metric} must name one score; it names {len(found)} of {have}.")
        return found[0]


def as_dict(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation as plain values for JSON."""
    return dataclasses.asdict(evaluation)


def score_table(evaluation: Evaluation) -> Table:
    """The scores as a table for a terminal."""
    heads = ("metric", "value", "95 % interval", "of", "against", "net", "n")
    return grid(heads, [_cells(score) for score in evaluation.scores], right="value n")


def _cells(score: Score) -> Sequence[str]:
    interval = ""
    if score.low is not None and score.high is not None:
        interval = f"{_number(score.low)} to {_number(score.high)}"
    value = f"{_number(score.value)} {score.unit}".strip()
    return (
        score.metric,
        value,
        interval,
        score.of,
        score.against or "",
        score.net or "",
        f"{score.n:,}",
    )


def _number(value: float) -> str:
    """Four digits that count, without an exponent where one can do without."""
    if value and abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.4f}" if abs(value) < 10 else f"{value:,.2f}"
