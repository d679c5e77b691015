"""What a stage keeps on disk while it works, so that nothing is lost when it is killed.

A stage is a sequence of parts with names, each a function of what is before it that gives a
dict of arrays. `Work.part` runs one and writes its arrays, or reads them if an earlier run
of the same recipe has written them: a run that is killed goes on at the part it was in, and
ends with the same bits. A file appears under its name only when it is whole.

On a pod the first process alone writes, and what it has written the others read: all make the
same parts in the same order, and wait for each other after every one.

Where the run is kept in a bucket, the folder is a local one that stands for it: a part is in the
bucket, too, before the next one begins.

The log is a JSON line for every event, with the seconds since the stage began.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.calibrate.pod import Pod
from qjax.calibrate.preemption import stop_if_asked
from qjax.core.mirror import Mirror
from qjax.core.safetensors_io import open_tensors, write_tensors
from qjax.core.typing import Array

Arrays = dict[str, Array]

OnEvent = Callable[[Mapping[str, Any]], None]


class Work:
    """Parts and log of one stage.

    Args:
      folder: Where both are; None keeps nothing.
      on_event: Called with every event of the log.
      pod: The devices and processes, for stages that run on several; None: one process, which
        takes its default device.
      mirror: Of the bucket that the folder stands for; None: it stands for itself.
    """

    def __init__(
        self,
        folder: Path | None = None,
        on_event: OnEvent | None = None,
        pod: Pod | None = None,
        mirror: Mirror | None = None,
    ):
        self.folder, self.pod, self.mirror = folder, pod, mirror
        self._on_event = on_event
        self._begin = time.monotonic()

    def part(self, name: str, make: Callable[[], Mapping[str, Array]]) -> Arrays:
        """The arrays of a part, made now or in an earlier run.

        Args:
          name: Its name: letters, digits, `-` and `_`.
          make: Computes them.

        Raises:
          OSError: If the disk is full; what was written before stays, and the same run can go
            on when there is room.
        """
        stop_if_asked(self.pod)
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        if path is not None and self.has(name):
            if self.mirror is not None:
                self.mirror.get(path)  # another process may have written it
            self.log("read", part=name)
            return {key: jnp.asarray(t.read()) for key, t in open_tensors(path).items()}
        arrays = {key: jnp.asarray(value) for key, value in make().items()}
        if path is not None and self.writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {key: np.asarray(a) for key, a in arrays.items()}, {})
            self.log("wrote", part=name)
            if self.mirror is not None:
                self.mirror.push()
        if path is not None and self.pod is not None:
            self.pod.wait(f"part {name}")
        return arrays

    @property
    def shared(self) -> Any:
        """The folder as all processes see it: a Path, or an `epath.Path` in a bucket; None: none."""
        if self.folder is None or self.mirror is None:
            return self.folder
        from etils import epath  # only pods ask

        return epath.Path(self.mirror.url_of(self.folder))

    @property
    def writes(self) -> bool:
        """Whether this process writes parts and log."""
        return self.pod is None or self.pod.writes

    def has(self, name: str) -> bool:
        """Whether a part was made already."""
        there = self.folder is not None and (self.folder / f"{name}.safetensors").exists()
        return there if self.pod is None else self.pod.agree(there)

    def drop(self, name: str) -> None:
        """Forget a part that a later one has made superfluous."""
        if self.folder is not None and self.writes:
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def log(self, event: str, **fields: Any) -> None:
        """Add an event; its fields are numbers and texts."""
        line = {"event": event, "seconds": round(time.monotonic() - self._begin, 2), **fields}
        if not self.writes:
            return
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "log.jsonl", "ab+") as file:
                # A full disk may have cut the last line off; it must not spoil this one.
                end = file.seek(0, os.SEEK_END)
                file.seek(max(end - 1, 0))
                start = b"" if file.read(1) in (b"", b"\n") else b"\n"
                file.write(start + json.dumps(line).encode() + b"\n")
        if self._on_event is not None:
            self._on_event(line)
