"""Quantization noise step by step, from the log that a noise correction leaves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qjax.plots import line_plot, save_plot
from qjax.run_logs import run_logs

__all__ = ["noise_plot", "normality_plot", "save_noise", "slope_plot"]


def noise_plot(steps: Sequence[Mapping[str, Any]]) -> str:
    """An SVG document: how far signal is above noise at every step, as it is and corrected.

    Args:
      steps: Events `"noise"` of a log.
    """
    x = [one["step"] for one in steps]
    return line_plot(
        {
            "quantized": (x, [one["snr"] for one in steps]),
            "corrected": (x, [one["snr_corrected"] for one in steps]),
        },
        title="Answer of the quantized network, step by step",
        x_label="step of the sampler",
        y_label="signal over noise in dB",
    )


def slope_plot(steps: Sequence[Mapping[str, Any]]) -> str:
    """An SVG document: how the noise follows the answer at every step.

    Args:
      steps: As there.
    """
    x = [one["step"] for one in steps]
    return line_plot(
        {
            "slope of the noise over the answer": (x, [one["slope"] for one in steps]),
            "k, what is corrected of it": (x, [one["k"] for one in steps]),
            "correlation of the two": (x, [one["correlation"] for one in steps]),
        },
        title="Quantization noise and the answer, step by step",
        x_label="step of the sampler",
        y_label="slope, and Pearson's correlation",
    )


def normality_plot(steps: Sequence[Mapping[str, Any]]) -> str:
    """An SVG document: how far what is left of the noise is from a normal distribution.

    Args:
      steps: As there.
    """
    x = [one["step"] for one in steps]
    return line_plot(
        {
            "skewness": (x, [one["skewness"] for one in steps]),
            "excess kurtosis": (x, [one["kurtosis"] for one in steps]),
            "p-value of the test": (x, [one["p_normal"] for one in steps]),
        },
        title="The rest of the noise; all but the p-value are 0 for a normal distribution",
        x_label="step of the sampler",
        y_label="skewness, excess kurtosis, p-value",
    )


PLOTS = {"noise.svg": noise_plot, "slope.svg": slope_plot, "normality.svg": normality_plot}
"""By the name of the file."""


def save_noise(out: Path) -> list[Path]:
    """Plot the noise of all corrections in a run's folder, beside their logs.

    Args:
      out: The folder that `qjax.calibrate.run` was given.

    Returns:
      The files; none where no stage has corrected noise.
    """
    made = []
    for log, events in run_logs(out):
        # A run that was killed may have told of its steps twice.
        found = {event["step"]: event for event in events if event["event"] == "noise"}
        steps = [found[step] for step in sorted(found)]
        for name, draw in PLOTS.items() if steps else ():
            save_plot(log.with_name(name), draw(steps))
            made.append(log.with_name(name))
    return made
