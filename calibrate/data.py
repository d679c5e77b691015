"""Calibration sets: what the network is told, and the noise that every item begins with.

An item is a label or a prompt with a noise of its own, drawn from the key of the set and the
item's number, so that an item stays the same whatever the batch size or the number of items.
Both halves of guidance belong to an item: they share its samples.
"""

import dataclasses
import warnings
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from qjax.calibrate.rollout import Items
from qjax.core.typing import PRNGKeyArray
from qjax.models.conditioners import TextConditioner
from qjax.models.pipeline import Pipeline
from qjax.models.sampling import draw_noise, image_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """What is calibrated on.

    Attributes:
      items: How many.
      labels: Classes, used in turn; empty: all that the model has, in turn.
      prompts: Texts, used in turn, of models that read prompts.
      negative_prompts: What the pictures shall not show, one for all; None for none.
    """

    items: int = 64
    labels: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()
    negative_prompts: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if self.items < 1:
            raise ValueError(f"items must be at least 1; got {self.items}.")

    def check(self, pipe: Pipeline) -> None:
        """That the set suits the model.

        Raises:
          ValueError: If it has no prompts for a model that reads them, or the other way round.
        """
        if pipe.reads_prompts and not self.prompts:
            raise ValueError(
                "this model reads prompts, and the calibration set has none. Give prompts, or a "
                "file of them, one a line."
            )
        if self.prompts and not pipe.reads_prompts:
            raise ValueError("this model reads labels, not prompts; give labels, or neither.")

    def draw(
        self, pipe: Pipeline, key: PRNGKeyArray, *, guidance_scale: float | None = None
    ) -> Items:
        """The items for a pipeline.

        Args:
          pipe: The float pipeline.
          key: Of the noise.
          guidance_scale: Weight of the guidance, which needs the unconditional half, or which
            the network is told; None or 1.0 for none.

        Raises:
          ValueError: If the set has no prompts for a model that reads them, or the other way
            round.
        """
        told, null = pipe.condition(
            self.items,
            guided=guidance_scale not in (None, 1.0),
            guidance_scale=guidance_scale,
            **self._words(pipe),
        )
        keys = image_keys(key, jnp.arange(self.items, dtype=jnp.uint32))
        return Items(draw_noise(keys, pipe.shape), told, null, keys)

    def _words(self, pipe: Pipeline) -> dict:
        self.check(pipe)
        if pipe.reads_prompts:
            warn_of_long_prompts(pipe, self.prompts)
            texts = [self.prompts[i % len(self.prompts)] for i in range(self.items)]
            return {"prompts": texts, "negative_prompts": self.negative_prompts}
        if pipe.num_labels is None:
            return {}
        labels = self.labels or tuple(range(pipe.num_labels))
        return {"labels": [labels[i % len(labels)] for i in range(self.items)]}


def warn_of_long_prompts(pipe: Pipeline, prompts: Sequence[str]) -> None:
    """Warn of prompts that are longer than the text encoder's window, whose ends are cut off."""
    if not isinstance(pipe.conditioner, TextConditioner):
        return
    tokenizer = pipe.conditioner.towers[0].tokenizer
    window = tokenizer.model_max_length
    long = [p for p in prompts if len(tokenizer(p, truncation=False)["input_ids"]) > window]
    if long:
        shown = long[0] if len(long[0]) <= 60 else long[0][:57] + "..."
        warnings.warn(
            f"{len(long)} prompts are longer than the {window} tokens that the text encoder "
            f"reads, and their ends are cut off; the first is {shown!r}.",
            stacklevel=3,
        )


def timesteps_of(steps: int, count: int) -> np.ndarray:
    """`count` sampler steps of `steps`, evenly spread, the first and the last among them."""
    if not 1 <= count <= steps:
        raise ValueError(f"count must be between 1 and steps={steps}; got {count}.")
    return np.unique(np.round(np.linspace(0, steps - 1, count)).astype(np.int32))
