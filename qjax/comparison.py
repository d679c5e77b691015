"""compare: quantized pipelines held against the float one, from the same noise.

Everything is measured here and shown by `qjax.report`: pictures and their likeness, the error
of the running sample after every step, bytes, and the seconds that a step takes. A model of
the zoo is also looked at by the zoo's classifier.
"""

import dataclasses
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qjax import report as pages
from qjax import report_judge, zoo
from qjax._version import __version__
from qjax.calibrate.recipe import Recipe
from qjax.calibrate.sensitivity import Probe
from qjax.core import metrics
from qjax.core.places import local_path
from qjax.core.quantize import tree_bytes
from qjax.core.serialize import flatten
from qjax.kernels import tuning
from qjax.layer_errors import output_sqnr, probe_of, weight_sqnr
from qjax.models.mesh import batch_of, writes
from qjax.models.pipeline import Pipeline
from qjax.models.saving import with_digest
from qjax.report_data import ComparisonReport, Timing, VariantResult
from qjax.report_how import settings_of
from qjax.report_layers import how_quantized, layer_results
from qjax.report_words import count_text
from qjax.timing import interleaved
from qjax.zoo.data import CLASSES

DEFAULT_IMAGES = 64
REPORTED_IMAGES = 8
# Of those, the last ones are the worst of all, where there are more to choose from.
WORST_IMAGES = 2
BATCH = 64
# Sensitivity of layers is measured at so many pictures, and at most at so many steps.
PROBED_IMAGES = 4
PROBED_STEPS = 10


def compare(
    pipe: Pipeline,
    quantized: Pipeline | Mapping[str, Pipeline],
    *,
    num_images: int | None = None,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    steps: int = 10,
    guidance_scale: float | None = None,
    eta: float = 0.0,
    seed: int = 0,
    repeats: int = 7,
    sensitivity: bool = False,
    recipes: Mapping[str, Recipe | str] | None = None,
    out: Path | str | None = None,
    mesh: Mesh | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> ComparisonReport:
    """Hold quantized pipelines against the float one, from the same noise.

    Args:
      pipe: The float pipeline.
      quantized: One quantized pipeline, or several by name.
      num_images: Pictures by each, by default as many as labels, else 64. Eight are shown: of
        more the first six, and the two that came out worst.
      labels: Their classes; by default all classes in turn.
      prompts: Their texts, for models that read prompts.
      steps: Steps of the sampler.
      guidance_scale: Weight of classifier-free guidance; None for none.
      eta: Share of fresh noise.
      seed: Of the noise; image i is the same whatever else is drawn.
      repeats: Timed runs behind every speed, all models in turn, of up to 64 pictures a device;
        0 leaves speed out.
      sensitivity: Whether to measure how much every layer alone changes the network's answers;
        what rounding did to its weights is always told.
      recipes: How variants were made, by name, as recipes or in words; the page tells.
      out: A `.html` file for the page; the picture grid is written beside it as `.png`.
      mesh: Devices to spread the pictures over (`Pipeline.on`), which is timed then; None: one.
      on_progress: Called with work done, all work and what comes next.

    Returns:
      The report; `qjax.report` shows it as a page, a grid and a table.

    Raises:
      ValueError: If the labels are not one an image, a pipeline has another shape of sample
        or another sampler than the float one, or the samples are no pictures; if `recipes`
        names a variant that is not there, or `sensitivity` is asked of a model that is no float
        one.
    """
    variants = {"quantized": quantized} if isinstance(quantized, Pipeline) else dict(quantized)
    recipes = dict(recipes or {})
    _check_comparable(pipe, variants, out)
    _check_recipes(recipes, variants)
    n, labels = _images_and_labels(pipe, num_images, labels, prompts)
    settings: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "eta": eta}
    settings |= {"labels": labels, "prompts": prompts, "num_images": n, "key": jax.random.key(seed)}
    settings |= {"batch_size": BATCH}
    drawing = {name: _on(mesh, one) for name, one in {"": pipe, **variants}.items()}
    total = 2 + len(variants) * (2 if sensitivity else 1) + repeats

    def tell(done: int, what: str) -> None:
        if on_progress is not None:
            on_progress(done, total, what)

    tell(0, "float images")
    reference = _draw(drawing[""], settings)
    drawn = {}
    for i, name in enumerate(variants):
        tell(1 + i, f"{name} images")
        drawn[name] = _draw(drawing[name], settings)
    first = 1 + len(variants)
    timings = _time(drawing, settings, repeats, lambda i: tell(first + i, f"speed, round {i + 1}"))
    effects: dict[str, dict[str, float]] = {}
    if sensitivity:
        probe = _probe(pipe, reference, settings)
        for i, (name, variant) in enumerate(variants.items()):
            tell(first + repeats + i, f"{name} layers")
            effects[name] = output_sqnr(probe, variant)
    tell(total - 1, "judging")
    results = tuple(
        _result(pipe, name, variant, drawn[name], reference, timings.get(name), labels)
        for name, variant in variants.items()
    )
    order, worst = _shown_first([result.psnr for result in results])
    results = tuple(
        _with_layers(
            _in_order(result, drawn[name].images, order),
            pipe,
            variants[name],
            effects.get(name, {}),
            recipes.get(name),
        )
        for name, result in zip(variants, results, strict=True)
    )
    tell(total, "done")
    shown = order[:REPORTED_IMAGES]
    said = _label_words(pipe, labels) if prompts is None else tuple(prompts)
    report = ComparisonReport(
        title=f"{model_name(pipe)}: float and quantized",
        model=_model_words(pipe),
        device=device_words(mesh),
        sampler=_sampler_words(pipe, steps, guidance_scale, eta),
        versions=(("qjax", __version__), ("jax", jax.__version__)),
        seeds=tuple(shown),
        labels=tuple(said[i] for i in shown) if said else (),
        float_images=reference.images[shown],
        bytes_float=tree_bytes(pipe.params),
        float_dtype="float16",
        variants=results,
        timesteps=tuple(float(t) for t in pipe.sampler.timesteps(steps)),
        worst_shown=worst,
        notes=report_judge.notes(n) if is_zoo(pipe) else (),
    )
    if out is not None and writes(mesh):
        page = local_path(out)
        page.parent.mkdir(parents=True, exist_ok=True)
        pages.save_html(report, page)
        pages.save_png(pages.image_grid(report), page.with_suffix(".png"))
    return report


