"""What stands beside the denoiser in a diffusers folder: text towers, autoencoder, classes."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qjax.core.typing import Array
from qjax.models.checkpoints import is_plain_name, load_checkpoint
from qjax.models.class_embedder import CLASS_NAME as CLASS_EMBEDDER
from qjax.models.components import (
    AUTOENCODERS,
    TEXT_ENCODERS,
    Component,
    build_component,
    weights_stem,
)
from qjax.models.conditioners import ClassConditioner, TextConditioner, TextTower
from qjax.models.convert import convert, save_component
from qjax.models.decoders import LatentDecoder
from qjax.models.pipeline import Pipeline
from qjax.models.saving_sides import sides_of
from qjax.models.text_encoders.tokenizers import load_tokenizer

OnTensor = Callable[[str, int, int], None]

ZERO_EMPTY = "force_zeros_for_empty_prompt"

# Of no use for sampling: a filter for pictures, and what prepares pictures for it.
IGNORED = ("safety_checker", "feature_extractor", "image_encoder")


class Sides(NamedTuple):
    """The fields of a pipeline that come from beside the denoiser, and what has no port."""

    fields: dict[str, Any]
    left: list[str]


def named_components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of every component that a `model_index.json` names.

    Raises:
      ValueError: If a name is not that of a folder beside the index, or a class is no text.
    """
    pairs = {
        name: value
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] is not None
    }
    for name, value in pairs.items():
        if not is_plain_name(name) or not isinstance(value[1], str):
            raise ValueError(
                "model_index.json must name components by plain names, and their classes; got "
                f"{name!r:.80}: {value!r:.80}. Do not use this checkpoint."
            )
    return {name: (value[0], value[1]) for name, value in pairs.items()}


def load_sides(
    folder: Path,
    index: Mapping[str, Any],
    components: Mapping[str, tuple[str, str]],
    *,
    dtype: Any,
    variant: str | None,
    on_tensor: OnTensor | None,
) -> Sides:
    """Conditioner and decoder of the pipeline in a folder.

    Args:
      folder: Of the whole model.
      index: Its `model_index.json`.
      components: Library and class by name, without denoiser and scheduler.
      dtype: Float dtype of the parameters; None keeps the files'.
      variant: Which weight files.
      on_tensor: Progress.

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If the files do not fit together, or a text tower lacks its tokenizer.
    """

    def load(name: str) -> Component:
        return load_component(
            folder / name,
            components[name][1],
            dtype=dtype,
            variant=variant,
            on_tensor=on_tensor,
        )

    fields: dict[str, Any] = {}
    left, towers = [], []
    for name, (_, class_name) in sorted(components.items()):
        if class_name in TEXT_ENCODERS:
            files = folder / name.replace("text_encoder", "tokenizer")
            if files.name not in components:
                raise ValueError(
                    f"{folder} has {name} without {files.name}, so it cannot read prompts."
                )
            towers.append(
                TextTower(component=load(name), tokenizer=load_tokenizer(files), files=files)
            )
        elif class_name in AUTOENCODERS:
            fields["decoder"] = LatentDecoder(component=load(name))
        elif class_name == CLASS_EMBEDDER:
            component = load(name)
            classes = component.model.config.num_classes
            fields["conditioner"] = ClassConditioner(component=component)
            fields |= {"null_label": classes, "num_labels": classes}
        elif not name.startswith(("tokenizer", *IGNORED)):
            left.append(name)
    if towers:
        zeros = bool(index.get(ZERO_EMPTY, False))
        fields["conditioner"] = TextConditioner(towers=tuple(towers), zero_without_negative=zeros)
    return Sides(fields, left)


def write_sides(pipe: Pipeline, out: Path) -> dict[str, Any]:
    """Write conditioner and decoder into a diffusers folder; gives their part of its index.

    Raises:
      ValueError: If the conditioner is not one of this library.
    """
    index: dict[str, Any] = {}
    sides = sides_of(pipe)
    for name, one in sides.components.items():
        library = {"class_embedder": "qjax", "vae": "diffusers"}.get(name, "transformers")
        if name == "vae" and pipe.source is not None and pipe.source.model == "UNet2DModel":
            name = "vqvae"  # as diffusers calls it in unconditional latent diffusion
        index[name] = [library, one.class_name]
        targets = build_component(one.class_name, one.config).targets
        stem = weights_stem(one.class_name)
        save_component(out / name, one.config, one.params, targets, stem=stem)
    for name, path in sides.files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / name)
        index[name.split("/")[0]] = ["transformers", "CLIPTokenizer"]
    if sides.record.get("zero_without_negative"):
        index[ZERO_EMPTY] = True
    return index


def load_component(
    folder: Path,
    class_name: str,
    *,
    dtype: Any = np.float32,
    variant: str | None = None,
    on_tensor: OnTensor | None = None,
) -> Component:
    """The network in a component's folder.

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If there is no port of the class, or weights and config do not fit together.
    """
    checkpoint = load_checkpoint(folder, variant=variant, stem=weights_stem(class_name))
    kind = build_component(class_name, checkpoint.config)
    params = convert(
        kind.rename(checkpoint), kind.targets, dtype=dtype, finish=_on_device, on_tensor=on_tensor
    )
    return Component(
        class_name=class_name, config=checkpoint.config, model=kind.model, params=params
    )


def _on_device(path: tuple[str, ...], array: np.ndarray) -> Array:
    return jnp.asarray(array)
