"""What a calibration and a sampler need on TPUs that are not there, as lines and numbers."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from qjax import api
from qjax.calibrate.compile_ahead import AheadOfTime, Network, compile_ahead
from qjax.calibrate.pod import SHARDS, Weights
from qjax.calibrate.recipe import Recipe
from qjax.calibrate.serial_parallel_settings import SerialParallelSettings
from qjax.cli_output import Output, grid
from qjax.models.denoisers import build_denoiser
from qjax.models.published import PUBLISHED, published_shapes
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_inputs import abstract_inputs
from qjax.report_words import bytes_text

STEPS = 20
"""Of the sampler, unless the recipe has its own."""


def network_of(model: str) -> Network:
    """The float network of a model as shapes, in bfloat16 where it is a published one.

    Args:
      model: One of `models.published`, or what `qjax.load` takes; of that the weights are read.
    """
    told: Any
    if model in PUBLISHED and not Path(model).exists():
        config = PUBLISHED[model]()
        data = config.to_diffusers()
        module = build_denoiser(data["_class_name"], data).model.clone(dtype=jnp.bfloat16)
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), published_shapes(model)
        )
        if isinstance(config, UNet2DConditionConfig):
            size = config.sample_size or config.size_multiple
            side = size if isinstance(size, tuple) else (size, size)
            x_t, _, told = abstract_inputs(config, size=side)
            return Network(module.apply, params, x_t, told, 2)
        edge = config.sample_size
        x_t = jax.ShapeDtypeStruct((1, edge, edge, config.in_channels), jnp.float32)
        return Network(module.apply, params, x_t, jax.ShapeDtypeStruct((1,), jnp.int32), 2)
    pipe = api.load(model)
    shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    told = None
    if pipe.reads_prompts:
        told, _ = pipe.condition(1, prompts="a picture")
    elif pipe.num_labels is not None:
        told, _ = pipe.condition(1, labels=0)
    x_t = jax.ShapeDtypeStruct((1, *pipe.shape), jnp.float32)
    halves = 2 if pipe.reads_prompts or pipe.null_label is not None else 1
    return Network(
        pipe.apply, jax.tree.map(shape, pipe.params), x_t, jax.tree.map(shape, told), halves
    )


def compiled_for(
    model: str,
    recipe: Recipe,
    topology: str,
    output: Output,
    *,
    data: int | None = None,
    block: int | None = None,
    weights: Weights = "whole",
    images: int = 1,
) -> AheadOfTime:
    """Compile a recipe's programs for a topology; progress is shown.

    Raises:
      ValueError: If no stage of the recipe runs on several devices, or as `compile_ahead`.
    """
    stages = [stage for stage in recipe.stages if isinstance(stage, SerialParallelSettings)]
    if not stages:
        raise ValueError(
            f"--topology: {recipe.name} has no stage that is calibrated on several devices; "
            "those of the s2p and ptqd recipes are."
        )
    stage = stages[0]
    settings = dataclasses.replace(stage, steps=stage.steps or STEPS, shards=stage.shards or SHARDS)
    # float16, which the recipes store floats in, is no native type of a TPU.
    quant = dataclasses.replace(recipe.quant, float_dtype="bfloat16")
    with output.progress(f"compiling for {topology}") as tell:
        return compile_ahead(
            network_of(model),
            quant,
            settings,
            topology,
            data=data,
            block=block,
            weights=weights,
            images=images,
            on_program=lambda program, done, total: tell(
                done, total, f"{program.what} {program.block}"
            ),
        )


def table(found: AheadOfTime) -> Table:
    """Every program: what it holds on a device, and what it sends."""
    return grid(
        ("program", "block", "alike", "arguments", "temporary", "HBM", "collectives", "sent", "s"),
        [
            (
                program.what,
                program.block or "network",
                program.blocks,
                bytes_text(program.argument_bytes),
                bytes_text(program.temp_bytes),
                bytes_text(program.hbm_bytes),
                ", ".join(f"{n} {kind}" for kind, n in program.collectives.items()) or "none",
                bytes_text(program.collective_bytes),
                f"{program.seconds:.1f}",
            )
            for program in found.programs
        ],
        right="alike arguments temporary HBM sent s",
    )


def summary(found: AheadOfTime) -> list[str]:
    """What matters, in lines."""
    of_all = f"of {bytes_text(int(found.hbm))}"
    most = lambda what: f"{bytes_text(found.held(what))} {of_all}"
    data = max(found.held("collect"), found.rolled_out)
    verdict = "fits" if found.fits else "does NOT fit"
    if data > found.hbm and found.weights == "whole":
        verdict += "; mesh.weights=sharded leaves a part of the networks on every device"
    if data > found.hbm:
        verdict += "; a smaller --batch runs less at once, a smaller --memory-gib keeps less data"
    return [
        (
            f"{found.topology}: {found.data * found.block} devices, {found.data} along data and "
            f"{found.block} along blocks; {len(found.programs)} programs compiled in "
            f"{found.seconds:.0f} s"
        ),
        f"HBM of a device while samples are rolled out: {bytes_text(found.rolled_out)} {of_all}, by a sum",
        f"HBM of a device while the data of blocks is collected: {most('collect')}",
        f"HBM of a device while blocks are fitted: {most('fit')}",
        f"HBM of a device while the blocks of the low-bit network run: {most('sample')}",
        f"it {verdict}",
    ]


def as_dict(found: AheadOfTime) -> dict[str, Any]:
    """The same as plain numbers."""
    return {
        "topology": found.topology,
        "mesh": {"data": found.data, "block": found.block},
        "hbm_bytes": int(found.hbm),
        "fit_bytes": found.held("fit"),
        "roll_out_bytes": found.rolled_out,
        "collect_bytes": found.held("collect"),
        "sample_bytes": found.held("sample"),
        "fits": found.fits,
        "programs": [program._asdict() for program in found.programs],
    }
