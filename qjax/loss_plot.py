"""Errors of fits while they were fitted, from the logs that their stages leave."""

from collections.abc import Mapping
from pathlib import Path

from qjax.plots import line_plot, save_plot
from qjax.run_logs import run_logs

__all__ = ["save_losses"]

LOSS = "loss.svg"


def save_losses(out: Path) -> Path | None:
    """Plot the errors of all fits that the logs of a run tell of.

    Args:
      out: The folder that `qjax.calibrate.run` was given.

    Returns:
      The file in it; None where no stage has fitted anything.
    """
    errors: dict[str, dict[int, float]] = {}
    for _, events in run_logs(out):
        for event in events:
            if event["event"] == "fit" and "error" in event:
                # A run that was killed has told of some iterations twice.
                errors.setdefault(event["block"], {})[event["iteration"]] = event["error"]
    if not errors:
        return None
    series = {name: _columns(found) for name, found in errors.items()}
    # Of many blocks those that are left with most.
    worst = sorted(series, key=lambda name: -series[name][1][-1])[:6]
    words = "" if len(series) == len(worst) else f", the worst {len(worst)} of {len(series)}"
    document = line_plot(
        {name: series[name] for name in series if name in worst},
        title=f"Error while fitting{words}",
        x_label="iteration",
        y_label="error relative to rounding to nearest",
    )
    save_plot(out / LOSS, document)
    return out / LOSS


def _columns(found: Mapping[int, float]) -> tuple[list[float], list[float]]:
    """Iterations in their order, and their errors."""
    ordered = sorted(found.items())
    return [x for x, _ in ordered], [y for _, y in ordered]
