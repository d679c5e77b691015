"""Commands that draw: generate and compare."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from PIL import Image, PngImagePlugin

import qjax
from qjax import report
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.noise_correction import ENTRY
from qjax.calibrate.noise_refit import refit, settings_of
from qjax.calibrate.prompt_files import read_prompts
from qjax.calibrate.recipe import recipe_of_run
from qjax.cli_mesh import SPREAD, chosen_mesh
from qjax.cli_models import MODEL, SEED, load_model
from qjax.cli_options import (
    Command,
    Option,
    files_with_scales,
    path,
    real,
    switch,
    text,
    texts,
    whole,
)
from qjax.cli_output import Output
from qjax.core.safetensors_io import atomic_write
from qjax.core.typing import Float
from qjax.models.mesh import batch_of, writes
from qjax.models.pipeline import Pipeline
from qjax.models.retargeting import retargeted
from qjax.report_data import as_dict
from qjax.report_words import seconds_text
from qjax.timing import stopwatch
from qjax.zoo.data import CLASSES

# Pictures are enlarged, in whole blocks, until a side has so many pixels.
SHOWN_SIDE = 128
ONE_ROW = 10

LABELS = Option(
    name="labels",
    read=texts,
    metavar="3,7",
    help="classes to draw, numbers (or, for the shipped models, names) with commas",
)
PROMPTS = Option(
    name="prompts",
    read=path,
    metavar="FILE",
    help="texts to draw, for models that read prompts: one a line, or a .tsv, .csv or .json of them",
)
STEPS = Option(name="steps", read=whole(1), metavar="N", default=20, help="steps of the sampler")
GUIDANCE = Option(
    name="guidance",
    read=real,
    metavar="W",
    help="weight of classifier-free guidance; without it there is none",
)
ETA = Option(
    name="eta", read=real, metavar="E", default=0.0, help="share of fresh noise a step, 0 to 1"
)


def label_numbers(words: Sequence[str] | None, pipe: Pipeline) -> list[int] | None:
    """Classes as numbers; the shipped models' classes have names, too.

    Raises:
      ValueError: If a word is neither.
    """
    if words is None:
        return None
    names: dict[str, int] = {}
    if pipe.source is not None and pipe.source.name in qjax.zoo_names():
        names = {name.lower(): i for i, name in enumerate(CLASSES)}
    wrong = [word for word in words if word.lower() not in names and not word.isdecimal()]
    if wrong:
        known = f", or of {', '.join(CLASSES)}" if names else ""
        raise ValueError(f"labels must be numbers from 0{known}; got {', '.join(wrong)}.")
    return [names[word.lower()] if word.lower() in names else int(word) for word in words]


def prompt_lines(file: Path | None) -> list[str] | None:
    """The prompts of a file.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it holds no prompt, or is no text.
    """
    if file is None:
        return None
    if not file.is_file():
        raise FileNotFoundError(
            f"--prompts must be a file, one prompt a line for example; got {file}."
        )
    return list(read_prompts(file))


def generate(settings: SimpleNamespace, output: Output) -> dict[str, Any]:
    """Pictures of a model, as one PNG or as an array."""
    suffix = settings.out.suffix.lower()
    if suffix not in (".png", ".npy"):
        raise ValueError(f"--out must end in .png or .npy; got {settings.out}.")
    mesh = chosen_mesh(settings, output)
    pipe = load_model(settings.model, output)
    if settings.teacher is not None and not settings.retarget:
        raise ValueError("--teacher fits a noise correction again; it needs --retarget.")
    for file, weight in settings.lora or ():
        pipe = pipe.with_lora(file, scale=weight)
    if suffix == ".png" and pipe.image_shape[-1] not in (1, 3):
        raise ValueError(
            f"a PNG shows 1 or 3 channels and {settings.model} makes samples of "
            f"{pipe.shape[-1]}; --out FILE.npy keeps them as numbers."
        )
    labels, prompts = label_numbers(settings.labels, pipe), prompt_lines(settings.prompts)
    retargets: dict[str, str] = {}
    if settings.retarget:
        pipe, retargets = _retarget(pipe, settings, labels, prompts, output)
    if mesh is not None:
        pipe = pipe.on(mesh)
    count = settings.num_images or len(labels or prompts or [""])
    if labels is not None:
        labels = [labels[i % len(labels)] for i in range(count)]
    if prompts is not None:
        prompts = [prompts[i % len(prompts)] for i in range(count)]
    with stopwatch() as seconds:
        samples = _draw(pipe, settings, labels, prompts, count, output, raw=suffix == ".npy")
    said = {
        "model": settings.model,
        "lora": [f"{file}:{weight:g}" for file, weight in settings.lora or ()],
        "labels": labels,
        "prompts": prompts,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "eta": settings.eta,
        "seed": settings.seed,
        "retargeted": retargets,
        "qjax": qjax.__version__,
    }
    scale = 1
    if suffix == ".png":
        scale = settings.scale or max(1, math.ceil(SHOWN_SIDE / max(samples.shape[1:3])))
    if writes(mesh):
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".png":
            _save_png(settings.out, samples, scale, said)
        else:
            with atomic_write(settings.out) as file:
                np.save(file, samples)
    _, height, width, _ = samples.shape
    pictures = "picture" if count == 1 else "pictures"
    words = f"{count} {pictures} of {height} x {width} in {settings.out}"
    if scale > 1:
        words += f", every pixel drawn as {scale} x {scale} (--scale 1 for the pixels alone)"
    output.say(words, f"{settings.steps} steps took {seconds_text(seconds())}, compiling included")
    return said | {"out": settings.out, "num_images": count, "scale": scale, "seconds": seconds()}


def _retarget(
    pipe: Pipeline,
    settings: SimpleNamespace,
    labels: list[int] | None,
    prompts: list[str] | None,
    output: Output,
) -> tuple[Pipeline, dict[str, str]]:
    """The model with a step table that suits the run, and what became of every entry."""
    scale = 1.0 if settings.guidance is None else settings.guidance
    old = pipe
    pipe, fates = retargeted(old, steps=settings.steps, eta=settings.eta, guidance_scale=scale)
    said = {name: str(fate) for name, fate in fates.items()}
    lost = ENTRY in fates and fates[ENTRY].lost
    if lost and settings.teacher is not None:
        teacher = load_model(settings.teacher, output)
        data = CalibrationSet(
            labels=tuple(labels or ()),
            prompts=tuple(prompts or ()),
            negative_prompts=settings.negative,
        )
        correction = settings_of(
            old,
            steps=settings.steps,
            eta=settings.eta,
            guidance_scale=settings.guidance,
            data=data,
        )
        with output.progress("correcting noise") as tell:

            def on_event(event: Mapping[str, Any]) -> None:
                if event["event"] == "step":
                    tell(event["step"], event["steps"], "step of the sampler")

            pipe = refit(pipe, teacher, correction, seed=settings.seed, on_event=on_event)
        said[ENTRY] = f"fitted again ({fates[ENTRY].reason})"
    elif settings.teacher is not None:
        output.remark("--teacher was not needed: no noise correction had to be fitted again.")
    output.say(*(f"{name}: {words}" for name, words in said.items()))
    return pipe, said


def _draw(
    pipe: Pipeline,
    settings: SimpleNamespace,
    labels: list[int] | None,
    prompts: list[str] | None,
    count: int,
    output: Output,
    *,
    raw: bool,
) -> Float[np.ndarray, "b h w c"]:
    """Samples in batches of one size, so that one program draws them all."""
    size = batch_of(count, settings.batch_size, pipe.mesh)
    parts = []
    with output.progress("drawing") as tell:
        for start in range(0, count, size):
            tell(start, count, f"{start} of {count} pictures")
            # The last batch is filled up, so that no smaller program has to be compiled.
            here = [min(i, count - 1) for i in range(start, start + size)]
            drawn = pipe(
                labels=None if labels is None else [labels[i] for i in here],
                prompts=None if prompts is None else [prompts[i] for i in here],
                negative_prompts=settings.negative,
                num_images=size,
                batch_size=settings.batch_size,
                start_index=start,
                steps=settings.steps,
                guidance_scale=settings.guidance,
                eta=settings.eta,
                key=jax.random.key(settings.seed),
                output="latent" if raw else "image",
            )
            parts.append(np.asarray(drawn)[: count - start])
    return np.concatenate(parts)


def tiled(images: Float[np.ndarray, "b h w c"], scale: int) -> Image.Image:
    """Pictures side by side without gaps, row by row; a pixel is a block of `scale` squared.

    Up to ten are one row, more are as square as they get; what is left over is black.
    """
    count, height, width, channels = images.shape
    columns = count if count <= ONE_ROW else math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    pixels = np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
    sheet = np.zeros((rows * columns, height, width, channels), np.uint8)
    sheet[:count] = pixels
    sheet = sheet.reshape(rows, columns, height, width, channels)
    sheet = sheet.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    sheet = sheet.repeat(scale, axis=0).repeat(scale, axis=1)
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)


def _save_png(
    file_path: Path, images: Float[np.ndarray, "b h w c"], scale: int, said: dict[str, Any]
) -> None:
    """A PNG that remembers the settings it was drawn with, in a text called `qjax`."""
    if not np.isfinite(images).all():
        count = int((~np.isfinite(images).all(axis=(1, 2, 3))).sum())
        raise ValueError(
            f"{count} of {len(images)} pictures hold values that are no numbers; nothing was "
            "written. Quantize fewer layers, or to more bits."
        )
    notes = PngImagePlugin.PngInfo()
    notes.add_text("qjax", json.dumps(said))
    with atomic_write(file_path) as file:
        tiled(images, scale).save(file, format="PNG", pnginfo=notes)


def compare(settings: SimpleNamespace, output: Output) -> dict[str, Any]:
    """Two models from the same noise: a table, and a page with a grid of pictures."""
    mesh = chosen_mesh(settings, output)
    a, b = (load_model(model, output) for model in (settings.model_a, settings.model_b))
    labels, prompts = label_numbers(settings.labels, a), prompt_lines(settings.prompts)
    with output.progress("comparing") as tell:
        found = qjax.compare(
            a,
            {short_name(settings.model_b): b},
            num_images=settings.num_images,
            labels=labels,
            prompts=prompts,
            steps=settings.steps,
            guidance_scale=settings.guidance,
            eta=settings.eta,
            seed=settings.seed,
            repeats=settings.repeats,
            sensitivity=settings.sensitivity,
            recipes=_recipe_of(settings.model_b),
            out=settings.out,
            mesh=mesh,
            on_progress=tell,
        )
    output.say(report.summary_table(found), *found.notes)
    output.say(*(f"{one.name}: {note}" for one in found.variants for note in one.notes))
    if settings.out is not None:
        output.say(f"page: {settings.out}", f"grid: {settings.out.with_suffix('.png')}")
    return as_dict(found) | {"out": settings.out}


def _recipe_of(model: str) -> dict[str, str]:
    """Name of the recipe that a calibration wrote beside the model; empty where none did."""
    name = recipe_of_run(model)
    return {} if name is None else {short_name(model): name}


def short_name(model: str) -> str:
    """The last part of a path or hub id: what to call a model in a table's head."""
    here = Path(model)
    return here.resolve().name if here.is_dir() else model.rstrip("/").rsplit("/", 1)[-1]


