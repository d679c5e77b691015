"""Pictures drawn, looked at and thrown away, in parts: the work of an evaluation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.core import metrics as core
from qjax.core.typing import UInt8
from qjax.evaluation_choice import Choice
from qjax.evaluation_nets import Nets, inception_probe, zoo_probe
from qjax.evaluation_parts import Parts
from qjax.evaluation_pictures import Folder, batches, draw
from qjax.models import lpips as perceptual
from qjax.models.clip_score import clip_scores
from qjax.models.pipeline import Pipeline

__all__ = ["Measuring", "Progress", "measure"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What is drawn, and what looks at it."""

    pipes: Mapping[str, Pipeline]
    choice: Choice
    nets: Nets
    settings: Mapping[str, Any]
    drawn_at_once: int
    batch_size: int
    part_size: int

    def looks(self, images: UInt8[np.ndarray, "b h w c"]) -> dict[str, np.ndarray]:
        """The features of some pictures."""
        keys = set(self.choice.keys.values())
        found: dict[str, np.ndarray] = {}
        if keys & {"pool", "spatial", "logits"}:
            probe = inception_probe(
                self.nets.inception or {}, spatial="spatial" in keys, logits="logits" in keys
            )
            found |= probe(images)
        if "zoo" in keys:
            found |= zoo_probe(images)
        return found

    def pairs(self, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        """The metrics of pairs of pictures."""
        wanted = self.choice.metrics
        found: dict[str, np.ndarray] = {}
        if "psnr" in wanted:
            found["psnr"] = core.psnr(x, y, data_range=255)
        if "ssim" in wanted:
            found["ssim"] = core.ssim(x, y, data_range=255)
        a, b = (jnp.asarray(images, jnp.float32) / 255 for images in (x, y))
        for net, params in self.nets.lpips.items():
            if f"lpips-{net}" in wanted:
                distances = perceptual.lpips(net, params, a, b)
                found[f"lpips-{net}"] = np.asarray(distances, np.float64)
        return found

    def batch(self, numbers: Sequence[int], count: int) -> dict[str, np.ndarray]:
        """What is kept of the pictures of these numbers, of which `count` are no repetitions.

        They are measured in batches of what one device draws, so that measurements do not depend
        on how many devices there are.
        """
        drawn = {side: draw(pipe, numbers, **self.settings) for side, pipe in self.pipes.items()}
        rows = []
        for start in range(0, count, self.batch_size):
            here = slice(start, start + self.batch_size)
            rows.append(self.kept({side: x[here] for side, x in drawn.items()}, numbers[here]))
        return {key: found[:count] for key, found in _joined(rows).items()}

    def kept(
        self, drawn: Mapping[str, UInt8[np.ndarray, "b h w c"]], numbers: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """What is kept of pictures of both sides."""
        kept: dict[str, np.ndarray] = {}
        for side, images in drawn.items():
            kept |= {f"{side}/{key}": rows for key, rows in self.looks(images).items()}
            if "clip" in self.choice.metrics and self.nets.clip is not None:
                texts = self.settings["prompts"]
                said = [texts[i % len(texts)] for i in numbers]
                found = clip_scores(self.nets.clip, images, said)
                kept[f"{side}/clip"] = np.asarray(found, np.float64)
        if "b" in drawn:
            kept |= self.pairs(drawn["a"], drawn["b"])
        return kept


def measure(
    parts: Parts, measuring: Measuring, n: int, folder: Folder | None, tell: Progress
) -> None:
    """Have all parts: of the models' pictures, and of the folder's."""
    of_folder = 0 if folder is None else len(folder.files)
    size, step, total = measuring.part_size, measuring.drawn_at_once, n + of_folder
    for begin in range(0, n, size):
        end = min(begin + size, n)

        def make(begin: int = begin, end: int = end) -> dict[str, np.ndarray]:
            rows = []
            for numbers, count in batches(begin, end, step):
                tell(numbers[0], total, f"picture {numbers[0]:,} of {n:,}")
                rows.append(measuring.batch(numbers, count))
            return _joined(rows)

        parts.part(f"pictures-{begin:08d}", end - begin, make)
    for begin in range(0, of_folder, size):
        end = min(begin + size, of_folder)

        def look(begin: int = begin, end: int = end) -> dict[str, np.ndarray]:
            assert folder is not None
            rows = []
            for numbers, count in batches(begin, end, measuring.batch_size):
                tell(n + numbers[0], total, f"file {numbers[0]:,} of {of_folder:,}")
                found = measuring.looks(folder.read(numbers))
                rows.append({f"r/{key}": value[:count] for key, value in found.items()})
            return _joined(rows)

        parts.part(f"images-{begin:08d}", end - begin, look)
    tell(total, total, "scores")


def _joined(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
