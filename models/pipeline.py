"""Pipeline: a denoiser, its parameters and a sampler, from labels or prompts to images.

One class for float and quantized models. The program (`sampling.sample`) is compiled once
for each number of steps, batch and size: the parameters and the rows are arguments of it, so
other parameters, another `eta`, guidance scale or prompt run the program that is there.

What is beside the denoiser is in two parts. A conditioner makes what the network is told of
labels or prompts, and a decoder makes images of latents; without them the network is told
the labels themselves, and what is sampled are the images.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from qjax.core.config import QuantConfig
from qjax.core.steps import StepTable, TableKey
from qjax.core.typing import Apply, Array, Float, Params, PRNGKeyArray
from qjax.models.conditioners import ClassConditioner, PromptConditioner
from qjax.models.decoders import LatentDecoder
from qjax.models.lora import AttachedLoRA
from qjax.models.mesh import batch_of, check_mesh, get, put_split, put_whole
from qjax.models.pipeline_inputs import (
    broadcast_texts,
    check_key,
    check_labels,
    check_sizes,
    count_images,
)
from qjax.models.samplers import Sampler
from qjax.models.sampling import (
    Trajectory,
    guided_prediction,
    image_keys,
    noise_jit,
    sample,
    sample_jit,
    to_images,
)
from qjax.models.unet2d_condition_inputs import Conditioning, guidance_embedding

if TYPE_CHECKING:
    from qjax.models.model_card import Report  # it reads pipelines itself

__all__ = ["Pipeline", "Source", "Trajectory", "guided_prediction", "sample"]

OUTPUTS = ("image", "latent")

_predict = jax.jit(guided_prediction, static_argnames=("apply", "guidance_channels"))
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
    license: str | None = None
    """Licence of the weights as the hub spells it, `"apache-2.0"`; None if the files do not say."""


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

    apply: Apply = dataclasses.field(repr=False)
    """`apply(variables, x_t, t, labels)`. Programs are kept per function object: reuse it."""
    params: Params = dataclasses.field(repr=False)
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
    conditioner: ClassConditioner | PromptConditioner | None = dataclasses.field(
        default=None, repr=False
    )
    """Makes what the network is told of labels or prompts; None: it is told the labels."""
    decoder: LatentDecoder | None = dataclasses.field(default=None, repr=False)
    """Makes images of samples; None: the samples are images."""
    buckets: tuple[tuple[int, int], ...] | None = None
    """Heights and widths in pixels that are drawn; other sizes are cut out of the smallest that
    holds them, so that few programs serve many sizes. None draws every size as it is asked."""
    step_table: StepTable | None = dataclasses.field(default=None, repr=False)
    """What changes from step to step in a quantized model."""
    time_layers: Params | None = dataclasses.field(default=None, repr=False)
    """Float layers that are not in `params` but stand in the step table as their outputs; what
    `retarget` makes other rows of. None: they are in `params`, or were not kept."""
    method: str | None = None
    """Name or hash of how `params` were quantized, compared with the step table's keys."""
    quant: QuantConfig | None = None
    """The rules by which `params` were quantized; None for float ones."""
    recipe: str | None = None
    """Name of the recipe that made `params`; None for float ones and bare rules."""
    loras: tuple[AttachedLoRA, ...] = ()
    """The LoRAs whose side branches are in the params, in the order they came."""
    smoothed: bool = False
    """Whether inputs of layers were scaled in calibration, which a LoRA does not know of."""
    source: Source | None = None
    """What it takes to build the network again; needed to save the pipeline."""
    mesh: Mesh | None = None
    """Devices that images are spread over (`on`); None: one device draws them all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.buckets is not None:
            object.__setattr__(self, "buckets", tuple(tuple(size) for size in self.buckets))
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

    def on(self, mesh: Mesh) -> Pipeline:
        """The pipeline on all devices of a mesh, over which its images are spread.

        Every device has all parameters, and draws its part of a batch as one device does: with
        low-bit kernels, and without a word to the others. What lies there already stays, so
        a second time is free. Text towers stay where they are, and `predict` is not spread.

        Args:
          mesh: All its axes are used for the images. Of several processes it is the same in all
            of them, and so is every call; each gets all images.

        Raises:
          TypeError: If it is no mesh of devices.
          ValueError: If it leaves out some of the processes, and is not this one's alone.

        Example:
          >>> from qjax.models.samplers import DDIM
          >>> apply = lambda variables, x_t, t, labels: variables["params"]["gain"] * x_t
          >>> pipe = Pipeline.from_apply(apply, {"gain": jnp.ones(())}, DDIM(), (8, 8, 1))
          >>> mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
          >>> pipe.on(mesh)(num_images=5, steps=4, key=jax.random.key(0)).shape
          (5, 8, 8, 1)
        """
        check_mesh(mesh)
        decoder = self.decoder
        if decoder is not None:
            component = decoder.component
            component = dataclasses.replace(component, params=put_whole(component.params, mesh))
            decoder = dataclasses.replace(decoder, component=component)
        return self.replace(
            mesh=mesh,
            params=put_whole(self.params, mesh),
            step_table=put_whole(self.step_table, mesh),
            decoder=decoder,
        )

    def save(self, folder: str | os.PathLike[str], *, report: Report | None = None) -> None:
        """Write parameters, sampler, config and a model card into `folder`; `qjax.load` reads it.

        Args:
          folder: Created, here or in a bucket (`gs://...`); an older save there is replaced,
            anything else is refused.
          report: What `qjax.compare` found of this pipeline, for the card.

        Raises:
          ValueError: If the pipeline does not say which network it runs, or the report is of
            several pipelines.
        """
        from qjax.models.saving import save_pipeline  # it builds pipelines itself

        save_pipeline(self, folder, report=report)

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        report: Report | None = None,
    ) -> str:
        """Upload what `save` writes to the Hugging Face hub; the address of the commit.

        Args:
          repository: `owner/name`; created if it is not there.
          private: Whether a repository that is created is private; None for the hub's default.
          token: Access token; None for the one of `hf auth login`.
          revision: Branch to upload to, created if it is not there; None for the main one.
          commit_message: Of the commit; None names qjax and the model.
          report: What `qjax.compare` found of this pipeline, for the model card.

        Raises:
          ValueError: As `save`, or if `repository` is no id.
          OSError: If the hub refused, or could not be reached.
        """
        from qjax.models.hub import push  # it saves pipelines

        return push(
            self,
            repository,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            report=report,
        )

    def with_lora(
        self, path: str | os.PathLike[str], *, scale: float = 1.0, fuse: bool = False
    ) -> Pipeline:
        """The pipeline with a LoRA on its denoiser and its text towers (`lora_pipeline`).

        Args:
          path: A safetensors file of PEFT, diffusers or kohya, or a folder that holds one.
          scale: Weight of the LoRA.
          fuse: Add it to the kernels, which must be float, for good; else it goes beside them,
            float or quantized, and beside the LoRAs that are there.

        Raises:
          FileNotFoundError: If there is no such file.
          ValueError: If keys of the file do not fit the networks, all of them named; if a
            kernel is quantized and `fuse` is set; or if the pipeline has no source.
        """
        from qjax.models.lora_pipeline import add_lora, fuse_lora  # they return pipelines

        return (fuse_lora if fuse else add_lora)(self, path, scale=scale)

    def with_lora_scale(self, scale: float | Sequence[float]) -> Pipeline:
        """The pipeline with another weight for all its LoRAs, or one for each; nothing compiles.

        Raises:
          ValueError: If there is no LoRA, or another number of them.
        """
        from qjax.models.lora_pipeline import scale_loras

        return scale_loras(self, scale)

    def without_lora(self) -> Pipeline:
        """The pipeline without the LoRAs beside its weights; those fused into them stay."""
        from qjax.models.lora_pipeline import remove_loras

        return remove_loras(self)

    def table_key(
        self,
        *,
        steps: int,
        eta: float = 0.0,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
    ) -> TableKey:
        """The settings of a run, as the entries of a step table are compared with them."""
        key = self.sampler.table_key(steps, eta=eta, guidance_scale=guidance_scale)
        return dataclasses.replace(
            key, method=self.method, guidance_rescale=float(guidance_rescale)
        )

    def retarget(
        self, *, steps: int, eta: float | None = None, guidance_scale: float | None = None
    ) -> Pipeline:
        """The pipeline with its step table made to suit another run (`retargeting`).

        Args:
          steps: Steps of the run.
          eta: Of the run; None if no entry of the table shall be judged by it.
          guidance_scale: Likewise.

        Raises:
          ValueError: If an entry cannot be made to suit, for its float layers are not at hand.
        """
        from qjax.models.retargeting import retarget  # it returns pipelines

        return retarget(self, steps=steps, eta=eta, guidance_scale=guidance_scale)

    @property
    def reads_prompts(self) -> bool:
        """Whether the pipeline takes prompts, and not labels."""
        return self.conditioner is not None and not isinstance(self.conditioner, ClassConditioner)

    @property
    def guidance_width(self) -> int | None:
        """Width of the embedding of the guidance scale that the network is told.

        A latent consistency model, which has one, is guided without an unconditional half.
        None: guidance is that of `sampling`.
        """
        return None if self.source is None else self.source.config.get("time_cond_proj_dim")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels, unless another size is asked for."""
        factor = 1 if self.decoder is None else self.decoder.factor
        return self.shape[0] * factor, self.shape[1] * factor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        channels = self.shape[-1] if self.decoder is None else self.decoder.channels
        return (*self.size, channels)

    def images(self, x_0: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """The images, in [0, 1], of samples as `output="latent"` gives them."""
        if self.decoder is None or self.mesh is None:
            return self._images(x_0)
        n, mesh = len(x_0), self.mesh
        filled = x_0[np.minimum(np.arange(batch_of(n, n, mesh)), n - 1)]
        return _joined([get(self._images(put_split(filled, mesh)), mesh)], n)

    def _images(self, x_0: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """The images of samples that lie where the parameters do."""
        return to_images(x_0 if self.decoder is None else self.decoder.decode(x_0, mesh=self.mesh))

    def condition(
        self,
        count: int,
        *,
        labels: Any = None,
        prompts: str | Sequence[str] | None = None,
        negative_prompts: str | Sequence[str] | None = None,
        guided: bool = False,
        guidance_scale: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[Any, Any]:
        """What the network is told about `count` images: `labels`, `null_labels` of `sample`.

        Args:
          count: Images.
          labels: Classes, one for all images or one for each.
          prompts: Texts, one for all images or one for each.
          negative_prompts: What the pictures shall not show, likewise; needs guidance.
          guided: Whether the second half is needed; else it is None, as it is for networks that
            are told the scale.
          guidance_scale: Weight of the guidance, read for networks that are told it.
          size: Height and width of the images in pixels; None for `self.size`.

        Raises:
          ValueError: If labels or prompts do not suit the model.
        """
        width = self.guidance_width
        if width is not None and negative_prompts is not None:
            raise ValueError(
                "negative_prompts need an unconditional half, and this network is told the scale "
                "of the guidance instead (LCM). Leave them out."
            )
        weak = width is None and guided and self.reads_prompts
        if weak and guidance_scale is not None and guidance_scale < 1:
            warnings.warn(
                f"guidance_scale={guidance_scale} draws less of the prompts, 0 nothing at all; "
                "diffusers reads scales below 1 as no guidance, which is None here.",
                stacklevel=3,
            )
        told, null = self._halves(
            count, labels, prompts, negative_prompts, guided and width is None, size or self.size
        )
        if width is not None and isinstance(told, Conditioning):
            told = told._replace(guidance=guidance_embedding(guidance_scale, width, batch=count))
        return told, null

    def _halves(
        self,
        count: int,
        labels: Any,
        prompts: str | Sequence[str] | None,
        negative_prompts: str | Sequence[str] | None,
        guided: bool,
        size: tuple[int, int],
    ) -> tuple[Any, Any]:
        """What is made of labels or prompts for `condition`."""
        conditioner = self.conditioner
        if conditioner is not None and not isinstance(conditioner, ClassConditioner):
            if prompts is None or labels is not None:
                raise ValueError(
                    f"this pipeline reads prompts; got {prompts=}, {labels=}. Pass prompts=[...]."
                )
            if negative_prompts is not None and not guided:
                raise ValueError("negative_prompts need a guidance_scale above 1; got none.")
            texts = broadcast_texts("prompts", prompts, count)
            negatives = None
            if negative_prompts is not None:
                negatives = broadcast_texts("negative_prompts", negative_prompts, count)
            told, null = conditioner.encode(texts, negatives, size=size)
            return told, null if guided else None
        if prompts is not None or negative_prompts is not None:
            raise ValueError(
                "this pipeline reads labels, not prompts. Pass labels=[...], or --labels on the "
                "command line."
            )
        if guided and self.null_label is None:
            raise ValueError(
                "guidance needs a model with a null_label; got null_label=None. Leave "
                "guidance_scale at None."
            )
        classes = check_labels(labels, count, self.num_labels, self.null_label, guided=guided)
        null = None
        if guided and self.null_label is not None:
            null = jnp.full((count,), self.null_label, jnp.int32)
        if conditioner is not None:
            if classes is None:
                raise ValueError("this pipeline is told a class; got labels=None.")
            return conditioner.encode(classes), None if null is None else conditioner.encode(null)
        return classes, null

    def predict(
        self,
        x_t: Float[Array, "b h w c"],
        t: ArrayLike,
        labels: int | Sequence[int] | np.ndarray | Array | None = None,
        guidance_scale: float | None = None,
        row: Mapping[str, Any] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        negative_prompts: str | Sequence[str] | None = None,
    ) -> Float[Array, "b h w c"]:
        """The guided prediction, without a noise correction and without a learned variance.

        Compiled once per shape. Inside a jit of your own use `guided_prediction`, and pass
        the parameters as an argument: here they would become constants.

        Args:
          x_t: Noisy samples, as the network sees them.
          t: Timestep, one for all or `[b]`.
          labels: Classes, one for all or `[b]`.
          guidance_scale: Weight of the guidance; None or 1.0 for none.
          row: A row of the step table (`step_table.row(i)`), required if there is a table.
          prompts: Texts, one for all or `[b]`.
          negative_prompts: Likewise.

        Raises:
          ValueError: If the labels or the guidance do not suit the model, or a row is missing.
        """
        if self.step_table is not None and self.step_table.entries and row is None:
            raise ValueError(
                "a pipeline with a step table predicts with one of its rows; got row=None. "
                "Pass row=pipe.step_table.row(i)."
            )
        scale = self._scale(guidance_scale)
        told, null = self.condition(
            len(x_t),
            labels=labels,
            prompts=prompts,
            negative_prompts=negative_prompts,
            guided=scale is not None,
            guidance_scale=guidance_scale,
        )
        collections = {k: v for k, v in (row or {}).items() if k != "noise_correction"}
        answer = _predict(
            self.apply,
            {"params": self.params, **collections},
            x_t,
            jnp.asarray(t),
            told,
            null,
            guidance_scale=scale,
            guidance_channels=self.guidance_channels,
        )
        return answer[..., : self.shape[-1]]

    def __call__(
        self,
        *,
        labels: int | Sequence[int] | np.ndarray | Array | None = None,
        prompts: str | Sequence[str] | None = None,
        negative_prompts: str | Sequence[str] | None = None,
        steps: int = 20,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        key: PRNGKeyArray | None = None,
        latents: Float[Array, "b h w c"] | None = None,
        output: str = "image",
        return_trajectory: bool = False,
        num_images: int | None = None,
        start_index: int = 0,
        batch_size: int = 64,
        mesh: Mesh | None = None,
    ) -> Any:
        """Images, drawn from the model.

        Args:
          labels: Classes, one for all images or one for each; None draws without a class.
          prompts: Texts, one for all images or one for each.
          negative_prompts: What the pictures shall not show, likewise; needs guidance.
          steps: Steps of the sampler.
          guidance_scale: Weight of classifier-free guidance; None or 1.0 for none, which
            also spares the unconditional half of the work. Below 1 the pictures follow labels
            and prompts less, at 0 not at all; diffusers reads 0 as none.
          guidance_rescale: 0 to 1: how far guidance that is too strong is taken back
            (`sampling`); 0.7 with zero terminal SNR, as its authors have it.
          height: Of the images in pixels; None for the model's own.
          width: Likewise.
          eta: Share of fresh noise, 0 to 1 (DDIM).
          key: Random key; may be left out only if `latents` are given and no noise is added.
          latents: `[b, h, w, c]`, in place of the standard normal noise to begin with, which some
            samplers scale (as diffusers' `latents`).
          output: `"image"` for float32 in [0, 1], `"latent"` for the samples as they are.
          return_trajectory: Whether the noisy samples and predictions of all steps come too.
          num_images: How many; by default as many as labels, prompts or latents, else 1.
          start_index: Index of the first image: `start_index=4` draws what would have been
            the fifth image and those after it.
          batch_size: Most images in one run of the program, on a mesh of every device; more are
            drawn in parts of this size, the last one filled up.
          mesh: Devices to spread the images over, the same as `pipe.on(mesh)(...)`, which places
            the parameters once for many calls; None for the pipeline's own, if it has one.

        Returns:
          `[b, h, w, c]` float32 on the default device, in every process; with
          `return_trajectory` a pair of that and a `Trajectory`.

        Raises:
          ValueError: If an argument is outside its range or does not suit the model, or the
            step table was fitted for other settings.
          TypeError: If `mesh` is none.
        """
        mesh = self.mesh if mesh is None else mesh
        pipe = self if mesh is None else self.on(mesh)  # free for what lies there
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {OUTPUTS}; got {output!r}.")
        if batch_size < 1 or start_index < 0:
            raise ValueError(
                f"batch_size must be at least 1 and start_index at least 0; got "
                f"{batch_size=}, {start_index=}."
            )
        scale = self._scale(guidance_scale)
        if not 0 <= guidance_rescale <= 1 or (guidance_rescale and scale is None):
            raise ValueError(
                "guidance_rescale must lie between 0 and 1 and needs a guidance_scale above 1; "
                f"got {guidance_rescale=}, {guidance_scale=}."
            )
        shape, crop = self._drawn_shape(height, width)
        count = count_images(num_images, labels=labels, prompts=prompts, latents=latents)
        if latents is not None and np.shape(latents)[1:] != shape:
            raise ValueError(
                f"latents must be [b, {', '.join(map(str, shape))}]; got {np.shape(latents)}."
            )
        told, null = self.condition(
            count,
            labels=labels,
            prompts=prompts,
            negative_prompts=negative_prompts,
            guided=scale is not None,
            guidance_scale=guidance_scale,
            size=crop,
        )
        rows = self.sampler.rows(steps, eta=eta)
        if self.step_table is not None:
            self.step_table.check(
                self.table_key(
                    steps=steps,
                    eta=eta,
                    guidance_scale=guidance_scale,
                    guidance_rescale=guidance_rescale,
                )
            )
        key = check_key(key, needed=latents is None or bool(np.any(rows["noise_std"] > 0)))
        run = functools.partial(
            sample_jit,
            self.apply,
            pipe.params,
            self.sampler,
            put_whole(rows, mesh),
            entries=pipe.step_table.entries if pipe.step_table is not None else None,
            guidance_scale=put_whole(scale, mesh),
            guidance_rescale=put_whole(_traced(guidance_rescale, neutral=0.0), mesh),
            guidance_channels=self.guidance_channels,
            return_trajectory=return_trajectory,
            mesh=mesh,
        )
        size = batch_of(count, batch_size, mesh)
        outputs, trajectories = [], []
        for start in range(0, count, size):
            # Past the end the last image is drawn again, and dropped below.
            index = np.minimum(np.arange(start, start + size), count - 1)
            keys = put_split(_image_keys(key, jnp.asarray(start_index + index, jnp.uint32)), mesh)
            if latents is None:
                x_T = noise_jit(keys, shape, mesh=mesh)
            else:
                x_T = put_split(jnp.asarray(latents, jnp.float32)[index], mesh)
            pick = lambda tree, index=index: put_split(jax.tree.map(lambda a: a[index], tree), mesh)
            x_0, trajectory = run(x_T, pick(told), pick(null), keys=keys)
            outputs.append(pipe._output(x_0, output, crop))
            trajectories.append(trajectory)
        if mesh is not None:
            outputs, trajectories = get((outputs, trajectories), mesh)
        images = _joined(outputs, count)
        if not return_trajectory:
            return images
        return images, jax.tree.map(lambda *x: _joined(x, count, axis=1), *trajectories)

    def _scale(self, guidance_scale: float | None) -> Array | None:
        """The scale of guidance by two halves; None without, or if the network is told it.

        Raises:
          ValueError: If it is no finite number.
        """
        if guidance_scale is not None and not np.isfinite(guidance_scale):
            raise ValueError(
                f"guidance_scale must be a finite number; got {guidance_scale}. None or 1.0 is no "
                "guidance."
            )
        return None if self.guidance_width is not None else _traced(guidance_scale)

    def _output(
        self, x_0: Float[Array, "b h w c"], output: str, crop: tuple[int, int]
    ) -> Float[Array, "b h2 w2 c2"]:
        """The samples, or the images of them at height and width `crop`."""
        if output == "latent":
            return x_0
        images = self._images(x_0)
        top, left = ((have - want) // 2 for have, want in zip(images.shape[1:3], crop, strict=True))
        return images[:, top : top + crop[0], left : left + crop[1]]

    def _drawn_shape(
        self, height: int | None, width: int | None
    ) -> tuple[tuple[int, int, int], tuple[int, int]]:
        """Shape of a sample that holds an image of that size, and the size."""
        own = self.size
        wanted = (own[0] if height is None else height, own[1] if width is None else width)
        factor = 1 if self.decoder is None else self.decoder.factor
        check_sizes(wanted, factor, self.buckets)
        drawn = wanted
        if self.buckets is not None:
            holding = [b for b in self.buckets if b[0] >= wanted[0] and b[1] >= wanted[1]]
            drawn = min(holding, key=lambda b: (b[0] * b[1], b))
        return (drawn[0] // factor, drawn[1] // factor, self.shape[-1]), wanted


def _joined(parts: Sequence[ArrayLike], count: int, *, axis: int = 0) -> Array:
    """What comes of several runs, without what the last was filled up with."""
    whole = jnp.concatenate(parts, axis=axis) if len(parts) > 1 else jnp.asarray(parts[0])
    return whole if whole.shape[axis] == count else jax.lax.slice_in_dim(whole, 0, count, axis=axis)


def _traced(value: float | None, *, neutral: float = 1.0) -> Array | None:
    """A setting as a traced scalar; None where it changes nothing, which spares its work."""
    if value is None or value == neutral:
        return None
    return jnp.asarray(value, jnp.float32)
