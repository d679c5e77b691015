"""States of fits on a pod while they are made, written by Orbax.

Every process writes the parts that its devices have, in the background, while the fit goes on; a
state appears under its name only when it is whole. It can be read on another mesh, of other
devices and processes.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import jax

from qjax.calibrate.parts import pack_tree, unpack_tree
from qjax.calibrate.pod import Pod


class States:
    """The states of one stage, by the name of the fit and its iteration.

    Args:
      folder: Where they are, one that all processes see; None keeps nothing.
      pod: The devices and processes.
    """

    def __init__(self, folder: Path | None, pod: Pod):
        import orbax.checkpoint as ocp  # seconds to import, and only pods need it

        self.folder = None if folder is None else folder.absolute()
        self.pod = pod
        self._checkpointer = ocp.StandardCheckpointer()

    def keep(self, name: str, iteration: int, state: Any) -> None:
        """Write a state, in the background; older ones of the fit go once it is whole.

        Args:
          name: Of the fit.
          iteration: Iterations done.
          state: A tree of arrays of the pod.
        """
        if self.folder is None:
            return
        self.finish()
        if self.pod.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self._there(name)[:-1]:
                shutil.rmtree(self._path(name, old))
        self.pod.wait(f"state {name} {iteration}")
        self._checkpointer.save(self._path(name, iteration), pack_tree(state))

    def finish(self) -> None:
        """Wait until what was kept is on the disk."""
        self._checkpointer.wait_until_finished()

    def last(self, name: str) -> int | None:
        """The iteration of the newest whole state of a fit; None if there is none."""
        there = self._there(name)
        found = self.pod.agree(there[-1] if there else -1)
        return None if found < 0 else found

    def read(self, name: str, iteration: int, like: Any) -> Any:
        """A state.

        Args:
          name: Of the fit.
          iteration: Iterations done.
          like: A tree of the same structure, shapes and types on the pod, which says where the
            arrays shall lie.
        """
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like
        )
        found = self._checkpointer.restore(self._path(name, iteration), pack_tree(shapes))
        return unpack_tree(found, like)

    def drop(self, name: str) -> None:
        """Forget all states of a fit."""
        self.finish()
        if self.folder is not None and self.pod.writes:
            for iteration in self._there(name):
                shutil.rmtree(self._path(name, iteration))

    def _path(self, name: str, iteration: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}-state-{iteration}"

    def _there(self, name: str) -> list[int]:
        if self.folder is None or not self.folder.is_dir():
            return []
        pattern = re.compile(re.escape(name) + r"-state-(\d+)")
        found = (pattern.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in found if match)
