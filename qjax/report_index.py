"""One page over several reports: a table and a strip of pictures each, and links to the rest."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from qjax.core.safetensors_io import atomic_write
from qjax.core.typing import Float
from qjax.report import table_rows
from qjax.report_data import ComparisonReport
from qjax.report_page import POLICY
from qjax.report_pictures import data_uri, picture
from qjax.report_style import CSS

STRIPS = """
a { color: var(--link); }
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
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}{STRIPS}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{paragraphs}</header>\n<main>\n"
        + "\n".join(map(_section, entries))
        + "\n</main>\n<footer></footer>\n</body>\n</html>\n"
    )
    with atomic_write(path) as file:
        file.write(page.encode())


def _section(entry: Entry) -> str:
    report = entry.report
    links = " · ".join(
        f'<a href="{escape(address)}">{escape(words)}</a>' for words, address in entry.links
    )
    notes = "".join(f'<p class="soft small">{escape(note)}</p>' for note in report.notes)
    return (
        f"<section><h2>{escape(report.model)}</h2>"
        f'<p class="soft small">{escape(report.device)}; {escape(report.sampler)}</p>'
        f"<p>{links}</p>{_table(entry)}{_strips(report)}{notes}</section>"
    )


def _table(entry: Entry) -> str:
    report = entry.report
    heads = "".join(f'<th scope="col">{escape(v.name)}</th>' for v in report.variants)
    rows = []
    for name, float_cell, verdicts in table_rows(report):
        cells = "".join(f'<td class="{v.tone}">{escape(v.text)}</td>' for v in verdicts)
        rows.append(_line(name, float_cell, cells))
    for name, float_cell, *texts in entry.extra:
        rows.append(_line(name, float_cell, "".join(f"<td>{escape(text)}</td>" for text in texts)))
    return (
        '<div class="scroll"><table class="numbers"><thead><tr><th></th>'
        f'<th scope="col">float<small>{escape(report.float_dtype)}</small></th>{heads}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _line(name: str, float_cell: str, cells: str) -> str:
    return f'<tr><th scope="row">{escape(name)}</th><td>{escape(float_cell)}</td>{cells}</tr>'


def _strips(report: ComparisonReport) -> str:
    rows = [("float", report.float_images)]
    rows += [(variant.name, variant.images) for variant in report.variants]
    cells = "".join(
        f'<span>{escape(name)}</span><img class="pixels" alt="pictures of {escape(name)}" '
        f'src="{_strip(images)}">'
        for name, images in rows
    )
    return f'<div class="strips">{cells}</div>'


def _strip(images: Float[np.ndarray, "n h w c"]) -> str:
    return data_uri(picture(np.concatenate(list(images), axis=1)))
