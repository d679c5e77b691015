"""Where in a run are bits needed? `python benchmarks/step_bits.py MODEL`

A shipped model with 8-bit weights, and inputs of 4, 6 or 8 bits by the step of the sampler:
20 steps, guidance 2, without (`--etas 0`) or with (1) fresh noise of the sampler, the same bit
operations for all but the first two rows. Ranges of every width are its own, the schedules
share weights and program.

| row | bits of the inputs |
|---|---|
| all 8, all 4 | 8, or 4, at all steps |
| uniform | 6 at all steps |
| early low | 4 in the first half, 8 in the second |
| late low | 8 in the first half, 4 in the second |
| chosen, last | of 4, 6 and 8, by the error that each step alone brings into the last samples |
| chosen, next | by the noise that it brings into the next sample |

Latent error is the relative L2 distance of the last latents to those of the float model, from
noise that nothing was fitted on. Rows in the result file are kept. Writes
`benchmarks/results/step_bits.json` and, of the first seed, `docs/pictures/step_bits_MODEL_etaE.svg`;
without MODEL it prints tables.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
from _judge import Judge
from _rows import Rows, shown
from calibration_ladder import GUIDANCE, quant

import qjax
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.recipe import Recipe, run
from qjax.calibrate.serial_parallel import SerialParallel
from qjax.calibrate.step_bits import StepBits
from qjax.plots import line_plot, save_plot

NAME = "step_bits"
WEIGHT_BITS, CHOICES = 8, (4, 6, 8)
EVALUATION_SEED = 20251
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


def schedules(steps: int) -> dict[str, dict]:
    """Settings of `StepBits` by row."""
    half = steps // 2
    return {
        "all 8": {"bits": (8,)},
        "all 4": {"bits": (4,)},
        "uniform": {"bits": (6,)},
        "early low": {"bits": (*(4,) * half, 8)},
        "late low": {"bits": (*(8,) * half, 4)},
        "chosen, last": {"mean_bits": 6.0},
        "chosen, next": {"mean_bits": 6.0, "cost": "next"},
    }


def markdown(known: Rows) -> str:
    """The rows as tables, one for each model: means over seeds, and their standard deviations."""
    lines = []
    for mine in known.by("model", "steps", "images", "eta"):
        first = mine[0]
        lines += [
            "",
            (
                f"`{first['model']}`, W{WEIGHT_BITS}, {first['steps']} steps, eta {first['eta']:g}, "
                f"{first['images']} pictures"
            ),
            "",
            "| row | seeds | mean bits | fewer bit operations | latent error | FD | schedule |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in dict.fromkeys(row["row"] for row in mine):
            found = [row for row in mine if row["row"] == name]
            lines.append(
                f"| {name} | {len(found)} | {found[0]['mean_bits']:.2f} | "
                f"{found[0]['gain']:.1f}x | {shown(found, 'latent_error', 4)} | "
                f"{np.mean([row['fd_to_float'] for row in found]):.2f} | "
                f"{found[0]['schedule'].replace(' ', '')} |"
            )
    return "\n".join(lines).strip()


def draw_costs(model: str, eta: float, costs: list[dict]) -> str:
    """An SVG document: the error that few bits at one step alone bring about."""
    x = [one["step"] for one in costs]
    return line_plot(
        {
            f"{bits} bits at this step, {CHOICES[-1]} at the others": (
                x,
                [one[f"cost_{bits}"] ** 0.5 for one in costs],
            )
            for bits in CHOICES[:-1]
        },
        title=f"Where bits are needed: {model}, eta {eta:g}",
        x_label="step of the sampler",
        y_label="relative L2 error of the last samples",
        log_y=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="leave it out to see what is known as tables")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--etas", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--rows", nargs="+", help="rows to add; default all")
    args = parser.parse_args()
    known = Rows(NAME)
    if args.model is None:
        print(markdown(known))
        return
    pipe = qjax.load(args.model)
    for eta in args.etas:
        measure(pipe, eta, known, args)


def measure(pipe: qjax.Pipeline, eta: float, known: Rows, args: argparse.Namespace) -> None:
    """Add the rows that are missing."""
    judge = None
    shared = {
        "steps": args.steps,
        "eta": eta,
        "guidance_scale": GUIDANCE,
        "data": CalibrationSet(items=32),
        "ranges": "mse",
    }
    ranges = SerialParallel(fits="ranges", samples="float", **shared)
    wanted = schedules(args.steps)
    for seed, row in itertools.product(range(args.seeds), args.rows or wanted):
        settings = wanted[row]
        what = {
            "model": args.model,
            "steps": args.steps,
            "images": args.images,
            "eta": eta,
            "row": row,
            "seed": seed,
        }
        if known.has(what):
            continue
        judge = judge or Judge(
            pipe, args.images, args.steps, guidance_scale=GUIDANCE, seed=EVALUATION_SEED, eta=eta
        )
        choices = CHOICES if "mean_bits" in settings else tuple(set(settings["bits"]))
        bits = StepBits(**(shared | settings | {"choices": choices}))
        recipe = Recipe(quant=quant(WEIGHT_BITS, 8), stages=(ranges, bits), name=row)
        events = []
        start = time.perf_counter()
        made = run(pipe, recipe, seed=seed, on_event=events.append)
        seconds = time.perf_counter() - start
        said = next(event for event in events if event["event"] == "schedule")
        costs = [event for event in events if event["event"] == "cost"]
        known.add(
            {
                **what,
                **judge(judge.draw(made)),
                "schedule": said["bits"],
                "mean_bits": said["mean_bits"],
                "gain": said["gain"],
                "expected": float(np.sqrt(sum(c[f"cost_{c['bits']}"] for c in costs)))
                if settings.get("cost") != "next" and costs
                else None,
                "measured": said["error"] if costs else None,  # to 8 bits throughout
                "seconds": round(seconds, 1),
            }
        )
        if row == "chosen, last" and seed == 0:
            picture = PICTURES / f"step_bits_{args.model}_eta{eta:g}.svg"
            save_plot(picture, draw_costs(args.model, eta, costs))


if __name__ == "__main__":
    main()
