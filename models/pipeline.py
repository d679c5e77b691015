"""Pipeline: a denoiser, its parameters and a sampler, from labels and a key to images.

One class for float and quantized models. The program (`sampling.sample`) is compiled once
for each number of steps and batch: the parameters and the rows are arguments of it, so other
parameters, another `eta` or another guidance scale run the program that is there.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qjax.core.config import QuantConfig
from qjax.core.steps import StepTable, TableKey
from qjax.core.typing import Apply, Array, Float, Int, Params, PRNGKeyArray
from qjax.models.samplers import Sampler
from qjax.models.sampling import (
    Trajectory,
    draw_noise,
    guided_prediction,
    image_keys,
    sample,
    to_images,
)

__all__ = ["Pipeline", "Source", "Trajectory", "guided_prediction", "sample"]

OUTPUTS = ("image", "latent")

_SAMPLE_STATIC = ("apply", "sampler", "null_label", "guidance_channels", "return_trajectory")
_sample = jax.jit(sample, static_argnames=_SAMPLE_STATIC)
_predict = jax.jit(guided_prediction, static_argnames=("apply", "null_label", "guidance_channels"))
_draw_noise = jax.jit(draw_noise, static_argnames="shape")
_image_keys = jax.jit(image_keys)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a pipeline's network comes from: what it takes to build it again."""

    model: str
    """Name of the model's class, `"DiT"`."""
    config: Mapping[str, Any]
    """Its config, as `to_diffusers` of the config gives it."""
    name: str | None = None
    """Name of the shipped model, folder or hub id it was loaded from."""
    sha256: str | None = None
    """Hash of the float parameters (`serialize.params_digest`); None if not computed yet."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pipeline:
    """A denoiser with its parameters and sampler; call it for images.

    Example:
      >>> from qjax.models.samplers import DDIM
      >>> apply = lambda variables, x_t, t, labels: variables["params"]["gain"] * x_t
      >>> pipe = Pipeline.from_apply(apply, {"gain": jnp.ones(())}, DDIM(), (8, 8, 1))
      >>> pipe(num_images=2, steps=4, key=jax.random.key(0)).shape
      (2, 8, 8, 1)
    """

    apply: Apply
    """`apply(variables, x_t, t, labels)`. Programs are kept per function object: reuse it."""
    params: Params
    """The parameters, float or quantized; an argument of the program, never a constant."""
    sampler: Sampler
    """The sampler."""
    shape: tuple[int, int, int]
    """Height, width and channels of one sample."""
    null_label: int | None = None
    """The class that stands for none, for guidance and for calls without labels."""
    num_labels: int | None = None
    """How many classes there are, null_label not counted; None if unknown or without."""
    guidance_channels: int | None = None
    """How many channels are guided; None for all."""
    step_table: StepTable | None = None
    """What changes from step to step in a quantized model."""
    method: str | None = None
    """Name or hash of how `params` were quantized, compared with the step table's keys."""
    quant: QuantConfig | None = None
    """The rules by which `params` were quantized; None for float ones."""
    source: Source | None = None
    """What it takes to build the network again; needed to save the pipeline."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if len(self.shape) != 3 or any(n < 1 for n in self.shape):
            raise ValueError(f"shape must be (height, width, channels); got {self.shape}.")
        if not isinstance(self.sampler, Sampler):
            raise TypeError(
                f"sampler must have the methods of qjax.models.samplers.Sampler; got "
                f"{type(self.sampler).__name__}. Use DDIM(...), or sampler_from_diffusers(config)."
            )
        channels = self.guidance_channels
        if channels is not None and not 1 <= channels <= self.shape[-1]:
            raise ValueError(
                f"guidance_channels must lie between 1 and the sample's channels; got "
                f"guidance_channels={channels}, shape={self.shape}. None guides all."
            )

    @classmethod
    def from_apply(
        cls,
        apply: Apply,
        params: Params,
        sampler: Sampler,
        shape: tuple[int, int, int],
        **fields: Any,
    ) -> Pipeline:
        """The pipeline of anybody's Flax denoiser.

        Args:
          apply: `apply(variables, x_t, t, labels) -> prediction`, a Linen `model.apply` for
            example; `variables` has `"params"` and the step table's collections. `x_t` is
            `[b, h, w, c]` float32, `t` `[b]` int32, `labels` `[b]` int32 or None. It returns
            the shape of `x_t`, or twice the channels with a learned variance.
          params: What it takes as `"params"`.
          sampler: The sampler, with the schedule and prediction type of training.
          shape: Height, width and channels of one sample.
          **fields: The other fields, `null_label` for example.
        """
        return cls(apply=apply, params=params, sampler=sampler, shape=shape, **fields)

    def replace(self, **fields: Any) -> Pipeline:
        """The pipeline with other fields: `pipe.replace(params=..., step_table=...)`."""
        return dataclasses.replace(self, **fields)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write parameters, sampler and config into `folder`; `qjax.load` reads it.

        Raises:
          ValueError: If the pipeline does not say which network it runs.
        """
        from qjax.models.saving import save_pipeline  # it builds pipelines itself

        save_pipeline(self, Path(folder))

    def table_key(
        self, *, steps: int, eta: float = 0.0, guidance_scale: float | None = None
    ) -> TableKey:
        """The settings of a run, as the entries of a step table are compared with them."""
        key = self.sampler.table_key(steps, eta=eta, guidance_scale=guidance_scale)
        return dataclasses.replace(key, method=self.method)

    def predict(
        self,
        x_t: Float[Array, "b h w c"],
        t: ArrayLike,
        labels: int | Sequence[int] | np.ndarray | Array | None = None,
        guidance_scale: float | None = None,
        row: Mapping[str, Any] | None = None,
    ) -> Float[Array, "b h w c"]:
        """The guided prediction, without a noise correction and without a learned variance.

        Compiled once per shape. Inside a jit of your own use `guided_prediction`, and pass
        the parameters as an argument: here they would become constants.

        Args:
          x_t: Noisy samples.
          t: Timestep, one for all or `[b]`.
          labels: Classes, one for all or `[b]`.
          guidance_scale: Weight of the guidance; None or 1.0 for none.
          row: A row of the step table (`step_table.row(i)`), required if there is a table.

        Raises:
          ValueError: If the labels or the guidance do not suit the model, or a row is missing.
        """
        if self.step_table is not None and self.step_table.entries and row is None:
            raise ValueError(
                "a pipeline with a step table predicts with one of its rows; got row=None. "
                "Pass row=pipe.step_table.row(i)."
            )
        scale = self._guidance(guidance_scale)
        collections = {k: v for k, v in (row or {}).items() if k != "noise_correction"}
        answer = _predict(
            self.apply,
            {"params": self.params, **collections},
            x_t,
            jnp.asarray(t),
            self._labels(labels, len(x_t), guided=scale is not None),
            null_label=self.null_label,
            guidance_scale=scale,
            guidance_channels=self.guidance_channels,
        )
        return answer[..., : self.shape[-1]]

    def __call__(
        self,
        *,
        labels: int | Sequence[int] | np.ndarray | Array | None = None,
        steps: int = 20,
        guidance_scale: float | None = None,
        eta: float = 0.0,
        key: PRNGKeyArray | None = None,
        latents: Float[Array, "b h w c"] | None = None,
        output: str = "image",
        return_trajectory: bool = False,
        num_images: int | None = None,
        start_index: int = 0,
        batch_size: int = 64,
    ) -> Any:
        """Images, drawn from the model.

        Args:
          labels: Classes, one for all images or one for each; None draws without a class.
          steps: Steps of the sampler.
          guidance_scale: Weight of classifier-free guidance; None or 1.0 for none, which
            also spares the unconditional half of the work.
          eta: Share of fresh noise, 0 to 1 (DDIM).
          key: Random key; may be left out only if `latents` are given and no noise is added.
          latents: `[b, h, w, c]`, in place of the noise to begin with.
          output: `"image"` for float32 in [0, 1], `"latent"` for the samples as they are.
          return_trajectory: Whether the noisy samples and predictions of all steps come too.
          num_images: How many; by default as many as labels or latents, else 1.
          start_index: Index of the first image: `start_index=4` draws what would have been
            the fifth image and those after it.
          batch_size: Most images in one run of the program; more are drawn in parts of this
            size, the last one filled up.

        Returns:
          `[b, h, w, c]`; with `return_trajectory` a pair of that and a `Trajectory`.

        Raises:
          ValueError: If an argument is outside its range or does not suit the model, or the
            step table was fitted for other settings.
        """
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {OUTPUTS}; got {output!r}.")
        if batch_size < 1 or start_index < 0:
            raise ValueError(
                f"batch_size must be at least 1 and start_index at least 0; got "
                f"{batch_size=}, {start_index=}."
            )
        scale = self._guidance(guidance_scale)
        count = self._count(num_images, labels, latents)
        classes = self._labels(labels, count, guided=scale is not None)
        rows = self.sampler.rows(steps, eta=eta)
        if self.step_table is not None:
            self.step_table.check(
                self.table_key(steps=steps, eta=eta, guidance_scale=guidance_scale)
            )
        key = self._key(key, needed=latents is None or bool(np.any(rows["noise_std"] > 0)))
        run = functools.partial(
            _sample,
            self.apply,
            self.params,
            self.sampler,
            rows,
            entries=self.step_table.entries if self.step_table is not None else None,
            null_label=self.null_label,
            guidance_scale=scale,
            guidance_channels=self.guidance_channels,
            return_trajectory=return_trajectory,
        )
        size = min(batch_size, count)
        samples, trajectories = [], []
        for start in range(0, count, size):
            # Past the end the last image is drawn again, and dropped below.
            index = np.minimum(np.arange(start, start + size), count - 1)
            keys = _image_keys(key, jnp.asarray(start_index + index, jnp.uint32))
            if latents is None:
                x_T = _draw_noise(keys, self.shape)
            else:
                x_T = jnp.asarray(latents, jnp.float32)[index]
            x_0, trajectory = run(x_T, None if classes is None else classes[index], keys=keys)
            samples.append(x_0[: count - start])
            if trajectory is not None:
                trajectories.append(jax.tree.map(lambda x, n=count - start: x[:, :n], trajectory))
        x_0 = jnp.concatenate(samples) if len(samples) > 1 else samples[0]
        images = to_images(x_0) if output == "image" else x_0
        if not return_trajectory:
            return images
        return images, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *trajectories)

    def _guidance(self, guidance_scale: float | None) -> Array | None:
        """The scale as a traced scalar, or None where the unconditional half is not needed."""
        if guidance_scale is None or guidance_scale == 1:
            return None
        if self.null_label is None:
            raise ValueError(
                f"guidance needs a model with a null_label; got {guidance_scale=}, "
                f"null_label=None. Leave guidance_scale at None."
            )
        return jnp.asarray(guidance_scale, jnp.float32)

    def _count(self, num_images: int | None, labels, latents) -> int:
        """How many images the arguments agree on."""
        if latents is not None and np.shape(latents)[1:] != self.shape:
            raise ValueError(
                f"latents must be [b, {', '.join(map(str, self.shape))}]; got {np.shape(latents)}."
            )
        said = {
            "num_images": num_images,
            "labels": np.shape(labels)[0] if np.ndim(labels) else None,
            "latents": np.shape(latents)[0] if latents is not None else None,
        }
        counts = {name: count for name, count in said.items() if count is not None}
        if len(set(counts.values())) > 1 or 0 in counts.values():
            raise ValueError(
                f"num_images, labels and latents must agree on at least one image; got {counts}. "
                f"One label for all images may be a plain int."
            )
        return next(iter(counts.values()), 1)

    def _labels(self, labels, count: int, *, guided: bool) -> Int[Array, " b"] | None:
        """Labels of `count` images, int32, checked against the classes there are."""
        if labels is None and guided:
            raise ValueError("guidance needs labels; got labels=None. Pass labels=[...].")
        if labels is None:
            if self.null_label is None and self.num_labels:
                raise ValueError(
                    f"a model of {self.num_labels} classes without a null_label needs labels; "
                    f"got labels=None. Pass labels=[...] from 0 to {self.num_labels - 1}."
                )
            labels = self.null_label
        if labels is None:
            return None
        values = np.asarray(labels)
        if not np.issubdtype(values.dtype, np.integer) or values.ndim > 1:
            raise TypeError(
                f"labels must be integers, one or one per image; got dtype {values.dtype} and "
                f"shape {values.shape}."
            )
        if self.num_labels is not None:
            wrong = (values < 0) | (values >= self.num_labels)
            if self.null_label is not None:
                wrong &= values != self.null_label
            if np.any(wrong):
                raise ValueError(
                    f"labels must lie between 0 and {self.num_labels - 1}; got "
                    f"{np.unique(values[wrong]).tolist()}."
                )
        return jnp.asarray(np.broadcast_to(values, (count,)), jnp.int32)

    def _key(self, key: PRNGKeyArray | None, *, needed: bool) -> PRNGKeyArray:
        if key is None:
            if needed:
                raise ValueError(
                    "noise needs a key; got key=None. Pass key=jax.random.key(seed), or latents "
                    "and eta=0 with DDIM."
                )
            return jax.random.key(0)  # its noise is multiplied by 0
        if not isinstance(key, jax.Array):
            raise TypeError(
                f"key must be a jax random key; got {type(key).__name__}. Use jax.random.key(seed)."
            )
        return key
