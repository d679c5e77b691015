"""One file of weights, safetensors or a pickle, as tensors by name with the file's SHA-256."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qjax.core.places import local_path
from qjax.core.safetensors_io import open_tensors
from qjax.models.pickles import SUFFIXES, to_safetensors


class WeightFile(NamedTuple):
    """What a file of weights holds.

    Attributes:
      tensors: Arrays by name, in the order and layout of the file.
      sha256: Of the file's bytes.
      notes: What was left out of it, in sentences.
    """

    tensors: Mapping[str, np.ndarray]
    sha256: str
    notes: tuple[str, ...]


def read_weights(file: str | os.PathLike[str]) -> WeightFile:
    """The tensors of a `.safetensors` file, or of a pickle through the restricted reader.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is neither, or damaged, or a pickle of anything but tensors.
      ModuleNotFoundError: If it is a pickle and PyTorch is not installed.
    """
    path = local_path(file)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of weights {path}.")
    if path.suffix != ".safetensors" and path.suffix not in SUFFIXES:
        raise ValueError(
            f"weights are read from .safetensors, or {', '.join(SUFFIXES)}; got {path}."
        )
    notes: tuple[str, ...] = ()
    with tempfile.TemporaryDirectory() as folder:
        source = path
        if path.suffix != ".safetensors":
            source = Path(folder, "weights.safetensors")
            notes = to_safetensors(path, source)
        tensors = {name: tensor.read() for name, tensor in open_tensors(source).items()}
    return WeightFile(tensors, file_sha256(path), notes)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
