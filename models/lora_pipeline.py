"""LoRA on a whole pipeline: the denoiser and the text towers, from one file.

`Pipeline.with_lora`, `with_lora_scale` and `without_lora` are what this file does. The key tables
of the networks come from their configs, and with them the names that the authors of Stable
Diffusion gave to the layers, in which some LoRAs are written.

Side branches are leaves of the networks' params and are saved with them. What each LoRA's share of
them is, its rank layer by layer, is in `Pipeline.loras`, so that the weights of one of several
can be changed at any time.
"""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qjax.core.typing import Params
from qjax.models.components import Kind, build_component
from qjax.models.conditioners import TextConditioner, tower_name
from qjax.models.convert import Target
from qjax.models.denoisers import Denoiser, build_denoiser
from qjax.models.lora import AttachedLoRA, LoRA, attach, detach, fuse, load_lora, one_each, rescale
from qjax.models.original_keys import unet_layers
from qjax.models.pipeline import Pipeline
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_config import UNet2DConfig

__all__ = ["add_lora", "fuse_lora", "lora_tables", "remove_loras", "scale_loras"]

# Blocks that the authors' UNet has too; the others' layers have no name there.
_BLOCKS = {f"{kind}{side}Block2D" for kind in ("", "Attn", "CrossAttn") for side in ("Down", "Up")}
_NOT_THE_AUTHORS = ("class_embedding", "time_embedding.cond_proj")


def add_lora(pipe: Pipeline, path: str | os.PathLike[str], *, scale: float = 1.0) -> Pipeline:
    """The pipeline with a LoRA beside its weights, float or quantized, and beside those there are.

    Args:
      pipe: The pipeline.
      path: A safetensors file of PEFT, diffusers or kohya, or a folder that holds one.
      scale: Weight of the LoRA; `scale_loras` changes it.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it does not fit the networks, every key that does not is named; if the
        pipeline does not say which networks it runs; or if inputs of its layers are scaled.
    """
    if pipe.smoothed:
        raise ValueError(
            "inputs of this pipeline's layers are scaled (Smoothing), so that a LoRA beside them "
            "would see other values than it was made for. Fuse it into the float model "
            "(fuse=True), and calibrate that."
        )
    loras = _read(pipe, path)
    params = _params(pipe)
    changed = {name: attach(params[name], lora, scale=scale) for name, lora in loras.items()}
    ranks = {
        name: {"/".join(layer): factors.rank for layer, factors in lora.layers.items()}
        for name, lora in loras.items()
    }
    attached = AttachedLoRA(name=Path(path).name, scale=float(scale), ranks=ranks)
    return _with_params(pipe, changed).replace(loras=(*pipe.loras, attached))


def fuse_lora(pipe: Pipeline, path: str | os.PathLike[str], *, scale: float = 1.0) -> Pipeline:
    """The pipeline with `scale` times a LoRA added to its float kernels.

    Raises:
      FileNotFoundError: As `add_lora`.
      ValueError: As `add_lora`; and if kernels are quantized, all of them named.
    """
    loras, params = _read(pipe, path), _params(pipe)
    changed = {name: fuse(params[name], lora, scale=scale) for name, lora in loras.items()}
    assert pipe.source is not None  # or it would not have been read
    # The hash was that of other params.
    source = dataclasses.replace(pipe.source, sha256=None)
    return _with_params(pipe, changed).replace(source=source)


def scale_loras(pipe: Pipeline, scale: float | Sequence[float]) -> Pipeline:
    """The pipeline with other weights for its LoRAs; programs that are compiled go on running.

    Args:
      pipe: A pipeline of `add_lora`.
      scale: Of every LoRA in the order they came, or one for all.

    Raises:
      ValueError: If there is no LoRA, or another number of them.
    """
    if not pipe.loras:
        raise ValueError("the pipeline must have LoRAs; got none. Add one: pipe.with_lora(path).")
    scales = one_each(scale, len(pipe.loras))
    changed = {}
    for name, params in _params(pipe).items():
        ranks = [lora.ranks.get(name, {}) for lora in pipe.loras]
        if any(ranks):
            changed[name] = rescale(params, ranks, scales)
    loras = tuple(
        dataclasses.replace(lora, scale=s) for lora, s in zip(pipe.loras, scales, strict=True)
    )
    return _with_params(pipe, changed).replace(loras=loras)


