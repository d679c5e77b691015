"""Line plots as small SVG files that any browser shows, in light and in dark."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from qjax.core.safetensors_io import atomic_write

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 44, 48

# Told apart by dash too, so that a plot can be read in grey.
COLOURS = ("#1f6fb4", "#c2410c", "#15803d", "#7c3aed", "#b91c7a", "#52525b")
DASHES = ("", "7 5", "2 4", "12 4 2 4", "4 3", "14 6")

STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.grid{stroke:#ddd}.axis{stroke:#555}"
    "rect{fill:#fff}@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#333}"
    ".axis{stroke:#999}rect{fill:#16181c}}"
)

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
    """An SVG document with a line for every series.

    Args:
      series: By name, x and y; points that are not finite (or, on a logarithmic axis, not
        positive) are left out.
      title: Said above.
      x_label: Under the x axis.
      y_label: Beside the title, of the y axis.
      log_x: Whether x is logarithmic.
      log_y: Whether y is.

    Raises:
      ValueError: If no point can be drawn.
    """
    kept = {name: _points(points, log_x, log_y) for name, points in series.items()}
    every = np.concatenate([points for points in kept.values() if len(points)] or [[]])
    if not len(every):
        raise ValueError(f"a plot needs at least one point that can be drawn; {title!r} has none.")
    x_ticks = _ticks(every[:, 0].min(), every[:, 0].max(), log_x)
    y_ticks = _ticks(every[:, 1].min(), every[:, 1].max(), log_y)
    x_of = _scale(x_ticks, log_x, LEFT, WIDTH - RIGHT)
    y_of = _scale(y_ticks, log_y, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<text x="{LEFT}" y="20" font-weight="600">{escape(title)}</text>',
        f'<text x="{LEFT}" y="37" opacity=".7">{escape(y_label)}</text>',
        (
            f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
            f"{escape(x_label)}</text>"
        ),
    ]
    for tick in y_ticks:
        y = f"{y_of(tick):.1f}"
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end">{tick:.4g}</text>'
        )
    for tick in x_ticks:
        x = f"{x_of(tick):.1f}"
        parts.append(
            f'<line class="axis" x1="{x}" x2="{x}" y1="{HEIGHT - BOTTOM}" '
            f'y2="{HEIGHT - BOTTOM + 5}"/>'
            f'<text x="{x}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick:.4g}</text>'
        )
    for i, (name, points) in enumerate(kept.items()):
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        look = (
            f'fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="2" '
            f'stroke-dasharray="{DASHES[i % len(DASHES)]}"'
        )
        parts.append(f'<polyline {look} points="{path}"><title>{escape(name)}</title></polyline>')
        if len(kept) > 1:
            y = TOP + 8 + 17 * i
            parts.append(
                f'<polyline {look} points="{WIDTH - 200},{y} {WIDTH - 168},{y}"/>'
                f'<text x="{WIDTH - 162}" y="{y + 4}">{escape(name)}</text>'
            )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )


def save_plot(path: Path, document: str) -> None:
    """Write an SVG document; the file appears whole."""
    with atomic_write(path) as file:
        file.write(document.encode())


def _points(points: Points, log_x: bool, log_y: bool) -> np.ndarray:
    x, y = (np.asarray(values, np.float64) for values in points)
    keep = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not log_x)) & ((y > 0) | (not log_y))
    return np.stack([x[keep], y[keep]], axis=-1)


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    if logarithmic:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        if last - first > 2:
            return [10.0**p for p in range(first, last + 1)]
        rounds = [m * 10.0**p for p in range(first - 1, last + 1) for m in (1, 2, 5)]
        begin = max((r for r in rounds if r <= low * (1 + 1e-9)), default=rounds[0])
        end = min((r for r in rounds if r >= high * (1 - 1e-9)), default=rounds[-1])
        if begin == end:
            end = next(r for r in rounds if r > begin)
        return [r for r in rounds if begin <= r <= end]
    low = min(low, 0.0) if low < 0.4 * high or low <= 0 else low
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power * 5 >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _scale(ticks: Sequence[float], logarithmic: bool, begin: float, end: float):
    size = math.log10 if logarithmic else float
    low, high = size(ticks[0]), size(ticks[-1])
    return lambda value: begin + (end - begin) * (size(value) - low) / (high - low)
