"""From what was kept of every picture to scores with intervals."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qjax.core import metrics, resampling
from qjax.core.metrics import FeatureStatistics, Interval
from qjax.core.moments import FeatureMoments
from qjax.core.set_metrics import inception_score, precision_recall
from qjax.evaluation_choice import Choice
from qjax.evaluation_data import Score
from qjax.evaluation_parts import Parts

__all__ = ["Against", "Scoring", "draws_of_sets", "scores"]

LEVEL = 0.95
# Of the metrics of sets; a Frechet distance of features as wide as Inception's takes seconds.
RESAMPLES = {"fid": 20, "sfid": 20, "is": 200, "kid": 200, "fd": 200}
SPLITS = 10
# A seed apart from that of the pictures: other pictures, the same resamples.
SEED, SEED_OF_IMAGES = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Against:
    """A set that features are held against.

    Attributes:
      name: What scores call it.
      side: Of `Parts`, whose rows are its features; None where there are statistics alone.
      paired: Whether its picture i has the noise of the model's picture i.
      statistics: By key of the features, where that is all there is.
    """

    name: str
    side: str | None = None
    paired: bool = False
    statistics: Mapping[str, FeatureStatistics] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """What to make of the parts.

    Attributes:
      model: Name of the model, whose rows are those of side `a`.
      reference: Name of the model of side `b`; None without.
      sets: What features are held against, the reference model among them.
      choice: The metrics, what they are called and what they read.
      resamples: Of the intervals of sets; None takes those of `RESAMPLES`, 0 leaves those
        intervals out.
    """

    model: str
    reference: str | None
    sets: tuple[Against, ...]
    choice: Choice
    resamples: int | None = None


def draws_of_sets(scoring: Scoring) -> dict[str, int]:
    """Resamples behind the intervals of sets, by metric."""
    return {
        metric: _draws(scoring, metric) for metric in scoring.choice.metrics if metric in RESAMPLES
    }


def _draws(scoring: Scoring, metric: str) -> int:
    return RESAMPLES[metric] if scoring.resamples is None else scoring.resamples


def scores(parts: Parts, scoring: Scoring) -> tuple[Score, ...]:
    """All scores, in the order of `scoring.choice.metrics`."""
    functions: dict[str, Any] = {
        "psnr": _pixels,
        "ssim": _pixels,
        "lpips-alex": _pixels,
        "lpips-vgg": _pixels,
        "fid": _frechet,
        "sfid": _frechet,
        "fd": _frechet,
        "is": _inception_score,
        "kid": _kernel,
        "pr": _precision_recall,
        "clip": _clip,
    }
    return tuple(
        score
        for metric in scoring.choice.metrics
        for score in functions[metric](parts, scoring, metric)
    )


def _pixels(parts: Parts, scoring: Scoring, metric: str) -> Iterator[Score]:
    """Means of one number a pair."""
    values = parts.whole(metric)
    finite = values[np.isfinite(values)]
    equal = len(values) - len(finite)
    note = f"{equal} pairs are equal to the last bit and left out" if equal else ""
    if not len(finite):
        note = f"all {equal} pairs are equal to the last bit"
    names = {"psnr": "PSNR", "ssim": "SSIM", "lpips-alex": "LPIPS", "lpips-vgg": "LPIPS"}
    fields: dict[str, Any] = {
        "metric": names[metric],
        "against": scoring.reference,
        "net": scoring.choice.nets.get(metric),
        "unit": "dB" if metric == "psnr" else "",
        "note": note,
        "n": len(finite) or len(values),
    }
    if not len(finite):
        yield Score(of=scoring.model, value=float("inf"), level=LEVEL, **fields)
        return
    yield _mean(scoring.model, finite, fields)


def _clip(parts: Parts, scoring: Scoring, metric: str) -> Iterator[Score]:
    rows = {side: parts.whole(f"{side}/clip") for side in _models(scoring)}
    fields = {"metric": "CLIP score", "net": scoring.choice.nets[metric]}
    yield from _scores_of_rows(scoring, rows, fields)


def _statistics(parts: Parts, key: str) -> FeatureStatistics:
    """Of the rows of a side, one part in memory at a time."""
    sums = None
    for rows in parts.stream(key):
        moments = FeatureMoments.of(rows)
        sums = moments if sums is None else sums + moments
    assert sums is not None
    return sums.statistics()


def _frechet(parts: Parts, scoring: Scoring, metric: str) -> Iterator[Score]:
    key = scoring.choice.keys[metric]
    sides = [*_models(scoring), *(one.side for one in scoring.sets if one.side is not None)]
    known = {side: _statistics(parts, f"{side}/{key}") for side in dict.fromkeys(sides)}
    n, d, draws = known["a"].n or 0, len(known["a"].mean), _draws(scoring, metric)
    for one in scoring.sets:
        theirs = one.statistics.get(key) if one.side is None else known[one.side]
        if theirs is None:
            continue
        values, spread = {}, {}
        for side in _held_against(scoring, one):
            values[side] = metrics.frechet_distance(known[side], theirs).value
            if draws:
                x, counts = parts.whole(f"{side}/{key}"), _counts(n, draws)
                if one.side is None:
                    spread[side] = resampling.frechet_resamples(x, theirs, counts)
                else:
                    y = parts.whole(f"{one.side}/{key}")
                    counts_y = _counts_of(one, counts, len(y))
                    spread[side] = resampling.frechet_resamples(x, y, counts, counts_y)
        fields = _fields(scoring, metric, one, n)
        if (fewest := min(n, theirs.n or n)) <= d:
            fields["note"] = (
                f"{fewest:,} pictures are no more than the {d:,} features, so it tells more of their "
                "number than of them: compare it at equal numbers only"
            )
        yield from _scores_of_sets(scoring, values, spread, fields)


def _kernel(parts: Parts, scoring: Scoring, metric: str) -> Iterator[Score]:
    key = scoring.choice.keys[metric]
    for one in scoring.sets:
        y = None if one.side is None else parts.whole(f"{one.side}/{key}")
        if y is None:
            continue
        values, spread, n = {}, {}, 0
        for side in _held_against(scoring, one):
            x = parts.whole(f"{side}/{key}")
            n = len(x)
            values[side] = _kernel_value(x, y, one)
            if draws := _draws(scoring, metric):
                counts = _counts(n, draws)
                counts_y = _counts_of(one, counts, len(y))
                spread[side] = resampling.kernel_resamples(
                    x, y, counts, counts_y, paired=one.paired
                )
        fields = _fields(scoring, metric, one, n)
        if one.paired:
            fields["note"] = "pairs from the same noise are left out of the mean over both sets"
        yield from _scores_of_sets(scoring, values, spread, fields)


def _kernel_value(x: np.ndarray, y: np.ndarray, one: Against) -> float:
    """KID: over subsets as it is published; of pairs, over all pictures at once."""
    if not one.paired:
        return metrics.kernel_distance(x, y, seed=SEED).mean
    once = np.ones((1, len(x)), np.int64)
    return float(resampling.kernel_resamples(x, y, once, once, paired=True)[0])


def _inception_score(parts: Parts, scoring: Scoring, metric: str) -> Iterator[Score]:
    values, spread, n, splits = {}, {}, 0, 1
    for side in _models(scoring):
        logits = parts.whole(f"{side}/logits")
        n, splits = len(logits), min(SPLITS, len(logits))
        values[side] = inception_score(logits, splits=splits).mean
        if draws := _draws(scoring, metric):
            spread[side] = resampling.inception_score_resamples(logits, _counts(n, draws))
    fields = _fields(scoring, metric, None, n)
    fields["note"] = f"mean of {splits} splits; the interval is as wide as that of one split"
    yield from _scores_of_sets(scoring, values, spread, fields)


def _precision_recall(parts: Parts, scoring: Scoring, metric: str) -> Iterator[Score]:
    key = scoring.choice.keys[metric]
    for one in scoring.sets:
        y = None if one.side is None else parts.whole(f"{one.side}/{key}")
        if y is None:
            continue
        found = {
            side: precision_recall(parts.whole(f"{side}/{key}"), y)
            for side in _held_against(scoring, one)
        }
        for title, which in (("precision", "inside"), ("recall", "covered")):
            rows = {side: getattr(both, which) for side, both in found.items()}
            fields = _fields(scoring, metric, one, 0) | {"metric": title}
            del fields["n"]
            fields["note"] = "the interval takes the balls around the pictures as given"
            yield from _scores_of_rows(scoring, rows, fields)


def _models(scoring: Scoring) -> tuple[str, ...]:
    return ("a",) if scoring.reference is None else ("a", "b")


def _held_against(scoring: Scoring, one: Against) -> tuple[str, ...]:
    """The models whose pictures are held against a set; never the set's own."""
    return tuple(side for side in _models(scoring) if side != one.side)


