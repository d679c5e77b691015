"""What a comparison found, as plain frozen data: numbers, words and pictures, no models.

`ComparisonReport` is one float model and what became of it: one `VariantResult` for each
way it was quantized. Whoever measures fills these in; `qjax.report` only shows them.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from qjax.core.typing import Float

__all__ = [
    "ClassAgreement",
    "ComparisonReport",
    "FeatureDistance",
    "LayerResult",
    "Timing",
    "VariantResult",
    "as_dict",
]


def _require_text(owner: str, **fields: str) -> None:
    for name, value in fields.items():
        if not value.strip():
            raise ValueError(
                f"{owner}.{name} must not be empty; it is what makes the number readable."
            )


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """One layer, or one parameter that belongs to none, before and after.

    Attributes:
      path: Path of its weights in the params tree, joined with `/`.
      kind: What it is: `"dense"`, `"conv"`, `"norm"`, `"embedding"`, ...
      shape: Logical shape of the weights.
      weight_bits: Width of a stored weight; None where the layer was left in float.
      act_bits: Width of its quantized input; None where the input stays in float.
      group_size: Weights that share a scale; None for one scale per channel or tensor.
      bytes_float: Bytes of its weights before.
      bytes_quantized: Bytes after, scales and zero points included.
      reason: Why it was left in float; required there, empty elsewhere.
      weight_sqnr: Signal to quantization noise, in dB, of its weights as they are stored
        against the float model's; None where it was left in float or nothing can be compared.
      output_sqnr: The same of the network's answers with this layer's weights alone quantized;
        None where it was not measured.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    weight_bits: int | None
    act_bits: int | None = None
    group_size: int | None = None
    bytes_float: int
    bytes_quantized: int
    reason: str = ""
    weight_sqnr: float | None = None
    output_sqnr: float | None = None

    def __post_init__(self):
        if self.weight_bits is None and not self.reason.strip():
            raise ValueError(
                f"layer {self.path!r} is left in float without a reason. Give `reason`, or "
                "`weight_bits` if it was quantized."
            )


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds that one sampling step takes, both models measured in one run.

    Attributes:
      seconds_float: The float model's, compilation not included.
      seconds_quantized: The quantized model's.
      batch: Pictures made at a time.
      repeats: Runs behind each number, which is their median.
    """

    seconds_float: float
    seconds_quantized: float
    batch: int
    repeats: int

    def __post_init__(self):
        if not (self.seconds_float > 0 and self.seconds_quantized > 0):
            raise ValueError(
                f"seconds per step must be positive; got {self.seconds_float=}, "
                f"{self.seconds_quantized=}. Leave `timing` out where nothing was measured."
            )

    @property
    def speedup(self) -> float:
        """Float seconds over quantized seconds; below 1 the quantized model is slower."""
        return self.seconds_float / self.seconds_quantized


@dataclass(frozen=True, kw_only=True)
class FeatureDistance:
    """A distance between two sets of pictures, in the features of a named net.

    Attributes:
      name: `"FD"`, `"KID"`, `"LPIPS"`, ...; `"FID"` only with Inception features.
      value: The quantized model's distance to the reference; lower is better.
      value_float: The float model's distance to the same reference; None where the float
        model's own pictures are the reference.
      net: The feature net, and which of its layers.
      reference: What the pictures were compared with, in words.
      n: Pictures made by each model.
    """

    name: str
    value: float
    value_float: float | None = None
    net: str
    reference: str = "the float model's pictures"
    n: int

    def __post_init__(self):
        _require_text("FeatureDistance", name=self.name, net=self.net)
        if self.name.upper() == "FID" and "inception" not in self.net.lower():
            raise ValueError(
                f"FID means Inception features; got net={self.net!r}. Call it FD and name the net."
            )


@dataclass(frozen=True, kw_only=True)
class ClassAgreement:
    """How often a classifier sees the class that was asked for.

    Attributes:
      value: Share of the quantized model's pictures, 0 to 1.
      value_float: The same of the float model's pictures, from the same noise.
      net: The classifier.
      n: Pictures made by each model.
    """

    value: float
    value_float: float
    net: str
    n: int

    def __post_init__(self):
        _require_text("ClassAgreement", net=self.net)
        if not (0 <= self.value <= 1 and 0 <= self.value_float <= 1):
            raise ValueError(
                "agreement must be a share between 0 and 1; got "
                f"{self.value=}, {self.value_float=}. Divide percent by 100."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class VariantResult:
    """One quantized form of the model, held against the float model from the same noise.

    Attributes:
      name: Short and unique, such as `"W4A8 GPTQ"`.
      how: How it was quantized, in plain words without a full stop at the end.
      images: Its pictures, `[n, h, w, c]` in [0, 1], in the order of the report's seeds.
      bytes_quantized: Bytes of all its weights, scales and whatever stayed in float.
      psnr: dB of each picture against the float model's, `[m]` with `m >= n`; the first
        `n` belong to `images`.
      ssim: SSIM of the same pictures, `[m]`; None where pictures are too small for it.
      error_per_step: Relative L2 error of the running sample after each step, `[s]`, from
        the first step (nearly noise) to the last.
      timing: None where speed was not measured.
      distances: Distances between sets of pictures.
      agreement: None for models without classes.
      layers: Every layer of the model, in the model's order.
      settings: How it was quantized, a name and words for each matter.
      notes: Whatever a reader should know, a sentence each.
    """

    name: str
    how: str
    images: Float[np.ndarray, "n h w c"]
    bytes_quantized: int
    psnr: Float[np.ndarray, " m"]
    ssim: Float[np.ndarray, " m"] | None = None
    error_per_step: Float[np.ndarray, " s"]
    timing: Timing | None = None
    distances: tuple[FeatureDistance, ...] = ()
    agreement: ClassAgreement | None = None
    layers: tuple[LayerResult, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def quantized_layers(self) -> tuple[LayerResult, ...]:
        """The layers with low-bit weights."""
        return tuple(layer for layer in self.layers if layer.weight_bits is not None)

    @property
    def float_layers(self) -> tuple[LayerResult, ...]:
        """The layers left in float."""
        return tuple(layer for layer in self.layers if layer.weight_bits is None)


@dataclass(frozen=True, kw_only=True, eq=False)
class ComparisonReport:
    """One float model against its quantized variants, from the same noise.

    Attributes:
      title: Heading of the page.
      model: What the model is, in words a stranger understands, without a full stop.
      device: Where the times were measured, as precisely as known.
      sampler: Sampler and its settings in words, such as `"DDIM, 20 steps, guidance 2"`.
      versions: Pairs of a package's name and version.
      seeds: Seed of each picture shown.
      labels: What each picture shows, a class or a prompt; empty for none.
      float_images: The float model's pictures, `[n, h, w, c]` in [0, 1] with 1 or 3
        channels. Values outside are clipped when drawn; those that are not finite are
        marked and counted.
      bytes_float: Bytes of the float model's weights.
      float_dtype: What those are stored in.
      variants: At least one, with different names.
      timesteps: Training timestep at each sampling step, `s` of them; empty if none.
      worst_shown: How many of the pictures shown, the last ones, were chosen because they are
        the least alike of all that were drawn.
      notes: Whatever a reader should know, a sentence each.

    Raises:
      ValueError: Naming everything that does not fit together.
    """

    title: str
    model: str
    device: str
    sampler: str
    versions: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...]
    labels: tuple[str, ...] = ()
    float_images: Float[np.ndarray, "n h w c"]
    bytes_float: int
    float_dtype: str = "float32"
    variants: tuple[VariantResult, ...]
    timesteps: tuple[float, ...] = ()
    worst_shown: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if problems := _problems(self):
            raise ValueError("the report does not fit together: " + "; ".join(problems) + ".")

    @property
    def picture_names(self) -> tuple[str, ...]:
        """`seed 3: sneaker` for each picture, or `seed 3` where there are no labels."""
        labels = self.labels or ("",) * len(self.seeds)
        return tuple(
            f"seed {seed}: {label}" if label else f"seed {seed}"
            for seed, label in zip(self.seeds, labels, strict=True)
        )


def _problems(report: ComparisonReport) -> list[str]:
    """Everything that is wrong with the report, in words; empty where nothing is."""
    found: list[str] = []
    images, n = report.float_images, len(report.seeds)
    if not_numpy := _not_numpy(report):
        return [f"arrays must be NumPy's, wrap them in np.asarray: {', '.join(not_numpy)}"]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        found.append(f"float_images must be [n, h, w, 1 or 3]; got {images.shape}")
    if images.dtype.kind != "f":
        found.append(f"float_images must be floats in [0, 1]; got {images.dtype}")
    if len(images) != n:
        found.append(f"seeds must be one a picture; got {n} for {len(images)}")
    if report.labels and len(report.labels) != n:
        found.append(f"labels must be one a seed; got {len(report.labels)} for {n}")
    if not 0 <= report.worst_shown <= n:
        found.append(f"worst_shown must be at most the pictures, {n}; got {report.worst_shown}")
    if report.bytes_float <= 0:
        found.append(f"bytes_float must be positive; got {report.bytes_float}")
    if not report.variants:
        found.append("variants must hold at least one")
    counts = Counter(variant.name for variant in report.variants)
    if twice := [name for name, count in counts.items() if count > 1]:
        found.append(f"variants need different names; got twice {twice}")
    for variant in report.variants:
        found += [f"variant {variant.name!r}: {problem}" for problem in _misfits(report, variant)]
    return found


def _not_numpy(report: ComparisonReport) -> list[str]:
    """Names of the arrays that are something else; the drawing code is NumPy only."""
    arrays: dict[str, Any] = {"float_images": report.float_images}
    for variant in report.variants:
        for field in ("images", "psnr", "error_per_step"):
            arrays[f"{variant.name!r} {field}"] = getattr(variant, field)
        if variant.ssim is not None:
            arrays[f"{variant.name!r} ssim"] = variant.ssim
    return [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]


def _misfits(report: ComparisonReport, variant: VariantResult) -> list[str]:
    """Where a variant does not fit its report."""
    found: list[str] = []
    if variant.images.shape != report.float_images.shape:
        found.append(
            f"images must be shaped as float_images, {report.float_images.shape}; "
            f"got {variant.images.shape}"
        )
    if variant.images.dtype.kind != "f":
        found.append(f"images must be floats in [0, 1]; got {variant.images.dtype}")
    if variant.bytes_quantized <= 0:
        found.append(f"bytes_quantized must be positive; got {variant.bytes_quantized}")
    if variant.psnr.ndim != 1 or len(variant.psnr) < len(report.seeds):
        found.append(
            f"psnr must hold at least one number a picture, {len(report.seeds)}; "
            f"got shape {variant.psnr.shape}"
        )
    if variant.ssim is not None and variant.ssim.shape != variant.psnr.shape:
        found.append(
            f"ssim must pair with psnr {variant.psnr.shape}; got shape {variant.ssim.shape}"
        )
    steps = variant.error_per_step.shape
    if len(steps) != 1 or not steps[0]:
        found.append(f"error_per_step must be a non-empty [s]; got shape {steps}")
    elif report.timesteps and len(report.timesteps) != steps[0]:
        found.append(
            f"error_per_step must have one number a timestep, {len(report.timesteps)}; "
            f"got {steps[0]}"
        )
    return found


def as_dict(report: ComparisonReport) -> dict[str, Any]:
    """Everything but the pictures, ready for `json.dumps(..., allow_nan=False)`.

    Numbers that JSON cannot hold (the PSNR of equal pictures is infinite) become the
    strings `"inf"`, `"-inf"` and `"nan"`, which `float` reads back.
    """
    return _plain(report)


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        names = [name for name in value.__dataclass_fields__ if not name.endswith("images")]
        fields = {name: _plain(getattr(value, name)) for name in names}
        if isinstance(value, ComparisonReport):
            fields["versions"] = dict(value.versions)
        if isinstance(value, Timing):
            fields["speedup"] = value.speedup
        return fields
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
