"""The front of a granularity search, from the log that its stage leaves: quality against cost."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qjax.calibrate.evolution import front
from qjax.plots import Points, line_plot, save_plot
from qjax.run_logs import run_logs

__all__ = ["front_plot", "front_series", "save_fronts"]

Cost = Literal["bitops", "bytes"]

LABELS: dict[Cost, str] = {
    "bitops": "billions of BitOps, one evaluation of one item",
    "bytes": "kilobytes of the layers of the search",
}
UNITS: dict[Cost, float] = {"bitops": 1e9, "bytes": 1e3}

BROKEN = 1e38
"""Logs have no infinity: distances from here on are of pictures that are not finite."""


def front_series(candidates: Iterable[Mapping[str, Any]], *, cost: Cost) -> dict[str, Points]:
    """What is drawn: what no other candidate betters in both, and the uniform group sizes.

    Args:
      candidates: Events `"candidate"` of a log, those of the search and not of its finalists.
      cost: The x axis, in the unit of its label.
    """
    found = [one for one in candidates if one["fitness"] < BROKEN]
    x, y = (np.array([one[key] for one in found], np.float64) for key in (cost, "fitness"))
    uniform = [i for i, one in enumerate(found) if len(set(one["groups"].split())) == 1]
    chosen = {
        "front of the search": front(x, y),
        "uniform group sizes": np.array(sorted(uniform, key=x.__getitem__), np.int64),
    }
    return {
        name: ((x[at] / UNITS[cost]).tolist(), y[at].tolist())
        for name, at in chosen.items()
        if at.size
    }


def front_plot(
    candidates: Sequence[Mapping[str, Any]], *, cost: Cost = "bitops", label: str = "distance"
) -> str:
    """An SVG document of `front_series`.

    Args:
      candidates: As there.
      cost: Likewise.
      label: What is minimised.

    Raises:
      ValueError: If there is no candidate of finite distance.
    """
    return line_plot(
        front_series(candidates, cost=cost),
        title=f"Group sizes by layer: front of {len(candidates)} candidates",
        x_label=LABELS[cost],
        y_label=label,
    )


def save_fronts(out: Path) -> list[Path]:
    """Plot the fronts of all searches in a run's folder, against both costs, beside their logs.

    Args:
      out: The folder that `qjax.calibrate.run` was given.

    Returns:
      The files; none where no stage has searched.
    """
    made = []
    for log, events in run_logs(out):
        found = [e for e in events if e["event"] == "candidate" and e["search"] == "search"]
        for cost in UNITS if found else ():
            path = log.with_name(f"front-{cost}.svg")
            save_plot(path, front_plot(found, cost=cost))
            made.append(path)
    return made
