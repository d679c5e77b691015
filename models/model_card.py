"""The model card of a save: README.md, which the hub shows and loading ignores.

What it says is in the pipeline and in a comparison, if one is given; of what was not measured it
says so. It has no dates and no paths of the machine, so that equal saves are equal bits.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import flax
import jax
import numpy as np

from qjax._version import __version__
from qjax.core.describe import how_quantized, leaf_kind, why_float
from qjax.core.qtensor import QTensor, is_qtensor
from qjax.core.quantize import tree_bytes
from qjax.core.serialize import flatten
from qjax.core.typing import Params
from qjax.models.denoisers import abstract_params, build_denoiser
from qjax.models.pipeline import Pipeline, Source
from qjax.models.saving_sides import sides_of
from qjax.models.time_table import dropped_layers

CARD = "README.md"
NO_PLACE = "path/to/this/folder"  # what a card loads that does not know where it will be
HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")
_NAMED = 12  # layers that a reason names


class Report(Protocol):
    """What the card reads of a comparison (`qjax.report_data.ComparisonReport`)."""

    @property
    def sampler(self) -> str:
        """The sampler with its settings, in words."""
        ...

    @property
    def device(self) -> str:
        """Where it was measured."""
        ...

    @property
    def variants(self) -> Sequence[Any]:
        """One result for every way of quantizing."""
        ...


def model_card(pipe: Pipeline, *, place: str | None = None, report: Report | None = None) -> str:
    """The text of a README.md for a saved pipeline.

    Args:
      pipe: The pipeline, with a source.
      place: Where it will be loaded from, a hub id; None for a folder that is not known.
      report: A comparison of this pipeline with its float model, whose numbers are shown.

    Raises:
      ValueError: If the pipeline has no source, or the report is of several pipelines.
    """
    if pipe.source is None:
        raise ValueError("A model card needs a pipeline with a source; this one has none.")
    parts = [
        _head(pipe, pipe.source),
        f"# {_plain(_title(pipe, pipe.source))}\n",
        _summary(pipe, pipe.source),
        "## Use\n",
        _use(pipe, place),
        "## What was quantized\n",
        _formats(pipe, pipe.source),
        _floats(pipe),
        "## Sampler\n",
        _sampler(pipe),
        "## What is known to get worse\n",
        _measured(report),
        "## Versions\n",
        _versions(),
    ]
    return "\n".join(parts)


def _versions() -> str:
    return (
        f"Made with qjax {__version__}, jax {jax.__version__}, flax {flax.__version__}. Later "
        "versions of qjax read it; the schema is in `qjax.json`.\n"
    )


def _head(pipe: Pipeline, source: Source) -> str:
    """The hub's metadata. Nothing of it is free text, so it needs no quotes."""
    lines = ["library_name: qjax"]
    if source.license is not None:
        lines.append(f"license: {source.license}")
    if source.name is not None and HUB_ID.fullmatch(source.name):
        lines += [f"base_model: {source.name}", "base_model_relation: quantized"]
    kind = "text-to-image" if pipe.reads_prompts else "unconditional-image-generation"
    tags = ["jax", "flax", "diffusion", *_widths(pipe.params)]
    lines += [f"pipeline_tag: {kind}", "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---", ""])


def _widths(params: Params) -> list[str]:
    """`["quantized", "w4a8"]`, of the most weights' format; nothing of a float model."""
    counts: Counter[str] = Counter()
    for _, leaf in flatten(params):
        if is_qtensor(leaf):
            act = 16 if leaf.act is None else leaf.act.bits
            counts[f"w{leaf.bits}a{act}"] += math.prod(leaf.shape)
    return ["quantized", counts.most_common(1)[0][0]] if counts else []


def _title(pipe: Pipeline, source: Source) -> str:
    name = source.name or source.model
    widths = _widths(pipe.params)
    return f"{name}, {widths[-1].upper()}" if widths else name


def _summary(pipe: Pipeline, source: Source) -> str:
    name = f"`{_code(source.name or source.model)}` ({_plain(source.model)})"
    if not _widths(pipe.params):
        words = f"The diffusion model {name}, not quantized, saved by qjax.\n"
    else:
        words = (
            f"The diffusion model {name}, quantized after training: {how_quantized(pipe.params)}.\n"
        )
    license = "unknown: its files do not say" if source.license is None else source.license
    return f"{words}\nLicence of the weights it was made of: {_plain(license)}.\n"


