"""Writes the tables of "Measured" in the README from `benchmarks/results`.

    python scripts/measured_tables.py          # rewrite README.md
    python scripts/measured_tables.py --check  # exit 1 if it would change

Each table stands between two comments with its name. A test runs the check.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"

FORMATS = {"w8a8": "W8A8", "w4a8": "W4A8", "w4a16": "W4A16"}
# With groups of 128 where the benchmark has both.
GROUPED = {"w4a8": "w4a8 g128", "w4a16": "w4a16 g128"}


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def span(values: Iterable[float]) -> str:
    """The smallest and the largest, or one number if they look the same."""
    found = sorted(values)
    low, high = f"{found[0]:.2f}", f"{found[-1]:.2f}"
    return low if low == high else f"{low} to {high}"


def ratios(found: list[dict[str, Any]], key: str) -> list[str]:
    """A cell for each format; empty where it was not measured."""
    names = {row[key] for row in found}
    cells = []
    for name in FORMATS:
        wanted = GROUPED[name] if GROUPED.get(name) in names else name
        values = [row["ratio"] for row in found if row[key] == wanted]
        cells.append(span(values) if values else "")
    return cells


def speed() -> str:
    """Times as ratios to float."""
    table = [
        f"| what | float | {' | '.join(FORMATS.values())} | script, result |",
        "|---|---|---|---|---|---|",
    ]

    def line(what: str, found: list[dict[str, Any]], key: str, name: str) -> None:
        source = f"`benchmarks/{name}.py`, `results/{name}.json`"
        table.append(f"| {what} | 1 | {' | '.join(ratios(found, key))} | {source} |")

    sampling = rows("sampling")
    for model in dict.fromkeys(row["model"] for row in sampling):
        mine = [row for row in sampling if row["model"] == model]
        line(f"`{model}`, sampling time", mine, "variant", "sampling")
    line("2 blocks of DiT-XL/2, sampling time", rows("dit_blocks"), "format", "dit_blocks")
    matmuls = rows("matmul")
    most, least = max(row["m"] for row in matmuls), min(row["m"] for row in matmuls)
    what = f"matmuls of DiT-XL/2, {least} to {most:,} rows; 4 bits in groups of 128"
    line(what, matmuls, "format", "matmul")
    convolutions = [row for row in rows("conv") if row["kernel"] == 3]
    line("3x3 convolutions, of the zoo and of Stable Diffusion", convolutions, "format", "conv")
    what = "ResNet blocks of Stable Diffusion v1-4"
    line(what, rows("resnet_block"), "format", "resnet_block")
    return "\n".join(table)


def sizes() -> str:
    """Megabytes of the denoisers' weights."""
    names = {
        "sd-v1-4": "Stable Diffusion v1-4",
        "sd-v2-1": "Stable Diffusion v2-1",
        "sdxl-1.0": "Stable Diffusion XL 1.0",
        "ldm-4-imagenet": "LDM-4 ImageNet",
        "dit-xl-2-256": "DiT-XL/2",
    }
    table = [
        "| MB of the denoiser's weights | fp16 | W8 | W4, groups of 128 or 64 |",
        "|---|---|---|---|",
    ]
    for row in rows("model_sizes"):
        if row["model"] not in names:
            continue
        cells = (f"{row[name] / 1e6:.0f}" for name in ("float16", "w8", "w4"))
        table.append(f"| {names[row['model']]} | {' | '.join(cells)} |")
    return "\n".join(table)


TABLES: dict[str, Callable[[], str]] = {"speed": speed, "sizes": sizes}


def rewritten(text: str) -> str:
    """The README with today's tables."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md must have one table between the comments of {name!r}.")
        before, rest = text.split(begin)
        text = before + begin + make() + end + rest.split(end)[1]
    return text


def main() -> None:
    """Rewrite, or check."""
    text = README.read_text()
    new = rewritten(text)
    if "--check" in sys.argv[1:]:
        if new != text:
            sys.exit(
                "README.md: its tables are not those of benchmarks/results. Run this without --check."
            )
    else:
        README.write_text(new)


if __name__ == "__main__":
    main()
