"""Dropped time layers on disk: which they are, and the side file that still has them.

`time.safetensors` holds the float layers that the time table stands for. A pipeline draws
without it; it is what `Pipeline.retarget` makes a table for other steps of, and may be deleted
by whoever needs no other.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax.core import serialize
from qjax.core.plan import name_some
from qjax.core.safetensors_io import open_tensors, write_tensors
from qjax.core.typing import Params
from qjax.models.pipeline import Pipeline
from qjax.models.time_rows import at_paths
from qjax.models.time_table import dropped_layers, split_layers, time_layers_of

SIDE_FILE = "time.safetensors"


def write_time(pipe: Pipeline, model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """What the record says of a pipeline's time layers, and the side file, written into `folder`.

    Args:
      pipe: The pipeline that is saved.
      model: Its network.
      folder: Where the file may lie until it is copied.
    """
    record: dict[str, Any] = {"dropped": list(dropped_layers(model, pipe.params)), "sha256": None}
    if pipe.time_layers is None:
        return record, {}
    record["sha256"] = serialize.params_digest(pipe.time_layers)
    layers = {path: np.asarray(leaf) for path, leaf in serialize.flatten(pipe.time_layers)}
    write_tensors(folder / SIDE_FILE, layers, {"format": "qjax"})
    return record, {SIDE_FILE: folder / SIDE_FILE}


def read_time(folder: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The layers in a folder's side file; None if it is not there.

    Raises:
      ValueError: If it is not the one that was saved.
    """
    path = folder / SIDE_FILE
    if record["sha256"] is None or not path.is_file():
        return None
    layers = at_paths((name, tensor.read()) for name, tensor in open_tensors(path).items())
    if serialize.params_digest(layers) != record["sha256"]:
        raise ValueError(
            f"{path} is not what was saved with the pipeline. Copy it again, or delete it: it is "
            "needed for other steps only."
        )
    return layers


def without_dropped(model: Any, expected: Params, record: Mapping[str, Any]) -> dict[str, Any]:
    """The params of a network that a save has which dropped time layers.

    Raises:
      ValueError: If it dropped others than a time table stands for.
    """
    dropped = record["dropped"]
    if wrong := sorted(set(dropped) - set(time_layers_of(model))):
        raise ValueError(
            f"Only layers that a time table stands for are left out of a save; this one says that "
            f"{name_some(wrong)} are. Copy the folder again."
        )
    return split_layers(expected, dropped)[0]
