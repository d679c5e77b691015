"""How fast is a training step of convolutions in a loop? `python benchmarks/conv_gradients.py`

A step is the value and the gradients of two 3x3 convolutions with respect to both kernels, and
a plain descent: alone in a jit, and eight times in a `lax.scan` in one jit. In turn in one
process: JAX's own gradients alone (the first row, what the others are compared with),
`qjax.kernels.conv_gradients`, and its alternatives: kernel gradients by one matmul per tap, and
all by matmuls over patches. JAX's own gradients in the loop, which take seconds, are there for
the smallest shape only. Milliseconds and ratios are per step; `ratio` below 2 is more than half
of the rate alone. Writes `benchmarks/results/conv_gradients.json`.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _timing import interleaved, table, write
from jax import lax

from qjax.kernels.conv_gradients import conv, input_gradient
from qjax.kernels.quant_conv_xla import IMAGE, im2col, pad_image, taps

# b, h, w, channels, strides of the second convolution.
SHAPES = (
    (8, 16, 16, 64, 1),
    (32, 16, 16, 64, 1),
    (32, 16, 16, 64, 2),
    (32, 8, 8, 96, 1),
    (32, 8, 8, 96, 2),
    (8, 32, 32, 320, 1),
    (8, 32, 32, 320, 2),
)
STEPS = 8
PADS = ((1, 1), (1, 1))


def plain(x, w, *, strides: int):
    return lax.conv_general_dilated(x, w, (strides, strides), PADS, dimension_numbers=IMAGE)


def with_gradients(forward, to_input, to_kernel):
    """`forward(x, w, strides)` with the two gradients given."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def run(x, w, strides):
        return forward(x, w, strides)

    def save(x, w, strides):
        return forward(x, w, strides), (x, w)

    def pull(strides, saved, dy):
        x, w = saved
        return to_input(dy, w, x.shape, strides, PADS), to_kernel(x, dy, w.shape, strides)

    run.defvjp(save, pull)
    return lambda x, w, *, strides: run(x, w, strides)


def patches(x, kernel, strides: int, pads=PADS):
    return im2col(pad_image(x, pads, None), kernel, strides)


def forward_by_patches(x, w, strides):
    return patches(x, w.shape[:2], strides) @ w.reshape(-1, w.shape[3])


def input_by_patches(dy, w, shape, strides, pads):
    rows = [
        (1, size - (strides * (out - 1) + 1) + 1, strides - 1)
        for size, out in zip(shape[1:3], dy.shape[1:3], strict=True)
    ]
    spread = lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *rows, (0, 0, 0)])
    turned = jnp.swapaxes(w[::-1, ::-1], 2, 3)
    return im2col(spread, (3, 3), 1) @ turned.reshape(-1, turned.shape[3])


def kernel_by_patches(x, dy, shape, strides):
    rows = patches(x, shape[:2], strides).reshape(-1, 9 * shape[2])
    return (rows.T @ dy.reshape(-1, shape[3])).reshape(shape)


def kernel_by_taps(x, dy, shape, strides):
    views = taps(pad_image(x, PADS, None), shape[:2], strides)
    columns = dy.reshape(-1, shape[3])
    return jnp.stack([view.reshape(-1, shape[2]).T @ columns for view in views]).reshape(shape)


FORMS = {
    "jax": plain,
    "conv_gradients": functools.partial(conv, pads=PADS),
    "kernel by taps": with_gradients(
        lambda x, w, strides: plain(x, w, strides=strides), input_gradient, kernel_by_taps
    ),
    "patches": with_gradients(forward_by_patches, input_by_patches, kernel_by_patches),
}


def descend(form, strides, kernels, batch):
    """One step on a batch of images and targets."""
    x, target = batch

    def loss(kernels):
        y = form(jnp.tanh(form(x, kernels[0], strides=1)), kernels[1], strides=strides)
        return jnp.mean(jnp.square(y - target))

    gradients = jax.grad(loss)(kernels)
    return jax.tree.map(lambda kernel, change: kernel - 0.01 * change, kernels, gradients)


def calls_of(b, h, w, channels, strides) -> dict:
    """By name: a step alone, or eight in a loop."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    kernels = tuple(draw(3, 3, channels, channels) / (9 * channels) ** 0.5 for _ in range(2))
    x, target = draw(b, h, w, channels), draw(b, h // strides, w // strides, channels)
    many = jax.tree.map(lambda array: jnp.stack([array] * STEPS), (x, target))
    calls = {}
    for name, form in FORMS.items():
        step = functools.partial(descend, form, strides)
        loop = lambda kernels, batches, step=step: lax.scan(
            lambda kernels, batch: (step(kernels, batch), None), kernels, batches
        )
        if name in ("jax", "conv_gradients"):
            calls[name, "alone"] = functools.partial(jax.jit(step), kernels, (x, target))
        if name != "jax" or (b, channels) == (8, 64):
            calls[name, "in a loop"] = functools.partial(jax.jit(loop), kernels, many)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write; default benchmarks/results")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of every candidate")
    args = parser.parse_args()
    results = []
    for shape in SHAPES:
        rows = []
        for (form, where), times in interleaved(calls_of(*shape), rounds=args.rounds).items():
            steps = STEPS if where == "in a loop" else 1
            names = dict(zip(("b", "h", "w", "channels", "strides"), shape, strict=True))
            per_step = {key: value / steps for key, value in times.items()}
            rows.append({**names, "form": form, "where": where, **per_step})
        print(table(rows), flush=True)
        results += rows
    print(write("conv_gradients", results, out=args.out))


if __name__ == "__main__":
    main()
