"""From a folder to a Pipeline and back: diffusers' layout, and the library's own.

A diffusers folder has `model_index.json` and a folder for each component (older ones keep all
files in one). A saved folder is what `qjax.core.serialize` writes. Both tell the class of the
denoiser, and the table here knows what to do with it.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qjax.core import serialize
from qjax.core.config import QuantConfig
from qjax.core.quantize import quantize_leaf
from qjax.models.checkpoints import Checkpoint, load_checkpoint
from qjax.models.convert import Target, convert
from qjax.models.dit import DiT, DiTConfig
from qjax.models.dit_keys import diffusers_keys
from qjax.models.pipeline import Pipeline, Source
from qjax.models.samplers import Sampler, sampler_from_diffusers
from qjax.models.unet2d import UNet2DModel
from qjax.models.unet2d_config import UNet2DConfig
from qjax.models.unet2d_keys import checkpoint_keys, rename_old_attention_keys

INDEX = "model_index.json"
DENOISERS = ("transformer", "unet")


class Denoiser(NamedTuple):
    """A network and what a pipeline must know of it."""

    model: nn.Module
    targets: Mapping[str, Target]
    fields: dict[str, Any]


def build_denoiser(class_name: str, config: Mapping[str, Any]) -> Denoiser:
    """The port of a diffusers class, its key table and its pipeline fields.

    Raises:
      ValueError: If there is no port of the class, or its config asks for what the port lacks.
    """
    if class_name == "DiTTransformer2DModel":
        dit = DiTConfig.from_diffusers(config)
        fields = {
            "shape": (dit.sample_size, dit.sample_size, dit.in_channels),
            "null_label": dit.num_classes,
            "num_labels": dit.num_classes,
            # The authors' code guides the first three of four channels.
            "guidance_channels": 3 if dit.in_channels == 4 else None,
        }
        return Denoiser(DiT(dit), diffusers_keys(dit), fields)
    if class_name == "UNet2DModel":
        unet = UNet2DConfig.from_diffusers(config)
        size = unet.sample_size
        height, width = size if isinstance(size, tuple) else (size, size)
        fields = {
            "shape": (height, width, unet.in_channels),
            "num_labels": unet.num_class_embeds,
        }
        return Denoiser(UNet2DModel(unet), checkpoint_keys(unet), fields)
    raise ValueError(
        "The denoisers with a port are DiTTransformer2DModel and UNet2DModel; got "
        f"{class_name!r}. Wrap your own Flax model with Pipeline.from_apply."
    )


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
      folder: A local folder.
      dtype: Float dtype of the parameters; None keeps the files'. Not for saved folders, whose
        parameters come back as they were.
      variant: Which weight files, `"fp16"` say; None for the plain ones.
      quantize: Quantize every tensor as soon as it is read, so that the float model is never
        in memory as a whole.
      name: What to call the source; the folder if None.
      on_tensor: Progress: called with a key, the bytes read and all bytes.

    Raises:
      FileNotFoundError: If the folder or a file in it is missing.
      ValueError: If the files do not fit together, or hold what there is no port for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    if (folder / serialize.MANIFEST).exists():
        if quantize is not None:
            raise ValueError(f"{folder} is a saved pipeline; load it, then quantize its params.")
        return _load_saved(folder)
    index = _read_json(folder / INDEX)
    components = {
        key: value for key, value in index.items() if isinstance(value, list) and len(value) == 2
    }
    found = [key for key in DENOISERS if key in components]
    if len(found) != 1:
        raise ValueError(
            f"{folder / INDEX} must name one denoiser ({' or '.join(DENOISERS)}); it names "
            f"{', '.join(components) or 'nothing'}."
        )
    left = sorted(
        key
        for key, (_, class_name) in components.items()
        if key not in (*found, "scheduler") and class_name is not None
    )
    if left:
        warnings.warn(
            f"{folder.name}: {', '.join(left)} not loaded; the pipeline works on latents, "
            "output='latent'.",
            stacklevel=3,
        )
    checkpoint = load_checkpoint(_component(folder, found[0], "config.json"), variant=variant)
    class_name = components[found[0]][1]
    denoiser = build_denoiser(class_name, checkpoint.config)
    params = _params(checkpoint, class_name, denoiser, dtype, quantize, on_tensor)
    scheduler = _read_json(
        _component(folder, "scheduler", "scheduler_config.json") / "scheduler_config.json"
    )
    zoo = folder / "zoo.json"
    extra = _read_json(zoo) if zoo.exists() else {}
    fields = dict(denoiser.fields)
    if extra:
        fields |= {"null_label": extra["null_label"], "num_labels": len(extra["labels"])}
    return Pipeline.from_apply(
        denoiser.model.apply,
        params,
        sampler_from_diffusers(scheduler),
        source=Source(model=class_name, config=checkpoint.config, name=name or folder.name),
        method=None if quantize is None else method_name(quantize),
        **fields,
    )


def abstract_params(denoiser: Denoiser) -> dict[str, Any]:
    """Shapes of the denoiser's params, without any weights."""
    import jax

    height, width, channels = denoiser.fields["shape"]
    x = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(denoiser.model.init, key, x, one, one)["params"]


