"""What does each part of PTQD's correction do? `python benchmarks/noise_correction.py MODEL`

A shipped model, rounded to nearest at few bits with a range for every step, is drawn with its
noise left as it is, then with the part corrected that follows the answer, then the bias, then
the variance of the sampler's own noise: 20 steps, guidance 2, the same noise for all. The
noise is collected on 256 items, on the float network's samples, and looked at on 256 others:

- error: of the answer, relative to the float one on the same samples, all steps together;
- bias: what is left of it in a channel, root mean square over steps and channels, beside the
  floor that is due to the numbers of items it was fitted and measured on;
- variance: what the sampler injects, its own noise and what is left of the answer's, over the
  float sampler's, mean over the steps where something is left of its own;
- latent error and FD: of pictures drawn by the corrected sampler, to the float model's.

The bias alone, `slope` of other kinds, the authors' deviations (`bias="total"`, `variance="released"`) and
samples of the quantized network are rows of their own. Rows in the result file are kept. Writes
`benchmarks/results/noise_correction.json`; without MODEL it prints tables.
"""

import argparse
import dataclasses
import time

import jax
import numpy as np
from _judge import Judge
from _rows import Rows, shown
from calibration_ladder import GUIDANCE, quant

import qjax
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.noise_correction import ENTRY, NoiseCorrection, noise_std_left
from qjax.calibrate.noise_statistics import Correction, Moments
from qjax.calibrate.recipe import Recipe, State, run
from qjax.calibrate.serial_parallel import SerialParallel
from qjax.calibrate.work import Work

NAME = "noise_correction"
ITEMS, PARTS = 256, 16
EVALUATION_SEED, HELD_OUT_SEED = 20251, 977

VARIANTS = {
    "none": {"correlated": False, "bias": "none", "variance": "none"},
    "+ correlated": {"bias": "none", "variance": "none"},
    "+ bias": {"variance": "none"},
    "+ variance": {},
    "bias alone": {"correlated": False, "variance": "none"},
    "own samples": {"driver": "quantized"},
    "within channels": {"slope": "within"},
    "signed": {"slope": "signed"},
    "mmse": {"slope": "mmse", "variance": "none"},
    "released": {"bias": "total", "variance": "released"},
}


def base(pipe: qjax.Pipeline, bits: int, act_bits: int, steps: int, eta: float, seed: int):
    """The model at few bits, with ranges alone."""
    stage = SerialParallel(
        fits="ranges",
        samples="float",
        ranges="mse",
        steps=steps,
        eta=eta,
        guidance_scale=GUIDANCE,
        data=CalibrationSet(items=64),
    )
    return run(pipe, Recipe(quant=quant(bits, act_bits), stages=(stage,), name="base"), seed=seed)


def bias_left(moments: Moments, correction: Correction) -> np.ndarray:
    """Mean of the corrected answer less the float one, by channel."""
    a, n = 1 / (1 + correction.k), moments.count
    return ((a - 1) * moments.e + a * (moments.d - n * np.asarray(correction.mu))) / n