COMMANDS = (
    Command(
        name="generate",
        help="draw pictures with a model, float or quantized",
        run=generate,
        arguments=(MODEL,),
        options=(
            LABELS,
            PROMPTS,
            Option(
                name="negative",
                read=text,
                metavar="TEXT",
                help="what the pictures shall not show; needs --guidance",
            ),
            Option(
                name="lora",
                read=files_with_scales,
                metavar="FILE[:SCALE]",
                help="LoRA beside the weights, safetensors; may be given several times",
                repeated=True,
            ),
            Option(
                name="num-images",
                read=whole(1),
                metavar="N",
                help="how many; labels or prompts repeat (default: one of each)",
            ),
            STEPS,
            Option(
                name="out",
                read=path,
                metavar="FILE.png",
                required=True,
                help="the picture; FILE.npy keeps the samples as float32",
            ),
            GUIDANCE,
            ETA,
            SEED,
            Option(
                name="retarget",
                read=switch,
                default=False,
                help="make what was fitted for other steps, eta or guidance suit these",
            ),
            Option(
                name="teacher",
                read=text,
                metavar="MODEL",
                help="with --retarget: the float model, to fit a noise correction again",
            ),
            Option(
                name="scale",
                read=whole(1),
                metavar="N",
                help="pixels a pixel is drawn as, each way (default: to at least 128 a side)",
            ),
            Option(
                name="batch-size",
                read=whole(1),
                metavar="N",
                default=64,
                help="most pictures at a time, of every device",
            ),
            *SPREAD,
        ),
        example="qjax generate fashion-dit --labels 3,7 --guidance 2 --out pictures.png",
    ),
    Command(
        name="compare",
        help="compare a model with a quantized one, from the same noise",
        run=compare,
        arguments=(
            ("MODEL_A", "the float model: as MODEL elsewhere"),
            ("MODEL_B", "the quantized one"),
        ),
        options=(
            Option(
                name="out", read=path, metavar="FILE.html", help="page to write, grid beside it"
            ),
            Option(
                name="num-images",
                read=whole(1),
                metavar="N",
                help="pictures by each (default: one a label, else 64)",
            ),
            LABELS,
            PROMPTS,
            Option(
                name="steps", read=whole(1), metavar="N", default=10, help="steps of the sampler"
            ),
            GUIDANCE,
            ETA,
            SEED,
            Option(
                name="repeats",
                read=whole(),
                metavar="N",
                default=7,
                help="timed runs behind each speed, all models in turn; 0 leaves speed out",
            ),
            Option(
                name="sensitivity",
                read=switch,
                default=False,
                help="measure how much each layer alone changes the network's answers",
            ),
            *SPREAD,
        ),
        example="qjax compare fashion-dit fashion-dit-w4a8 --guidance 2 --out report.html",
    ),
)
