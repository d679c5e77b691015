"""Checkpoints of latent diffusion in its authors' layout, as pipelines.

One file holds UNet, autoencoder and class embedder, and no config. What it is of is found by
trying: the published configs are listed here, and the one whose every tensor is there with its
shape is it. The averaged weights (`model_ema.*`) are not read, as the authors' samplers do not
read them from the published files either.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from qjax.core.safetensors_io import ArrayLike
from qjax.models import autoencoder_kl, class_embedder, unet2d_keys, vq_model
from qjax.models.autoencoder_config import AutoencoderKLConfig, VQModelConfig
from qjax.models.class_embedder import ClassEmbedderConfig
from qjax.models.components import Component, build_component
from qjax.models.conditioners import ClassConditioner
from qjax.models.convert import Target, convert
from qjax.models.decoders import LatentDecoder
from qjax.models.denoisers import build_denoiser
from qjax.models.original_keys import AUTOENCODER, UNET, autoencoder_layers, unet_layers
from qjax.models.pipeline import Pipeline, Source
from qjax.models.samplers import DDIM
from qjax.models.schedules import Schedule
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_keys import checkpoint_keys as condition_keys
from qjax.models.unet2d_config import UNet2DConfig

CLASS_TABLE = "cond_stage_model.embedding.weight"
SCALE = "scale_factor"
# Of all of them: the square roots of the betas are on a line.
SCHEDULE = Schedule.scaled_linear(1000, 0.0015, 0.0195)


def ldm4() -> UNet2DConfig:
    """LDM-4 without classes: CelebA-HQ, FFHQ, LSUN bedrooms at 256 (LDM, table 12)."""
    down = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    return UNet2DConfig(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        block_out_channels=(224, 448, 672, 896),
        layers_per_block=2,
        down_block_types=down,
        up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
        attention_head_dim=32,
        flip_sin_to_cos=True,
        freq_shift=0,
    )


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model that was published in this layout.

    Attributes:
      unet: Its UNet.
      autoencoder: Its first stage.
    """

    unet: UNet2DConfig | UNet2DConditionConfig
    autoencoder: VQModelConfig | AutoencoderKLConfig


def published() -> dict[str, Published]:
    """The models that are recognised, by name."""
    return {
        "LDM-4 on ImageNet": Published(
            unet=UNet2DConditionConfig.ldm4_imagenet(), autoencoder=VQModelConfig.vq_f4()
        ),
        "LDM-4": Published(unet=ldm4(), autoencoder=VQModelConfig.vq_f4()),
    }


def is_latent_diffusion(keys: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is in the layout of latent diffusion's authors."""
    return any(key.startswith(UNET) for key in keys)


@dataclass(frozen=True, eq=False)
class _View:
    """A tensor of a checkpoint, or one of the three projections in it, in another shape."""

    tensor: ArrayLike
    shape: tuple[int, ...]
    part: int | None
    heads: int

    @property
    def dtype(self) -> Any:
        return self.tensor.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self.tensor)
        if self.part is not None:
            # Head by head: its query, its key, its value.
            array = array.reshape(self.heads, 3, -1)[:, self.part]
        return np.array(array.reshape(self.shape), dtype or array.dtype)


