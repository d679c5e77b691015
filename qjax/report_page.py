"""The report's HTML page: every section a function from data to text.

All text that comes from the data goes through `escape`; the script reads it back from the
page and never sees it as code. The page's policy allows that one script, by its hash, and
nothing from elsewhere.
"""

import base64
import hashlib
from collections.abc import Iterable
from html import escape

import numpy as np
from PIL import Image

from qjax import report_words as words
from qjax.report_chart import error_chart
from qjax.report_data import ComparisonReport, VariantResult
from qjax.report_pictures import data_uri, error_ceiling, error_picture, heat_palette, picture
from qjax.report_sensitivity import layers_section, reasons
from qjax.report_style import CSS, JS
from qjax.report_words import Verdict
from qjax.report_worse import losses, not_measured

__all__ = ["document", "glossary", "render_html"]

# Shorter side, in pixels, below which a picture is shown as blocks instead of smoothed.
SMALL_PICTURE = 128

# Script and style are inline, pictures are `data:`; nothing else may load.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; script-src "
)

GLOSSARY = (
    (
        "PSNR, in decibels (dB)",
        (
            "How close two pictures are, pixel by pixel; higher is closer. Every 6 dB halves the "
            "error. Above 40 dB few people see a difference, below 20 dB everybody does."
        ),
    ),
    (
        "SSIM",
        (
            "How alike the structures of two pictures are: 1 is equal, 0 is unrelated. "
            "11-pixel Gaussian windows."
        ),
    ),
    (
        "Distances between sets (FD, KID, ...)",
        (
            "Whether two sets of pictures look alike as a whole, seen by the net that is named; "
            "lower is closer. FD falls as n grows: compare it only with numbers of the same net "
            "and the same n."
        ),
    ),
    (
        "Class agreement",
        "How often a classifier sees in a picture what the model was asked to draw.",
    ),
    (
        "Error per step",
        (
            "A picture is made from noise in steps. After each, how far the quantized model's "
            "half-made picture has drifted from the float model's, as a share of its size."
        ),
    ),
    (
        "W4A8",
        (
            "Weights stored in 4 bits, the numbers flowing between layers rounded to 8. A16: those "
            "stay in float."
        ),
    ),
    (
        "Groups and scales",
        (
            "A stored weight is a small integer; times a scale it is the weight again. Weights of "
            "one group share a scale: small groups are closer, and cost more scales."
        ),
    ),
    (
        "Tensor, kernel",
        (
            "A tensor is a block of the model's numbers. A kernel is the large one of a layer, by "
            "which its input is multiplied. Biases and norms are small and stay in float."
        ),
    ),
    (
        "Weights moved, answer moved",
        (
            "How far a layer's stored weights are from the float ones, and how far the network's "
            "answer is with that layer alone quantized, as a share of their size (relative L2; "
            "10 % is a signal to noise ratio, SQNR, of 20 dB, 1 % of 40 dB)."
        ),
    ),
    (
        "95 % interval",
        "Where the mean would lie in 95 of 100 such comparisons, by drawing from these pictures.",
    ),
)


def render_html(report: ComparisonReport) -> str:
    """The whole page as text, complete in itself."""
    sections = (
        _header(report),
        "<main>",
        _cards(report),
        _slider(report),
        _worse(report),
        _how(report),
        _numbers(report),
        _pictures(report),
        _errors(report),
        layers_section(report),
        glossary(),
        "</main>",
        _footer(report),
    )
    body = "\n".join(section for section in sections if section)
    return document(report.title, body, script=JS)


def document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A page that is complete in itself and may load nothing.

    Args:
      title: Of the page; escaped here.
      body: HTML.
      style: Added to the common style sheet.
      script: The one script of the page; no other can run.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = POLICY + (f"'sha256-{digest}'" if script else "'none'")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{CSS}{style}</style>\n</head>\n<body>\n{body}"
        + (f"\n<script>{script}</script>" if script else "")
        + "\n</body>\n</html>\n"
    )


def _paragraphs(sentences: Iterable[str], css: str = "") -> str:
    attribute = f' class="{css}"' if css else ""
    return "".join(f"<p{attribute}>{escape(sentence)}</p>" for sentence in sentences)


def _header(report: ComparisonReport) -> str:
    facts = (
        ("Device", report.device),
        ("Sampler", report.sampler),
        ("Float model", f"{words.bytes_text(report.bytes_float)} in {report.float_dtype}"),
    )
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts
    )
    return (
        f"<header><h1>{escape(report.title)}</h1>{_paragraphs([words.lede(report)])}"
        f'<dl class="facts">{items}</dl></header>'
    )