def _fields(scoring: Scoring, metric: str, one: Against | None, n: int) -> dict[str, Any]:
    return {
        "metric": scoring.choice.titles[metric],
        "against": None if one is None else one.name,
        "net": scoring.choice.nets[metric],
        "n": n,
    }


def _name(scoring: Scoring, side: str) -> str:
    return scoring.model if side == "a" else str(scoring.reference)


def _difference(scoring: Scoring) -> str:
    return f"{scoring.model} - {scoring.reference}"


def _scores_of_sets(
    scoring: Scoring,
    values: Mapping[str, float],
    spread: Mapping[str, np.ndarray],
    fields: Mapping[str, Any],
) -> Iterator[Score]:
    """A number of each model, and of two their difference, over the same resamples."""

    def score(of: str, value: float, resampled: np.ndarray | None) -> Score:
        if resampled is None:
            return Score(of=of, value=value, level=LEVEL, **fields)
        n = fields["n"]
        return _score(of, resampling.standard_interval(value, resampled, n=n, level=LEVEL), fields)

    for side, value in values.items():
        yield score(_name(scoring, side), value, spread.get(side))
    if len(values) == 2:
        both = spread["a"] - spread["b"] if spread else None
        yield score(_difference(scoring), values["a"] - values["b"], both)


def _scores_of_rows(
    scoring: Scoring, rows: Mapping[str, np.ndarray], fields: Mapping[str, Any]
) -> Iterator[Score]:
    """The mean of one number a picture for each model, and of two their paired difference."""
    for side, values in rows.items():
        yield _mean(_name(scoring, side), values, {**fields, "n": len(values)})
    if len(rows) == 2:
        difference = np.subtract(rows["a"], rows["b"], dtype=np.float64)
        yield _mean(_difference(scoring), difference, {**fields, "n": len(difference)})


def _mean(of: str, values: np.ndarray, fields: Mapping[str, Any]) -> Score:
    """The mean, or of claims the share that holds; one picture tells nothing of others."""
    if len(values) < 2:
        return Score(of=of, value=float(np.mean(values)), level=LEVEL, **fields)
    if values.dtype == bool:
        return _score(of, metrics.share_interval(values, level=LEVEL), fields)
    return _score(of, metrics.bootstrap_interval(values, level=LEVEL, seed=SEED), fields)


def _score(of: str, interval: Interval, fields: Mapping[str, Any]) -> Score:
    return Score(
        of=of,
        value=interval.estimate,
        low=interval.low,
        high=interval.high,
        level=interval.level,
        **fields,
    )


def _counts(n: int, draws: int) -> np.ndarray:
    return resampling.resample_counts(n, resamples=draws, seed=SEED)


def _counts_of(one: Against, counts: np.ndarray, n: int) -> np.ndarray:
    """Those of the other set: the same for paired pictures, else of its own."""
    if one.paired:
        return counts
    return resampling.resample_counts(n, resamples=len(counts), seed=SEED_OF_IMAGES)