def held_out(stage: NoiseCorrection, state: State) -> tuple[list[list[Moments]], dict]:
    """Moments of every step on items of their own, in parts, and the sampler's rows."""
    part = dataclasses.replace(stage, data=CalibrationSet(items=ITEMS // PARTS), driver="float")
    found = []
    for i in range(PARTS):
        rollout, noises = part.collect(state, jax.random.key(HELD_OUT_SEED + i), Work())
        found.append([noise.moments for noise in noises])
    return [list(step) for step in zip(*found, strict=True)], rollout.rows


def judged(
    corrections: list[Correction], entry: dict, parts: list[list[Moments]], rows: dict
) -> dict[str, float]:
    """Error, bias and variance on the held-out items."""
    whole = [sum(step[1:], step[0]) for step in parts]
    error = sum(m.error(c) for m, c in zip(whole, corrections, strict=True))
    signal = sum(m.signal for m in whole)
    bias, floor, ratios = [], [], []
    left = noise_std_left(np.asarray(entry["k"]), np.asarray(entry["variance"]), rows)
    for i, (step, correction) in enumerate(zip(parts, corrections, strict=True)):
        means = np.stack([bias_left(m, correction) for m in step])
        bias.append(bias_left(whole[i], correction))
        # Of as many items to fit as to measure.
        floor.append(np.std(means, axis=0, ddof=1) / np.sqrt(len(step)) * np.sqrt(2))
        std = rows["noise_std"][i]
        if std > 0 and left[i] > 0:
            spread = whole[i].error(correction) - float(np.mean(bias[-1] ** 2))
            gain, direction = rows["prediction_gain"][i], rows["mean_from_noise"][i]
            # The authors' program takes another direction, too.
            other = float(np.asarray(entry.get("mean_from_noise", rows["mean_from_noise"]))[i])
            gain = gain + (other - direction) * rows["noise_from_prediction"][i]
            injected = left[i] ** 2 + gain**2 * spread + other**2 - direction**2
            ratios.append(injected / std**2)
    rms = lambda values: float(np.sqrt(np.mean(np.square(values))))
    return {
        "error": float(np.sqrt(error / signal)),
        "bias": rms(bias),
        "bias_floor": rms(floor),
        "variance_ratio": float(np.mean(ratios)) if ratios else float("nan"),
        "clipped": int(np.sum((rows["noise_std"] > 0) & (left == 0))),
    }


def markdown(known: Rows) -> str:
    """The rows as tables, one for each model and eta: means over seeds, standard deviations."""
    lines = []
    for mine in known.by("model", "bits", "steps", "images", "eta"):
        first = mine[0]
        eta = first["eta"]
        positive = sorted({row["k_positive"] for row in mine})
        lines += [
            "",
            (
                f"`{first['model']}`, {first['bits']}, {first['steps']} steps, eta {eta:g}, "
                f"{first['images']} pictures; k above 0 at {'/'.join(map(str, positive))} steps"
            ),
            "",
            (
                "| corrected | seeds | error of the answer | bias (floor) | injected variance | "
                "latent error | FD |"
            ),
            "|---|---|---|---|---|---|---|",
        ]
        for name in (v for v in VARIANTS if any(row["variant"] == v for row in mine)):
            found = [row for row in mine if row["variant"] == name]

            variance = shown(found, "variance_ratio", 4) if eta else "-"
            lines.append(
                f"| {name} | {len(found)} | {shown(found, 'error', 4)} | {shown(found, 'bias', 4)} "
                f"({np.mean([row['bias_floor'] for row in found]):.4f}) | {variance} | "
                f"{shown(found, 'latent_error', 4)} | {shown(found, 'fd_to_float', 2)} |"
            )
    return "\n".join(lines).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="leave it out to see what is known as tables")
    parser.add_argument("--bits", default="3/6", help="of weights and of inputs, as 3/6")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--etas", type=float, nargs="+", default=[1.0, 0.0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    args = parser.parse_args()
    bits, act_bits = map(int, args.bits.split("/"))
    known = Rows(NAME)
    if args.model is None:
        print(markdown(known))
        return
    pipe = qjax.load(args.model)
    for eta in args.etas:
        judge = None
        for seed in range(args.seeds):
            what = {
                "model": args.model,
                "bits": f"W{bits}A{act_bits}",
                "steps": args.steps,
                "images": args.images,
                "eta": eta,
                "seed": seed,
            }
            missing = [n for n in args.variants if not known.has(what | {"variant": n})]
            if not missing:
                continue
            judge = judge or Judge(
                pipe,
                args.images,
                args.steps,
                guidance_scale=GUIDANCE,
                seed=EVALUATION_SEED,
                eta=eta,
            )
            start = time.perf_counter()
            state = State(pipe, base(pipe, bits, act_bits, args.steps, eta, seed))
            shared = {"steps": args.steps, "eta": eta, "guidance_scale": GUIDANCE}
            stage = NoiseCorrection(data=CalibrationSet(items=ITEMS), **shared)
            key = jax.random.key(1000 + seed)
            parts, rows = held_out(stage, state)
            collected = {}
            for name in missing:
                variant = dataclasses.replace(stage, **VARIANTS[name])
                driver = variant.driver
                if driver not in collected:
                    collected[driver] = variant.collect(state, key, Work())
                rollout, noises = collected[driver]
                corrections = [variant.fit(noise.moments) for noise in noises]
                entry = variant.entry(corrections, rows)
                table = rollout.table
                if name != "none":
                    table = table.with_entry(ENTRY, entry, key=variant.key(state.student))
                made = state.student.replace(step_table=table)
                result = {
                    **what,
                    "variant": name,
                    **judge(judge.draw(made)),
                    **judged(corrections, entry, parts, rows),
                    "k": [round(one.k, 4) for one in corrections],
                    "k_positive": sum(noise.moments.slope > 0 for noise in noises),
                    "slope": [round(noise.moments.slope, 4) for noise in noises],
                    "seconds": round(time.perf_counter() - start, 1),
                }
                known.add(result)


if __name__ == "__main__":
    main()
