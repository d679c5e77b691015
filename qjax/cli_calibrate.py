"""The command that calibrates: a recipe with all its stages, resumable, its progress shown."""

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import qjax
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.pod import SHARDS, Pod, Weights
from qjax.calibrate.recipe import RUN, Recipe, opened, run
from qjax.calibrate.spread import on_host
from qjax.cli_mesh import MESH_BLOCK, MESH_DATA, MESH_WEIGHTS, PROCESSES, joined
from qjax.cli_models import (
    BATCH,
    MEMORY,
    MODEL,
    OUT_FOLDER,
    RECIPE,
    SEED,
    chosen_recipe,
    float_shapes,
    load_model,
    require_free,
    said_of_memory,
    saved_words,
)
from qjax.cli_options import Command, Option, path, real, text, whole
from qjax.cli_output import Output
from qjax.cli_pictures import GUIDANCE, LABELS, label_numbers, prompt_lines
from qjax.core.mirror import Mirror
from qjax.core.places import is_remote
from qjax.loss_plot import save_losses
from qjax.models.pipeline import Pipeline
from qjax.noise_plot import save_noise
from qjax.report_words import stage_progress
from qjax.search_plot import save_fronts


def calibrate(settings: SimpleNamespace, output: Output) -> dict[str, Any]:
    """Quantization and all stages of the recipe; resumes where an earlier run stopped."""
    if not is_remote(settings.out) and not (settings.out / RUN).exists():
        # What a run leaves that was killed while it wrote its first file.
        for unfinished in settings.out.glob(f".{RUN}.*.tmp"):
            unfinished.unlink()
        require_free(settings.out)
    pod = chosen_pod(settings)
    if pod is not None and not pod.writes:
        output.silence()  # the first process speaks for all
    if not is_remote(settings.out):
        return _calibrate(settings, output, pod, None)
    with opened(settings.out, pod) as mirror:
        return _calibrate(settings, output, pod, mirror)


def _calibrate(
    settings: SimpleNamespace, output: Output, pod: Pod | None, mirror: Mirror | None
) -> dict[str, Any]:
    """`calibrate`, in a folder or in what stands for one in a bucket."""
    out = settings.out if mirror is None else mirror.local
    shapes = float_shapes(settings.model)
    recipe = chosen_recipe(settings, shapes)
    prompts = prompt_lines(settings.prompts)
    planned = qjax.plan(shapes, recipe)
    teacher = load_model(settings.model, output)
    recipe = with_options(recipe, settings, teacher, prompts)
    if pod is not None:
        recipe = on_pod(recipe, settings, pod, output)
        teacher = teacher.replace(params=on_host(teacher.params))
    stages = max(len(recipe.stages), 1)
    with output.progress("calibrating") as tell:
        on_stage, on_event = stage_progress(lambda done, words: tell(done, stages, words))
        pipe = run(
            teacher,
            recipe,
            out=mirror or out,
            seed=settings.seed,
            on_stage=on_stage,
            on_event=on_event,
            pod=pod,
        )
    if not recipe.stages:
        output.remark(f"{recipe.name} has no stages that need data; this is what quantize does.")
    shown = lambda path: path if mirror is None or path is None else mirror.url_of(path)
    result = saved_words(settings.model, recipe, pipe, shown(out / "final"), output, planned)
    if pod is not None and not pod.writes:
        return result
    plot = shown(save_losses(out))
    if plot is not None:
        output.say(f"losses: {plot}")
    fronts = [shown(front) for front in save_fronts(out)]
    output.say(*(f"front of the search: {front}" for front in fronts))
    noise = [shown(one) for one in save_noise(out)]
    output.say(*(f"quantization noise: {one}" for one in noise))
    if mirror is not None:
        mirror.push()
    named = [type(stage).__name__ for stage in recipe.stages]
    return result | {"stages": named, "losses": plot, "fronts": fronts, "noise": noise}


def chosen_pod(settings: SimpleNamespace) -> Pod | None:
    """The pod that the command line asks for; None if it asks for none.

    Raises:
      ValueError: If the mesh does not suit the devices.
    """
    if not joined(settings):
        return None
    data, block = (getattr(settings, option.field) for option in (MESH_DATA, MESH_BLOCK))
    weights: Weights = getattr(settings, MESH_WEIGHTS.field) or "whole"
    return Pod.of(data=data, block=block or 1, weights=weights)


