"""Does a step unlearn what it was taught while the others have their turns? `python
benchmarks/saw_tooth.py`

The latent diffusion model of the zoo at W3A6, 10 steps, guidance 2: from one roll-out its
weights are fitted with batches of one step of the sampler, step after step (`order="serial"`,
one optimizer step each), and with batches of all steps (`order="shuffled"`), the same number of
iterations of the same size. After every iteration the error of the first step is taken on
items that are not fitted, relative to rounding to nearest. The rise is what an epoch (a turn
of every step) adds to the error after the step's own turn, on average (`calibrate/traces.py`).

Writes `benchmarks/results/saw_tooth.json` and `docs/pictures/saw_tooth.svg`.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from _timing import table, write
from calibration_ladder import GUIDANCE, quant

import qjax
from qjax.calibrate.calibration import Calibration
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.ranges import to_fitted
from qjax.calibrate.recipe import quantize_pipeline
from qjax.calibrate.reconstruction import FitSettings
from qjax.calibrate.serial_parallel_settings import SerialParallelSettings
from qjax.calibrate.traces import network_problem, pairs_of, rises, trace
from qjax.calibrate.work import Work
from qjax.plots import line_plot, save_plot

MODEL, BITS, ACT_BITS = "fashion-ldm", 3, 6
STEPS, ITEMS, BATCH = 10, 32, 8
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "saw_tooth.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[3e-3, 1e-3], help="the first is drawn"
    )
    parser.add_argument("--out", type=Path, help="JSON file; None for the usual, with the plot")
    args = parser.parse_args()
    pipe = qjax.load(MODEL)
    settings = SerialParallelSettings(
        steps=STEPS,
        guidance_scale=GUIDANCE,
        data=CalibrationSet(items=ITEMS),
        ranges="minmax",
        batch=BATCH,
    )
    student = quantize_pipeline(pipe, quant(BITS, ACT_BITS))
    run = Calibration(pipe, student, settings, jax.random.key(0), Work())
    buffer = run.roll_out("roll-out")
    run.tables = to_fitted(buffer.ranges, run.student.formats)
    block = run.student.whole()
    problem = network_problem(run, buffer, pairs_of(range(STEPS), range(ITEMS // 2)))
    held_out = network_problem(run, buffer, pairs_of([0], range(ITEMS // 2, ITEMS)))
    rows, traces = [], []
    for rate in args.rates:
        for order in ("serial", "shuffled"):
            fit = FitSettings(
                weights="latent",
                weight_rate=rate,
                order=order,
                iterations=args.epochs * STEPS,
                batch=BATCH,
            )
            begin = run.student.begin(block, problem.fixed, run.tables, fit, run.key)
            start = time.perf_counter()
            runner = run.student.runner(block)
            found = trace(runner, problem, begin, fit, jax.random.key(1), held_out=held_out)[:, 0]
            teeth = rises(found, steps=STEPS)
            rows.append(
                {
                    "model": MODEL,
                    "bits": f"W{BITS}A{ACT_BITS}",
                    "steps": STEPS,
                    "batch": BATCH,
                    "order": order,
                    "rate": rate,
                    "rise": float(np.mean(teeth)),
                    "rise_by_epoch": [round(value, 4) for value in teeth.tolist()],
                    "highest": float(found.max()),
                    "last": float(found[-1]),
                    "seconds": round(time.perf_counter() - start, 1),
                }
            )
            traces.append([round(value, 5) for value in found.tolist()])
            print(table(rows[-1:]), flush=True)
    for row, errors in zip(rows, traces, strict=True):
        row["errors_of_step_0"] = errors
    write("saw_tooth", rows, out=args.out)
    if args.out is None:
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        picture = line_plot(
            {row["order"]: (range(len(y)), y) for row, y in zip(rows[:2], traces[:2], strict=True)},
            title=f"Error of the first of {STEPS} steps while {MODEL} is fitted",
            x_label=f"iteration (a turn of all steps is {STEPS})",
            y_label="error relative to rounding to nearest, items that are not fitted",
        )
        save_plot(PICTURE, picture)


if __name__ == "__main__":
    main()
