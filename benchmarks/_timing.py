"""Timing that survives a busy machine: candidates take turns in one process.

On a shared machine the speed of a core drifts by tens of percent within a minute, so two
candidates timed one after the other cannot be compared. `interleaved` times every candidate
once in each round, in turn, and reports medians over the rounds and the median of the
round-by-round ratios to the first one; ratios are what a result is quoted by.
"""

import datetime
import functools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int = 7, min_seconds: float = 0.02
) -> dict[str, dict[str, float]]:
    """Milliseconds per call of every candidate, and its ratio to the first.

    Args:
      candidates: Functions without arguments that return JAX arrays; each is called twice
        before anything is timed, so compilation does not count.
      rounds: Timed rounds; the reported numbers are medians over them.
      min_seconds: A sample repeats the call until about so much time is spent.

    Returns:
      By name: `ms` (median), `best_ms` (least), `ratio` (median over rounds of this
      candidate's time over the first's) and `best_ratio` (ratio of the least times).
    """
    repeats = {}
    for name, call in candidates.items():
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        repeats[name] = max(1, round(min_seconds / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                jax.block_until_ready(call())
            samples[name].append((time.perf_counter() - start) * 1e3 / repeats[name])
    base = next(iter(samples.values()))
    return {
        name: {
            "ms": statistics.median(times),
            "best_ms": min(times),
            "ratio": statistics.median(t / b for t, b in zip(times, base, strict=True)),
            "best_ratio": min(times) / min(base),
        }
        for name, times in samples.items()
    }


def environment() -> dict[str, Any]:
    """What a number depends on: device, cores, versions, commit, date and load."""
    import flax
    import jaxlib

    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "platform": device.platform,
        "device": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "device_count": jax.device_count(),
        "cores": os.cpu_count(),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "versions": {
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "flax": flax.__version__,
        },
    }


def write(name: str, rows: Sequence[Mapping[str, Any]], *, out: Path | None = None) -> Path:
    """Write `rows` with the environment to `results/<name>.json`, or to `out`."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"benchmark": name, "environment": environment(), "rows": list(rows)}
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as aligned text."""
    if not rows:
        return ""
    show = lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)
    cells = [list(rows[0])] + [[show(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def _commit() -> str | None:
    """The commit the working tree stands on, with `+` where it differs; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=False)
    head = run([*git, "rev-parse", "HEAD"])
    if head.returncode:
        return None
    status = run([*git, "status", "--porcelain"])
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def _cpu_name() -> str:
    """Model and widest integer instructions of the CPU, where the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "cpu"
    lines = dict(
        (part.strip() for part in line.split(":", 1)) for line in text.splitlines() if ":" in line
    )
    flags = lines.get("flags", "").split()
    known = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if flag in flags]
    return " ".join([lines.get("model name", "cpu"), *known])