def read(
    tensors: Mapping[str, ArrayLike],
    *,
    name: str,
    dtype: Any = None,
    on_tensor: Callable[[str, int, int], None] | None = None,
    models: Mapping[str, Published] | None = None,
) -> tuple[Pipeline, str, tuple[str, ...]]:
    """The pipeline in a checkpoint of latent diffusion.

    Args:
      tensors: The whole checkpoint.
      name: What to call its source.
      dtype: Float dtype of the params; None keeps the file's.
      on_tensor: Progress.
      models: What it may be of; None for `published()`.

    Returns:
      The pipeline, which model it is, and the keys that were not read.

    Raises:
      ValueError: If it is of none of them; for the nearest one it names what does not fit.
    """
    kind, one = _recognise(tensors, published() if models is None else models)
    unet_config = one.unet.to_diffusers()
    denoiser = build_denoiser(unet_config["_class_name"], unet_config)
    layout = _layout(one)
    used = {source for part in layout.values() for source, *_ in part.values()}

    def params_of(part: str, targets: Mapping[str, Target]) -> dict[str, Any]:
        views = {
            key: _View(tensors[source], targets[key].shape, place, heads)
            for key, (source, place, heads) in layout[part].items()
        }
        return convert(views, targets, dtype=dtype, on_tensor=on_tensor)

    fields: dict[str, Any] = dict(denoiser.fields)
    autoencoder = one.autoencoder.to_diffusers()
    if SCALE in tensors:
        autoencoder["scaling_factor"] = float(np.asarray(tensors[SCALE]))
        used.add(SCALE)
    built = build_component(autoencoder["_class_name"], autoencoder)
    fields["decoder"] = LatentDecoder(
        component=Component(
            class_name=autoencoder["_class_name"],
            config=autoencoder,
            model=built.model,
            params=params_of("autoencoder", built.targets),
        )
    )
    if isinstance(one.unet, UNet2DConditionConfig):
        rows, width = tensors[CLASS_TABLE].shape
        classes = ClassEmbedderConfig(num_classes=rows - 1, embed_dim=width).to_diffusers()
        embedder = build_component(class_embedder.CLASS_NAME, classes)
        table = {"embedding.weight": tensors[CLASS_TABLE]}
        component = Component(
            class_name=class_embedder.CLASS_NAME,
            config=classes,
            model=embedder.model,
            params=convert(table, embedder.targets, dtype=dtype),
        )
        fields["conditioner"] = ClassConditioner(component=component)
        fields |= {"null_label": rows - 1, "num_labels": rows - 1}
        used.add(CLASS_TABLE)
    pipe = Pipeline.from_apply(
        denoiser.model.apply,
        params_of("unet", denoiser.targets),
        DDIM(
            schedule=SCHEDULE,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        source=Source(model=unet_config["_class_name"], config=unet_config, name=name),
        **fields,
    )
    return pipe, kind, tuple(sorted(key for key in tensors if key not in used))


Layout = dict[str, dict[str, tuple[str, int | None, int]]]


def _layout(model: Published) -> Layout:
    """For UNet and autoencoder, and every key of diffusers: the authors' key, part and heads."""
    unet = model.unet
    if isinstance(unet, UNet2DConditionConfig):
        targets, head_dim = condition_keys(unet), None
    else:
        targets, head_dim = unet2d_keys.checkpoint_keys(unet), unet.attention_head_dim
    depth = unet.layers_per_block
    assert isinstance(depth, int)  # of every published one
    names = unet_layers({_split(key)[0] for key in targets}, layers_per_block=depth)
    parts: Layout = {"unet": {}, "autoencoder": {}}
    for key, target in targets.items():
        layer, leaf = _split(key)
        original = names[layer]
        heads = target.shape[0] // head_dim if head_dim and original.part is not None else 1
        parts["unet"][key] = (f"{UNET}{original.name}.{leaf}", original.part, heads)
    stage = model.autoencoder
    module = vq_model if isinstance(stage, VQModelConfig) else autoencoder_kl
    keys = module.checkpoint_keys(stage)
    layers = {_split(key)[0] for key in keys}
    named = autoencoder_layers(layers, levels=len(stage.block_out_channels))
    for key in keys:
        layer, leaf = _split(key)
        parts["autoencoder"][key] = (f"{AUTOENCODER}{named[layer]}.{leaf}", None, 1)
    return parts


def _split(key: str) -> tuple[str, str]:
    layer, _, leaf = key.rpartition(".")
    return layer, leaf


def _recognise(
    tensors: Mapping[str, ArrayLike], models: Mapping[str, Published]
) -> tuple[str, Published]:
    """The model whose every tensor is there with as many values as it should have."""
    problems: dict[str, list[str]] = {}
    for name, model in models.items():
        problems[name] = _misfits(tensors, model)
        if not problems[name]:
            return name, model
    nearest = min(problems, key=lambda name: len(problems[name]))
    shown = ", ".join(problems[nearest][:10])
    raise ValueError(
        f"the checkpoint must be of {', '.join(models)}; it comes nearest to {nearest}, but "
        f"{len(problems[nearest])} tensors do not fit: {shown}. Convert it with its authors' "
        "tools, and load the folder in diffusers' layout."
    )


def _targets(model: Published) -> dict[str, Mapping[str, Target]]:
    """The key tables of UNet and autoencoder."""
    unet, stage = model.unet.to_diffusers(), model.autoencoder.to_diffusers()
    return {
        "unet": build_denoiser(unet["_class_name"], unet).targets,
        "autoencoder": build_component(stage["_class_name"], stage).targets,
    }


def _misfits(tensors: Mapping[str, ArrayLike], model: Published) -> list[str]:
    """What is missing or of another size for a checkpoint to be of this model."""
    targets, wrong = _targets(model), []
    if isinstance(model.unet, UNet2DConditionConfig) and CLASS_TABLE not in tensors:
        wrong.append(f"{CLASS_TABLE} is missing")
    for part, keys in _layout(model).items():
        for key, (source, place, _) in keys.items():
            size = prod(targets[part][key].shape) * (1 if place is None else 3)
            if source not in tensors:
                wrong.append(f"{source} is missing")
            elif prod(tensors[source].shape) != size:
                wrong.append(f"{source} has the shape {list(tensors[source].shape)}")
    return sorted(set(wrong))
