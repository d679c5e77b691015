"""From a folder to a Pipeline: diffusers' layout, or the library's own (`saving.py`).

A diffusers folder has `model_index.json` and a folder for each component (older ones keep all
files in one). The index tells the class of the denoiser and of the networks beside it, and
`denoisers.py` and `components.py` know their ports.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qjax.core import serialize
from qjax.core.config import QuantConfig
from qjax.core.manifest import MANIFEST
from qjax.core.places import is_remote
from qjax.core.plain_json import read_json
from qjax.core.quantize import plan, quantize_leaf
from qjax.core.remote import fetch
from qjax.models.checkpoints import Checkpoint, load_checkpoint
from qjax.models.conditioners import TextConditioner
from qjax.models.convert import convert
from qjax.models.denoisers import Denoiser, abstract_params, build_denoiser
from qjax.models.hub import CONFIGS, INDEX, TEXTS, WEIGHTS
from qjax.models.licenses import license_of
from qjax.models.loading_sides import load_sides, named_components
from qjax.models.pipeline import Pipeline, Source
from qjax.models.samplers import sampler_from_diffusers
from qjax.models.saving import load_saved, method_name
from qjax.models.unet2d_condition import UNet2DConditionModel
from qjax.models.unet2d_keys import rename_old_attention_keys

DENOISERS = ("transformer", "unet")


def load_pipeline(
    folder: Path | str,
    *,
    dtype: Any = np.float32,
    variant: str | None = None,
    quantize: QuantConfig | None = None,
    name: str | None = None,
    on_tensor: Callable[[str, int, int], None] | None = None,
) -> Pipeline:
    """The pipeline in a diffusers folder or in one that `save_pipeline` wrote.

    Args:
      folder: A local folder, or one in a bucket, of which a copy is read (`copied_here`).
      dtype: Float dtype of the parameters; None keeps the files'. Not for saved folders, whose
        parameters come back as they were.
      variant: Which weight files, `"fp16"` say; None for the plain ones.
      quantize: Quantize every tensor as soon as it is read, so that the float model is never
        in memory as a whole. Its rules are checked before the first one is.
      name: What to call the source; the folder if None.
      on_tensor: Progress: called with a key, the bytes read and all bytes.

    Raises:
      FileNotFoundError: If the folder or a file in it is missing.
      ValueError: If the files do not fit together, or hold what there is no port for; if
        `quantize` does not suit the model, or its weights are not finite.
    """
    folder = copied_here(folder) if is_remote(folder) else Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    if (folder / MANIFEST).exists():
        if quantize is not None:
            raise ValueError(f"{folder} is a saved pipeline; load it, then quantize its params.")
        return load_saved(folder)
    index = _read_json(folder / INDEX)
    components = named_components(index)
    part, class_name = _denoiser_of(folder, components)
    sides = load_sides(
        folder,
        index,
        {name: library for name, library in components.items() if name not in (part, "scheduler")},
        dtype=dtype,
        variant=variant,
        on_tensor=on_tensor,
    )
    if sides.left:
        warnings.warn(
            f"{folder.name}: {', '.join(sides.left)} not loaded; there is no port of them.",
            stacklevel=3,
        )
    checkpoint = load_checkpoint(_component(folder, part, "config.json"), variant=variant)
    denoiser = build_denoiser(class_name, checkpoint.config)
    fields = denoiser.fields | sides.fields | _zoo_fields(folder / "zoo.json")
    scheduler = _read_json(
        _component(folder, "scheduler", "scheduler_config.json") / "scheduler_config.json"
    )
    sampler = sampler_from_diffusers(scheduler)
    params, sha256 = _params(checkpoint, class_name, denoiser, dtype, quantize, on_tensor)
    source = Source(
        model=class_name,
        config=checkpoint.config,
        name=name or folder.name,
        sha256=sha256,
        license=license_of(folder),
    )
    if reasons := _why_not_drawn(denoiser.model, fields):
        warnings.warn(
            f"{folder.name} can be quantized and saved, but pictures cannot be drawn with it: "
            f"{'; '.join(reasons)}.",
            stacklevel=3,
        )
    return Pipeline.from_apply(
        denoiser.model.apply,
        params,
        sampler,
        source=source,
        quant=quantize,
        method=None if quantize is None else method_name(quantize),
        **fields,
    )


def copied_here(url: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """A copy of a model in a bucket, for as long as the process runs.

    Args:
      url: The folder in the bucket, in diffusers' layout or a save.
      weights: Whether those of a diffusers folder are wanted; else the configs alone.

    Raises:
      FileNotFoundError: If there is no model at that place.
    """
    folder = fetch(url, CONFIGS)
    is_save = (folder / MANIFEST).is_file()
    if not is_save and not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{os.fspath(url)} holds neither {MANIFEST} (a model saved by qjax) nor {INDEX} "
            "(diffusers' layout). Is it the folder of a model? If it was being saved there, that "
            "was broken off: save it again."
        )
    everything = (*CONFIGS, *TEXTS, WEIGHTS)
    return fetch(url, everything) if weights or is_save else folder


def load_shapes(folder: Path | str) -> dict[str, Any]:
    """The params of `load_pipeline(folder)` as shapes; of a diffusers folder no weight is read.

    Raises:
      FileNotFoundError: As `load_pipeline`.
      ValueError: As `load_pipeline`, as far as the configs tell.
    """
    folder = copied_here(folder, weights=False) if is_remote(folder) else Path(folder)
    if (folder / MANIFEST).exists():
        return dict(load_saved(folder).params)
    part, class_name = _denoiser_of(folder, named_components(_read_json(folder / INDEX)))
    config = _read_json(_component(folder, part, "config.json") / "config.json")
    return abstract_params(build_denoiser(class_name, config))


def _params(
    checkpoint: Checkpoint,
    class_name: str,
    denoiser: Denoiser,
    dtype: Any,
    config: QuantConfig | None,
    on_tensor: Callable[[str, int, int], None] | None,
) -> tuple[dict[str, Any], str | None]:
    """The params and, where they are quantized on the way, the hash of the float ones."""
    digests: dict[str, str] = {}

    def finish(path: tuple[str, ...], array: np.ndarray) -> Any:
        if config is None:
            return jnp.asarray(array)
        name = "/".join(path)
        digests[name] = serialize.leaf_digest(name, array)
        return quantize_leaf(name, array, config)

    if config is not None:
        plan(abstract_params(denoiser), config)
    tensors: Mapping[str, Any] = checkpoint
    if class_name == "UNet2DModel":
        tensors = rename_old_attention_keys(checkpoint)
    params = convert(tensors, denoiser.targets, dtype=dtype, finish=finish, on_tensor=on_tensor)
    return params, serialize.digest_of(digests) if digests else None


def _why_not_drawn(model: nn.Module, fields: Mapping[str, Any]) -> list[str]:
    """What a UNet must be told and a pipeline here does not tell it; empty where nothing."""
    if not isinstance(model, UNet2DConditionModel):
        return []
    config, conditioner = model.config, fields.get("conditioner")
    towers = len(conditioner.towers) if isinstance(conditioner, TextConditioner) else 0
    reasons = []
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        reasons.append(
            f"its UNet takes {config.in_channels} channels and answers {config.out_channels}, as "
            "those for inpainting do"
        )
    if config.addition_embed_type == "text_time" and towers == 1:
        reasons.append("its UNet needs two text towers, and the folder has one")
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        reasons.append("its UNet is told classes beside the text")
    return reasons


def _zoo_fields(path: Path) -> dict[str, Any]:
    """What `zoo.json` says of a shipped model's classes; nothing where there is no such file."""
    if not path.exists():
        return {}
    record = _read_json(path)
    null, labels = record.get("null_label"), record.get("labels")
    if type(null) not in (int, type(None)) or not isinstance(labels, list):
        raise ValueError(f"{path} must have a null_label and labels.")
    return {"null_label": null, "num_labels": len(labels)}


def _denoiser_of(folder: Path, components: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """Name and class of the one denoiser among the components."""
    found = [key for key in DENOISERS if key in components]
    if len(found) != 1:
        raise ValueError(
            f"{folder / INDEX} must name one denoiser ({' or '.join(DENOISERS)}); it names "
            f"{', '.join(components) or 'nothing'}."
        )
    return found[0], components[found[0]][1]


def _component(folder: Path, name: str, file: str) -> Path:
    """The component's own folder, or the pipeline's where old layouts keep all files."""
    inside = folder / name
    return inside if (inside / file).exists() or not (folder / file).exists() else folder


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; is {path.parent} a diffusers folder?")
    return read_json(path)