def on_pod(recipe: Recipe, settings: SimpleNamespace, pod: Pod, output: Output) -> Recipe:
    """The recipe with its data in shards, and as many blocks at once as the pod has places for.

    Raises:
      ValueError: If no stage of it can run on several devices, or the shards do not suit.
    """
    if not any(hasattr(stage, "shards") for stage in recipe.stages):
        raise ValueError(
            f"mesh: {recipe.name} has no stage that runs on several devices; those of the "
            "s2p and ptqd recipes do."
        )
    shards = SHARDS if settings.shards is None else settings.shards
    at_once = pod.block if settings.at_once is None else settings.at_once
    pod.check(shards)
    output.say(
        f"{pod.block} x {pod.data} devices along block and data, {pod.processes} processes; "
        f"{shards} logical shards, up to {at_once} alike blocks at once"
    )
    return recipe.with_settings(shards=shards, at_once=at_once)


def with_options(
    recipe: Recipe, settings: SimpleNamespace, pipe: Pipeline, prompts: list[str] | None
) -> Recipe:
    """The recipe with what the command line says of the sampler and the data.

    Raises:
      ValueError: If it says something that no stage of the recipe has.
    """
    changes: dict[str, Any] = {
        name: value
        for name, value in (
            ("steps", settings.steps),
            ("guidance_scale", settings.guidance),
            ("eta", settings.eta),
        )
        if value is not None
    }
    data: dict[str, Any] = {
        name: value
        for name, value in (
            ("items", settings.items),
            ("labels", label_numbers(settings.labels, pipe)),
            ("prompts", prompts),
            ("negative_prompts", settings.negative),
        )
        if value is not None
    }
    recipe = recipe.with_settings(**changes, **said_of_memory(settings))
    if data:
        recipe = _with_data(recipe, data)
    if settings.iterations is None:
        return recipe
    fitting: list[Any] = [stage for stage in recipe.stages if hasattr(stage, "fit")]
    if not fitting:
        raise ValueError(f"--iterations: {recipe.name} has no stage that fits anything.")
    fit = dataclasses.replace(fitting[0].fit, iterations=settings.iterations)
    return recipe.with_settings(fit=fit)


def _with_data(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other data, of every stage what is not changed staying its own.

    Raises:
      ValueError: If no stage has data.
    """
    old: tuple[Any, ...] = recipe.stages
    if not any(hasattr(stage, "data") for stage in old):
        return recipe.with_settings(data=CalibrationSet(**changes))  # says which stages there are
    stages = tuple(
        dataclasses.replace(stage, data=dataclasses.replace(stage.data, **changes))
        if hasattr(stage, "data")
        else stage
        for stage in old
    )
    return dataclasses.replace(recipe, stages=stages)


STEPS = Option(
    name="steps", read=whole(1), metavar="N", help="steps of the sampler that it is meant for"
)
ETA = Option(name="eta", read=real, metavar="E", help="share of fresh noise a step, 0 to 1")

COMMANDS = (
    Command(
        name="calibrate",
        help="quantize a model with data, stage by stage; the same DIR again resumes",
        run=calibrate,
        arguments=(MODEL,),
        options=(
            RECIPE,
            OUT_FOLDER,
            STEPS,
            GUIDANCE,
            ETA,
            LABELS,
            Option(
                name="prompts",
                read=path,
                metavar="FILE",
                help="texts to calibrate on, one a line, for models that read prompts",
            ),
            Option(
                name="negative",
                read=text,
                metavar="TEXT",
                help="the negative prompt of the later use",
            ),
            Option(name="items", read=whole(1), metavar="N", help="pictures to calibrate on"),
            BATCH,
            MEMORY,
            Option(
                name="iterations", read=whole(1), metavar="N", help="optimizer steps of every fit"
            ),
            SEED,
            MESH_DATA,
            MESH_BLOCK,
            MESH_WEIGHTS,
            *PROCESSES,
            Option(
                name="shards",
                read=whole(1),
                metavar="N",
                help=f"logical shards of the data on a mesh (default: {SHARDS})",
            ),
            Option(
                name="at-once",
                read=whole(1),
                metavar="N",
                help="most alike blocks fitted at once on a mesh (default: mesh.block)",
            ),
        ),
        takes_quant=True,
        example="qjax calibrate fashion-ldm --recipe s2p_w4a8 --steps 10 --guidance 2 --out run",
    ),
)
