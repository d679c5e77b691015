"""load, quantize, plan and compare: the few functions that join the floors."""

import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qjax import recipes
from qjax._version import __version__
from qjax.calibrate.recipe import Recipe, quant_config, quantize_pipeline
from qjax.core import metrics
from qjax.core import quantize as core
from qjax.core.config import QuantConfig
from qjax.core.qtensor import is_qtensor
from qjax.core.serialize import flatten
from qjax.core.typing import Params
from qjax.models.loading import load_pipeline
from qjax.models.pipeline import Pipeline
from qjax.models.sampling import to_images
from qjax.report_data import (
    ClassAgreement,
    ComparisonReport,
    FeatureDistance,
    LayerResult,
    Timing,
    VariantResult,
)
from qjax.zoo import judge
from qjax.zoo.data import CLASSES

ZOO = Path(__file__).parent / "zoo"
REPORTED_IMAGES = 8


def zoo_names() -> list[str]:
    """Names of the diffusion models that ship with the package."""
    return sorted(path.parent.name for path in ZOO.glob("*/model_index.json"))


def load(model: str | Path, *, quantize: QuantConfig | Recipe | None = None, **options) -> Pipeline:
    """The pipeline of a shipped model, a local folder, a saved pipeline or a hub repository.

    Args:
      model: `"fashion-dit"`; a folder in diffusers' layout or written by `Pipeline.save`; or
        an id on the Hugging Face hub, `"owner/name"`.
      quantize: Quantize every tensor as it is read; the float model is never in memory whole.
      **options: `dtype`, `variant`, `on_tensor` of `qjax.models.loading.load_pipeline`.

    Raises:
      FileNotFoundError: If there is nothing of that name.
      ValueError: If what there is cannot be read in full.
    """
    config = None if quantize is None else quant_config(quantize)
    name = str(model)
    if name in zoo_names():
        return load_pipeline(ZOO / name, quantize=config, name=name, **options)
    if Path(model).is_dir():
        return load_pipeline(model, quantize=config, **options)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists():
        folder = _download(name)
        return load_pipeline(folder, quantize=config, name=name, **options)
    raise FileNotFoundError(
        f"{name!r} is no model of the zoo ({', '.join(zoo_names())}), no local folder and no hub "
        "id of the form owner/name."
    )


def _download(repository: str) -> Path:
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            repository, allow_patterns=["*.json", "*.safetensors", "*/*.json", "*/*.safetensors"]
        )
    )


def quantize(target: Any, config: QuantConfig | Recipe, *, box: bool = True) -> Any:
    """`target` with low-bit weights; data-free, and nothing is mutated.

    Args:
      target: A Flax params tree, an `nnx.State`, an `nnx.Module`, or a `Pipeline`.
      config: Rules, or a recipe, whose stages are left out: they need data
        (`qjax.calibrate.run`).
      box: See `qjax.core.quantize.quantize`.

    Returns:
      The same kind of thing, with QTensors for the kernels that the rules choose.
    """
    if isinstance(config, Recipe) and config.stages:
        names = ", ".join(type(stage).__name__ for stage in config.stages)
        warnings.warn(
            f"qjax.quantize is data-free and leaves out the stages {names} of the recipe "
            f"{config.name!r}; qjax.calibrate.run runs them.",
            stacklevel=2,
        )
    if isinstance(target, Pipeline):
        return quantize_pipeline(target, config)
    return core.quantize(target, quant_config(config), box=box)


def plan(target: Any, config: QuantConfig | Recipe) -> core.Plan:
    """What `quantize(target, config)` would do, leaf by leaf; print it."""
    params = target.params if isinstance(target, Pipeline) else target
    return core.plan(params, quant_config(config))