def _check_comparable(
    pipe: Pipeline, variants: Mapping[str, Pipeline], out: Path | str | None
) -> None:
    if not variants:
        raise ValueError("compare needs at least one quantized pipeline; got none.")
    if pipe.image_shape[-1] not in (1, 3):
        raise ValueError(
            f"compare shows pictures of 1 or 3 channels; got samples of {pipe.shape[-1]} "
            f"channels, shape={pipe.shape}. Latents have to be decoded first."
        )
    problems = [
        f"{name} has {what} {theirs} instead of {ours}"
        for name, variant in variants.items()
        for what, theirs, ours in (
            ("shape", variant.shape, pipe.shape),
            ("sampler", variant.sampler, pipe.sampler),
        )
        if theirs != ours
    ]
    if problems:
        raise ValueError(
            "pictures from the same noise can be compared if shape and sampler are the same; "
            f"{'; '.join(problems)}. Use pipe.replace(sampler=...)."
        )
    if out is not None and local_path(out).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"out must be a file that ends in .html; got {str(out)!r}.")


def _images_and_labels(
    pipe: Pipeline,
    num_images: int | None,
    labels: Sequence[int] | None,
    prompts: Sequence[str] | None,
) -> tuple[int, Sequence[int] | None]:
    """How many pictures, and their classes; None for a model without."""
    n = num_images
    if n is None:
        said = prompts if labels is None else labels
        n = DEFAULT_IMAGES if said is None else len(said)
    if n < 1:
        raise ValueError(f"num_images must be at least 1; got {n}.")
    if labels is not None and len(labels) != n:
        raise ValueError(
            f"labels must be one an image; got {len(labels)} labels for num_images={n}. Leave "
            "num_images out, or give as many labels."
        )
    if prompts is not None and len(prompts) != n:
        raise ValueError(
            f"prompts must be one an image; got {len(prompts)} for num_images={n}. Leave "
            "num_images out, or give as many prompts."
        )
    if labels is None and pipe.num_labels:
        classes = pipe.num_labels - (pipe.null_label == pipe.num_labels - 1)
        labels = [i % classes for i in range(n)]
    return n, labels


