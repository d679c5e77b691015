"""A comparison in words: numbers with units, verdicts, sentences.

Everything here is plain text; whoever puts it into HTML or a terminal escapes it. Bad news
is said as plainly as good news: a quantized model that is slower is called slower.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qjax.core.metrics import Interval, bootstrap_interval
from qjax.report_data import ComparisonReport, FeatureDistance, LayerResult, VariantResult

__all__ = [
    "Verdict",
    "agreement_fell",
    "agreement_verdict",
    "bits_text",
    "breakage",
    "bytes_text",
    "cost_sentences",
    "count_text",
    "distance_rows",
    "distance_text",
    "distance_verdict",
    "event_words",
    "fidelity_sentences",
    "fidelity_verdict",
    "float_seconds",
    "layer_text",
    "lede",
    "likeness",
    "loss_sentences",
    "mean_and_interval",
    "noise_share",
    "noise_text",
    "number_text",
    "percent_text",
    "risen_distances",
    "seconds_text",
    "size_verdict",
    "speed_verdict",
    "summary_sentences",
]

# Keeps a number and its unit on one line.
NBSP = "\N{NO-BREAK SPACE}"
# Two times that differ by less are not told apart: about what medians vary between runs.
SAME_SPEED = 0.02
# PSNR in dB below which a difference is plain to everybody, as a rule of thumb.
PLAIN = 20.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A short claim and how to take it.

    Attributes:
      text: Such as `"1.7× slower"`.
      tone: Better than the float model, worse, or neither.
    """

    text: str
    tone: Literal["good", "bad", "even"]


def number_text(value: float, digits: int = 3) -> str:
    """The number with `digits` significant digits and no exponent where it stays short."""
    if np.isnan(value):
        return "not a number"
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    magnitude = abs(value)
    if magnitude and not 1e-4 <= magnitude < 1e6:
        text = f"{value:.{digits - 1}e}"
    else:
        before_point = int(np.floor(np.log10(magnitude))) + 1 if magnitude else 1
        text = f"{value:,.{max(0, digits - before_point)}f}"
    return text.replace("-", "−") if value < 0 else text


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    size, unit = next((pair for pair in units if value >= pair[0]), units[-1])
    return f"{number_text(value / size)}{NBSP}{unit}"