def remove_loras(pipe: Pipeline) -> Pipeline:
    """The pipeline without its LoRAs; what was fused stays, and so do branches of calibration."""
    changed = {
        name: detach(params, [lora.ranks.get(name, {}) for lora in pipe.loras])
        for name, params in _params(pipe).items()
    }
    return _with_params(pipe, changed).replace(loras=())


def lora_tables(pipe: Pipeline) -> dict[str, Mapping[str, Target]]:
    """The key tables of the networks that a LoRA may change, by component.

    Raises:
      ValueError: If the pipeline does not say which network it runs.
    """
    return {name: network.targets for name, network in _networks(pipe).items()}


def authors_names(config: Any, table: Mapping[str, Target]) -> dict[str, str]:
    """diffusers' names of a UNet's layers by the authors' (LDM, Stable Diffusion 1, 2 and XL).

    Layers that have none are left out: those of other networks, those of blocks that the
    authors' UNet does not know, and projections that are one tensor there.

    Args:
      config: The network's config.
      table: Its key table.
    """
    if not isinstance(config, UNet2DConfig | UNet2DConditionConfig):
        return {}
    depths = (
        {config.layers_per_block}
        if isinstance(config.layers_per_block, int)
        else {*config.layers_per_block}
    )
    if len(depths) > 1 or not {*config.down_block_types, *config.up_block_types} <= _BLOCKS:
        return {}
    layers = {key.rpartition(".")[0] for key in table}
    known = sorted(layer for layer in layers if not layer.startswith(_NOT_THE_AUTHORS))
    named = unet_layers(known, layers_per_block=depths.pop())
    return {original.name: layer for layer, original in named.items() if original.part is None}


def _networks(pipe: Pipeline) -> dict[str, Denoiser | Kind]:
    """The networks that a LoRA may change, by component."""
    if pipe.source is None:
        raise ValueError(
            "a LoRA needs a pipeline whose source says which network it runs; this one came from "
            "from_apply without one. Use load_lora and attach of qjax.models.lora on its params."
        )
    networks: dict[str, Denoiser | Kind] = {
        _denoiser_name(pipe): build_denoiser(pipe.source.model, pipe.source.config)
    }
    if isinstance(pipe.conditioner, TextConditioner):
        for i, tower in enumerate(pipe.conditioner.towers):
            component = tower.component
            networks[tower_name(i)] = build_component(component.class_name, component.config)
    return networks


def _read(pipe: Pipeline, path: str | os.PathLike[str]) -> dict[str, LoRA]:
    """The LoRA in a file by component; says so where a step table was made without it."""
    networks = _networks(pipe)
    denoiser = _denoiser_name(pipe)
    model: Any = networks[denoiser].model
    names = authors_names(model.config, networks[denoiser].targets)
    tables = {name: network.targets for name, network in networks.items()}
    loras = load_lora(path, tables, renames={denoiser: names})
    if pipe.step_table is not None and pipe.step_table.entries:
        warnings.warn(
            f"the step table ({', '.join(sorted(pipe.step_table.entries))}) was fitted without "
            f"{Path(path).name}; it is used as it is. Calibrate the pipeline with the LoRA in "
            "place for one of its own.",
            stacklevel=4,
        )
    return loras


def _denoiser_name(pipe: Pipeline) -> str:
    """What diffusers calls the denoiser among the components."""
    assert pipe.source is not None
    return "transformer" if "Transformer" in pipe.source.model else "unet"


def _params(pipe: Pipeline) -> dict[str, Params]:
    """The params of the networks that a LoRA may change, by component."""
    found = {"unet" if pipe.source is None else _denoiser_name(pipe): pipe.params}
    if isinstance(pipe.conditioner, TextConditioner):
        towers = enumerate(pipe.conditioner.towers)
        found |= {tower_name(i): tower.component.params for i, tower in towers}
    return found


def _with_params(pipe: Pipeline, changed: Mapping[str, Params]) -> Pipeline:
    """The pipeline with other params for some of the components of `_params`."""
    denoiser, *names = _params(pipe)
    fields: dict[str, Any] = {"params": changed.get(denoiser, pipe.params)}
    if isinstance(pipe.conditioner, TextConditioner):
        towers = tuple(
            dataclasses.replace(
                tower,
                component=dataclasses.replace(
                    tower.component, params=changed.get(name, tower.component.params)
                ),
            )
            for name, tower in zip(names, pipe.conditioner.towers, strict=True)
        )
        fields["conditioner"] = dataclasses.replace(pipe.conditioner, towers=towers)
    return pipe.replace(**fields)
