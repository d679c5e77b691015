"""States of fits on a pod while they are made, written by Orbax.

Every process writes the parts that its devices have, in the background, while the fit goes on; a
state appears under its name only when it is whole. It can be read on another mesh, of other
devices and processes.
"""

import re
from pathlib import Path
from typing import Any

import jax

from qjax.calibrate.parts import pack_tree, unpack_tree
from qjax.calibrate.pod import Pod


class States:
    """The states of one stage, by the name of the fit and its iteration.

    Args:
      folder: Where they are, one that all processes see; an `epath.Path` if it is in a bucket.
        None keeps nothing.
      pod: The devices and processes.
    """

    def __init__(self, folder: Any, pod: Pod):
        import orbax.checkpoint as ocp  # seconds to import, and only pods need it
        from etils import epath

        # Of one in a bucket `absolute` would make a local one.
        here = folder.absolute() if isinstance(folder, Path) else folder
        self.folder = None if here is None else epath.Path(here)
        if here is not None and not isinstance(here, Path):
            import fsspec

            # Else a process would not see what another one has written since it last looked.
            fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
        self.pod = pod
        self._is_whole = ocp.utils.is_checkpoint_finalized
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
            whole = self._there(name)
            for old in self._all(name):
                if old not in whole[-1:]:  # older ones, and in a bucket what was broken off
                    self._path(name, old).rmtree()
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
            for iteration in self._all(name):
                self._path(name, iteration).rmtree()

    def _path(self, name: str, iteration: int) -> Any:
        assert self.folder is not None
        return self.folder / f"{name}-state-{iteration}"

    def _there(self, name: str) -> list[int]:
        """Iterations of the whole states of a fit."""
        return [i for i in self._all(name) if self._is_whole(self._path(name, i))]

    def _all(self, name: str) -> list[int]:
        if self.folder is None or not self.folder.is_dir():
            return []
        pattern = re.compile(re.escape(name) + r"-state-(\d+)")
        found = (pattern.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in found if match)