def save_pipeline(pipe: Pipeline, folder: Path | str) -> None:
    """Write a pipeline, quantized or not, so that `load_pipeline` finds it again.

    Raises:
      ValueError: If the pipeline does not say which network it runs (one from `from_apply`
        without a `source`), or has a step table.
    """
    if pipe.source is None:
        raise ValueError(
            "A pipeline can be saved if its source says which network it runs; this one came "
            "from from_apply without one. Save its params with qjax.core.serialize.save."
        )
    if pipe.step_table is not None and pipe.step_table.entries:
        raise ValueError(
            "A pipeline with a step table cannot be saved yet; drop it with "
            "pipe.replace(step_table=None)."
        )
    record = {
        "source": {**dataclasses.asdict(pipe.source), "config": dict(pipe.source.config)},
        "sampler": pipe.sampler.to_diffusers(),
        "fields": {
            "shape": list(pipe.shape),
            "null_label": pipe.null_label,
            "num_labels": pipe.num_labels,
            "guidance_channels": pipe.guidance_channels,
            "method": pipe.method,
        },
    }
    serialize.save(folder, pipe.params, record)


def method_name(config: QuantConfig) -> str:
    """A short hash of a config: what a step table's entries are compared with."""
    import hashlib

    text = json.dumps(config.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _load_saved(folder: Path) -> Pipeline:
    params, record = serialize.load(folder)
    try:
        source = Source(**record["source"])
        sampler: Sampler = sampler_from_diffusers(record["sampler"])
        fields = dict(record["fields"], shape=tuple(record["fields"]["shape"]))
        denoiser = build_denoiser(source.model, source.config)
        pipe = Pipeline.from_apply(
            denoiser.model.apply, params, sampler, source=source, **fields
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / serialize.MANIFEST} does not describe a pipeline: {error!r}."
        ) from None
    _check_shapes(folder, abstract_params(denoiser), params)
    return pipe


def _check_shapes(folder: Path, expected: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """That the saved leaves are those of the model, by path and logical shape."""
    want = {path: tuple(leaf.shape) for path, leaf in serialize.flatten(expected)}
    have = {path: tuple(leaf.shape) for path, leaf in serialize.flatten(params)}
    problems = [f"missing {path}" for path in want.keys() - have.keys()]
    problems += [f"unexpected {path}" for path in have.keys() - want.keys()]
    problems += [
        f"{path} {list(have[path])} instead of {list(want[path])}"
        for path in want.keys() & have.keys()
        if want[path] != have[path]
    ]
    if problems:
        raise ValueError(
            f"The params in {folder} do not fit its config: {'; '.join(sorted(problems)[:20])}."
        )


def _params(
    checkpoint: Checkpoint,
    class_name: str,
    denoiser: Denoiser,
    dtype: Any,
    config: QuantConfig | None,
    on_tensor: Callable[[str, int, int], None] | None,
) -> dict[str, Any]:
    def finish(path: tuple[str, ...], array: np.ndarray) -> Any:
        if config is None:
            return jnp.asarray(array)
        return quantize_leaf("/".join(path), array, config)

    tensors: Mapping[str, Any] = checkpoint
    if class_name == "UNet2DModel":
        tensors = rename_old_attention_keys(checkpoint)
    return convert(tensors, denoiser.targets, dtype=dtype, finish=finish, on_tensor=on_tensor)


def _component(folder: Path, name: str, file: str) -> Path:
    """The component's own folder, or the pipeline's where old layouts keep all files."""
    inside = folder / name
    return inside if (inside / file).exists() or not (folder / file).exists() else folder


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; is {path.parent} a diffusers folder?")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return data