def _use(pipe: Pipeline, place: str | None) -> str:
    settings = dict(_run_of(pipe))
    what = "labels=[0, 1]" if pipe.num_labels else "num_images=2"
    if pipe.reads_prompts:
        what = 'prompts=["a photograph of a lighthouse"]'
    words = ", ".join([what, *(f"{name}={value}" for name, value in settings.items())])
    return (
        "qjax is installed from its repository; the package of that name on PyPI belongs to an "
        "unrelated project.\n\n"
        "```python\n"
        "import jax, qjax\n"
        f"pipe = qjax.load({json.dumps(place or NO_PLACE)})\n"
        f"images = pipe({words}, key=jax.random.key(0))\n"
        "```\n"
    )


def _run_of(pipe: Pipeline) -> Iterable[tuple[str, float]]:
    """The settings of a run that the step table suits; 20 steps where it says nothing."""
    keys = list(pipe.step_table.keys) if pipe.step_table is not None else []
    found: dict[str, float] = {}
    for _, key in keys:
        if key.timesteps is not None:
            found["steps"] = len(key.timesteps)
        if key.guidance_scale not in (None, 1.0):
            found["guidance_scale"] = key.guidance_scale
        if key.eta:
            found["eta"] = key.eta
    return ({"steps": 20} | found).items()


def _formats(pipe: Pipeline, source: Source) -> str:
    whole = abstract_params(build_denoiser(source.model, source.config))
    before = sum(2 * math.prod(leaf.shape) for _, leaf in flatten(whole))
    after = tree_bytes(pipe.params)
    rows = Counter[tuple[str, str, str]]()
    layers = Counter[tuple[str, str, str]]()
    for _, leaf in flatten(pipe.params):
        if is_qtensor(leaf):
            rows[_format_of(leaf)] += leaf.nbytes_packed
            layers[_format_of(leaf)] += 1
    if not rows:
        return f"Nothing: {before:,} bytes in float16.\n"
    lines = [f"Recipe: {_plain(pipe.recipe or 'rules without a name')}.\n"]
    lines.append(
        f"Denoiser: {after:,} bytes instead of {before:,} in float16 ({after / before:.2f}x), "
        "scales and what stays in float included.\n"
    )
    lines += ["| weights | inputs | scales | layers | bytes |", "|---|---|---|---|---|"]
    for format in sorted(rows):
        lines.append(f"| {' | '.join(format)} | {layers[format]} | {rows[format]:,} |")
    if pipe.loras:
        names = ", ".join(f"{_plain(lora.name)} at {lora.scale:g}" for lora in pipe.loras)
        lines.append(f"\nBeside the weights, in 16 bits: LoRA {names}.")
    sides = sides_of(pipe).components
    if sides:
        lines.append(f"\nNot quantized: {', '.join(sorted(sides))}.")
    return "\n".join(lines) + "\n"


def _format_of(leaf: QTensor) -> tuple[str, str, str]:
    kind = "symmetric" if leaf.zero_point is None else "with zero points"
    act = leaf.act
    inputs = "float" if act is None else f"{act.bits} bits, {act.mode}, {act.granularity}"
    scales = "a channel or tensor" if leaf.group_size is None else f"groups of {leaf.group_size}"
    return f"{leaf.bits} bits, {kind}", inputs, scales


def _floats(pipe: Pipeline) -> str:
    """Layers that were left in float, by reason; other leaves are counted."""
    if not _widths(pipe.params):
        return ""
    reasons: dict[str, list[str]] = {}
    others = 0
    for path, leaf in flatten(pipe.params):
        if is_qtensor(leaf):
            continue
        if not path.endswith("/kernel"):
            others += 1
            continue
        reason = why_float(path, leaf_kind(path, len(leaf.shape)), pipe.quant)
        reasons.setdefault(reason, []).append(path.removesuffix("/kernel"))
    lines = []
    for reason, paths in sorted(reasons.items()):
        named = [f"`{_code(path)}`" for path in sorted(paths, key=_numbers)]
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        lines.append(f"- {_plain(reason)}: {', '.join(named[:_NAMED])}{more}")
    if dropped_layers(getattr(pipe.apply, "__self__", None), pipe.params):
        lines.append("- replaced by a table of their outputs: the layers of the timestep")
    if others:
        lines.append(f"- not a layer's kernel (biases, norms, embeddings): {others} arrays")
    return "\n".join(["Left in float, and why:\n", *lines]) + "\n"


