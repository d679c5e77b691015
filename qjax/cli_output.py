"""Where the command line writes: results to stdout, progress and remarks to stderr.

With `--json` stdout holds one JSON document and nothing else. Progress bars, with the time
that is left, are drawn where stderr is a terminal; elsewhere there is silence until the end.
"""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

# Width of tables that go into a file or a pipe.
WIDTH = 120

# Called with work done, all work and what comes next.
Tell = Callable[[float, float, str], None]


class Output:
    """Writes results for a reader, or keeps silent where a JSON document is wanted."""

    def __init__(self, *, as_json: bool):
        self.as_json = as_json
        self.silent = False
        self._stdout = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH)
        self._stderr = Console(file=sys.stderr)

    def silence(self) -> None:
        """Write nothing more but remarks: another process says it all."""
        self.silent = True

    def say(self, *words: Any) -> None:
        """Lines of text or rich tables, for a reader."""
        if self.as_json or self.silent:
            return
        for word in words:
            if isinstance(word, str):
                # Not through the console: it would break lines and colour numbers.
                print(word)
            else:
                self._stdout.print(word)

    def remark(self, words: str) -> None:
        """A line on stderr."""
        print(f"qjax: {words}", file=sys.stderr)

    def document(self, data: Mapping[str, Any]) -> None:
        """The JSON document, where one is wanted."""
        if self.as_json and not self.silent:
            print(json.dumps(plain(data), indent=1, allow_nan=False))

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Tell]:
        """A bar for some work; what it gives is called with work done, all work, and words."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        bars = Progress(
            *columns,
            console=self._stderr,
            transient=True,
            redirect_stdout=False,
            disable=self.silent or not self._stderr.is_terminal,
        )
        with bars:
            task = bars.add_task(what, total=None)

            def tell(done: float, total: float, words: str) -> None:
                label = f"{what}: {words}" if words else what
                bars.update(task, completed=done, total=total, description=label)

            yield tell


def grid(heads: Sequence[str], rows: Iterable[Sequence[Any]], *, right: str = "") -> Table:
    """A rich table of plain texts; `right` names the columns of numbers, divided by spaces."""
    table = Table(box=SIMPLE_HEAD, show_header=any(heads), pad_edge=False)
    numbers = right.split()
    for head in heads:
        table.add_column(Text(head), justify="right" if head in numbers else "left")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return table


def plain(value: Any) -> Any:
    """`value` in types of JSON; numbers it does not know become the texts inf, -inf and nan."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, bool | int | str) or value is None else str(value)
