"""Commands on models: plan, quantize, inspect."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import qjax
from qjax import api, recipes, topology_plan
from qjax.calibrate.recipe import Recipe, data_free_name
from qjax.cli_mesh import MESH_BLOCK, MESH_DATA, MESH_WEIGHTS
from qjax.cli_options import (
    Command,
    Option,
    apply_quant,
    one_of,
    place,
    real,
    switch,
    text,
    whole,
)
from qjax.cli_output import Output, grid
from qjax.core.config import QuantConfig
from qjax.core.manifest import MANIFEST, read_manifest
from qjax.core.places import is_remote
from qjax.core.plan import Plan
from qjax.core.qtensor import is_qtensor
from qjax.core.quantize import tree_bytes
from qjax.core.remote import RemoteFolder, may_replace
from qjax.core.serialize import flatten
from qjax.core.typing import Params
from qjax.models import hub
from qjax.models.model_card import CARD, NO_PLACE
from qjax.models.pipeline import Pipeline
from qjax.models.published import PUBLISHED
from qjax.report_data import LayerResult
from qjax.report_layers import how_quantized, layer_results
from qjax.report_words import bits_text, bytes_text

MODEL = (
    "MODEL",
    "a shipped model, a diffusers or saved folder, here or in gs://, or a hub id owner/name[@revision]",
)
PLANNED = (MODEL[0], f"{MODEL[1]}; or without weights {', '.join(PUBLISHED)}")

RECIPE = Option(
    name="recipe",
    read=one_of(tuple(recipes.RECIPES)),
    metavar="NAME",
    help=f"which bits: {', '.join(recipes.RECIPES)}",
)
SEED = Option(
    name="seed", read=whole(), metavar="N", default=0, help="number that all randomness comes from"
)
BATCH = Option(
    name="batch",
    read=whole(1),
    metavar="N",
    help="pictures that run at once while it is calibrated",
)
MEMORY = Option(
    name="memory-gib",
    read=real,
    metavar="G",
    help="most that the data of the blocks being fitted may take on a device",
)
OUT_FOLDER = Option(
    name="out",
    read=place,
    metavar="DIR",
    required=True,
    help="folder to write into, here or in a bucket, as gs://bucket/folder",
)
OVERWRITE = Option(
    name="overwrite", read=switch, default=False, help="replace an older save in that folder"
)


def load_model(model: str, output: Output, **options: Any) -> Pipeline:
    """`qjax.load` with a bar of the bytes read."""
    with output.progress(f"reading {model}") as tell:
        return qjax.load(model, on_tensor=lambda key, done, total: tell(done, total, ""), **options)


def chosen_recipe(settings: SimpleNamespace, params: Params) -> Recipe:
    """The recipe that is asked for, changed as `quant` says.

    Args:
      settings: With `recipe` and `quant`.
      params: What it is for, shapes suffice: the rules in `quant` have to match something,
        while a recipe's own serve several models.

    Raises:
      ValueError: If neither recipe nor `quant` is given, or they do not make a config.
    """
    changes = settings.quant
    if settings.recipe is None and not changes:
        raise ValueError(
            f"--recipe is needed, one of {', '.join(recipes.RECIPES)}; or `quant:` in the "
            "config file."
        )
    base = Recipe(name="custom", quant=QuantConfig())
    if settings.recipe is not None:
        base = recipes.by_name(settings.recipe)
    if not changes:
        return base
    quant = QuantConfig.from_dict(apply_quant(base.quant.to_dict(), changes))
    own = changes.get("rules") or []
    own_rules = quant.rules[: len(own) if isinstance(own, list) else 1]
    if own_rules and not changes.get("allow_unmatched"):
        strict = dataclasses.replace(quant, rules=own_rules, allow_unmatched=False)
        qjax.plan(params, strict)
    name = "custom" if settings.recipe is None else f"{settings.recipe}, changed"
    return dataclasses.replace(base, quant=quant, name=name)


def float_shapes(model: str) -> Params:
    """The shapes of a model that is not quantized yet.

    Raises:
      ValueError: If it is.
    """
    params = api.shapes(model)
    count = sum(is_qtensor(leaf) for _, leaf in flatten(params))
    if count:
        raise ValueError(
            f"{model} is quantized already ({count} layers: {how_quantized(params)}). Give the "
            "float model."
        )
    return params


def require_free(place: Path | str, *, overwrite: bool = False) -> None:
    """That a folder can be written without touching what somebody else put there.

    Raises:
      ValueError: If it is a file or not empty; with `overwrite`, a save of qjax may be there.
    """
    if is_remote(place):
        there = RemoteFolder(place).files()
        if there and not (overwrite and may_replace(there)):
            raise ValueError(
                f"{place} is not empty; choose another folder"
                + (
                    ", or replace the save that is there with --overwrite."
                    if MANIFEST in there
                    else "."
                )
            )
        return
    folder = Path(place)
    if folder.is_dir():
        if not any(folder.iterdir()) or (overwrite and (folder / MANIFEST).exists()):
            return
        way_out = "choose another folder"
        if (folder / MANIFEST).exists():
            way_out += ", or replace the save that is there with --overwrite"
        raise ValueError(f"the folder {folder} is not empty; {way_out}.")
    if folder.exists():
        raise ValueError(f"{folder} is a file; --out takes a folder.")


def said_of_memory(settings: SimpleNamespace) -> dict[str, Any]:
    """What the command line says of how much a calibration has in memory, by setting."""
    said = {"batch": settings.batch, "memory_gib": settings.memory_gib}
    return {name: value for name, value in said.items() if value is not None}


def plan(settings: SimpleNamespace, output: Output) -> dict[str, Any]:
    """A dry run: what quantizing would do to every leaf."""
    shapes = float_shapes(settings.model)
    recipe = chosen_recipe(settings, shapes)
    planned = qjax.plan(shapes, recipe)
    output.say(str(planned))
    result = {"model": settings.model, "recipe": recipe.name, **_plan_dict(planned)}
    if settings.topology is None:
        return result
    found = topology_plan.compiled_for(
        settings.model,
        recipe.with_settings(**said_of_memory(settings)),
        settings.topology,
        output,
        data=getattr(settings, "mesh.data"),
        block=getattr(settings, "mesh.block"),
        weights=getattr(settings, "mesh.weights") or "whole",
        images=settings.images,
    )
    output.say("", topology_plan.table(found), *topology_plan.summary(found))
    return result | {"topology": topology_plan.as_dict(found)}


def _plan_dict(planned: Plan) -> dict[str, Any]:
    return {
        "bytes_float16": planned.bytes_before,
        "bytes_quantized": planned.bytes_after,
        "mean_bits": planned.mean_bits,
        "leaves": [dataclasses.asdict(entry) for entry in planned.entries],
    }


def quantize(settings: SimpleNamespace, output: Output) -> dict[str, Any]:
    """Data-free quantization, tensor by tensor, saved."""
    require_free(settings.out, overwrite=settings.overwrite)
    shapes = float_shapes(settings.model)
    recipe = chosen_recipe(settings, shapes)
    planned = qjax.plan(shapes, recipe)
    waiting = [e.path for e in planned.entries if e.act is not None and e.act.mode != "dynamic"]
    if waiting:
        raise ValueError(
            f"{recipe.name} gives {len(waiting)} layers ranges that are fitted for the sampler's "
            "steps, which takes data: use `qjax calibrate` with --steps, or a recipe with dynamic "
            f"ranges, {', '.join(recipes.DATA_FREE)}."
        )
    if recipe.stages:
        names = ", ".join(type(stage).__name__ for stage in recipe.stages)
        output.remark(f"{names} left out: quantize uses no data. `qjax calibrate` runs them.")
    if (api.locate(settings.model)[0] / MANIFEST).exists():
        pipe = qjax.quantize(load_model(settings.model, output), recipe.quant)
    else:
        pipe = load_model(settings.model, output, quantize=recipe.quant)
    pipe = pipe.replace(recipe=data_free_name(recipe))
    pipe.save(settings.out)
    return saved_words(settings.model, recipe, pipe, settings.out, output, planned)


def saved_words(
    model: str, recipe: Recipe, pipe: Pipeline, folder: Path | str, output: Output, planned: Plan
) -> dict[str, Any]:
    """Say what was saved."""
    before, after, disk = planned.bytes_before, tree_bytes(pipe.params), api.folder_bytes(folder)
    quantized = sum(entry.weight is not None for entry in planned.entries)
    output.say(
        f"{model}, {recipe.name}: {how_quantized(pipe.params)}",
        f"{quantized} of {len(planned.entries)} leaves quantized; "
        f"`qjax inspect {folder}` lists them, with reasons for the rest",
        f"weights: {bytes_text(after)} instead of {bytes_text(before)} in float16 "
        f"({after / before:.2f}x)",
        f"saved to {folder}: {bytes_text(disk)} on disk",
    )
    return {
        "model": model,
        "recipe": recipe.name,
        "out": folder,
        "bytes_float16": before,
        "bytes_quantized": after,
        "bytes_on_disk": disk,
        "leaves": len(planned.entries),
        "leaves_quantized": quantized,
    }


def push(settings: SimpleNamespace, output: Output) -> dict[str, Any]:
    """A model on the hub, as `Pipeline.save` writes it."""
    hub.check_id(settings.repo)
    folder, _ = api.locate(settings.model)
    pipe = load_model(settings.model, output)
    # What somebody has written into the card of a save goes along.
    card = None
    if (folder / MANIFEST).exists() and (folder / CARD).is_file():
        card = (folder / CARD).read_text(encoding="utf-8").replace(NO_PLACE, settings.repo)
    output.remark(f"uploading to {settings.repo}")
    address = hub.push(
        pipe,
        settings.repo,
        private=True if settings.private else None,
        revision=settings.revision,
        commit_message=settings.message,
        card=card,
    )
    output.say(f"{settings.model} is on the hub: {address}")
    return {"model": settings.model, "repository": settings.repo, "address": address}


def inspect(settings: SimpleNamespace, output: Output) -> dict[str, Any]:
    """What a model is and how each of its leaves is stored."""
    folder, name = api.locate(settings.model)
    pipe = load_model(settings.model, output)
    layers = layer_results(pipe.params, pipe.quant)
    files = {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix in (".safetensors", ".json")
    }
    assert pipe.source is not None  # what is loaded from a folder has one
    result: dict[str, Any] = {
        "model": settings.model,
        "folder": folder,
        "name": name or pipe.source.name,
        "network": pipe.source.model,
        "config": dict(pipe.source.config),
        "sampler": pipe.sampler.to_diffusers(),
        "sample_shape": pipe.shape,
        "image_shape": pipe.image_shape,
        "labels": pipe.num_labels,
        "null_label": pipe.null_label,
        "parameters": sum(math.prod(layer.shape) for layer in layers),
        "how": how_quantized(pipe.params),
        "bytes_float16": sum(layer.bytes_float for layer in layers),
        "bytes_stored": sum(layer.bytes_quantized for layer in layers),
        "files": files,
        "manifest": _manifest(folder),
        "quant": None if pipe.quant is None else pipe.quant.to_dict(),
        "layers": [dataclasses.asdict(layer) for layer in layers],
    }
    _show(result, layers, output)
    return result


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What a saved folder says of itself; None for another."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    source = manifest["record"].get("source", {})
    return {
        "schema_version": manifest["schema_version"],
        "qjax_version": manifest["qjax_version"],
        "tensors": len(manifest["tensors"]),
        "made_from": source.get("name"),
        "made_from_sha256": source.get("sha256"),
    }


def _show(result: Mapping[str, Any], layers: tuple[LayerResult, ...], output: Output) -> None:
    height, width, channels = result["sample_shape"]
    latent = result["image_shape"] != result["sample_shape"]
    labels = "none" if result["labels"] is None else f"{result['labels']}"
    if result["null_label"] is not None:
        labels += f", and {result['null_label']} for no class"
    sizes = (
        f"{bytes_text(result['bytes_stored'])}, {bytes_text(result['bytes_float16'])} in "
        f"float16; files {bytes_text(sum(result['files'].values()))}"
    )
    facts = [
        ("model", f"{result['name']} ({result['network']})"),
        ("folder", result["folder"]),
        ("weights", result["how"]),
        ("parameters", f"{result['parameters']:,}"),
        ("bytes", sizes),
        ("sample", f"{height} x {width}, {channels} channel{'s' * (channels > 1)}"),
        *([("image", " x ".join(map(str, result["image_shape"])))] if latent else []),
        ("classes", labels),
        ("sampler", _settings(result["sampler"])),
        ("config", _settings(result["config"])),
    ]
    if result["manifest"] is not None:
        facts.append(("manifest", _settings(result["manifest"])))
    output.say(grid(("", ""), facts))
    rows = [
        (
            layer.path,
            "x".join(map(str, layer.shape)),
            bits_text(layer),
            layer.group_size or "",
            f"{layer.bytes_quantized:,}",
            layer.reason if result["quant"] else "",
        )
        for layer in layers
    ]
    output.say(grid(("leaf", "shape", "bits", "group", "bytes", "note"), rows, right="group bytes"))


def _settings(values: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in values.items() if not key.startswith("_")}
    return ", ".join(f"{key}={value}" for key, value in shown.items() if value is not None)


COMMANDS = (
    Command(
        name="plan",
        help="show what quantizing would do to every layer, without doing it",
        run=plan,
        arguments=(PLANNED,),
        options=(
            RECIPE,
            Option(
                name="topology",
                read=text,
                metavar="SLICE",
                help="compile calibration and sampling for a TPU slice, as v5e:16x16, without it",
            ),
            MESH_DATA,
            MESH_BLOCK,
            MESH_WEIGHTS,
            BATCH,
            MEMORY,
            Option(
                name="images",
                read=whole(1),
                metavar="N",
                default=1,
                help="images that a device of the slice samples at once",
            ),
        ),
        takes_quant=True,
        example="qjax plan fashion-dit --recipe w4a8",
    ),
    Command(
        name="quantize",
        help="quantize a model without data and save it",
        run=quantize,
        arguments=(MODEL,),
        options=(RECIPE, OUT_FOLDER, OVERWRITE),
        takes_quant=True,
        example="qjax quantize fashion-dit --recipe w4a8 --out fashion-dit-w4a8",
    ),
    Command(
        name="push",
        help="upload a model to the Hugging Face hub, with the token of `hf auth login`",
        run=push,
        arguments=(MODEL, ("REPO", "owner/name on the hub; created if it is not there")),
        options=(
            Option(
                name="private",
                read=switch,
                default=False,
                help="create it as a private repository",
            ),
            Option(name="revision", read=text, metavar="BRANCH", help="branch to upload to"),
            Option(name="message", read=text, metavar="TEXT", help="message of the commit"),
        ),
        example="qjax push fashion-dit-w4a8 owner/fashion-dit-w4a8 --private",
    ),
    Command(
        name="inspect",
        help="show what a model is: config, size, how every layer is stored",
        run=inspect,
        arguments=(MODEL,),
        example="qjax inspect fashion-dit",
    ),
)