def _check_recipes(recipes: Mapping[str, Any], variants: Mapping[str, Pipeline]) -> None:
    if unknown := sorted(recipes.keys() - variants.keys()):
        raise ValueError(
            f"recipes must be given by the names of variants, {', '.join(variants)}; got also "
            f"{', '.join(unknown)}."
        )


class _Drawn(NamedTuple):
    """Pictures, the running sample after every step, and the first few before every step."""

    images: np.ndarray
    path: np.ndarray
    probed: np.ndarray


def _on(mesh: Mesh | None, pipe: Pipeline) -> Pipeline:
    return pipe if mesh is None else pipe.on(mesh)


def _draw(pipe: Pipeline, settings: Mapping[str, Any]) -> _Drawn:
    x_0, trajectory = pipe(**settings, output="latent", return_trajectory=True)
    x_t = np.asarray(trajectory.x_t)
    path = np.concatenate([x_t[1:], np.asarray(x_0)[None]])
    return _Drawn(np.asarray(pipe.images(x_0)), path, x_t[:, :PROBED_IMAGES].copy())


def _first(settings: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Labels and prompts of the first pictures."""
    said = {name: settings[name] for name in ("labels", "prompts")}
    return {name: None if words is None else words[:count] for name, words in said.items()}


def _probe(pipe: Pipeline, reference: _Drawn, settings: Mapping[str, Any]) -> Probe:
    """The float network at a few of its own samples, as it was told of them."""
    _, count = reference.probed.shape[:2]
    scale = settings["guidance_scale"]
    few = _first(settings, count)
    told, null = pipe.condition(count, **few, guided=scale not in (None, 1.0), guidance_scale=scale)
    times = pipe.sampler.rows(settings["steps"], eta=settings["eta"])["t"]
    chosen = np.unique(np.linspace(0, len(times) - 1, PROBED_STEPS).round().astype(int))
    return probe_of(pipe, reference.probed[chosen], times[chosen], told, null)


def _shown_first(scores: Sequence[np.ndarray]) -> tuple[list[int], int]:
    """All pictures, those to show first, and how many of these are there for being the worst.

    Args:
      scores: PSNR of every variant's pictures.
    """
    n = len(scores[0])
    if n <= REPORTED_IMAGES:
        return list(range(n)), 0
    lowest = np.min([np.nan_to_num(psnr, nan=-np.inf) for psnr in scores], axis=0)
    first = list(range(REPORTED_IMAGES - WORST_IMAGES))
    rest = sorted(range(len(first), n), key=lambda i: lowest[i])
    worst = rest[:WORST_IMAGES]
    return [*first, *worst, *sorted(rest[WORST_IMAGES:])], WORST_IMAGES


def _time(
    pipes: Mapping[str, Pipeline],
    settings: Mapping[str, Any],
    repeats: int,
    on_round: Callable[[int], None],
) -> dict[str, Timing]:
    """Median seconds a step of all, run in turn; the programs are compiled already.

    Args:
      pipes: By name; the float one's is empty.
      settings: Of the calls.
      repeats: Rounds.
      on_round: Told of each.
    """
    if not repeats:
        return {}
    n = settings["num_images"]
    batch = min(n, batch_of(n, settings["batch_size"], pipes[""].mesh))
    asked = {**settings, **_first(settings, batch), "num_images": batch}

    def run(one: Pipeline) -> Any:
        return one(**asked, output="latent", return_trajectory=True)

    calls = {name: (lambda one=one: run(one)) for name, one in pipes.items()}
    seconds = interleaved(calls, rounds=repeats, min_seconds=0, warm=True, on_round=on_round)
    steps = settings["steps"]
    return {
        name: Timing(
            seconds_float=seconds[""] / steps,
            seconds_quantized=seconds[name] / steps,
            batch=batch,
            repeats=repeats,
        )
        for name in pipes
        if name
    }


def _result(
    pipe: Pipeline,
    name: str,
    variant: Pipeline,
    drawn: _Drawn,
    reference: _Drawn,
    timing: Timing | None,
    labels: Sequence[int] | None,
) -> VariantResult:
    images = drawn.images
    small = min(images.shape[1:3]) < metrics.SSIM_WINDOW
    known = is_zoo(pipe)
    distances = report_judge.feature_distances(images, reference.images) if known else ()
    agreement = None
    if known and labels is not None:
        agreement = report_judge.agreement(images, reference.images, labels)
    axes = tuple(range(1, drawn.path.ndim))
    return VariantResult(
        name=name,
        how=how_quantized(variant.params),
        images=images,
        bytes_quantized=tree_bytes(variant.params),
        psnr=metrics.psnr(images, reference.images, data_range=1.0),
        ssim=None if small else metrics.ssim(images, reference.images, data_range=1.0),
        error_per_step=np.asarray(metrics.relative_l2(drawn.path, reference.path, axis=axes)),
        timing=timing,
        distances=distances,
        agreement=agreement,
        notes=_origin(pipe, variant),
    )


def _in_order(result: VariantResult, images: np.ndarray, order: Sequence[int]) -> VariantResult:
    """What was found of every picture, those to show first."""
    return dataclasses.replace(
        result,
        images=images[order[:REPORTED_IMAGES]],
        psnr=result.psnr[order],
        ssim=None if result.ssim is None else result.ssim[order],
    )


def _with_layers(
    result: VariantResult,
    pipe: Pipeline,
    variant: Pipeline,
    effects: Mapping[str, float],
    recipe: Recipe | str | None,
) -> VariantResult:
    """The layers, what quantizing did to each, and how it was done."""
    weights = weight_sqnr(pipe.params, variant)
    layers = tuple(
        dataclasses.replace(
            layer, weight_sqnr=weights.get(layer.path), output_sqnr=effects.get(layer.path)
        )
        for layer in layer_results(variant.params, variant.quant)
    )
    settings = settings_of(variant, layers, recipe)
    return dataclasses.replace(result, layers=layers, settings=settings)


def _origin(pipe: Pipeline, variant: Pipeline) -> tuple[str, ...]:
    """A remark where the variant remembers to be made from other weights."""
    if pipe.source is None or variant.source is None or variant.source.sha256 is None:
        return ()
    ours = with_digest(pipe).sha256
    if ours is None or ours == variant.source.sha256:
        return ()
    note = (
        "It was made from other weights than those of the float model here, so what differs was "
        "not caused by quantization alone."
    )
    return (note,)


def model_name(pipe: Pipeline) -> str:
    """What to call a model in tables."""
    return (pipe.source and pipe.source.name) or "a denoiser of your own"


def _model_words(pipe: Pipeline) -> str:
    """Name, kind and size of a model, and what it draws."""
    count = sum(math.prod(leaf.shape) for _, leaf in flatten(pipe.params))
    height, width = pipe.image_shape[:2]
    kind = f"a {pipe.source.model} of " if pipe.source else ""
    what = "pictures of clothes" if is_zoo(pipe) else "pictures"
    words = f"{model_name(pipe)}, {kind}{count_text(count)} numbers that draws {what}"
    return f"{words} of {height} × {width} pixels"


def is_zoo(pipe: Pipeline) -> bool:
    """Whether the zoo's classifier can look at its pictures."""
    return model_name(pipe) in zoo.names() and pipe.image_shape == (32, 32, 1)


def device_words(mesh: Mesh | None = None) -> str:
    """The device that programs run on, or those of a mesh."""
    device = jax.devices()[0]
    if mesh is not None and mesh.size > 1:
        return f"{mesh.size} devices, each {device_words()}"
    if device.platform != "cpu":
        return device.device_kind
    return f"{tuning.processor()} (CPU, {os.cpu_count()} cores, {platform.machine()})"


def _sampler_words(pipe: Pipeline, steps: int, guidance_scale: float | None, eta: float) -> str:
    words = f"{type(pipe.sampler).__name__}, {steps} steps"
    if guidance_scale not in (None, 1, 1.0):
        words += f", guidance {guidance_scale:g}"
    return words + (f", eta {eta:g}" if eta else "")


def _label_words(pipe: Pipeline, labels: Sequence[int] | None) -> tuple[str, ...]:
    if labels is None:
        return ()
    if is_zoo(pipe):
        return tuple((*CLASSES, "no class")[label] for label in labels)
    return tuple(f"class {label}" for label in labels)
