"""convert: checkpoints as they are published -> a folder in the layout of diffusers.

Three kinds are read: a folder that diffusers wrote (old attention names, shards and fp16
variants included), and a DiT or a latent diffusion model in the layout of its authors, one file
of a state dict, safetensors or a pickle (`qjax.models.pickles`). What is written is read back
and must hold the same values, bit for bit.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qjax.api import locate
from qjax.core.manifest import MANIFEST
from qjax.core.places import local_path
from qjax.core.safetensors_io import atomic_write, open_tensors
from qjax.core.serialize import flatten, params_digest
from qjax.models import original_checkpoints, pickles
from qjax.models.conditioners import TextConditioner
from qjax.models.convert import convert, save_component
from qjax.models.denoisers import build_denoiser
from qjax.models.dit import DiTConfig
from qjax.models.dit_keys import ORIGINAL_CONSTANTS, is_original, original_config, original_keys
from qjax.models.loading import INDEX, load_pipeline
from qjax.models.loading_sides import write_sides
from qjax.models.pipeline import Pipeline, Source
from qjax.models.samplers import DDIM
from qjax.models.schedules import Schedule

# What the loader reads for labels and the null class, which diffusers has no place for.
ZOO_FILE = "zoo.json"
COMPONENTS = {"DiTTransformer2DModel": "transformer"}  # the others are a "unet"

# Heads of the authors' models by their width; no tensor shows them.
DIT_HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}
# The schedule that the authors' models were trained with.
DIT_SAMPLER = DDIM(schedule=Schedule.linear(1000, 1e-4, 0.02), clip_sample=False)

FREQUENCIES = (
    "diffusers' DiT spaces the frequencies of the timestep i / (n - 1), the authors' i / n; the "
    "result follows diffusers, as the checkpoints published in its layout do, so its pictures "
    "differ slightly from those of the authors' code."
)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Account:
    """What became of a checkpoint.

    Attributes:
      network: Class of the denoiser.
      layout: What was read, in words.
      tensors: Tensors that were read.
      left_out: Tensors that were not, because they are recomputed.
      parameters: Values in the result.
      dtypes: Float types that are stored, each with the number of leaves.
      sha256: Hash of the params, of what was read and what was written.
      notes: What a reader should know, a sentence each.
    """

    network: str
    layout: str
    tensors: int
    left_out: tuple[str, ...]
    parameters: int
    dtypes: Mapping[str, int]
    sha256: str
    notes: tuple[str, ...]


def convert_checkpoint(
    source: str | Path,
    out: Path,
    *,
    dtype: Any = None,
    num_heads: int | None = None,
    on_tensor: Progress | None = None,
) -> Account:
    """Write the checkpoint `source` into the folder `out`, in the layout of diffusers.

    Args:
      source: A diffusers folder, a hub id of one, or a file of an authors' DiT or latent
        diffusion model: safetensors, or a pickle that holds nothing but tensors.
      out: A new folder.
      dtype: Float dtype to store; None keeps each tensor's own.
      num_heads: Attention heads of an authors' DiT whose width does not tell them.
      on_tensor: Progress: called with a key, the bytes read and all bytes.

    Raises:
      FileNotFoundError: If there is nothing of that name.
      ValueError: If `source` is of another kind, or does not hold the whole model; if what was
        written does not read back as it should.
    """
    path, out = local_path(source), local_path(out)
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    if path.suffix.lower() in pickles.SUFFIXES:
        with tempfile.TemporaryDirectory(prefix="qjax-") as scratch:
            read = Path(scratch, f"{path.stem}.safetensors")
            notes = pickles.to_safetensors(path, read)
            pipe, layout, left_out, more = _read_file(read, dtype, num_heads, on_tensor)
        notes += more
    elif path.is_file():
        pipe, layout, left_out, notes = _read_file(path, dtype, num_heads, on_tensor)
    else:
        folder, name = locate(source)
        if (folder / MANIFEST).exists():
            raise ValueError(
                f"{source} was saved by qjax; convert reads checkpoints of others. It can be "
                "loaded as it is."
            )
        pipe = load_pipeline(folder, dtype=dtype, name=name, on_tensor=on_tensor)
        path = folder
        layout = "a folder in the layout of diffusers"
    write_folder(pipe, out)
    if (path / ZOO_FILE).exists():
        with atomic_write(out / ZOO_FILE) as file:
            file.write((path / ZOO_FILE).read_bytes())
    return _account(pipe, out, layout, left_out, notes)


def _read_file(
    path: Path, dtype: Any, num_heads: int | None, on_tensor: Progress | None
) -> tuple[Pipeline, str, tuple[str, ...], tuple[str, ...]]:
    """Pipeline, layout in words, keys left out and notes of an authors' file."""
    tensors = open_tensors(path)
    if original_checkpoints.is_latent_diffusion(tensors):
        pipe, kind, left = original_checkpoints.read(
            tensors, name=path.stem, dtype=dtype, on_tensor=on_tensor
        )
        return pipe, f"one file in the layout of latent diffusion's authors: {kind}", left, ()
    pipe, left = _read_dit(path, dtype, num_heads, on_tensor)
    return pipe, "one file in the layout of DiT's authors", left, (FREQUENCIES,)


