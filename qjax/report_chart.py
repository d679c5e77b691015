"""The error-per-step chart as inline SVG that keeps its text size at any width.

Positions are percentages of the plot, so the browser stretches the lines and leaves text
and markers alone. Colours are the page's variables, and series differ in dash and marker
too, so that the chart can be read in grey.
"""

import math
from collections.abc import Callable
from html import escape

import numpy as np

from qjax.report_data import ComparisonReport
from qjax.report_words import number_text

__all__ = ["error_chart"]

SERIES_COLOURS = 6
DASHES = ("", "7 5", "2 5", "12 4 2 4", "4 3", "14 6")
# A logarithmic axis where errors span more than this; below it a linear one is easier to read.
LOG_SPAN = 20.0
# Above this many steps markers would touch each other.
MOST_MARKERS = 60


def error_chart(report: ComparisonReport) -> str:
    """Lines of every variant's error per step, with axes, legend and tooltips."""
    series = [np.asarray(variant.error_per_step, np.float64) for variant in report.variants]
    low, high, logarithmic = _range(series)
    place = (
        (lambda e: math.log(e / low) / math.log(high / low))
        if logarithmic
        else (lambda e: e / high)
    )
    steps = max(len(errors) for errors in series)
    parts = [_y_axis(low, high, logarithmic, place), _x_axis(report, steps)]
    for i, errors in enumerate(series):
        points = [
            (_across(step, steps), 100 - 100 * min(max(place(e), 0.0), 1.0), step, e)
            for step, e in enumerate(map(float, errors))
            if math.isfinite(e) and (e > 0 or not logarithmic)
        ]
        parts.append(_line(report, i, points))
    names = "; ".join(
        f"{variant.name} ends at {number_text(float(errors[-1]))}"
        for variant, errors in zip(report.variants, series, strict=True)
    )
    scale = "logarithmic" if logarithmic else "linear"
    return (
        '<div class="chart"><p class="small soft">Relative L2 distance of the half-made picture '
        f"from the float model’s after each sampling step, on a {scale} scale.</p>"
        f'{_legend(report)}<div class="plot"><svg role="img" '
        f'aria-label="{escape(f"Error per step, {scale} scale: {names}")}">{"".join(parts)}'
        "</svg></div></div>"
    )


def _range(series: list[np.ndarray]) -> tuple[float, float, bool]:
    """Ends of the error axis, and whether it is logarithmic."""
    values = np.concatenate(series)
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return 0.0, 1.0, False
    smallest, largest = float(positive.min()), float(positive.max())
    if largest / smallest <= LOG_SPAN:
        return 0.0, _linear_ticks(largest)[-1], False
    rounds = [m * 10.0**p for p in range(*_decades(smallest, largest)) for m in (1, 2, 5)]
    low = max(tick for tick in rounds if tick <= smallest * (1 + 1e-9))
    high = min(tick for tick in rounds if tick >= largest * (1 - 1e-9))
    return low, high, True


def _decades(smallest: float, largest: float) -> tuple[int, int]:
    """First and past-the-last power of ten whose multiples 1, 2, 5 enclose both."""
    return math.floor(math.log10(smallest)), math.ceil(math.log10(largest)) + 2


def _linear_ticks(largest: float) -> list[float]:
    """Up to six round numbers from 0 to at least `largest`."""
    power = 10.0 ** math.floor(math.log10(largest / 4))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power * 5 >= largest * (1 - 1e-9))
    return [step * i for i in range(math.ceil(largest / step - 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between the ends, or their multiples by 1, 2, 5 where those are few."""
    decades = range(*_decades(low, high))
    between = lambda ticks: [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
    powers = between([10.0**p for p in decades])
    if len(powers) < 3:
        return between([m * 10.0**p for p in decades for m in (1, 2, 5)])
    return powers[:: -(-len(powers) // 7)]


def _step_ticks(steps: int) -> list[int]:
    """The first step, the last, and round ones between, about six."""
    stride = next(s * 10**p for p in range(9) for s in (1, 2, 5) if s * 10**p * 6 >= steps)
    inner = [step for step in range(stride, steps, stride) if 1 < step <= steps - stride / 2]
    return sorted({1, *inner, steps})


def _across(step: int, steps: int) -> float:
    return 100 * step / (steps - 1) if steps > 1 else 50.0


def _y_axis(low: float, high: float, logarithmic: bool, place: Callable[[float], float]) -> str:
    ticks = _log_ticks(low, high) if logarithmic else _linear_ticks(high)
    parts = ['<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"></line>']
    for tick in ticks:
        y = f"{100 - 100 * place(tick):.2f}%"
        parts.append(
            f'<line class="gridline" x1="0" x2="100%" y1="{y}" y2="{y}"></line>'
            f'<text x="-8" y="{y}" dy="5" text-anchor="end">{tick:.4g}</text>'
        )
    return "".join(parts)


def _x_axis(report: ComparisonReport, steps: int) -> str:
    """Steps counted from 1; the tooltips also name the training timestep."""
    parts = []
    for step in _step_ticks(steps):
        x = f"{_across(step - 1, steps):.2f}%"
        parts.append(f'<text x="{x}" y="100%" dy="20" text-anchor="middle">{step}</text>')
    parts.append(
        '<text x="0" y="100%" dy="42" text-anchor="start">noise</text>'
        '<text x="50%" y="100%" dy="42" text-anchor="middle">sampling step</text>'
        '<text x="100%" y="100%" dy="42" text-anchor="end">picture</text>'
    )
    return "".join(parts)


def _line(report: ComparisonReport, i: int, points: list[tuple[float, float, int, float]]) -> str:
    colour = f"var(--series-{i % SERIES_COLOURS})"
    dash = DASHES[i % len(DASHES)]
    path = " ".join(f"{x:.2f},{y:.2f}" for x, y, _, _ in points)
    # The inner picture is stretched, the stroke is not (vector-effect in the style sheet).
    drawn = (
        '<svg width="100%" height="100%" viewBox="0 0 100 100" preserveAspectRatio="none" '
        f'style="height:100%"><polyline points="{path}" stroke-dasharray="{dash}" '
        f'style="stroke:{colour}"></polyline></svg>'
    )
    if len(points) > MOST_MARKERS:
        return drawn
    markers = []
    for x, y, step, error in points:
        at = f", timestep {report.timesteps[step]:g}" if report.timesteps else ""
        tip = f"{report.variants[i].name}, step {step + 1}{at}: {number_text(error)}"
        markers.append(
            f'<circle cx="{x:.2f}%" cy="{y:.2f}%" r="3" style="fill:{colour}">'
            f"<title>{escape(tip)}</title></circle>"
        )
    return drawn + "".join(markers)


def _legend(report: ComparisonReport) -> str:
    items = []
    for i, variant in enumerate(report.variants):
        items.append(
            '<span><svg width="34" height="10" aria-hidden="true"><line x1="1" x2="33" y1="5" '
            f'y2="5" stroke-width="2.5" stroke-dasharray="{DASHES[i % len(DASHES)]}" '
            f'style="stroke:var(--series-{i % SERIES_COLOURS})"></line></svg>'
            f"{escape(variant.name)}</span>"
        )
    return f'<div class="legend">{"".join(items)}</div>'
