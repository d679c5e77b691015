"""Rows of a result file that is added to, run after run, and tables of them over seeds."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _timing import RESULTS, write


class Rows:
    """The rows of `results/<name>.json`, those of earlier runs among them.

    Args:
      name: Of the benchmark.
      out: Another file.
    """

    def __init__(self, name: str, out: Path | None = None):
        self.name, self.path = name, out or RESULTS / f"{name}.json"
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            self.rows = json.loads(self.path.read_text())["rows"]

    def has(self, what: Mapping[str, Any]) -> bool:
        """Whether there is a row with these settings."""
        return any(what.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Print a row, and write it with all others."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        write(self.name, self.rows, out=self.path)

    def by(self, *names: str) -> Iterator[list[dict[str, Any]]]:
        """The rows of every setting of these names, in the order in which they came."""
        setting = lambda row: tuple(row[name] for name in names)
        for one in dict.fromkeys(map(setting, self.rows)):
            yield [row for row in self.rows if setting(row) == one]


def shown(rows: Sequence[Mapping[str, Any]], key: str, digits: int) -> str:
    """The mean over seeds, and of several their standard deviation."""
    values = [row[key] for row in rows]
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"
