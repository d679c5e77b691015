"""Float pictures to pixels: error maps, PNG bytes, and a labelled grid.

Knows arrays and Pillow only. Pictures are `[h, w, c]` in [0, 1] with 1 or 3 channels; the
error of one is its absolute difference from the float model's, averaged over the channels,
so it is a share of the full range. One ceiling serves all error maps of a report, so that
equal colours mean equal errors.
"""

import base64
import io
import os
import re
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qjax.core.safetensors_io import atomic_write
from qjax.core.typing import Float, UInt8

__all__ = [
    "data_uri",
    "error_ceiling",
    "error_picture",
    "grid",
    "heat_palette",
    "picture",
    "save_png",
]

# The error's colour scale: dark to bright in even steps of lightness, readable in grey too.
HEAT = ((13, 11, 33), (83, 26, 110), (183, 52, 90), (243, 131, 43), (255, 242, 178))
# Marks a pixel that is not finite; a colour that neither pictures nor HEAT are likely to hold.
NOT_FINITE = (0, 229, 255)

BACKGROUND, INK, FAINT = (255, 255, 255), (24, 25, 29), (98, 101, 109)


def picture(image: Float[np.ndarray, "h w c"]) -> Image.Image:
    """RGB pixels: values are clipped to [0, 1], and what is not finite turns cyan."""
    finite = np.isfinite(image).all(axis=-1)
    levels = np.round(np.clip(np.where(finite[..., None], image, 0), 0, 1) * 255).astype(np.uint8)
    pixels = np.array(np.broadcast_to(levels, (*levels.shape[:2], 3)))
    pixels[~finite] = NOT_FINITE
    return Image.fromarray(pixels)


def _error(
    image: Float[np.ndarray, "*n h w c"], reference: Float[np.ndarray, "*n h w c"]
) -> Float[np.ndarray, "*n h w"]:
    with np.errstate(invalid="ignore"):  # inf - inf; drawn as not finite
        return np.abs(image.astype(np.float64) - reference.astype(np.float64)).mean(axis=-1)


def error_ceiling(
    images: Sequence[Float[np.ndarray, "n h w c"]], reference: Float[np.ndarray, "n h w c"]
) -> float:
    """The error that gets the brightest colour: exceeded by 1 pixel in 200 of the worst set.

    Rounded up to two digits, and at least one level of 255, so that rounding noise alone
    never looks like an error.
    """
    ceiling = 1 / 255
    for variant in images:
        error = _error(variant, reference)
        if (finite := error[np.isfinite(error)]).size:
            ceiling = max(ceiling, float(np.quantile(finite, 0.995)))
    digits = 10.0 ** (np.floor(np.log10(ceiling)) - 1)
    return float(min(1.0, np.ceil(ceiling / digits - 1e-9) * digits))


@cache
def heat_palette() -> UInt8[np.ndarray, "256 3"]:
    """Colours of errors 0 to the ceiling at 0..254, and of what is not finite at 255."""
    at = np.linspace(0, len(HEAT) - 1, 255)
    anchors = np.array(HEAT, np.float64)
    mixed = [np.interp(at, np.arange(len(HEAT)), anchors[:, channel]) for channel in range(3)]
    return np.vstack([np.round(mixed).T, NOT_FINITE]).astype(np.uint8)


def error_picture(
    image: Float[np.ndarray, "h w c"],
    reference: Float[np.ndarray, "h w c"],
    *,
    ceiling: float,
) -> Image.Image:
    """Paletted pixels of the error, dark for 0 and brightest from `ceiling` on."""
    error = _error(image, reference)
    finite = np.isfinite(error)
    index = np.round(np.clip(np.where(finite, error, 0) / ceiling, 0, 1) * 254)
    drawn = Image.fromarray(np.where(finite, index, 255).astype(np.uint8))
    drawn.putpalette(heat_palette().tobytes())
    return drawn


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(image: Image.Image) -> str:
    """The picture as a `data:` address, at its own size."""
    return "data:image/png;base64," + base64.b64encode(_png(image)).decode("ascii")


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG; what stood at `path` stays whole until the new file is complete."""
    with atomic_write(path) as file:
        file.write(_png(image))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # DejaVu Sans comes with matplotlib on every platform; Pillow's own has no accents.
    import matplotlib

    return ImageFont.truetype(
        os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size
    )


def _lines(text: str, *, width: int, font: ImageFont.FreeTypeFont, most: int) -> list[str]:
    """The text in at most `most` lines of at most `width` pixels; what is cut ends in `…`.

    Lines end at spaces and after underscores.
    """
    lines: list[str] = []
    words = [word for word in re.findall(r"\s*[^\s_]*_*", text) if word]
    while words and len(lines) < most:
        count = len(words)
        while count > 1 and font.getlength("".join(words[:count]).strip()) > width:
            count -= 1
        if len(lines) == most - 1:  # what is left goes on the last line, cut below
            count = len(words)
        lines.append("".join(words[:count]).strip())
        words = words[count:]
    return [_cut(line, width=width, font=font) for line in lines]


def _cut(line: str, *, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"


def grid(
    columns: Sequence[tuple[str, Sequence[Image.Image]]],
    row_names: Sequence[str],
    *,
    footer: str,
    tile: int = 112,
) -> Image.Image:
    """Pictures of equal size in rows and columns, with names above and to the left.

    Args:
      columns: Each column's name and its pictures, one a row.
      row_names: Each row's name.
      footer: A line below the grid.
      tile: Shorter side that a picture gets at least: smaller ones are enlarged by a whole
        factor without smoothing, larger ones are left as they are.
    """
    w, h = columns[0][1][0].size
    factor = max(1, -(-tile // min(w, h)))
    w, h = w * factor, h * factor
    gap, margin, size = 8, 20, 14
    font, line = _font(size), 18
    left = margin + min(220, max(int(font.getlength(name)) for name in row_names) + 1) + gap
    heads = [_lines(name, width=w, font=font, most=3) for name, _ in columns]
    top = margin + line * max(len(head) for head in heads) + gap
    foot = _lines(
        footer, width=max(left + len(columns) * (w + gap) - 2 * margin, 200), font=font, most=4
    )
    canvas = Image.new(
        "RGB",
        (
            left + len(columns) * (w + gap) - gap + margin,
            top + len(row_names) * (h + gap) + line * len(foot) + margin,
        ),
        BACKGROUND,
    )
    draw = ImageDraw.Draw(canvas)
    for column, ((_, cells), head) in enumerate(zip(columns, heads, strict=True)):
        x = left + column * (w + gap)
        for i, text in enumerate(head):
            above = top - gap - line * (len(head) - i)
            draw.text((x + w / 2, above), text, font=font, fill=INK, anchor="ma")
        for row, cell in enumerate(cells):
            enlarged = cell.convert("RGB").resize((w, h), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (x, top + row * (h + gap)))
    for row, name in enumerate(row_names):
        lines = _lines(name, width=left - margin - gap, font=font, most=max(1, h // line))
        middle = top + row * (h + gap) + (h - line * len(lines)) / 2
        for i, text in enumerate(lines):
            draw.text((left - gap, middle + line * i), text, font=font, fill=INK, anchor="ra")
    below = top + len(row_names) * (h + gap) + gap / 2
    for i, text in enumerate(foot):
        draw.text((margin, below + line * i), text, font=font, fill=FAINT)
    return canvas
