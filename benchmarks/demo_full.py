"""What do the three systems gain, alone and together? `qjax demo --full && python benchmarks/demo_full.py`

Reads `qjax-demo/demo.json`, which `qjax demo --full` writes: every model that ships with qjax, float,
rounded to nearest, and by the recipes of S2P, PTQD, Q-DiT and their combination, where the model
suits them; 256 pictures from the same noise. Prints a table of each and writes the numbers to
`benchmarks/results/demo_full.json`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from _timing import write


def rows(folder: Path) -> list[dict[str, Any]]:
    """A row for each quantized version of each model."""
    found = []
    for name, model in json.loads((folder / "demo.json").read_text())["models"].items():
        base = {"model": name, "sampler": model["sampler"], "bytes_float": model["bytes_float"]}
        for one in model["variants"]:
            (distance,) = one["distances"]
            found.append(
                base
                | {
                    "recipe": one["name"],
                    "bytes": one["bytes_quantized"],
                    "psnr": float(np.mean(one["psnr"])),
                    "ssim": float(np.mean(one["ssim"])),
                    "fd_to_real": distance["value"],
                    "fd_to_real_float": distance["value_float"],
                    "step_ratio": one["timing"]["seconds_quantized"]
                    / one["timing"]["seconds_float"],
                    "pictures": len(one["psnr"]),
                }
            )
    return found


def markdown(found: list[dict[str, Any]]) -> str:
    """One table for all models."""
    lines = [
        "| model | recipe | smaller than float16 | PSNR, dB | SSIM | FD to real pictures, float's |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row['model']}` | `{row['recipe']}` | {row['bytes_float'] / row['bytes']:.2f}x | "
        f"{row['psnr']:.1f} | {row['ssim']:.3f} | {row['fd_to_real']:.2f}, "
        f"{row['fd_to_real_float']:.2f} |"
        for row in found
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("qjax-demo"), help="of the demo")
    args = parser.parse_args()
    found = rows(args.folder)
    print(markdown(found))
    print(write("demo_full", found))


if __name__ == "__main__":
    main()
