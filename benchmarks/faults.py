"""What happens to files when things go wrong: `python benchmarks/faults.py`

Processes are killed while they write, files are damaged, disks are full, memory is short, two jobs
want one folder, clocks run backwards and locales differ. Each case is tried many times, and the
counts go into `benchmarks/results/faults.json` and `docs/faults.md`. The exit status is 1 if
anything was lost or half-written.
"""

import argparse
import datetime
import json
import locale
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from _damage import damaged_files, full_disks, memory
from _kills import (
    kills_in_calibrations,
    kills_in_conversions,
    kills_in_quantize,
    kills_in_saves,
    kills_in_tuning,
)
from _surroundings import clocks, places, two_jobs
from _trials import Wrong, check

from qjax.core.safetensors_io import atomic_write

ROOT = Path(__file__).parents[1]

CASES: dict[str, tuple[Callable[[Path, random.Random, int], dict[str, Any]], int, int]] = {
    "killed while a model is saved over another": (kills_in_saves, 40, 3),
    "killed while a calibration writes its parts and stages": (kills_in_calibrations, 8, 1),
    "killed while a checkpoint is converted": (kills_in_conversions, 8, 1),
    "killed in `qjax quantize --overwrite`": (kills_in_quantize, 24, 2),
    "killed while choices of tuning are kept": (kills_in_tuning, 10, 1),
    "damaged files of a save": (damaged_files, 1, 40),
    "full disks": (full_disks, 24, 4),
    "quantized while it is read, within a budget of memory": (memory, 12, 6),
    "two jobs on one folder": (two_jobs, 3, 1),
    "clocks that run backwards": (clocks, 4, 1),
    "locales, names, rights": (places, 1, 1),
}
"""What each line of the table runs, how often, and how often with `--quick`; of damaged files
every how manieth byte, of memory the layers of the model."""


def to_markdown(result: dict[str, Any]) -> str:
    """The table as a page of the documentation."""
    lines = [
        "# Faults",
        "",
        "What happens to files when processes die, disks are full and files are damaged, tried by",
        "`python benchmarks/faults.py`, which writes this page.",
        "",
        "| fault | what was tried | counts | held |",
        "|---|---|---|---|",
    ]
    for name, case in result["cases"].items():
        counts = case.get("counts", {})
        said = "; ".join(
            f"{key}: {', '.join(value) if isinstance(value, list) else f'{value:,}' if isinstance(value, int) else value}"
            for key, value in counts.items()
        )
        held = "yes" if case["held"] else f"**no**: {case['error'][-200:]}"
        lines.append(f"| {name} | {case['claim']} | {said} | {' '.join(held.split())} |")
    kills = sum(case.get("counts", {}).get("killed", 0) for case in result["cases"].values())
    lines += [
        "",
        f"{kills} processes were killed at work.",
        f"{'Nothing' if result['held'] else 'Something'} was lost or half-written.",
        f"{result['seconds']:,} s on {result['machine']}, Python {result['python']},",
        f"commit {result['commit'][:12]}, {result['date']}.",
        "",
        "What stays after a kill, and when it goes:",
        "",
        "| left | where | removed by |",
        "|---|---|---|",
        "| `.NAME-0123456789abcdef` | beside a saved folder | the next save to `NAME` |",
        "| `.NAME.0123456789abcdef.tmp` | beside a file | the next writing of that file |",
        "| `.qjax-lock`: no lock without its process | in a calibration's folder | the next run |",
        "| `.tuning.lock` | in the cache folder | nothing: it is empty and stays |",
        "| a folder without `model_index.json` | where `qjax convert` wrote | nothing: delete it |",
        "",
        "Only what no living process holds is removed (`qjax/core/locks.py`). Where the system cannot",
        "exchange two folders in one step, a kill in the middle of replacing a save leaves the old one",
        "under `.NAME-...-old` and none at `NAME`.",
        "",
        "Weights of others, in diffusers' layout, carry no hashes: a changed byte of their data cannot",
        "be told from another value. Their headers are checked, and values that are not finite refused.",
        "",
        "Folders in buckets have their tests: a job dies at every change of the bucket, and another on",
        "an empty disk ends with the same bits (`tests/core/test_remote.py`, `tests/calibrate/test_bucket.py`,",
        "and with real clients and SIGKILL `tests/calibrate/test_bucket_processes.py`).",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few trials of each, for tests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="cases whose names hold this text")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/faults.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/faults.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    locale.setlocale(locale.LC_ALL, "")
    begin, cases = time.perf_counter(), {}
    for name, (case, often, quick) in CASES.items():
        if args.only and args.only not in name:
            continue
        folder = Path(tempfile.mkdtemp(prefix="qjax-faults-"))
        start = time.perf_counter()
        entry: dict[str, Any] = {"claim": (case.__doc__ or "").splitlines()[0], "held": True}
        try:
            counts = case(folder, random.Random(args.seed), quick if args.quick else often)
            entry["counts"] = counts
            never = [key for key, count in counts.items() if count == 0 and not args.quick]
            check(not never, f"claimed of nothing that happened: {never}")
        except Wrong as error:
            entry |= {"held": False, "error": str(error)}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        entry["seconds"] = round(time.perf_counter() - start, 1)
        cases[name] = entry
        print(f"{name}: {json.dumps(entry, ensure_ascii=False)}", flush=True)
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    seconds = round(time.perf_counter() - begin)
    if args.only and args.out.exists():  # one case anew, the others as they were
        old = json.loads(args.out.read_text(encoding="utf-8"))
        if old["commit"] == commit:
            cases = {name: (old["cases"] | cases).get(name) for name in CASES}
            cases = {name: case for name, case in cases.items() if case is not None}
            seconds += old["seconds"]
    result = {
        "held": all(case["held"] for case in cases.values()),
        "cases": cases,
        "seed": args.seed,
        "seconds": seconds,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    for path, text in (
        (args.out, json.dumps(result, indent=1, ensure_ascii=False) + "\n"),
        (args.page, to_markdown(result)),
    ):
        with atomic_write(path) as file:
            file.write(text.encode())
    sys.exit(0 if result["held"] else 1)


if __name__ == "__main__":
    main()
