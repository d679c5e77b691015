"""What does each part of the calibration gain? `python benchmarks/calibration_ladder.py MODEL`

From rounding to nearest up to serial-to-parallel with mixed precision and precalculated time,
on a shipped model at few bits: the same calibration items, the same number of evaluations of
the network (those with gradients included; a fit of blocks counts as one of the network), and
pictures from the same noise, which was not calibrated on.

| row | samples | what is fitted |
|---|---|---|
| nearest | of the float network | ranges |
| parallel | of the float network | AdaRound, block by block (Q-Diffusion, TFMQ-DM) |
| parallel, network | of the float network | the network at once, as in serial-to-parallel |
| serial | own, online | the network, step after step (EfficientDM) |
| register | own, online | the network, all steps at once (shift register) |
| s2p R=1, R=3 | own, refreshed R - 1 times | the network |
| s2p R=3, faster | own, refreshed twice | the same with rate 0.01 (0.005) |
| s2p R=3, float first | of the float network until the first refresh | the network |
| + mixed | own | the same, bits by layer at the same mean |
| + time | own | the same, and time layers tabulated in float: no bits of theirs to share out |
| + time, same bytes | own | the same, what the time layers took given to the others |

Latent error is the relative L2 distance of the final latents to the float model's; FD the
Frechet distance between the pictures' features. Rows already in the result file are kept, so
that a run can be broken off. Writes `benchmarks/results/calibration_ladder.json`.
"""

import argparse
import dataclasses
import time

import numpy as np
from _judge import Judge
from _rows import Rows, shown

import qjax
from qjax import recipes
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.mixed_precision import MixedPrecision
from qjax.calibrate.recipe import Recipe, Stage, run
from qjax.calibrate.reconstruction import FitSettings
from qjax.calibrate.serial_parallel import SerialParallel
from qjax.calibrate.time_table import TimePrecalculation
from qjax.core.config import ActSpec, QuantConfig, WeightSpec
from qjax.core.qtensor import is_qtensor
from qjax.core.quantize import tree_bytes
from qjax.core.serialize import flatten

GUIDANCE = 2.0
ITEMS, PAIRS, BATCH = 64, 512, 32
BUDGET = 16384
EVALUATION_SEED = 20251
NAME = "calibration_ladder"


def quant(bits: int, act_bits: int, *, time_in_float: bool = False) -> QuantConfig:
    """Weights per output channel, inputs with a range for every step."""
    rules = (*recipes.EDGES, recipes.TIME) if time_in_float else recipes.EDGES
    act = dataclasses.replace(recipes.PER_STEP_A8, bits=act_bits)
    assert isinstance(act, ActSpec)
    weight = WeightSpec(bits=bits, method="mse")
    return QuantConfig(
        rules=rules, weight=weight, act=act, float_dtype="float16", allow_unmatched=True
    )