def compare(
    pipe: Pipeline,
    quantized: Pipeline | Mapping[str, Pipeline],
    *,
    num_images: int = 64,
    labels: Sequence[int] | None = None,
    steps: int = 10,
    guidance_scale: float | None = None,
    eta: float = 0.0,
    seed: int = 0,
    repeats: int = 3,
    out: Path | str | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> ComparisonReport:
    """Hold quantized pipelines against the float one, from the same noise.

    Args:
      pipe: The float pipeline.
      quantized: One quantized pipeline, or several by name.
      num_images: Pictures by each; the first eight are shown.
      labels: Their classes; by default all classes in turn.
      steps: Steps of the sampler.
      guidance_scale: Weight of classifier-free guidance; None for none.
      eta: Share of fresh noise.
      seed: Of the noise; image i is the same whatever else is drawn.
      repeats: Timed runs behind every speed, both models in turn; 0 leaves speed out.
      out: A `.html` file for the page; the picture grid is written beside it as `.png`.
      on_progress: Called with work done, all work and what comes next.

    Returns:
      The report; `qjax.report` shows it as a page, a grid and a table.
    """
    variants = {"quantized": quantized} if isinstance(quantized, Pipeline) else dict(quantized)
    if labels is None and pipe.num_labels:
        classes = pipe.num_labels - (pipe.null_label == pipe.num_labels - 1)
        labels = [i % classes for i in range(num_images)]
    if labels is not None and len(labels) != num_images:
        raise ValueError(f"labels must be {num_images}, one an image; got {len(labels)}.")
    settings = {"steps": steps, "guidance_scale": guidance_scale, "eta": eta}
    settings |= {"labels": labels, "num_images": num_images, "key": jax.random.key(seed)}
    total, done = 2 * len(variants) + 1, 0

    def tell(what: str) -> None:
        nonlocal done
        if on_progress is not None:
            on_progress(done, total, what)
        done += 1

    tell("float images")
    reference = _draw(pipe, settings)
    results = []
    for name, variant in variants.items():
        tell(f"{name} images")
        drawn = _draw(variant, settings)
        tell(f"{name} speed")
        timing = _time(pipe, variant, settings, repeats) if repeats else None
        results.append(_result(pipe, name, variant, drawn, reference, timing, labels))
    if on_progress is not None:
        on_progress(total, total, "done")
    shown = min(REPORTED_IMAGES, num_images)
    report = ComparisonReport(
        title=f"{_name(pipe)}: float and quantized",
        model=_name(pipe),
        device=_device(),
        sampler=_sampler_words(pipe, steps, guidance_scale, eta),
        versions=(("qjax", __version__), ("jax", jax.__version__)),
        seeds=tuple(range(shown)),
        labels=_label_words(pipe, labels, shown),
        float_images=reference.images[:shown],
        bytes_float=core.tree_bytes(pipe.params),
        float_dtype="float16",
        variants=tuple(results),
        timesteps=tuple(float(t) for t in pipe.sampler.timesteps(steps)),
    )
    if out is not None:
        from qjax import report as pages

        page = Path(out)
        page.parent.mkdir(parents=True, exist_ok=True)
        pages.save_html(report, page)
        pages.save_png(pages.image_grid(report), page.with_suffix(".png"))
    return report


class _Drawn(NamedTuple):
    """Pictures, and the running sample after every step."""

    images: np.ndarray
    path: np.ndarray


def _draw(pipe: Pipeline, settings: Mapping[str, Any]) -> _Drawn:
    x_0, trajectory = pipe(**settings, output="latent", return_trajectory=True)
    path = np.concatenate([np.asarray(trajectory.x_t)[1:], np.asarray(x_0)[None]])
    return _Drawn(np.asarray(to_images(x_0)), path)


def _time(pipe: Pipeline, variant: Pipeline, settings: Mapping[str, Any], repeats: int) -> Timing:
    """Median seconds a step of both, run in turn; the programs are compiled already."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(repeats):
        for side, one in enumerate((pipe, variant)):
            start = time.perf_counter()
            jax.block_until_ready(one(**settings, output="latent", return_trajectory=True))
            seconds[side].append((time.perf_counter() - start) / settings["steps"])
    return Timing(
        seconds_float=statistics.median(seconds[0]),
        seconds_quantized=statistics.median(seconds[1]),
        batch=settings["num_images"],
        repeats=repeats,
    )


def _result(
    pipe: Pipeline,
    name: str,
    variant: Pipeline,
    drawn: _Drawn,
    reference: _Drawn,
    timing: Timing | None,
    labels: Sequence[int] | None,
) -> VariantResult:
    images, n = drawn.images, len(drawn.images)
    small = min(images.shape[1:3]) < metrics.SSIM_WINDOW
    distances, agreement = (), None
    if _is_zoo(pipe):
        theirs, ours = judge.judge(images), judge.judge(reference.images)
        real = judge.real_statistics()
        distances = (
            FeatureDistance(
                name="FD",
                value=metrics.frechet_distance(theirs.features, real).value,
                value_float=metrics.frechet_distance(ours.features, real).value,
                net=f"fashion-features, {ours.features.shape[1]} penultimate features",
                reference="the real test set",
                n=n,
            ),
        )
        if labels is not None:
            agreement = ClassAgreement(
                value=metrics.class_agreement(theirs.classes, np.asarray(labels)),
                value_float=metrics.class_agreement(ours.classes, np.asarray(labels)),
                net="fashion-features",
                n=n,
            )
    axes = tuple(range(1, drawn.path.ndim))
    return VariantResult(
        name=name,
        how=_how(variant.params),
        images=images[:REPORTED_IMAGES],
        bytes_quantized=core.tree_bytes(variant.params),
        psnr=metrics.psnr(images, reference.images, data_range=1.0),
        ssim=None if small else metrics.ssim(images, reference.images, data_range=1.0),
        error_per_step=np.asarray(metrics.relative_l2(drawn.path, reference.path, axis=axes)),
        timing=timing,
        distances=distances,
        agreement=agreement,
        layers=_layers(variant.params),
    )


def _layers(params: Params) -> tuple[LayerResult, ...]:
    """Every leaf of a quantized tree, as it is stored."""
    rows = []
    for path, leaf in flatten(params):
        size = int(np.prod(leaf.shape, dtype=np.int64))
        quantized = is_qtensor(leaf)
        rows.append(
            LayerResult(
                path=path,
                kind=_kind(path, len(leaf.shape)),
                shape=tuple(leaf.shape),
                weight_bits=leaf.bits if quantized else None,
                act_bits=leaf.act.bits if quantized and leaf.act else None,
                group_size=leaf.group_size if quantized else None,
                bytes_float=2 * size,
                bytes_quantized=leaf.nbytes_packed if quantized else 2 * size,
                reason="" if quantized else _why_float(path),
            )
        )
    return tuple(rows)


def _kind(path: str, ndim: int) -> str:
    name = path.rsplit("/", 1)[-1]
    if name == "kernel":
        return "conv" if ndim == 4 else "dense"
    return {"bias": "bias", "scale": "norm", "embedding": "embedding"}.get(name, "other")


def _why_float(path: str) -> str:
    if not path.endswith("kernel"):
        return "not a layer's kernel"
    for rule in recipes.EDGES:
        if re.fullmatch(rule.pattern, path):
            return rule.reason
    return "left in float by the config"


def _how(params: Params) -> str:
    leaves = [leaf for _, leaf in flatten(params) if is_qtensor(leaf)]
    if not leaves:
        return "not quantized"
    bits = sorted({leaf.bits for leaf in leaves})
    acts = sorted({leaf.act.bits for leaf in leaves if leaf.act is not None})
    groups = sorted({leaf.group_size for leaf in leaves if leaf.group_size})
    shared = f"groups of {' or '.join(map(str, groups))}" if groups else "one scale per channel"
    words = f"{' or '.join(map(str, bits))}-bit weights ({shared})"
    if not acts:
        return f"{words}, activations in float"
    return f"{words}, {' or '.join(map(str, acts))}-bit activations"


def _name(pipe: Pipeline) -> str:
    return (pipe.source and pipe.source.name) or "a denoiser of your own"


def _is_zoo(pipe: Pipeline) -> bool:
    return _name(pipe) in zoo_names() and pipe.shape == (32, 32, 1)


def _device() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"CPU ({os.cpu_count()} cores, {platform.machine()})"


def _sampler_words(pipe: Pipeline, steps: int, guidance_scale: float | None, eta: float) -> str:
    words = f"{type(pipe.sampler).__name__}, {steps} steps"
    if guidance_scale not in (None, 1, 1.0):
        words += f", guidance {guidance_scale:g}"
    return words + (f", eta {eta:g}" if eta else "")


def _label_words(pipe: Pipeline, labels: Sequence[int] | None, count: int) -> tuple[str, ...]:
    if labels is None:
        return ()
    if _is_zoo(pipe):
        return tuple(CLASSES[label] for label in labels[:count])
    return tuple(f"class {label}" for label in labels[:count])
