"""What got worse, in words with numbers, and what was not measured.

Plain text for the report: a `Loss` is a matter and what is to be said of it. Nothing here is left
out for being small; what is better than the float model is not listed.
"""

from dataclasses import dataclass

import numpy as np

from qjax import report_words as words
from qjax.report_data import ComparisonReport, LayerResult, VariantResult

__all__ = ["Loss", "losses", "not_measured"]

# Shown by name: so many pictures, so many layers.
MOST_NAMED = 3
LONGEST_NAME = 40
# PSNR in dB below which a difference is seen up close.
SEEN = 30.0


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Something that is worse than in the float model.

    Attributes:
      what: A word or two.
      text: A sentence or two.
    """

    what: str
    text: str


def losses(report: ComparisonReport, variant: VariantResult) -> tuple[Loss, ...]:
    """Everything measured that is worse, the plainest first; empty where nothing is."""
    found = (
        _broken(variant),
        _speed(report, variant),
        _size(report, variant),
        _classes(variant),
        *_distances(variant),
        _pictures(report, variant),
        _steps(variant),
        _weights(variant),
        _answers(variant),
    )
    return tuple(loss for loss in found if loss is not None)


def not_measured(variant: VariantResult) -> tuple[str, ...]:
    """What the report does not know of a variant, in a few words each."""
    quantized = variant.quantized_layers
    missing = {
        "speed": variant.timing is None,
        "SSIM": variant.ssim is None,
        "distances between sets of pictures": not variant.distances,
        "class agreement": variant.agreement is None,
        "what rounding did to the weights of layers": bool(quantized)
        and all(layer.weight_sqnr is None for layer in quantized),
        "the effect of each layer alone on the answers": bool(quantized)
        and all(layer.output_sqnr is None for layer in quantized),
    }
    return tuple(what for what, is_missing in missing.items() if is_missing)


def _broken(variant: VariantResult) -> Loss | None:
    count = int(np.isnan(variant.psnr).sum())
    if not count:
        return None
    text = f"{count:,} of {len(variant.psnr):,} pictures hold values that are no numbers."
    return Loss(what="Broken", text=text)


def _speed(report: ComparisonReport, variant: VariantResult) -> Loss | None:
    verdict, timing = words.speed_verdict(variant), variant.timing
    if timing is None or verdict.tone != "bad":
        return None
    text = (
        f"A sampling step takes {words.seconds_text(timing.seconds_quantized)} instead of "
        f"{words.seconds_text(timing.seconds_float)} on {report.device}: {verdict.text}."
    )
    return Loss(what="Slower", text=text)


def _size(report: ComparisonReport, variant: VariantResult) -> Loss | None:
    verdict = words.size_verdict(report, variant)
    if verdict.tone != "bad":
        return None
    text = (
        f"The weights take {words.bytes_text(variant.bytes_quantized)} instead of "
        f"{words.bytes_text(report.bytes_float)}: {verdict.text}."
    )
    return Loss(what="Larger", text=text)


def _classes(variant: VariantResult) -> Loss | None:
    agreement = variant.agreement
    if agreement is None or not words.agreement_fell(variant):
        return None
    fewer = round((agreement.value_float - agreement.value) * agreement.n)
    text = (
        f"A classifier sees what was asked for in {words.percent_text(agreement.value)} of the "
        f"pictures instead of {words.percent_text(agreement.value_float)}: {fewer:,} fewer of "
        f"{agreement.n:,}."
    )
    return Loss(what="Off the subject", text=text)


def _distances(variant: VariantResult) -> list[Loss]:
    return [
        Loss(
            what="Further from the reference",
            text=f"{distance.name} to {distance.reference} rose from "
            f"{words.number_text(before)} to {words.number_text(distance.value)} "
            f"(lower is closer; {distance.n:,} pictures).",
        )
        for distance, before in words.risen_distances(variant)
    ]


def _pictures(report: ComparisonReport, variant: VariantResult) -> Loss | None:
    """How many pictures differ how much, and the worst of those shown."""
    psnr = variant.psnr
    whole = int((~np.isnan(psnr)).sum())
    if np.isposinf(psnr).all() or not whole:
        return None
    plain, seen = int((psnr < words.PLAIN).sum()), int((psnr < SEEN).sum())
    first = (
        f"None of {whole:,} differs from the float model's so that it can be seen (PSNR below "
        f"{SEEN:g}{words.NBSP}dB)."
        if not seen
        else f"{seen:,} of {whole:,} differ from the float model's so that it can be seen up close "
        f"(PSNR below {SEEN:g}{words.NBSP}dB), {plain:,} of them at a glance (below "
        f"{words.PLAIN:g}{words.NBSP}dB)."
    )
    parts = [first]
    names = report.picture_names
    scores = psnr[: len(names)]
    order = [int(i) for i in np.argsort(scores, kind="stable") if np.isfinite(scores[i])]
    if order:
        named = "; ".join(
            f"{_short(names[i])}, {scores[i]:.1f}{words.NBSP}dB" for i in order[:MOST_NAMED]
        )
        of = "all" if scores[order[0]] == np.nanmin(psnr) else "those shown"
        parts.append(f"The least alike of {of}: {named}.")
    return Loss(what="Pictures", text=" ".join(parts))


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1].rstrip()}…"


def _steps(variant: VariantResult) -> Loss | None:
    """Where the error grew most, and where it ended."""
    errors = np.asarray(variant.error_per_step, np.float64)
    if not np.isfinite(errors).all() or not errors.any():
        return None
    growth = np.diff(errors, prepend=0.0)
    worst = int(np.argmax(growth))
    before = errors[worst - 1] if worst else 0.0
    text = (
        f"The half-made picture drifts from the float model's most at step {worst + 1} of "
        f"{len(errors)}, from {words.percent_text(before)} to {words.percent_text(errors[worst])} "
        f"of its size; after the last step it is {words.percent_text(errors[-1])} away."
    )
    return Loss(what="Worst step", text=text)


def _named(layers: list[tuple[float, LayerResult]]) -> str:
    layers = sorted(layers, key=lambda pair: pair[0])
    return "; ".join(
        f"{words.layer_text(layer)}, {words.noise_text(sqnr)}"
        for sqnr, layer in layers[:MOST_NAMED]
    )


def _weights(variant: VariantResult) -> Loss | None:
    known = [
        (layer.weight_sqnr, layer) for layer in variant.layers if layer.weight_sqnr is not None
    ]
    if not known or all(np.isposinf(sqnr) for sqnr, _ in known):
        return None
    text = f"The weights that moved most, as a share of their size: {_named(known)}."
    return Loss(what="Worst layers", text=text)


def _answers(variant: VariantResult) -> Loss | None:
    known = [
        (layer.output_sqnr, layer) for layer in variant.layers if layer.output_sqnr is not None
    ]
    if not known or all(np.isposinf(sqnr) for sqnr, _ in known):
        return None
    text = (
        "Quantized alone, all else in float, these change what the network answers most: "
        f"{_named(known)}."
    )
    return Loss(what="Most sensitive layers", text=text)