def stages(row: str, steps: int, bits: float, max_bytes: int) -> tuple[Stage, ...]:
    """The stages of a row, each with the iterations that its budget allows."""
    data = CalibrationSet(items=ITEMS)
    shared = {"steps": steps, "guidance_scale": GUIDANCE, "data": data, "ranges": "minmax"}
    roll_out = 2 * steps * ITEMS  # both halves
    answers = 2 * PAIRS
    latent = FitSettings(weights="latent", batch=BATCH)

    def iterations(spent: float, each: float = BATCH) -> int:
        return int((BUDGET - spent) / each)

    def fitted(
        rounds: int, samples: str = "quantized", rate: float | None = None
    ) -> SerialParallel:
        # A roll-out that the float network drives evaluates both.
        rolls = rounds + (samples == "float_first")
        count = iterations(rolls * roll_out + rounds * answers)
        fit = dataclasses.replace(latent, iterations=count, weight_rate=rate)
        return SerialParallel(
            fits="network", fit=fit, pairs=PAIRS, refreshes=rounds, samples=samples, **shared
        )

    if row == "nearest":
        return (SerialParallel(fits="ranges", samples="float", **shared),)
    if row.startswith("parallel"):
        # A float-driven roll-out evaluates both networks.
        count = iterations(2 * roll_out + answers)
        if row == "parallel":
            fit = FitSettings(weights="adaround", batch=BATCH, iterations=count)
            return (SerialParallel(samples="float", fit=fit, pairs=PAIRS, **shared),)
        fit = dataclasses.replace(latent, iterations=count)
        return (SerialParallel(samples="float", fits="network", fit=fit, pairs=PAIRS, **shared),)
    if row == "serial":
        # An iteration moves its samples on, and asks the float network, besides.
        count = iterations(roll_out, 3 * BATCH)
        fit = dataclasses.replace(latent, iterations=count)
        return (SerialParallel(schedule="serial", fits="network", fit=fit, **shared),)
    if row == "register":
        moving = -(-BATCH // (2 * steps)) * 2 * steps
        count = iterations(roll_out, BATCH + 2 * moving / 5)
        fit = dataclasses.replace(latent, iterations=count)
        return (
            SerialParallel(schedule="register", shift_every=5, fits="network", fit=fit, **shared),
        )
    if row == "s2p R=3, float first":
        return (fitted(3, "float_first"),)
    if row == "s2p R=3, faster":
        return (fitted(3, rate=0.01),)
    if row.startswith("s2p"):
        return (fitted(int(row[-1])),)
    same_bytes = row == "+ time, same bytes"
    mixed = MixedPrecision(
        mean_bits=None if same_bytes else bits,
        max_bytes=max_bytes if same_bytes else None,
        choices=(2, 3, 4, 5, 6, 8),
        steps=steps,
        guidance_scale=GUIDANCE,
        data=data,
        pairs=64,
        rescore=0.0,
    )
    if row == "+ mixed":
        return (mixed, fitted(3))
    return (mixed, fitted(3), TimePrecalculation(steps=steps))


ROWS = (
    "nearest",
    "parallel",
    "parallel, network",
    "serial",
    "register",
    "s2p R=1",
    "s2p R=3",
    "s2p R=3, faster",
    "s2p R=3, float first",
    "+ mixed",
    "+ time",
    "+ time, same bytes",
)


def mean_bits(pipe: qjax.Pipeline) -> float:
    """Bits of a quantized weight, on average."""
    found = [leaf for _, leaf in flatten(pipe.params) if is_qtensor(leaf)]
    sizes = np.asarray([np.prod(leaf.shape) for leaf in found], np.float64)
    return float(np.sum(sizes * [leaf.bits for leaf in found]) / np.sum(sizes))


def markdown(known: Rows) -> str:
    """The rows as tables, one a setting: means over seeds, and their standard deviations."""
    lines = []
    for mine in known.by("model", "bits", "steps", "images"):
        first = mine[0]
        lines += [
            "",
            f"`{first['model']}`, {first['bits']}, {first['steps']} steps, {first['images']} pictures",
            "",
            "| row | seeds | latent error | FD | SSIM | mean bits | MB | evaluations | seconds |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name in sorted({row["row"] for row in mine}, key=ROWS.index):
            found = [row for row in mine if row["row"] == name]

            lines.append(
                f"| {name} | {len(found)} | {shown(found, 'latent_error', 3)} | "
                f"{shown(found, 'fd_to_float', 2)} | {shown(found, 'ssim', 3)} | {found[0]['mean_bits']:.2f} | {found[0]['bytes'] / 1e6:.2f} | "
                f"{found[0]['forwards']:,} | {np.mean([row['seconds'] for row in found]):.0f} |"
            )
    return "\n".join(lines).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="leave it out to see what is known as tables")
    parser.add_argument("--bits", default="3/6", help="of weights and of inputs, as 3/6")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    args = parser.parse_args()
    bits, act_bits = map(int, args.bits.split("/"))
    known = Rows(NAME)
    if args.model is None:
        print(markdown(known))
        return
    pipe = qjax.load(args.model)
    found = None
    for seed in range(args.seeds):
        for row in args.rows:
            what = {
                "model": args.model,
                "bits": f"W{bits}A{act_bits}",
                "steps": args.steps,
                "images": args.images,
                "row": row,
                "seed": seed,
            }
            if known.has(what):
                continue
            found = found or Judge(
                pipe, args.images, args.steps, guidance_scale=GUIDANCE, seed=EVALUATION_SEED
            )
            plain = qjax.plan(pipe.params, quant(bits, act_bits)).entries
            layer_bytes = sum(entry.bytes_after for entry in plain if entry.weight is not None)
            config = quant(bits, act_bits, time_in_float=row.startswith("+ time"))
            recipe = Recipe(
                quant=config, stages=stages(row, args.steps, bits, layer_bytes), name=row
            )
            events = []
            start = time.perf_counter()
            made = run(pipe, recipe, seed=seed, on_event=events.append)
            seconds = time.perf_counter() - start
            result = {
                **what,
                **found(found.draw(made)),
                "seconds": round(seconds, 1),
                "forwards": sum(e["forwards"] for e in events if e["event"] == "done"),
                "mean_bits": round(mean_bits(made), 3),
                "bytes": tree_bytes(made.params),
            }
            known.add(result)


if __name__ == "__main__":
    main()
