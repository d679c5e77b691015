"""What an evaluation keeps of pictures that it has drawn, measured and thrown away.

Pictures are done in parts of one size, counted from 0, whatever the batch. Of a part a few numbers
and features of each picture stay: in a file that appears when it is whole, or in memory. A run that
was killed goes on at the part it was in and ends with the same numbers. Two jobs that write into
one folder at once do each other no harm, but each draws what it does not find: their parts are
equal. In a bucket there is one job at a time (`qjax/core/mirror.py`).

`run.json` says whose run the folder is; another run is refused, and the differences named. It comes
with the first part, so that a run whose settings turn out to be wrong leaves nothing.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from qjax.core.mirror import Mirror
from qjax.core.plain_json import read_json
from qjax.core.safetensors_io import atomic_write, open_tensors, write_tensors
from qjax.models.mesh import agree, wait, writes

__all__ = ["Parts"]

RUN = "run.json"
Arrays = dict[str, np.ndarray]


class Parts:
    """The measurements of a run, in parts.

    Args:
      folder: Where they are kept; None keeps them in memory.
      claim: What the run is of, in values of JSON; all of it must be that of the folder.
      mesh: Of a run that is spread over processes: the first decides what is there and writes,
        and all of them have to see the folder.
      mirror: Of the bucket that the folder stands for; None: it stands for itself.

    Raises:
      ValueError: If the folder belongs to another run, or is no folder for a run.
    """

    def __init__(
        self,
        folder: Path | None,
        claim: Mapping[str, Any],
        *,
        mesh: Mesh | None = None,
        mirror: Mirror | None = None,
    ):
        self.folder, self._mirror = folder, mirror
        self.mesh = mesh
        self.writes = writes(mesh)
        self._names: list[str] = []
        self._kept: dict[str, Arrays] = {}
        self._claim: dict[str, Any] = json.loads(json.dumps(claim))
        if folder is None:
            return
        try:
            self._is_ours(folder)
        finally:
            wait("claim of an evaluation", mesh)  # before anybody writes it

    def part(self, name: str, rows: int, make: Callable[[], Mapping[str, np.ndarray]]) -> bool:
        """Have the part, made now or in an earlier run; whether it was made now.

        Args:
          name: Its name: letters, digits, `-`.
          rows: Pictures in it, the first axis of every array.
          make: Measures them.

        Raises:
          ValueError: If a file of an earlier run is damaged, or another run has taken the folder
            in the meantime.
        """
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        if path is None or not agree(path.exists(), self.mesh):
            arrays = {key: np.asarray(value) for key, value in make().items()}
            if path is None:
                self._kept[name] = arrays
            elif self.writes:
                self._take(path.parent)
                write_tensors(path, arrays)
                self._push()
            self._names.append(name)
            return True
        if wrong := [key for key, t in open_tensors(path).items() if t.shape[0] != rows]:
            raise ValueError(f"{path} must hold {rows} rows; {', '.join(wrong)} do not. Remove it.")
        self._names.append(name)
        return False

    def complete(self) -> None:
        """After the last part: what the first process has written is there for all to read.

        Raises:
          ValueError: If this process does not see it.
        """
        wait("parts of an evaluation", self.mesh)
        if self._mirror is not None and self.folder is not None and not self.writes:
            self._mirror.get(self.folder)
        if self.folder is not None and not (self.folder / RUN).exists():
            raise ValueError(f"all processes must see one folder; {self.folder} is not there.")

    def stream(self, key: str) -> Iterator[np.ndarray]:
        """The rows of `key`, part by part, in the order the parts were asked for."""
        for name in self._names:
            if self.folder is None:
                kept = self._kept[name]
                if key in kept:
                    yield kept[key]
            else:
                tensors = open_tensors(self.folder / f"{name}.safetensors")
                if key in tensors:
                    yield tensors[key].read()

    def whole(self, key: str) -> np.ndarray:
        """All rows of `key`, one after the other.

        Raises:
          KeyError: If no part has any.
        """
        found = list(self.stream(key))
        if not found:
            raise KeyError(f"no part holds {key!r}.")
        return np.concatenate(found)

    def _push(self) -> None:
        if self._mirror is not None:
            self._mirror.push()

    def _take(self, folder: Path) -> None:
        """Say that the folder is this run's, if it does not yet."""
        if self._is_ours(folder):
            return
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / RUN) as file:
            file.write((json.dumps(self._claim, indent=1) + "\n").encode())

    def _is_ours(self, folder: Path) -> bool:
        """Whether the folder says that it is this run's; an error if it is another's."""
        path, mine = folder / RUN, self._claim
        if not path.exists():
            if folder.exists() and (not folder.is_dir() or _visible(folder)):
                raise ValueError(f"{folder} is no empty folder, and no evaluation. Use another.")
            return False
        try:
            theirs = read_json(path)
        except ValueError as error:
            raise ValueError(
                f"{error} It is not what a run has written; use another folder."
            ) from None
        keys = sorted(mine.keys() | theirs.keys())
        if wrong := [key for key in keys if theirs.get(key) != mine.get(key)]:
            named = folder if self._mirror is None else self._mirror.url
            raise ValueError(
                f"{named} belongs to another run: "
                + ", ".join(
                    f"{k} {_short(theirs.get(k))}, now {_short(mine.get(k))}" for k in wrong
                )
                + ". Use another folder."
            )
        return True


def _visible(folder: Path) -> bool:
    """Whether something lies in a folder, files that another job is writing aside."""
    return any(not entry.name.startswith(".") for entry in folder.iterdir())


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:57]}..."