def bytes_text(count: int) -> str:
    """Bytes in decimal units, as file managers and shops count: `"3.24 MB"`."""
    if count < 1000:
        return f"{count}{NBSP}bytes"
    return _scaled(count, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")))


def count_text(count: int) -> str:
    """A count in words where it is large: `"1.87 million"`."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{number_text(count / size)}{NBSP}{word}"
    return f"{count:,}"


def noise_share(sqnr: float) -> float:
    """Size of the noise as a share of the signal's, of an SQNR in dB: 20 dB is 0.1."""
    return float(10.0 ** (-sqnr / 20))


def noise_text(sqnr: float) -> str:
    """The same in percent, or that the noise is no number."""
    return (
        "not a number" if np.isneginf(sqnr) or np.isnan(sqnr) else percent_text(noise_share(sqnr))
    )


def layer_text(layer: LayerResult) -> str:
    """Path of a layer, without the name of its kernel."""
    return layer.path.removesuffix("/kernel")


def seconds_text(seconds: float) -> str:
    """A duration with the unit that suits it: `"1.90 ms"`."""
    return _scaled(seconds, ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")))


def percent_text(share: float) -> str:
    """A share of 1 in percent, with one decimal."""
    return f"{100 * share:.1f}{NBSP}%"


def bits_text(layer: LayerResult) -> str:
    """`"W4A8"`, `"W4"` where the input stays in float, or `"float"`."""
    if layer.weight_bits is None:
        return "float"
    return f"W{layer.weight_bits}" + (f"A{layer.act_bits}" if layer.act_bits else "")


def size_verdict(report: ComparisonReport, variant: VariantResult) -> Verdict:
    """How many times smaller or larger the weights are."""
    ratio = report.bytes_float / variant.bytes_quantized
    if ratio > 1:
        return Verdict(text=f"{number_text(ratio)}× smaller", tone="good")
    if ratio == 1:
        return Verdict(text="same size", tone="even")
    return Verdict(text=f"{number_text(1 / ratio)}× larger", tone="bad")


def speed_verdict(variant: VariantResult) -> Verdict:
    """How many times faster or slower a step is; within 2 % it is the same."""
    if variant.timing is None:
        return Verdict(text="speed not measured", tone="even")
    speedup = variant.timing.speedup
    if speedup > 1 + SAME_SPEED:
        return Verdict(text=f"{number_text(speedup)}× faster", tone="good")
    if speedup > 1 / (1 + SAME_SPEED):
        return Verdict(text="same speed", tone="even")
    return Verdict(text=f"{number_text(1 / speedup)}× slower", tone="bad")


def mean_and_interval(values: np.ndarray) -> Interval | None:
    """Mean and 95 % bootstrap interval of the finite values; None where there are none."""
    finite = values[np.isfinite(values)]
    return bootstrap_interval(finite) if finite.size else None


def fidelity_verdict(variant: VariantResult) -> Verdict:
    """Mean PSNR in dB, bad where everybody sees it, or that the pictures are equal, or broken."""
    broken, equal = int(np.isnan(variant.psnr).sum()), int(np.isposinf(variant.psnr).sum())
    if broken:
        return Verdict(text=f"{broken} of {len(variant.psnr)} broken", tone="bad")
    if equal == len(variant.psnr):
        return Verdict(text="identical", tone="good")
    interval = mean_and_interval(variant.psnr)
    mean = interval.estimate if interval else float("nan")
    tone: Literal["bad", "even"] = "bad" if mean < PLAIN else "even"
    return Verdict(text=f"{mean:.1f}{NBSP}dB PSNR", tone=tone)


def likeness(variant: VariantResult) -> str:
    """What the mean PSNR looks like, as a rule of thumb for pictures at normal contrast."""
    interval = mean_and_interval(variant.psnr)
    if np.isnan(variant.psnr).any():
        return "values that are not numbers"
    if interval is None:
        return "pixel for pixel"
    if interval.estimate >= 40:
        return "hard to tell apart by eye"
    if interval.estimate >= 30:
        return "small differences, seen up close"
    if interval.estimate >= PLAIN:
        return "details visibly differ"
    return "visibly different pictures"


def agreement_verdict(variant: VariantResult) -> Verdict:
    """Share of pictures that show what was asked for, against the float model's share."""
    agreement = variant.agreement
    if agreement is None:
        return Verdict(text="not measured", tone="even")
    change = agreement.value - agreement.value_float
    tone: Literal["good", "bad", "even"] = (
        "even" if change == 0 else "good" if change > 0 else "bad"
    )
    return Verdict(text=percent_text(agreement.value), tone=tone)


def distance_verdict(distance: FeatureDistance | None) -> Verdict:
    """The distance, worse where the float model's to the same reference is lower."""
    if distance is None:
        return Verdict(text="–", tone="even")
    worse = distance.value_float is not None and distance.value > distance.value_float
    return Verdict(text=number_text(distance.value), tone="bad" if worse else "even")


def distance_text(distance: FeatureDistance) -> str:
    """Everything about a distance but its value: name, net, reference and n."""
    return f"{distance.name} to {distance.reference} (seen by {distance.net}; n = {distance.n:,})"


def distance_rows(
    report: ComparisonReport,
) -> tuple[tuple[FeatureDistance, tuple[FeatureDistance | None, ...]], ...]:
    """Distances of one kind side by side: an example of the kind, and one a variant or None."""
    rows: dict[str, list[FeatureDistance | None]] = {}
    for column, variant in enumerate(report.variants):
        for distance in variant.distances:
            row = rows.setdefault(distance_text(distance), [None] * len(report.variants))
            row[column] = distance
    return tuple(
        (next(cell for cell in row if cell is not None), tuple(row)) for row in rows.values()
    )


def lede(report: ComparisonReport) -> str:
    """What the page is about, for somebody who has never heard of quantization."""
    count = len(report.variants)
    versions = "a quantized version" if count == 1 else f"{count} quantized versions"
    return (
        f"The model: {report.model}. Here it is compared with {versions} of itself. Quantizing "
        f"stores the numbers a model is made of in fewer bits than {report.float_dtype}: the "
        "model becomes smaller, it may run faster or slower, and its pictures change. "
        "Every pair of pictures starts from the same random noise, so whatever differs "
        "between the two was caused by quantization."
    )


def summary_sentences(report: ComparisonReport, variant: VariantResult) -> tuple[str, ...]:
    """What was done, what broke, size, speed, likeness, what got worse, layers, notes."""
    return (
        f"{variant.name}: {variant.how}.",
        *breakage(variant),
        *cost_sentences(report, variant),
        *fidelity_sentences(variant),
        *_distance_sentences(variant),
        *loss_sentences(report, variant),
        *_layer_sentences(variant),
        *variant.notes,
    )


def breakage(variant: VariantResult) -> tuple[str, ...]:
    """What is not merely worse but broken; empty in good times."""
    shown = variant.images
    count = int((~np.isfinite(shown).all(axis=(1, 2, 3))).sum())
    if not count:
        return ()
    return (f"BROKEN: {count} of the {len(shown)} pictures shown hold values that are no numbers.",)


def cost_sentences(report: ComparisonReport, variant: VariantResult) -> tuple[str, str]:
    """Bytes and seconds, in float and quantized."""
    size = size_verdict(report, variant).text.replace("×", " times")
    sentence = (
        f"The weights take {bytes_text(variant.bytes_quantized)} instead of "
        f"{bytes_text(report.bytes_float)} in {report.float_dtype}: {size}."
    )
    return sentence, _speed_sentence(report, variant)


def _speed_sentence(report: ComparisonReport, variant: VariantResult) -> str:
    timing = variant.timing
    if timing is None:
        return "How fast it runs was not measured."
    verdict = speed_verdict(variant)
    claim = {
        "good": verdict.text.replace("×", " times"),
        "even": "no difference worth the name",
        "bad": verdict.text.replace("×", " times").replace("slower", "SLOWER"),
    }[verdict.tone]
    return (
        f"On {report.device}, one sampling step takes {seconds_text(timing.seconds_quantized)} "
        f"instead of {seconds_text(timing.seconds_float)}: {claim} "
        f"(batch {timing.batch}, median of {timing.repeats})."
    )


def fidelity_sentences(variant: VariantResult) -> tuple[str, ...]:
    """How alike the pictures are, and whether they still show what was asked for."""
    return (_likeness_sentence(variant), *_agreement_sentences(variant))


def _likeness_sentence(variant: VariantResult) -> str:
    total, equal = len(variant.psnr), int(np.isposinf(variant.psnr).sum())
    if equal == total:
        return "Its pictures equal the float model's, pixel for pixel."
    interval = mean_and_interval(variant.psnr)
    if interval is None:
        return "None of its pictures can be compared with the float model's."
    spread = "on one picture"
    if interval.n > 1:
        spread = (
            f"over {interval.n:,} pictures (95{NBSP}% interval {interval.low:.1f} to "
            f"{interval.high:.1f}; worst {np.nanmin(variant.psnr):.1f})"
        )
    if equal:
        spread += f", leaving out {equal:,} that are equal"
    similarity = ""
    if variant.ssim is not None and np.isfinite(variant.ssim).any():
        similarity = f" and an SSIM of {np.nanmean(variant.ssim):.3f} (1 is equal)"
    return (
        "From the same noise, its pictures match the float model's with a PSNR of "
        f"{interval.estimate:.1f}{NBSP}dB {spread}{similarity}. Rule of thumb: {likeness(variant)}."
    )


def _agreement_sentences(variant: VariantResult) -> tuple[str, ...]:
    agreement = variant.agreement
    if agreement is None:
        return ()
    before, after = percent_text(agreement.value_float), percent_text(agreement.value)
    direction = "fewer" if agreement.value < agreement.value_float else "more"
    compared = "as many as" if before == after else f"{direction} than the {before} of"
    sentence = (
        f"A classifier ({agreement.net}) recognizes what was asked for in {after} of its "
        f"{agreement.n:,} pictures, {compared} the float model's."
    )
    return (sentence,)


def _distance_sentences(variant: VariantResult) -> list[str]:
    found = []
    for distance in variant.distances:
        sentence = f"{distance_text(distance)} is {number_text(distance.value)}"
        if distance.value_float is not None:
            sentence += f"; the float model's is {number_text(distance.value_float)}"
        found.append(sentence + ".")
    return found


def agreement_fell(variant: VariantResult) -> bool:
    """Whether a classifier sees what was asked for in fewer pictures than the float model's."""
    agreement = variant.agreement
    return agreement is not None and agreement.value < agreement.value_float


def risen_distances(variant: VariantResult) -> tuple[tuple[FeatureDistance, float], ...]:
    """Distances that are larger than the float model's, which follows each."""
    known = ((d, d.value_float) for d in variant.distances)
    return tuple((d, before) for d, before in known if before is not None and d.value > before)


def loss_sentences(report: ComparisonReport, variant: VariantResult) -> tuple[str, ...]:
    """One sentence that lists everything measured that got worse; empty where nothing did."""
    losses = []
    if (speed := speed_verdict(variant)).tone == "bad":
        losses.append(f"speed ({speed.text})")
    if (size := size_verdict(report, variant)).tone == "bad":
        losses.append(f"size ({size.text})")
    if (agreement := variant.agreement) and agreement_fell(variant):
        change = f"{percent_text(agreement.value_float)} to {percent_text(agreement.value)}"
        losses.append(f"class agreement ({change})")
    for distance, before in risen_distances(variant):
        change = f"{number_text(before)} to {number_text(distance.value)}"
        losses.append(f"{distance.name} to {distance.reference} ({change})")
    return (f"Worse than the float model: {'; '.join(losses)}.",) if losses else ()


def _layer_sentences(variant: VariantResult) -> tuple[str, ...]:
    if not variant.layers:
        return ()
    quantized, kept = len(variant.quantized_layers), len(variant.float_layers)
    return (f"{quantized:,} of {len(variant.layers):,} layers quantized, {kept:,} left in float.",)


def float_seconds(report: ComparisonReport) -> tuple[float, ...]:
    """The float model's seconds per step in every run that timed it, sorted."""
    return tuple(sorted(v.timing.seconds_float for v in report.variants if v.timing))


def stage_progress(
    tell: Callable[[float, str], None],
) -> tuple[Callable[[int, int, str], None], Callable[[Mapping[str, Any]], None]]:
    """`on_stage` and `on_event` of `qjax.calibrate.run`, as one progress.

    Args:
      tell: Called with the stages done, the one at hand in part, and words on it.
    """
    stage = 0

    def on_stage(done: int, total: int, name: str) -> None:
        nonlocal stage
        stage = done
        tell(done, name)

    def on_event(event: Mapping[str, Any]) -> None:
        if "share" in event:
            tell(stage + event["share"], event_words(event))

    return on_stage, on_event


def event_words(event: Mapping[str, Any]) -> str:
    """A few words on what a stage is at."""
    if event["event"] == "step":
        return f"{event['part']}, step {event['step']} of {event['steps']}"
    error = f", error {event['error']:.3f} of nearest" if "error" in event else ""
    return f"{event.get('block', '')}, iteration {event.get('iteration', '')}{error}"
