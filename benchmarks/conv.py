"""Which form of a low-bit convolution is the fastest? `python benchmarks/conv.py`

`ops.conv` of each format as it chooses by itself, and the forms it chooses from, all with
the dynamic quantization of the input included, and the float32 convolution, in turn in one
process. Writes `benchmarks/results/conv.json` and prints the table; `ratio` below 1 is
faster than float. The thresholds at the top of `qjax/core/ops.py` come from here.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _timing import interleaved, table, write
from jax import lax

from qjax.core import ops
from qjax.core.config import ActSpec, WeightSpec
from qjax.core.qtensor import from_codes
from qjax.core.quantizers import quantize_activation, quantize_weight
from qjax.kernels.packing import Format
from qjax.kernels.quant_conv_xla import IMAGE, float_dots, im2col, pad_image, shifted_dots

# b, h, w, i, o, kernel: a UNet's first and deeper levels, and those of the zoo's small ones.
SHAPES = (
    (2, 32, 32, 320, 320, 3),
    (1, 16, 16, 640, 640, 3),
    (1, 16, 16, 1280, 1280, 3),
    (64, 32, 32, 16, 16, 3),
    (64, 16, 16, 48, 48, 3),
    (64, 8, 8, 96, 96, 3),
    (2, 32, 32, 320, 320, 1),
    (64, 16, 16, 48, 48, 1),
    (64, 8, 8, 96, 96, 1),
)
FORMATS = {
    "w8a8": (WeightSpec(bits=8), ActSpec()),
    "w4a8": (WeightSpec(bits=4), ActSpec()),
    "w4a16": (WeightSpec(bits=4), None),
}


def quantize(w, spec: WeightSpec, act: ActSpec | None):
    codes = quantize_weight(w, spec)
    layout = "native" if spec.bits == 8 else "packed"
    return from_codes(*codes, bits=spec.bits, act=act, layout=layout)


def forms() -> dict:
    """The integer convolution of an image `x` with int8 `q`, in every way there is."""

    def patches(x, q, pads):
        rows = im2col(pad_image(x, pads, None), q.shape[:2], 1)
        return jnp.matmul(rows, q.reshape(-1, q.shape[3]), preferred_element_type=jnp.int32)

    def shifted(x, q, pads):
        return shifted_dots(pad_image(x, pads, None), q, 1, Format(bits=8))

    def native(x, q, pads):
        return lax.conv_general_dilated(
            x, q, (1, 1), pads, dimension_numbers=IMAGE, preferred_element_type=jnp.int32
        )

    return {
        "form: im2col": patches,
        "form: shifted": shifted,
        "form: floats": lambda x, q, pads: float_dots(x, q, 1, pads),
        "form: xla int8 conv": native,
    }


def with_quantization(dots):
    def run(x, q):
        p = quantize_activation(x, ActSpec(), sample_axes=(-3, -2, -1))
        pad = (q.shape[0] - 1) // 2
        y = dots(lax.optimization_barrier(p.codes), q.qvalue, ((pad, pad), (pad, pad)))
        return y.astype(jnp.float32) * p.scale * q.scale.astype(jnp.float32)

    return jax.jit(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write; default benchmarks/results")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    run = jax.jit(ops.conv)
    results = []
    for b, h, w, i, o, kernel in SHAPES:
        x = jnp.asarray(rng.standard_normal((b, h, w, i)), jnp.float32)
        weights = rng.standard_normal((kernel, kernel, i, o)) / (kernel**2 * i) ** 0.5
        weights = jnp.asarray(weights, jnp.float32)
        calls = {"f32": functools.partial(run, x, weights)}
        for name, fmt in FORMATS.items():
            calls[name] = functools.partial(run, x, quantize(weights, *fmt))
        int8 = quantize(weights, *FORMATS["w8a8"])
        for name, dots in forms().items():
            calls[name] = functools.partial(with_quantization(dots), x, int8)
        shape = {"b": b, "h": h, "w": w, "i": i, "o": o, "kernel": kernel}
        rows = [{**shape, "format": name, **result} for name, result in interleaved(calls).items()]
        print(table(rows), flush=True)
        results += rows
    print(write("conv", results, out=args.out))


if __name__ == "__main__":
    main()
