"""One page over several reports: a table and a strip of pictures each, and links to the rest."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from qjax.core.safetensors_io import atomic_write
from qjax.core.typing import Float
from qjax.report import table_rows
from qjax.report_data import ComparisonReport
from qjax.report_page import document, glossary
from qjax.report_pictures import data_uri, picture
from qjax.report_words import Verdict

FOOTER = "This page loads nothing from the network. The links lead to files beside it."

STRIPS = """
a { color: var(--link); display: inline-block; padding: 11px 0; }
.strips { display: grid; gap: 6px 12px; grid-template-columns: auto 1fr; align-items: center;
  margin: 14px 0; font-size: 0.9rem; }
.strips img { display: block; width: 100%; max-width: 640px; border-radius: 6px; }
main > section { margin-top: 28px; }
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A report and the files beside the index that belong to it.

    Attributes:
      report: What was found.
      links: Words and relative addresses.
      extra: More rows of the table: name, the float model's cell, a cell for each variant.
    """

    report: ComparisonReport
    links: tuple[tuple[str, str], ...] = ()
    extra: tuple[tuple[str, ...], ...] = ()


def save_index(
    path: str | os.PathLike[str], title: str, sentences: Sequence[str], entries: Sequence[Entry]
) -> None:
    """Write the page; what stood at `path` stays whole until the new file is complete."""
    paragraphs = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    parts = (
        f"<header><h1>{escape(title)}</h1>{paragraphs}</header>",
        "<main>",
        *map(_section, entries),
        glossary(),
        "</main>",
        f"<footer><p>{FOOTER}</p></footer>",
    )
    page = document(title, "\n".join(parts), style=STRIPS)
    with atomic_write(path) as file:
        file.write(page.encode())


def _section(entry: Entry) -> str:
    report = entry.report
    links = " &nbsp; ".join(
        f'<a href="{escape(address)}">{escape(words)}</a>' for words, address in entry.links
    )
    notes = "".join(f'<p class="soft small">{escape(note)}</p>' for note in report.notes)
    return (
        f"<section><h2>{escape(report.title)}</h2><p>{escape(report.model)}.</p>"
        f'<p class="soft small">{escape(report.device)}; {escape(report.sampler)}</p>'
        f"<p>{links}</p>{_table(entry)}{_strips(report)}{notes}</section>"
    )


def _table(entry: Entry) -> str:
    report = entry.report
    heads = "".join(f'<th scope="col">{escape(v.name)}</th>' for v in report.variants)
    rows: list[tuple[str, str, tuple[Verdict, ...], list[str]]] = []
    for name, float_cell, verdicts in table_rows(report):
        below = [""] * len(verdicts)
        if not name:  # what to think of the numbers above: one cell for both
            name, float_cell, above, _ = rows.pop()
            below = [verdict.text for verdict in above]
        rows.append((name, float_cell, tuple(verdicts), below))
    lines = [
        _line(name, float_cell, map(_cell, cells, below)) for name, float_cell, cells, below in rows
    ]
    for name, float_cell, *texts in entry.extra:
        lines.append(_line(name, float_cell, (f"<td>{escape(text)}</td>" for text in texts)))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="The numbers, a table">'
        '<table class="numbers"><thead><tr><td></td>'
        f'<th scope="col">float<small>{escape(report.float_dtype)}</small></th>{heads}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(verdict: Verdict, below: str) -> str:
    small = f"<small>{escape(below)}</small>" if below else ""
    return f'<td class="{verdict.tone}">{escape(verdict.text)}{small}</td>'


def _line(name: str, float_cell: str, cells: Iterable[str]) -> str:
    title = name[:1].upper() + name[1:]
    return (
        f'<tr><th scope="row">{escape(title)}</th><td>{escape(float_cell)}</td>'
        f"{''.join(cells)}</tr>"
    )


def _strips(report: ComparisonReport) -> str:
    rows = [("float", report.float_images)]
    rows += [(variant.name, variant.images) for variant in report.variants]
    cells = "".join(
        f'<span>{escape(name)}</span><img class="pixels" alt="pictures of {escape(name)}" '
        f'src="{_strip(images)}">'
        for name, images in rows
    )
    chosen = ""
    if report.worst_shown:
        total = len(report.variants[0].psnr)
        chosen = f" The last {report.worst_shown} came out worst of {total:,}."
    return (
        '<p class="soft small after">Pictures from the same noise, a column each.'
        f'{chosen}</p><div class="strips">{cells}</div>'
    )


def _strip(images: Float[np.ndarray, "n h w c"]) -> str:
    return data_uri(picture(np.concatenate(list(images), axis=1)))