def _read_dit(
    path: Path, dtype: Any, num_heads: int | None, on_tensor: Progress | None
) -> tuple[Pipeline, tuple[str, ...]]:
    """A pipeline of diffusers' DiT with the weights of an authors' file."""
    tensors = open_tensors(path)
    if not is_original(tensors):
        raise ValueError(
            f"{path} is in the layout neither of DiT's authors (it has no x_embedder.proj.weight) "
            "nor of latent diffusion's (no model.diffusion_model). A model in diffusers' layout "
            f"is converted as a folder with {INDEX}."
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    width = shapes["x_embedder.proj.weight"][0]
    heads = num_heads or DIT_HEADS.get(width)
    if heads is None:
        raise ValueError(f"num_heads is needed for a DiT of width {width}, which no shape shows.")
    original = original_config(shapes, num_heads=heads)
    params = convert(
        tensors,
        original_keys(original),
        dtype=dtype,
        on_tensor=on_tensor,
        allow_unexpected=ORIGINAL_CONSTANTS,
    )
    fields = {name: getattr(original, name) for name in original.__dataclass_fields__}
    config = DiTConfig(**(fields | {"freq_shift": 1})).to_diffusers()
    denoiser = build_denoiser("DiTTransformer2DModel", config)
    pipe = Pipeline.from_apply(
        denoiser.model.apply,
        params,
        DIT_SAMPLER,
        source=Source(model="DiTTransformer2DModel", config=config, name=path.stem),
        **denoiser.fields,
    )
    return pipe, tuple(key for key in tensors if key in ORIGINAL_CONSTANTS)


def write_folder(pipe: Pipeline, out: Path) -> None:
    """Write a float pipeline as diffusers would: index, denoiser, scheduler.

    The index comes last, so that a folder that was left half-written is none.

    Raises:
      ValueError: If the pipeline does not say which network it runs, or a LoRA stands beside
        its weights.
      TypeError: If it is quantized.
    """
    if pipe.source is None:
        raise ValueError("A pipeline can be written if its source says which network it runs.")
    if pipe.loras:
        names = ", ".join(lora.name for lora in pipe.loras)
        raise ValueError(
            f"A folder in the layout of diffusers has no place for a LoRA beside the weights; got "
            f"{names}. Fuse it: pipe.without_lora().with_lora(path, fuse=True)."
        )
    class_name = pipe.source.model
    component = COMPONENTS.get(class_name, "unet")
    denoiser = build_denoiser(class_name, pipe.source.config)
    save_component(out / component, pipe.source.config, pipe.params, denoiser.targets)
    scheduler = pipe.sampler.to_diffusers()
    _write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {
        "_class_name": pipeline_class(pipe),
        component: ["diffusers", class_name],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    if pipe.reads_prompts:
        index["requires_safety_checker"] = False  # there is none
    _write_json(out / INDEX, index | write_sides(pipe, out))


def pipeline_class(pipe: Pipeline) -> str:
    """The class of diffusers that runs a pipeline of these parts.

    `"Pipeline"`, which diffusers does not have, where none does: class-conditional latent
    diffusion, for example.
    """
    network = None if pipe.source is None else pipe.source.model
    if network == "DiTTransformer2DModel":
        return "DiTPipeline"
    if network == "UNet2DModel" and pipe.conditioner is None:
        if pipe.decoder is not None:
            return "LDMPipeline"
        # diffusers' third one takes every scheduler.
        scheduler = pipe.sampler.to_diffusers()["_class_name"]
        own = {"DDIMScheduler": "DDIMPipeline", "PNDMScheduler": "PNDMPipeline"}
        return own.get(scheduler, "DDPMPipeline")
    if isinstance(pipe.conditioner, TextConditioner) and pipe.decoder is not None:
        if len(pipe.conditioner.towers) > 1:
            return "StableDiffusionXLPipeline"
        guided = pipe.guidance_width is None
        return "StableDiffusionPipeline" if guided else "LatentConsistencyModelPipeline"
    return "Pipeline"


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps(data, indent=2, sort_keys=True) + "\n").encode())


def _account(
    pipe: Pipeline, out: Path, layout: str, left_out: tuple[str, ...], notes: tuple[str, ...]
) -> Account:
    """What was written, once it has been read back."""
    digest = params_digest(pipe.params)
    if (back := params_digest(load_pipeline(out, dtype=None).params)) != digest:
        raise ValueError(
            f"{out} does not read back as it was written: {back} instead of {digest}. See that "
            "the disk is not full, and convert again."
        )
    assert pipe.source is not None
    denoiser = build_denoiser(pipe.source.model, pipe.source.config)
    leaves = [leaf for _, leaf in flatten(pipe.params)]
    dtypes: dict[str, int] = {}
    for leaf in leaves:
        dtypes[np.dtype(leaf.dtype).name] = dtypes.get(np.dtype(leaf.dtype).name, 0) + 1
    return Account(
        network=pipe.source.model,
        layout=layout,
        tensors=len(denoiser.targets),
        left_out=left_out,
        parameters=sum(leaf.size for leaf in leaves),
        dtypes=dtypes,
        sha256=digest,
        notes=notes,
    )
