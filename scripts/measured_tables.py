"""Writes the tables of "Measured" in the README and of `docs/benchmarks.md` from `benchmarks/results`.

    python scripts/measured_tables.py          # rewrite both
    python scripts/measured_tables.py --check  # exit 1 if one would change

Each table stands between two comments with its name. A test runs the check.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

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


def quality() -> str:
    """How good the float models of the zoo are."""
    table = [
        "| model | guidance | class agreement | FD to the real test set |",
        "|---|---|---|---|",
    ]
    for row in rows("zoo_quality"):
        if "model" in row:
            shown = f"{row['class_agreement']:.1%} | {row['fd_to_real_test']:.1f}"
            table.append(f"| `{row['model']}` | {row['guidance']:g} | {shown} |")
    return "\n".join(table)


def tpu() -> str:
    """What the TPUs' compiler says of a step of DiT-XL/2."""
    table = [
        "| weights, activations | parameters (MB) | temporaries (MB) | HBM (MB) | over bfloat16 | int8 matmuls of XLA | kernels |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows("tpu_compile"):
        sizes = (row["params_bytes"], row["temp_bytes"], row["hbm_bytes"])
        megabytes = " | ".join(f"{size / 1e6:.0f}" for size in sizes)
        counts = f"{row['int8_matmuls']} | {row['kernels']}"
        table.append(
            f"| {row['setting']}, batch {row['batch']} | {megabytes} | {row['hbm_over_bf16']:.2f} | {counts} |"
        )
    return "\n".join(table)


def full_size() -> str:
    """Whole published models, read and quantized tensor by tensor."""
    table = [
        "| model | setting | float16 (MB) | saved (MB) | the process grew by (MB) | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("full_size_dit_xl_2", "full_size_sdxl"):
        for row in rows(name):
            label = {"sdxl": "Stable Diffusion XL"}.get(row["model"], row["model"])
            sizes = (row["float16_bytes"], row["saved_bytes"], row["peak_bytes"])
            megabytes = " | ".join(f"{size / 1e6:.0f}" for size in sizes)
            table.append(f"| {label} | {row['setting']} | {megabytes} | {row['seconds']:.0f} |")
    return "\n".join(table)


def systems() -> str:
    """What the recipes leave of the zoo's models."""
    table = [
        "| model | recipe | smaller than float16 | PSNR (dB) | SSIM | FD to real pictures, float's |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows("demo_full"):
        ratio = row["bytes_float"] / row["bytes"]
        distances = f"{row['fd_to_real']:.2f}, {row['fd_to_real_float']:.2f}"
        table.append(
            f"| `{row['model']}` | `{row['recipe']}` | {ratio:.2f}x | {row['psnr']:.1f} | "
            f"{row['ssim']:.3f} | {distances} |"
        )
    return "\n".join(table)


TABLES: dict[str, Callable[[], str]] = {
    "speed": speed,
    "sizes": sizes,
    "quality": quality,
    "tpu": tpu,
    "full size": full_size,
    "systems": systems,
}

# Which tables each file has.
FILES = {"README.md": ("speed", "sizes"), "docs/benchmarks.md": tuple(TABLES)}


def rewritten(text: str, file: str) -> str:
    """The text of a file with today's tables."""
    for name in FILES[file]:
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{file} must have one table between the comments of {name!r}.")
        before, rest = text.split(begin)
        text = before + begin + TABLES[name]() + end + rest.split(end)[1]
    return text


def main() -> None:
    """Rewrite, or check."""
    for file in FILES:
        text = (ROOT / file).read_text()
        new = rewritten(text, file)
        if "--check" not in sys.argv[1:]:
            (ROOT / file).write_text(new)
        elif new != text:
            sys.exit(
                f"{file}: its tables are not those of benchmarks/results. Run this without --check."
            )


if __name__ == "__main__":
    main()
