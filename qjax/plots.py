"""Line plots as SVG files, drawn by matplotlib."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qjax.core.safetensors_io import atomic_write

# Inches; told apart by dash too, so that a plot can be read in grey.
SIZE = (7.2, 4.0)
LABEL = 44  # characters of a line beside the y axis
DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)))

Points = tuple[Sequence[float], Sequence[float]]


def line_plot(
    series: Mapping[str, Points],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """An SVG document with a line for every series; the same series give the same document.

    Args:
      series: By name, x and y; points that are not finite (or, on a logarithmic axis, not
        positive) are left out.
      title: Said above.
      x_label: Of the x axis.
      y_label: Of the y axis.
      log_x: Whether x is logarithmic.
      log_y: Whether y is.

    Raises:
      ValueError: If no point can be drawn.
    """
    kept = {name: _points(points, log_x, log_y) for name, points in series.items()}
    if not any(len(points) for points in kept.values()):
        raise ValueError(f"a plot needs at least one point that can be drawn; {title!r} has none.")
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text, and what is random in the names of elements is not.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qjax"}):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        for i, (name, points) in enumerate(kept.items()):
            marker = "o" if len(points) < 20 else None
            axes.plot(*points.T, label=name, linestyle=DASHES[i % len(DASHES)], marker=marker, ms=3)
        axes.set(title=title, xlabel=x_label, ylabel=textwrap.fill(y_label, LABEL))
        axes.set_xscale("log" if log_x else "linear")
        axes.set_yscale("log" if log_y else "linear")
        axes.grid(alpha=0.3)
        if len(kept) > 1:
            axes.legend()
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Title": title})
    return file.getvalue().decode()


def save_plot(path: Path, document: str) -> None:
    """Write an SVG document; the file appears whole."""
    with atomic_write(path) as file:
        file.write(document.encode())


def _points(points: Points, log_x: bool, log_y: bool) -> np.ndarray:
    x, y = (np.asarray(values, np.float64) for values in points)
    keep = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not log_x)) & ((y > 0) | (not log_y))
    return np.stack([x[keep], y[keep]], axis=-1)
