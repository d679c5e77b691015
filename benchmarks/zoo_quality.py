"""How good are the float models of the zoo? `python benchmarks/zoo_quality.py`

Draws guided samples of every class and reports, per guidance scale, how often the zoo's
classifier sees the class that was asked for, and the Frechet distance of the samples to the
real test set in the classifier's features, beside the distance between two halves of the
real test set. Writes `benchmarks/results/zoo_quality.json`.
"""

import argparse

import jax
import numpy as np
from _timing import write

import qjax
from qjax.core import metrics
from qjax.zoo import judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    real, known = judge.real_statistics(), judge.record()
    rows = []
    for name in qjax.zoo_names():
        pipe = qjax.load(name)
        labels = np.arange(args.images) % pipe.num_labels
        for scale in args.guidance:
            images = np.asarray(
                pipe(
                    labels=labels,
                    steps=args.steps,
                    guidance_scale=scale,
                    key=jax.random.key(args.seed),
                )
            )
            seen = judge.judge(images)
            row = {
                "model": name,
                "guidance": scale,
                "steps": args.steps,
                "n": args.images,
                "class_agreement": metrics.class_agreement(seen.classes, labels),
                "fd_to_real_test": metrics.frechet_distance(seen.features, real).value,
            }
            rows.append(row)
            print(row, flush=True)
    reference = {key: value for key, value in known.items() if key != "labels"}
    print(reference)
    write("zoo_quality", [*rows, reference])


if __name__ == "__main__":
    main()
