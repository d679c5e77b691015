"""Fashion-MNIST as the zoo sees it: 32x32 images in [-1, 1], read from the idx files.

The Debian package `dataset-fashion-mnist` installs the four files in the default folder;
the same files from any other source do as well.

References:
  Xiao, Rasul and Vollgraf, Fashion-MNIST, 2017, https://arxiv.org/abs/1708.07747 (MIT).
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from qjax.core.typing import Array, Float, Int, UInt8

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")

CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def read_idx(path: Path) -> np.ndarray:
    """The array of unsigned bytes in a gzipped idx file.

    Raises:
      ValueError: If the file is not idx, not of bytes, or has another length than it says.
    """
    try:
        with gzip.open(path, "rb") as file:
            data = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}. Get it again.") from None
    rank = data[3] if len(data) > 3 else 0
    if data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * rank:
        raise ValueError(f"{path} is not an idx file of unsigned bytes; its start is {data[:4]!r}.")
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if body.size != np.prod(shape):
        raise ValueError(f"{path} says shape {shape} but holds {body.size} values.")
    return body.reshape(shape)


def fashion_mnist(
    split: str, *, folder: Path = DEFAULT_FOLDER
) -> tuple[UInt8[np.ndarray, "b 32 32 1"], Int[np.ndarray, " b"]]:
    """Images padded to 32x32 with background, and their labels 0 to 9.

    Args:
      split: `"train"` (60,000 images) or `"test"` (10,000).
      folder: Where the four gzipped idx files lie.

    Raises:
      FileNotFoundError: If the files are not there; the text says how to get them.
      ValueError: If `split` is another, or the files are not what they should be.
    """
    prefixes = {"train": "train", "test": "t10k"}
    if split not in prefixes:
        raise ValueError(f"split must be 'train' or 'test'; got {split!r}.")
    prefix = prefixes[split]
    paths = [folder / f"{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {folder} (missing {', '.join(missing)}); install the "
            "Debian package dataset-fashion-mnist, or give the folder of the idx files."
        )
    images, labels = map(read_idx, paths)
    if images.shape != (len(labels), 28, 28):
        raise ValueError(
            f"Fashion-MNIST has 28x28 images and a label for each; {folder} has images of shape "
            f"{images.shape} and {labels.shape} labels."
        )
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]
    return padded, labels.astype(np.int32)


def to_float(images: UInt8[Array, "*b"]) -> Float[Array, "*b"]:
    """Bytes 0 to 255 as float32 in [-1, 1]."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)
