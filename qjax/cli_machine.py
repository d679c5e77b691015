"""Commands about this machine: what it can do, and how fast a model runs on it."""

import dataclasses
from types import SimpleNamespace
from typing import Any

from rich.text import Text

import qjax
from qjax import doctor as doctor_
from qjax.bench import Benchmark, LayerTime, bench, dequantized, matmuls
from qjax.cli_models import MODEL, RECIPE, chosen_recipe, load_model
from qjax.cli_options import Command, Option, whole
from qjax.cli_output import Output, grid
from qjax.kernels import tuning
from qjax.models.pipeline import Pipeline
from qjax.report_layers import how_quantized
from qjax.report_words import SAME_SPEED, number_text, seconds_text
from qjax.roofline import Peak
from qjax.tune import tune

STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}
DEFAULT_RECIPE = "w8a8"
SLOWER = "slower"
ROOFLINE = ("rate", "bandwidth")


def doctor(settings: SimpleNamespace, output: Output) -> dict[str, Any]:
    """Everything that matters about this machine, a sentence each."""
    found = []
    with output.progress("looking") as tell:
        for finding in doctor_.findings():
            found.append(finding)
            tell(len(found), len(found) + 1, finding.about)
    rows = [
        (Text(one.grade, style=STYLES[one.grade]), Text(one.about), Text(one.text)) for one in found
    ]
    output.say(grid(("", "", ""), rows))
    wrong = [one for one in found if one.grade == "wrong"]
    count = f"{len(wrong)} {'thing is' if len(wrong) == 1 else 'things are'} wrong."
    output.say(count if wrong else "Nothing is wrong.")
    return {
        "findings": [dataclasses.asdict(one) for one in found],
        "wrong": len(wrong),
        "exit_status": 1 if wrong else 0,
    }


def run_bench(settings: SimpleNamespace, output: Output) -> dict[str, Any]:
    """Times of every layer and of a whole step, float and low-bit in turn."""
    pipe, quantized, name = _low_bit(settings, output)
    if pipe is quantized:
        pipe = dequantized(quantized)
    with output.progress("timing") as tell:
        found = bench(
            pipe, quantized, batch=settings.batch, rounds=settings.rounds, on_progress=tell
        )
    rows = [_row(layer, found.peak) for layer in found.layers]
    rows.append(
        (
            f"the whole network, {found.batch} pictures",
            "",
            "",
            *_times(found.step_float, found.step_low_bit),
            "",
            "",
        )
    )
    heads = ("layer", "kernel", "what ran", "float", "low-bit", "ratio", "", *ROOFLINE)
    output.say(f"{settings.model}, {name}: {how_quantized(quantized.params)}")
    output.say(grid(heads, rows, right="float low-bit ratio rate bandwidth"), _verdict(found))
    return {
        "model": settings.model,
        "recipe": name,
        "batch": found.batch,
        "rounds": found.rounds,
        "peak": found.peak._asdict() if found.peak else None,
        "layers": [_measured(layer, found.peak) for layer in found.layers],
        "step": {
            "seconds_float": found.step_float,
            "seconds_low_bit": found.step_low_bit,
            "ratio": found.step_low_bit / found.step_float,
        },
        "slower": [path for layer in _slower(found) for path in layer.paths],
    }


def _low_bit(settings: SimpleNamespace, output: Output) -> tuple[Pipeline, Pipeline, str]:
    """A model, the same quantized (one object if it is already), and what quantized it."""
    pipe = load_model(settings.model, output)
    how = how_quantized(pipe.params)
    if how == "not quantized":
        if settings.recipe is None and not settings.quant:
            settings.recipe = DEFAULT_RECIPE
        recipe = chosen_recipe(settings, pipe.params)
        quantized, name = qjax.quantize(pipe, recipe.quant), recipe.name
    elif settings.recipe is not None or settings.quant:
        raise ValueError(
            f"{settings.model} is quantized already ({how}); leave the recipe out, or give the "
            "float model."
        )
    else:
        quantized, name = pipe, "as saved"
    return pipe, quantized, name


