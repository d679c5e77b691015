"""Does a quantized zoo model sample as fast as the float one? `python benchmarks/sampling.py`

Whole sampling runs, the float model and its quantized forms in turn in one process, medians
of seven. Writes `benchmarks/results/sampling.json`.
"""

import argparse
import functools

import jax
from _timing import interleaved, write

import qjax
from qjax import recipes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=2.0)
    args = parser.parse_args()
    rows = []
    for name in qjax.zoo_names():
        pipe = qjax.load(name)
        pipes = {"float": pipe}
        pipes |= {key: qjax.quantize(pipe, recipes.by_name(key)) for key in recipes.DATA_FREE}
        settings = {
            "labels": [i % 10 for i in range(args.images)],
            "steps": args.steps,
            "guidance_scale": args.guidance,
            "key": jax.random.key(0),
        }
        calls = {key: functools.partial(one, **settings) for key, one in pipes.items()}
        for key, result in interleaved(calls).items():
            verdict = "slower than float" if result["ratio"] > 1.02 else ""
            row = {"model": name, "variant": key, "images": args.images, "steps": args.steps}
            row |= result | {"verdict": verdict}
            rows.append(row)
            print(f"{name:14} {key:6} {result['ms']:8.1f} ms  {result['ratio']:.2f}x {verdict}")
    write("sampling", rows)


if __name__ == "__main__":
    main()