def _stat(verdict: Verdict, below: str) -> str:
    return (
        f'<div class="stat {verdict.tone}"><b>{escape(verdict.text)}</b>'
        f"<span>{escape(below)}</span></div>"
    )


def _cards(report: ComparisonReport) -> str:
    cards = "".join(_card(report, variant) for variant in report.variants)
    return f'<section><h2>In short</h2><div class="cards rows">{cards}</div></section>'


def _card(report: ComparisonReport, variant: VariantResult) -> str:
    share = variant.bytes_quantized / report.bytes_float
    timing = variant.timing
    stats = (
        _stat(
            words.size_verdict(report, variant),
            f"{words.bytes_text(variant.bytes_quantized)}, was "
            f"{words.bytes_text(report.bytes_float)}",
        ),
        _stat(
            words.speed_verdict(variant),
            f"{words.seconds_text(timing.seconds_quantized)} a step, was "
            f"{words.seconds_text(timing.seconds_float)}"
            if timing
            else "",
        ),
        _stat(words.fidelity_verdict(variant), words.likeness(variant)),
    )
    text = (
        _paragraphs(words.breakage(variant), "warning")
        + _paragraphs([" ".join(words.cost_sentences(report, variant))])
        + _paragraphs([" ".join(words.fidelity_sentences(variant))])
        + _paragraphs(words.loss_sentences(report, variant), "loss")
        + _paragraphs(variant.notes, "soft")
    )
    return (
        f'<article class="card"><h3>{escape(variant.name)}</h3>'
        f'<p class="soft how">{escape(variant.how)}.</p>'
        f'<div><div class="bar" role="img" aria-label="{share:.0%} of the float model’s bytes">'
        f'<i style="width:{min(share, 1):.1%}"></i></div>'
        f'<span class="soft small">{share:.0%} of the float model’s bytes</span></div>'
        f'<div class="stats-box"><div class="stats">{"".join(stats)}</div></div><div>{text}</div>'
        "</article>"
    )


def _cell(text: str, small: str = "", tone: str = "even") -> str:
    note = f"<small>{escape(small)}</small>" if small else ""
    css = "" if tone == "even" else f' class="{tone}"'
    return f"<td{css}>{escape(text)}{note}</td>"


def _row(name: str, float_cell: str, cells: Iterable[str], small: str = "") -> str:
    note = f"<small>{escape(small)}</small>" if small else ""
    return f'<tr><th scope="row">{escape(name)}{note}</th>{float_cell}{"".join(cells)}</tr>'


def _numbers(report: ComparisonReport) -> str:
    variants = report.variants
    heads = "".join(f'<th scope="col">{escape(variant.name)}</th>' for variant in variants)
    rows = (
        _size_row(report),
        _speed_row(report),
        _row(
            "PSNR",
            _cell("–"),
            (_mean_cell(v.psnr, "{:.1f} dB") for v in variants),
            "mean, 95 % interval; higher is closer",
        ),
        _row(
            "SSIM",
            _cell("–"),
            (_cell("–") if v.ssim is None else _mean_cell(v.ssim, "{:.3f}") for v in variants),
            "mean, 95 % interval; 1 is equal",
        ),
        *_distance_rows(report),
        _agreement_row(report) if any(v.agreement for v in variants) else "",
        _row(
            "Error after the last step",
            _cell("–"),
            (_cell(words.number_text(float(v.error_per_step[-1]))) for v in variants),
            "relative L2; lower is closer",
        ),
    )
    return (
        '<section><h2>The numbers</h2><div class="scroll" tabindex="0" role="region" '
        'aria-label="The numbers, a table"><table class="numbers"><thead><tr>'
        f'<td></td><th scope="col">float<small>{escape(report.float_dtype)}</small></th>{heads}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"{_paragraphs(report.notes, 'soft small after')}</section>"
    )


def _size_row(report: ComparisonReport) -> str:
    cells = []
    for variant in report.variants:
        verdict = words.size_verdict(report, variant)
        cells.append(_cell(verdict.text, words.bytes_text(variant.bytes_quantized), verdict.tone))
    return _row("Weights", _cell(words.bytes_text(report.bytes_float)), cells)


