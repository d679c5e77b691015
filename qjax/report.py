"""The comparison report: one HTML page, a PNG grid, a table for the terminal.

Takes data, knows no model: `qjax.report_data` says what to fill in. The page is a single
file with its style, script and pictures inside; it asks nothing of the network, and tells
the browser to refuse if it did. The same data gives the same bytes.
"""

import os

from PIL import Image
from rich.table import Table
from rich.text import Text

from qjax import report_words as words
from qjax.core.safetensors_io import atomic_write
from qjax.report_data import (
    ClassAgreement,
    ComparisonReport,
    FeatureDistance,
    LayerResult,
    Timing,
    VariantResult,
    as_dict,
)
from qjax.report_page import render_html
from qjax.report_pictures import error_ceiling, error_picture, grid, picture, save_png
from qjax.report_words import Verdict, summary_sentences

__all__ = [
    "ClassAgreement",
    "ComparisonReport",
    "FeatureDistance",
    "LayerResult",
    "Timing",
    "VariantResult",
    "as_dict",
    "image_grid",
    "render_html",
    "save_html",
    "save_png",
    "summary_sentences",
    "summary_table",
    "table_rows",
]

# What a verdict's tone looks like in a terminal.
STYLES = {"good": "green", "bad": "bold red", "even": ""}


def image_grid(report: ComparisonReport, *, tile: int = 112) -> Image.Image:
    """Rows are seeds; columns the float model, its variants, and a map of each one's error.

    Args:
      report: The data.
      tile: Shorter side of a picture at least; small ones are enlarged in whole blocks.
    """
    variants = [variant.images for variant in report.variants]
    ceiling = error_ceiling(variants, report.float_images)
    columns = [("float", [picture(image) for image in report.float_images])]
    for variant in report.variants:
        columns.append((variant.name, [picture(image) for image in variant.images]))
    for variant in report.variants:
        pairs = zip(variant.images, report.float_images, strict=True)
        maps = [error_picture(image, reference, ceiling=ceiling) for image, reference in pairs]
        columns.append((f"error of {variant.name}", maps))
    footer = (
        f"{report.title}. Error maps: dark is 0, brightest is {words.percent_text(ceiling)} of "
        "the full range or more."
    )
    return grid(columns, report.picture_names, footer=footer, tile=tile)


def save_html(report: ComparisonReport, path: str | os.PathLike[str]) -> None:
    """Write the page; what stood at `path` stays whole until the new file is complete."""
    page = render_html(report).encode()
    with atomic_write(path) as file:
        file.write(page)


def summary_table(report: ComparisonReport) -> Table:
    """The report's numbers for a terminal: one column a variant, bad news in words and red."""
    table = Table(title=Text(report.title), caption=Text(f"{report.device}; {report.sampler}"))
    table.add_column("")
    table.add_column(Text(f"float\n{report.float_dtype}"), justify="right")
    for variant in report.variants:
        table.add_column(Text(variant.name), justify="right")
    for name, float_cell, verdicts in table_rows(report):
        cells = [Text(verdict.text, style=STYLES[verdict.tone]) for verdict in verdicts]
        table.add_row(Text(name), Text(float_cell), *cells)
    return table


def table_rows(report: ComparisonReport) -> list[tuple[str, str, list[Verdict]]]:
    """Name, the float model's cell and the variants' cells of every row."""
    even = lambda text: Verdict(text=text, tone="even")
    variants, times = report.variants, words.float_seconds(report)
    ssim = [even(_ssim_text(v)) for v in variants]
    seconds = [
        even(words.seconds_text(v.timing.seconds_quantized) if v.timing else "–") for v in variants
    ]
    rows: list[tuple[str, str, list[Verdict]]] = [
        (
            "weights",
            words.bytes_text(report.bytes_float),
            [even(words.bytes_text(v.bytes_quantized)) for v in variants],
        ),
        ("", "", [words.size_verdict(report, v) for v in variants]),
        ("one step", words.seconds_text(times[len(times) // 2]) if times else "–", seconds),
        ("", "", [words.speed_verdict(v) for v in variants]),
        ("pictures", "", [words.fidelity_verdict(v) for v in variants]),
        ("SSIM", "", ssim),
    ]
    for kind, found in words.distance_rows(report):
        known = [d.value_float for d in found if d and d.value_float is not None]
        cells = [words.distance_verdict(distance) for distance in found]
        rows.append(
            (words.distance_text(kind), words.number_text(known[0]) if known else "", cells)
        )
    if known_agreement := [v.agreement for v in variants if v.agreement]:
        first = known_agreement[0]
        cells = [words.agreement_verdict(v) for v in variants]
        rows.append(
            (
                f"class agreement ({first.net}; n = {first.n:,})",
                words.percent_text(first.value_float),
                cells,
            )
        )
    return rows


def _ssim_text(variant: VariantResult) -> str:
    """Mean over the pictures that are not broken; those are told of in the row above."""
    if variant.ssim is None:
        return "–"
    found = words.mean_and_interval(variant.ssim)
    return "broken" if found is None else f"{found.estimate:.3f}"
