"""The report's section on layers: bars of the most sensitive ones, and a table of all.

A layer's bar is what quantizing it alone does to the network's answer where that was measured,
else how far its stored weights are from the float ones.
"""

from collections.abc import Callable
from html import escape

from qjax import report_words as words
from qjax.report_data import ComparisonReport, LayerResult, VariantResult

__all__ = ["layers_section", "reasons"]

# More would not be read; the table has them all.
MOST_BARS = 12

ANSWER = (
    "How far the network’s answer moves, as a share of its size, when the weights of this layer "
    "alone are the quantized ones and all else is float."
)
WEIGHTS = (
    "How far the stored weights of each layer are from the float ones, as a share of their size. "
    "Rounding causes it; a calibration that trains weights adds to it on purpose."
)

Measure = Callable[[LayerResult], float | None]


def layers_section(report: ComparisonReport) -> str:
    """The section as HTML; empty where no variant tells of layers."""
    parts = [_layers(variant) for variant in report.variants if variant.layers]
    if not parts:
        return ""
    return (
        '<section><h2>Layer by layer</h2><p class="soft">Which layers lose most, and how each is '
        f'stored.</p><div class="cards layered">{"".join(parts)}</div></section>'
    )


def reasons(variant: VariantResult, *, paths: bool) -> str:
    """Why layers were left in float, as an HTML list gathered by reason.

    Args:
      variant: Whose layers.
      paths: Whether the layers are named, not only counted.
    """
    if not variant.layers:
        return ""
    if not variant.float_layers:
        return '<p class="soft">No tensor was left in float.</p>'
    found: dict[str, list[str]] = {}
    for layer in variant.float_layers:
        found.setdefault(layer.reason, []).append(layer.path)
    items = []
    for reason, layers in found.items():
        named = ", ".join(f"<code>{_breaking(path)}</code>" for path in layers) if paths else ""
        items.append(
            f'<li><b>{escape(reason)}</b> <span class="soft">({len(layers)})</span>'
            f"{'<br>' if named else ''}{named}</li>"
        )
    return f'<p class="soft after">Left in float, and why:</p><ul class="reasons">{"".join(items)}</ul>'


def _layers(variant: VariantResult) -> str:
    quantized, kept = variant.quantized_layers, variant.float_layers
    counts = (
        f"{len(quantized)} of {len(variant.layers)} tensors quantized, {len(kept)} left in float"
    )
    return (
        f'<article class="card"><h3>{escape(variant.name)}</h3>{_bars(variant)}'
        f"<details><summary>All layers <span>{counts}</span></summary>"
        f"{reasons(variant, paths=True)}{_table(variant)}</details></article>"
    )


def _weights(layer: LayerResult) -> float | None:
    return layer.weight_sqnr


def _answer(layer: LayerResult) -> float | None:
    return layer.output_sqnr


def _bars(variant: VariantResult) -> str:
    """The worst layers first, by the answer where it was measured."""
    measured = any(layer.output_sqnr is not None for layer in variant.layers)
    measure: Measure = _answer if measured else _weights
    known = [(sqnr, layer) for layer in variant.layers if (sqnr := measure(layer)) is not None]
    if not known:
        return '<p class="soft">What quantizing did to single layers was not measured.</p>'
    known.sort(key=lambda pair: pair[0])
    longest = max((words.noise_share(sqnr) for sqnr, _ in known if sqnr > -float("inf")), default=0)
    items = []
    for sqnr, layer in known[:MOST_BARS]:
        share = words.noise_share(sqnr) / longest if longest else 0.0
        items.append(
            f"<li><code>{_breaking(words.layer_text(layer))}</code><span>{escape(words.bits_text(layer))}</span>"
            f"<b>{escape(words.noise_text(sqnr))}</b>"
            f'<i aria-hidden="true" style="width:{min(share, 1):.1%}"></i></li>'
        )
    rest = len(known) - len(items)
    more = (
        f'<p class="soft">{rest:,} more layers move less; all are in the table.</p>' if rest else ""
    )
    return (
        f'<p class="soft">{ANSWER if measured else WEIGHTS}</p>'
        f'<ol class="bars">{"".join(items)}</ol>{more}'
    )


def _table(variant: VariantResult) -> str:
    names = ["layer", "kind", "shape", "bits", "group", "float", "now", "weights moved"]
    measured = any(layer.output_sqnr is not None for layer in variant.layers)
    if measured:
        names.append("answer moved")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = "".join(_row(layer, measured) for layer in variant.layers)
    label = escape(f"Layers of {variant.name}, a table")
    return (
        f'<div class="scroll tall" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="layers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _row(layer: LayerResult, measured: bool) -> str:
    css = "" if layer.weight_bits is not None else ' class="kept"'
    cells = [
        layer.kind,
        " × ".join(map(str, layer.shape)),
        words.bits_text(layer),
        "–" if layer.group_size is None else str(layer.group_size),
        words.bytes_text(layer.bytes_float),
        words.bytes_text(layer.bytes_quantized),
        _moved(layer.weight_sqnr),
    ]
    if measured:
        cells.append(_moved(layer.output_sqnr))
    return (
        f'<tr{css}><td class="mono">{_breaking(layer.path)}</td>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
    )


def _breaking(path: str) -> str:
    """A path as HTML that may go on in the next line after a slash or an underscore."""
    return escape(path).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _moved(sqnr: float | None) -> str:
    """`"9.8 % (20.2 dB)"`."""
    if sqnr is None:
        return "–"
    text = words.noise_text(sqnr)
    return f"{text} ({sqnr:.1f}{words.NBSP}dB)" if abs(sqnr) < float("inf") else text