def _speed_row(report: ComparisonReport) -> str:
    times = words.float_seconds(report)
    cells = []
    for variant in report.variants:
        verdict, timing = words.speed_verdict(variant), variant.timing
        small = (
            f"{words.seconds_text(timing.seconds_quantized)} against "
            f"{words.seconds_text(timing.seconds_float)}"
            if timing
            else ""
        )
        cells.append(_cell(verdict.text, small, verdict.tone))
    float_cell = _cell(words.seconds_text(times[len(times) // 2]) if times else "–")
    return _row("Time of one step", float_cell, cells, f"on {report.device}")


def _mean_cell(values: np.ndarray, form: str) -> str:
    """Mean and interval of the finite values, and how many there are or are missing."""
    interval = words.mean_and_interval(values)
    broken, equal = int(np.isnan(values).sum()), int(np.isposinf(values).sum())
    counts = [f"n = {len(values):,}".replace(" ", words.NBSP)]
    if broken:
        counts.append(f"{broken} broken")
    if equal:
        counts.append(f"{equal} identical")
    tone = "bad" if broken else "even"
    if interval is None:
        return _cell("identical" if equal else "broken", ", ".join(counts), tone)
    if interval.n > 1:
        plain = form.split()[0]
        counts.insert(0, f"{plain.format(interval.low)} to {plain.format(interval.high)}")
    return _cell(form.format(interval.estimate), ", ".join(counts), tone)


def _distance_rows(report: ComparisonReport) -> list[str]:
    rows = []
    for kind, found in words.distance_rows(report):
        of_float = [d.value_float for d in found if d and d.value_float is not None]
        cells = []
        for verdict in map(words.distance_verdict, found):
            small = "worse than float" if verdict.tone == "bad" else ""
            cells.append(_cell(verdict.text, small, verdict.tone))
        rows.append(
            _row(
                f"{kind.name} to {kind.reference}",
                _cell(words.number_text(of_float[0]) if of_float else "–"),
                cells,
                f"{kind.net}; n = {kind.n:,}; lower is closer",
            )
        )
    return rows


def _agreement_row(report: ComparisonReport) -> str:
    known = [variant.agreement for variant in report.variants if variant.agreement]
    cells = []
    for variant in report.variants:
        verdict, agreement = words.agreement_verdict(variant), variant.agreement
        small = f"n = {agreement.n:,}" if agreement else ""
        if verdict.tone == "bad":
            small = f"fewer than float, {small}"
        cells.append(_cell(verdict.text, small, verdict.tone))
    nets = sorted({agreement.net for agreement in known})
    return _row(
        "Class agreement",
        _cell(words.percent_text(known[0].value_float)),
        cells,
        f"seen by {', '.join(nets)}; higher is better",
    )


def _slider(report: ComparisonReport) -> str:
    h, w = report.float_images.shape[1:3]
    return (
        '<section class="needs-script" hidden><h2>Before and after</h2>'
        '<p class="soft">Drag across the picture, or use the arrow keys: float on the left of the '
        f'line, quantized on the right.</p><div class="stage-box"><div class="stage{_pixels(report)}" '
        f'style="aspect-ratio:{w}/{h}"><img alt=""><img class="over" alt="">'
        '<div class="edge"></div><span class="tag left">float</span>'
        '<span class="tag right"></span><input type="range" min="0" max="100" value="50" '
        'aria-label="Share of the picture that shows the float model"></div>'
        '<div><h3>Version</h3><div class="choices" data-variants></div><h3>Picture</h3>'
        f'<div class="choices{_pixels(report)}" data-seeds></div>'
        f'<figure class="zoom{_pixels(report)}"><img class="map" alt=""><figcaption aria-live='
        '"polite"><b data-caption></b><span>where it differs</span></figcaption></figure>'
        "</div></div></section>"
    )


def _pixels(report: ComparisonReport) -> str:
    """The class that shows small pictures as crisp blocks, with a space before it."""
    return " pixels" if min(report.float_images.shape[1:3]) < SMALL_PICTURE else ""


def _pictures(report: ComparisonReport) -> str:
    variants = [variant.images for variant in report.variants]
    ceiling = error_ceiling(variants, report.float_images)
    width = 112 * (1 + len(report.variants)) + 40
    seeds = "".join(_seed(report, i, ceiling) for i in range(len(report.seeds)))
    palette = Image.fromarray(heat_palette()[None, :255])
    count = len(report.variants[0].psnr)
    chosen = ""
    if report.worst_shown:
        of = f"the {report.worst_shown} that came out worst of {count:,}"
        chosen = f" The last are {of}; the others are simply the first."
    return (
        "<section><h2>Same noise, side by side</h2>"
        '<p class="soft">Above, the pictures; below each, where and how much it differs from '
        f"the float model’s. All maps share one colour scale.{chosen}</p>"
        f'<div class="heat"><span>no error</span><img alt="colour scale" '
        f'src="{data_uri(palette)}"><span>{escape(words.percent_text(ceiling))} of the full '
        'range, or more</span></div><div class="seeds" style="grid-template-columns:'
        f'repeat(auto-fill,minmax(min(100%,{width}px),1fr))">{seeds}</div></section>'
    )


def _seed(report: ComparisonReport, i: int, ceiling: float) -> str:
    name, reference = report.picture_names[i], report.float_images[i]
    h, w = reference.shape[:2]
    size = f'width="{w}" height="{h}"'
    figures = [
        (
            f'<figure><img class="shot" {size} alt="{escape(f"{name}, float")}" '
            f'src="{data_uri(picture(reference))}"><figcaption>float</figcaption>'
            '<span class="aside">difference from float</span></figure>'
        )
    ]
    for variant in report.variants:
        score = _score(float(variant.psnr[i]))
        drawn = error_picture(variant.images[i], reference, ceiling=ceiling)
        figures.append(
            f'<figure><img class="shot" {size} alt="{escape(f"{name}, {variant.name}")}" '
            f'data-name="{escape(variant.name)}" data-score="{escape(score)}" '
            f'src="{data_uri(picture(variant.images[i]))}">'
            f"<figcaption>{escape(variant.name)}<span>{escape(score)}</span></figcaption>"
            f'<img class="map" {size} alt="{escape(f"{name}, error of {variant.name}")}" '
            f'src="{data_uri(drawn)}"></figure>'
        )
    return (
        f'<article class="seed" data-name="{escape(name)}"><h3>{escape(name)}</h3>'
        f'<div class="row{_pixels(report)}">{"".join(figures)}</div></article>'
    )


def _score(psnr: float) -> str:
    if np.isnan(psnr):
        return "broken: not a number"
    return "identical" if np.isposinf(psnr) else f"{psnr:.1f}{words.NBSP}dB"


def _errors(report: ComparisonReport) -> str:
    return (
        "<section><h2>How the error grows while a picture is made</h2>"
        f"{error_chart(report)}</section>"
    )


def _worse(report: ComparisonReport) -> str:
    cards = []
    for variant in report.variants:
        found = losses(report, variant)
        text = _facts([(loss.what, loss.text) for loss in found])
        if not found:
            text = "<p>Nothing that was measured got worse.</p>"
        if missing := not_measured(variant):
            text += f'<p class="soft">Not measured: {escape("; ".join(missing))}.</p>'
        cards.append(f'<article class="card"><h3>{escape(variant.name)}</h3>{text}</article>')
    return (
        '<section><h2>What got worse</h2><p class="soft">Fewer bits always cost something. This is '
        "all of it that was measured, the worst by name, and what was not measured.</p>"
        f'<div class="cards">{"".join(cards)}</div></section>'
    )


def _how(report: ComparisonReport) -> str:
    cards = [
        f'<article class="card"><h3>{escape(variant.name)}</h3>{_facts(variant.settings)}'
        f"{reasons(variant, paths=False)}</article>"
        for variant in report.variants
        if variant.settings
    ]
    if not cards:
        return ""
    return (
        '<section><h2>How it was quantized</h2><p class="soft">Everything that was chosen, so that '
        f'it can be done again.</p><div class="cards">{"".join(cards)}</div></section>'
    )


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in pairs
    )
    return f'<dl class="said">{rows}</dl>'


def glossary() -> str:
    """What the terms of the pages mean, as a section."""
    items = "".join(
        f"<div><dt>{escape(term)}</dt><dd>{escape(meaning)}</dd></div>"
        for term, meaning in GLOSSARY
    )
    return f'<section><h2>How to read this</h2><dl class="glossary">{items}</dl></section>'


def _footer(report: ComparisonReport) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions)
    seeds = ", ".join(map(str, report.seeds))
    lines = (
        f"Seeds of the pictures: {seeds}. Sampler: {report.sampler}. Times: {report.device}.",
        f"Made with {versions}. This page is one file and loads nothing from the network.",
    )
    return f"<footer>{_paragraphs(lines)}</footer>"
