"""How a pipeline was quantized, read from what it remembers, in words for the report."""

import math
from collections.abc import Sequence

from qjax import recipes
from qjax.calibrate.recipe import Recipe
from qjax.core.layers import LOW_RANK
from qjax.core.qtensor import QTensor, is_qtensor
from qjax.core.serialize import flatten
from qjax.models.pipeline import Pipeline
from qjax.report_data import LayerResult
from qjax.report_words import count_text, percent_text

STAGES = {
    "GPTQ": "weights rounded one after the other, each making up for the errors before it (GPTQ)",
    "GranularitySearch": "group sizes chosen layer by layer, by search on pictures",
    "LowRank": "a small 16-bit branch beside each layer holds what its low-bit weights miss",
    "MixedPrecision": "bits chosen layer by layer, by how much each layer matters",
    "NoiseCorrection": "the mean and the size of the quantization noise corrected at every step",
    "SerialParallel": "weights and ranges fitted, block by block, to what the float model computes",
    "Smoothing": "scale moved from the inputs of layers into their weights",
    "StepBits": "bits of the layers' inputs chosen step by step",
    "TimePrecalculation": "what depends on the time step alone computed once, in float",
}
"""What the stages of a recipe do, by the names of their classes."""

_INPUTS = {
    "dynamic": "the range is taken from the numbers themselves while the model runs",
    "static": "in one range for all steps, found by calibration",
    "per_step": "in a range for each step, found by calibration",
}
_ENTRIES = {
    "noise_correction": STAGES["NoiseCorrection"],
    "quant": "ranges of the layers' inputs for every step",
    "time": STAGES["TimePrecalculation"],
}


def settings_of(
    pipe: Pipeline, layers: Sequence[LayerResult], recipe: Recipe | str | None = None
) -> tuple[tuple[str, str], ...]:
    """Names and words of everything that was chosen; empty for a float pipeline.

    Args:
      pipe: The quantized pipeline.
      layers: Its layers (`layer_results`).
      recipe: How it was made, if known: a pipeline remembers its rules, but not its stages.
    """
    stored = [leaf for _, leaf in flatten(pipe.params) if is_qtensor(leaf)]
    if not stored:
        return ()
    facts = (
        ("Weights", _weight_words(stored, layers)),
        ("Groups", _group_words(stored)),
        ("Rounding", _rounding_words(pipe, stored)),
        ("Inputs of layers", _input_words(stored)),
        ("Calibration", _calibration_words(pipe, recipe)),
        ("Left in float", _float_words(pipe, layers)),
    )
    said = tuple((name, words[:1].upper() + words[1:]) for name, words in facts)
    return (("Recipe", _recipe_words(pipe, recipe)), *said)


def _recipe_words(pipe: Pipeline, recipe: Recipe | str | None) -> str:
    if isinstance(recipe, Recipe):
        return recipe.name
    if recipe:
        return recipe
    same = [name for name, make in recipes.DATA_FREE.items() if make().quant == pipe.quant]
    if same and not _traces(pipe):
        return f"the rules of {same[0]}"
    return "rules of its own"


def _weight_words(stored: Sequence[QTensor], layers: Sequence[LayerResult]) -> str:
    counts: dict[tuple[int, int], int] = {}
    for leaf in stored:
        # A range that is mirrored leaves one level out (`qjax.core.quantizers`).
        kind = (leaf.bits, 2**leaf.bits - (leaf.zero_point is None))
        counts[kind] = counts.get(kind, 0) + math.prod(leaf.shape)
    low_bit, everything = sum(counts.values()), sum(math.prod(layer.shape) for layer in layers)
    kinds = [
        f"{bits}-bit integers, {levels} levels each"
        + (f" ({percent_text(count / low_bit)} of them)" if len(counts) > 1 else "")
        for (bits, levels), count in sorted(counts.items())
    ]
    return (
        f"{count_text(low_bit)} of {count_text(everything)} numbers "
        f"({percent_text(low_bit / everything)}) are {'; '.join(kinds)}"
    )


def _group_words(stored: Sequence[QTensor]) -> str:
    sizes = sorted({leaf.group_size for leaf in stored if leaf.group_size})
    parts = []
    if sizes:
        parts.append(f"{' or '.join(map(str, sizes))} weights share one scale")
    if any(leaf.group_size is None for leaf in stored):
        parts.append("all weights of an output channel share one scale")
    kinds = sorted({str(leaf.scale.dtype) for leaf in stored})
    return f"{'; in other layers '.join(parts)}. Scales are stored as {' or '.join(kinds)}"


def _rounding_words(pipe: Pipeline, stored: Sequence[QTensor]) -> str:
    zero_points = sum(leaf.zero_point is not None for leaf in stored)
    ends = "the range is mirrored at zero"
    if zero_points == len(stored):
        ends = "the range has a zero point"
    elif zero_points:
        ends = f"the range has a zero point in {zero_points} of {len(stored)} layers"
    weight = pipe.quant.weight if pipe.quant is not None else None
    if weight is None:
        return ends
    found = {
        "minmax": "covers the smallest and the largest weight",
        "mse": "was searched for the least error",
    }
    return f"{ends} and, as far as calibration has not moved it, {found[weight.method]}"


def _input_words(stored: Sequence[QTensor]) -> str:
    acts = {(leaf.act.bits, leaf.act.mode) for leaf in stored if leaf.act is not None}
    parts = [f"{bits}-bit integers, {_INPUTS[mode]}" for bits, mode in sorted(acts)]
    if any(leaf.act is None for leaf in stored):
        parts.append("in float" if parts else "stay in float")
    return "; in other layers ".join(parts)


def _calibration_words(pipe: Pipeline, recipe: Recipe | str | None) -> str:
    if isinstance(recipe, Recipe) and recipe.stages:
        names = [type(stage).__name__ for stage in recipe.stages]
        return "; then ".join(STAGES.get(name, name) for name in names)
    if traces := _traces(pipe):
        return "; ".join(traces)
    if isinstance(recipe, Recipe):
        return "none: no data was needed"
    return "none that the model remembers"


def _traces(pipe: Pipeline) -> list[str]:
    """What calibration has left in a pipeline besides integers."""
    traces = []
    if pipe.smoothed:
        traces.append(STAGES["Smoothing"])
    if not pipe.loras and any(LOW_RANK[0] in path.split("/") for path, _ in flatten(pipe.params)):
        traces.append(STAGES["LowRank"])
    if pipe.step_table is not None:
        traces += [_ENTRIES.get(name, name) for name in pipe.step_table.entries]
    return traces


def _float_words(pipe: Pipeline, layers: Sequence[LayerResult]) -> str:
    kept = [layer for layer in layers if layer.weight_bits is None]
    if not kept:
        return "nothing"
    numbers = sum(math.prod(layer.shape) for layer in kept)
    dtypes = sorted({str(leaf.dtype) for _, leaf in flatten(pipe.params) if not is_qtensor(leaf)})
    return (
        f"{len(kept):,} of {len(layers):,} tensors, {count_text(numbers)} numbers, as "
        f"{' or '.join(dtypes)}"
    )