def run_tune(settings: SimpleNamespace, output: Output) -> dict[str, Any]:
    """Measures every low-bit matmul's candidates, and keeps the fastest for later programs."""
    tuning.check_writable()
    _, quantized, name = _low_bit(settings, output)
    # With guidance the network is called with twice as many.
    wanted = matmuls(quantized, settings.batch) + matmuls(quantized, 2 * settings.batch)
    wanted = list(dict.fromkeys(wanted))
    with output.progress("tuning") as tell:
        found = tune(wanted, rounds=settings.rounds, on_progress=tell)
    file = tuning.keep({one.problem: one.choice for one in found})
    rows = [
        (
            one.problem.name(),
            one.choice.implementation,
            "rule" if one.choice.blocks is None else "x".join(map(str, one.choice.blocks)),
            str(one.tried),
            seconds_text(one.seconds_rule),
            seconds_text(one.seconds),
            f"{number_text(one.seconds / one.seconds_rule, 2)}x",
        )
        for one in found
    ]
    heads = ("matmul", "fastest", "blocks", "tried", "rule", "tuned", "ratio")
    faster = sum(one.seconds < one.seconds_rule for one in found)
    output.say(f"{settings.model}, {name}, on {tuning.machine()}")
    output.say(
        grid(heads, rows, right="tried rule tuned ratio"),
        f"{faster} of {len(found)} matmuls are faster than by rule; kept in {file}.",
    )
    return {
        "model": settings.model,
        "recipe": name,
        "machine": tuning.machine(),
        "file": str(file),
        "matmuls": [
            {
                "problem": one.problem.name(),
                "implementation": one.choice.implementation,
                "blocks": one.choice.blocks,
                "seconds_rule": one.seconds_rule,
                "seconds": one.seconds,
                "tried": one.tried,
                "failed": [[str(choice), why] for choice, why in one.failed],
            }
            for one in found
        ],
    }


def _measured(layer: LayerTime, peak: Peak | None) -> dict[str, Any]:
    rate, bandwidth = (None, None) if peak is None else layer.shares(peak)
    return dataclasses.asdict(layer) | {
        "ratio": layer.ratio,
        "of_peak": rate,
        "of_bandwidth": bandwidth,
    }


def _row(layer: LayerTime, peak: Peak | None) -> tuple[Any, ...]:
    name = layer.paths[0].removesuffix("/kernel")
    if len(layer.paths) > 1:
        name += f" and {len(layer.paths) - 1} alike"
    shape = "x".join(map(str, layer.shape))
    times = _times(layer.seconds_float, layer.seconds_low_bit)
    reached = ("", "") if peak is None else (f"{share:.0%}" for share in layer.shares(peak))
    return name, shape, layer.ran, *times, *reached


def _times(seconds_float: float, seconds_low_bit: float | None) -> tuple[Any, ...]:
    if seconds_low_bit is None:
        return seconds_text(seconds_float), "", "", ""
    ratio = seconds_low_bit / seconds_float
    flag = Text(SLOWER, style="bold red") if ratio > 1 + SAME_SPEED else Text("")
    return (
        seconds_text(seconds_float),
        seconds_text(seconds_low_bit),
        f"{number_text(ratio, 2)}x",
        flag,
    )


def _slower(found: Benchmark) -> list[LayerTime]:
    return [
        layer for layer in found.layers if layer.ratio is not None and layer.ratio > 1 + SAME_SPEED
    ]


def _verdict(found: Benchmark) -> str:
    ratio = found.step_low_bit / found.step_float
    words = f"A step at low bits takes {number_text(ratio)} times the float step"
    words += ": slower." if ratio > 1 + SAME_SPEED else "."
    low_bit = sum(len(layer.paths) for layer in found.layers if layer.ratio is not None)
    slower = sum(len(layer.paths) for layer in _slower(found))
    words += f" {slower} of {low_bit} low-bit layers are slower than in float."
    words += f" Medians of {found.rounds} rounds, both in turn."
    if found.peak is None:
        return words
    at_most = found.peak
    return (
        f"{words} Rate and bandwidth are shares of what the device can do ({at_most.source}): "
        f"{at_most.float_operations / 1e12:.3g} TFLOP/s, {at_most.int8_operations / 1e12:.3g} TOP/s "
        f"of int8, {at_most.bytes / 1e9:.3g} GB/s."
    )


TIMED = (
    dataclasses.replace(
        RECIPE, help=f"{RECIPE.help} (default for a float model: {DEFAULT_RECIPE})"
    ),
    Option(
        name="batch",
        read=whole(1),
        metavar="N",
        default=16,
        help="pictures in a call of the network",
    ),
    Option(
        name="rounds",
        read=whole(1),
        metavar="N",
        default=7,
        help="samples behind each median",
    ),
)

COMMANDS = (
    Command(
        name="bench",
        help="time every layer and a whole step, float against low-bit",
        run=run_bench,
        arguments=(MODEL,),
        options=TIMED,
        takes_quant=True,
        example="qjax bench fashion-dit --recipe w4a8",
    ),
    Command(
        name="tune",
        help="find the fastest way to do every low-bit matmul of a model on this machine",
        run=run_tune,
        arguments=(MODEL,),
        options=TIMED,
        takes_quant=True,
        example="qjax tune fashion-dit --recipe w4a8",
    ),
    Command(
        name="doctor",
        help="say what this machine can do, and what is wrong",
        run=doctor,
        example="qjax doctor",
    ),
)