def _numbers(path: str) -> list[Any]:
    return [
        (part.isdigit(), int(part) if part.isdigit() else 0, part)
        for part in re.split(r"(\d+)", path)
    ]


def _sampler(pipe: Pipeline) -> str:
    settings = json.dumps(pipe.sampler.to_diffusers(), indent=1, sort_keys=True)
    lines = [f"```json\n{settings}\n```\n"]
    keys = pipe.step_table.keys if pipe.step_table is not None else ()
    if not keys:
        return lines[0] + "\nNothing was fitted to a number of steps: any run will do.\n"
    lines.append(
        "It has a table with a row for each step, and draws with these settings alone until it is "
        "made to suit others (`pipe.retarget`); an empty cell is not compared.\n"
    )
    lines += ["| entry | steps | eta | guidance |", "|---|---|---|---|"]
    for name, key in keys:
        steps = None if key.timesteps is None else len(key.timesteps)
        cells = (f"`{_code(name)}`", steps, key.eta, key.guidance_scale)
        lines.append(f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _measured(report: Report | None) -> str:
    if report is None:
        return (
            "Unknown: no comparison with the float model was given when this was saved. "
            "`qjax compare` makes one.\n"
        )
    if len(report.variants) != 1:
        names = ", ".join(variant.name for variant in report.variants)
        raise ValueError(
            "report must be of this pipeline alone, qjax.compare(pipe, qpipe); got one of "
            f"{len(report.variants)}: {names}."
        )
    (variant,) = report.variants
    sentence = (
        f"Compared with the float model from the same noise: {len(variant.psnr)} pictures, "
        f"{_plain(report.sampler)}, on {_plain(report.device)}. Nothing else was measured.\n"
    )
    lines = [
        sentence,
        "| | |",
        "|---|---|",
        f"| PSNR, mean | {_mean(variant.psnr, '.2f', ' dB')} |",
    ]
    if variant.ssim is not None:
        lines.append(f"| SSIM, mean | {_mean(variant.ssim, '.4f')} |")
    lines.append(f"| relative error of the last step | {variant.error_per_step[-1]:.4f} |")
    for distance in variant.distances:
        own = "" if distance.value_float is None else f", float model's {distance.value_float:.3f}"
        lines.append(
            f"| {_plain(distance.name)} to {_plain(distance.reference)} ({_plain(distance.net)}, "
            f"n = {distance.n}) | {distance.value:.3f}{own} |"
        )
    if variant.agreement is not None:
        agreement = variant.agreement
        lines.append(
            f"| classes as asked ({_plain(agreement.net)}, n = {agreement.n}) | "
            f"{agreement.value:.1%}, float model's {agreement.value_float:.1%} |"
        )
    if variant.timing is not None:
        share = 1 / variant.timing.speedup
        lines.append(f"| time of a step over the float model's | {share:.2f} |")
    return "\n".join(lines) + "\n"


def _mean(values: np.ndarray, form: str, unit: str = "") -> str:
    """The mean of what is finite, and how many pictures are not: equal to the bit, or broken."""
    finite = values[np.isfinite(values)]
    words = [f"{np.mean(finite):{form}}{unit}"] if finite.size else []
    equal, broken = int(np.isposinf(values).sum()), int(np.isnan(values).sum())
    if equal:
        words.append(f"{equal} of {len(values)} pictures equal to the last bit")
    if broken:
        words.append(f"{broken} of {len(values)} pictures broken, with values that are no numbers")
    return "; ".join(words)


def _plain(text: str) -> str:
    """Text from outside as text: no markup of Markdown or HTML, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(str(text).split()))


def _code(text: str) -> str:
    """The same between backticks."""
    return re.sub(r"[`|\n\r]", " ", str(text))
