"""What the logs of a calibration's stages tell, for plots."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["run_logs"]


def run_logs(out: Path) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Every log of a run's folder, stage by stage, with its events.

    A line that was cut off, by a full disk or a machine that was taken away, is no event; what the
    run went on to tell stands after it.

    Args:
      out: The folder that `qjax.calibrate.run` was given.
    """
    for log in sorted(out.glob("stage-*-parts/log.jsonl")):
        events = map(_event, log.read_text(encoding="utf-8", errors="replace").splitlines())
        yield log, [event for event in events if event is not None]


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None
