"""Pictures to measure, a batch at a time: drawn by a model, or read from a folder."""

import contextlib
import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from qjax.core.metrics import FeatureStatistics
from qjax.core.serialize import params_digest
from qjax.core.typing import Float, UInt8
from qjax.models.network_digest import network_digest
from qjax.models.pipeline import Pipeline
from qjax.models.weight_files import file_sha256

__all__ = [
    "Folder",
    "batches",
    "draw",
    "fingerprint",
    "folder_of",
    "in_8_bits",
    "read_statistics",
]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def in_8_bits(images: Float[np.ndarray, "b h w c"]) -> UInt8[np.ndarray, "b h w c"]:
    """Pictures in [0, 1] as a PNG holds them, values outside cut off.

    Raises:
      ValueError: If a picture holds values that are no numbers.
    """
    bad = int((~np.isfinite(images).all(axis=(1, 2, 3))).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(images)} pictures hold values that are no numbers, and cannot be "
            "judged. Quantize fewer layers, or to more bits."
        )
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def batches(start: int, stop: int, size: int) -> Iterator[tuple[list[int], int]]:
    """Numbers of pictures, `size` at a time, and how many of them count.

    The last ones are filled up with the last picture, so that one program draws them all.
    """
    for first in range(start, stop, size):
        yield [min(i, stop - 1) for i in range(first, first + size)], min(size, stop - first)


def draw(
    pipe: Pipeline,
    numbers: Sequence[int],
    *,
    labels: Sequence[int] | None,
    prompts: Sequence[str] | None,
    seed: int,
    **settings: Any,
) -> UInt8[np.ndarray, "b h w c"]:
    """The pictures of these numbers, in 8 bits; number i is the same in every batch.

    Args:
      pipe: The model.
      numbers: Consecutive ones, the last perhaps several times.
      labels: Classes, used in turn.
      prompts: Texts, used in turn.
      seed: Of the noise.
      **settings: Of the sampler, as the pipeline takes them.
    """
    images = pipe(
        labels=None if labels is None else [labels[i % len(labels)] for i in numbers],
        prompts=None if prompts is None else [prompts[i % len(prompts)] for i in numbers],
        num_images=len(numbers),
        batch_size=len(numbers),
        start_index=numbers[0],
        key=jax.random.key(seed),
        **settings,
    )
    return in_8_bits(np.asarray(images))


def fingerprint(pipe: Pipeline) -> str:
    """A hash of all that decides what a pipeline draws: equal models, equal pictures."""
    parts = [params_digest(pipe.params), repr(pipe.sampler), repr(pipe.quant), str(pipe.shape)]
    # A function of the user's own has no name that says what it computes.
    parts.append(network_digest(pipe) if pipe.source is None else repr(pipe.source.config))
    parts += [str(pipe.guidance_channels), str(pipe.null_label), str(pipe.buckets)]
    towers = getattr(pipe.conditioner, "towers", ())
    owners = (pipe.decoder, pipe.conditioner, *towers)
    sides = [one.component for one in owners if hasattr(one, "component")]
    parts += [repr(dict(side.config)) for side in sides]
    trees: list[Any] = [None if pipe.step_table is None else pipe.step_table.entries]
    trees += [side.params for side in sides]
    digest = hashlib.sha256("\n".join(parts).encode())
    for leaf in jax.tree.leaves(trees):
        array = np.asarray(leaf)
        digest.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Pictures in files, all of one size.

    Attributes:
      path: The folder.
      files: The pictures in it and in its folders, by name.
      grey: Whether they are read as grey.
    """

    path: Path
    files: tuple[Path, ...]
    grey: bool

    def read(self, numbers: Sequence[int]) -> UInt8[np.ndarray, "b h w c"]:
        """The pictures of these numbers, as 8 bits."""
        return np.stack([self._read(self.files[i]) for i in numbers])

    def _read(self, file: Path) -> np.ndarray:
        with _opened(file) as image:
            pixels = np.asarray(image.convert("L" if self.grey else "RGB"))
        return pixels[..., None] if self.grey else pixels

    def digest(self) -> str:
        """A hash of names and contents of the files."""
        lines = (f"{file.relative_to(self.path)} {file_sha256(file)}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """A picture; what is wrong with it is an error that names the file."""
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{file} cannot be read as a picture ({error}). Remove it, or get it again."
        ) from None


def folder_of(path: Path, *, grey: bool) -> Folder:
    """The pictures below a folder.

    Raises:
      FileNotFoundError: If there is no such folder.
      ValueError: If it holds fewer than two pictures, pictures of several sizes, or a file that
        is called a picture and is none.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"images must be a folder of pictures or a .npz; got {path}.")
    files = tuple(sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES))
    if len(files) < 2:
        raise ValueError(f"{path} must hold two pictures at least; it holds {len(files)}.")
    sizes: dict[tuple[int, int], Path] = {}
    for file in files:
        with _opened(file) as image:
            sizes.setdefault(image.size, file)
    if len(sizes) > 1:
        (a, file_a), (b, file_b) = list(sizes.items())[:2]
        raise ValueError(
            f"pictures of a folder must have one size; {file_a.name} is {a[0]} x {a[1]}, "
            f"{file_b.name} {b[0]} x {b[1]}. Cut and shrink them as the model's are."
        )
    return Folder(path=path, files=files, grey=grey)


def read_statistics(path: Path) -> dict[str, FeatureStatistics]:
    """Means and covariances of a `.npz`: of `pool`, and of `spatial` where it has them.

    pytorch-fid writes `mu` and `sigma`, ADM's reference batches have `mu_s` and `sigma_s` too.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it has no `mu` and `sigma`, or they are no statistics.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of statistics {path}.")
    names = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
    try:
        if not zipfile.is_zipfile(path):  # NumPy would take it for an array, or a pickle
            raise ValueError("it is no .npz")
        # Opened here: NumPy leaves a broken one open.
        with open(path, "rb") as file, np.load(file) as arrays:
            if missing := {"mu", "sigma"} - set(arrays.files):
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            return {
                key: FeatureStatistics(
                    mean=arrays[mu].astype(np.float64), cov=arrays[sigma].astype(np.float64)
                )
                for key, (mu, sigma) in names.items()
                if mu in arrays.files and sigma in arrays.files
            }
    # Of a broken file zipfile and NumPy raise a dozen kinds.
    except Exception as error:  # noqa: BLE001
        raise ValueError(
            f"{path} must hold statistics of pictures, the arrays mu and sigma: "
            f"{str(error) or type(error).__name__}."
        ) from None
