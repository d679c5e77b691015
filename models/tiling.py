"""Large images and batches in little memory: overlapping tiles, and one image at a time.

The memory that an autoencoder needs grows with the number of pixels, and that of the
attention in its middle with the square. Both functions here take any function of images and
apply it to parts:

    decode = lambda z: model.apply(variables, z, method="decode")
    one_at_a_time(decode, latents)              the same result, one image of the batch a time
    tiled(decode, latents, tile=64)             nearly the same, one tile of each image a time

Tiles start every `tile - overlap` pixels. The result of each is as large as its input times
or over the scale of the autoencoder. Where two results overlap, over `n` pixels, the later
one is faded in linearly, first from above and then from the left:

    y[i] = before[i] * (1 - i / n) + after[i] * (i / n)         i = 0 ... n-1

A tile does not see the rest of the image, in its normalisations and its attention least of
all, so the result is not that of the whole image: colours can differ from tile to tile, and
the less the larger the tiles are.
"""

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.typing import Array, Float

Tiles = dict[tuple[int, int], Array]


def one_at_a_time(function: Callable[[Array], Any], batch: Float[Array, "b h w c"]) -> Any:
    """`function(batch)`, one image after the other.

    Args:
      function: Of a batch `[1, h, w, c]`; the first axis of all that it returns is the batch.
      batch: `[b, h, w, c]`.
    """
    of_one = lambda image: jax.tree.map(lambda y: y[0], function(image[None]))
    return jax.lax.map(of_one, batch)


def tiled(
    function: Callable[[Array], Array],
    x: Float[Array, "b h w c"],
    *,
    tile: int,
    overlap: int | None = None,
) -> Float[Array, "b h2 w2 o"]:
    """`function(x)`, nearly: of overlapping tiles, blended.

    An `x` that is no larger than one tile goes to `function` as it is. With the default overlap
    and a tile that four divides, the tiles are those of diffusers' `tiled_encode` and
    `tiled_decode`, and so is the order of blending. Tiles of one size are run one after the
    other by one program; at the bottom and the right there are smaller ones, and at most nine
    sizes in all.

    Args:
      function: `AutoencoderKL.decode` of latents, say, or `AutoencoderKL.moments` of images:
        its results must all be larger or smaller than its inputs by the same scale.
      x: Images or latents.
      tile: Height and width of a tile in pixels of `x`; `config.latent_tile` for latents, and
        `config.size_multiple` times that for images.
      overlap: Pixels of `x` that neighbours share; a quarter of a tile if None, as in
        diffusers. Must be at most half a tile and, like `tile`, whole at the scale of the
        result.

    Raises:
      ValueError: If `tile` or `overlap` do not fit.

    Example:
      >>> x = jnp.arange(10.0).reshape(1, 1, 10, 1)
      >>> tiled(lambda x: jnp.repeat(x, 2, axis=2), x, tile=4, overlap=2).shape
      (1, 1, 20, 1)
    """
    overlap = tile // 4 if overlap is None else overlap
    if tile < 1 or not 0 <= overlap <= tile // 2:
        raise ValueError(
            "tile must be at least 1 and overlap from 0 to half a tile; got "
            f"{tile=}, {overlap=}. Use overlap=None for a quarter."
        )
    height, width = x.shape[1:3]
    if height <= tile and width <= tile:
        return function(x)
    step = tile - overlap
    spans = [[(start, min(tile, n - start)) for start in range(0, n, step)] for n in x.shape[1:3]]
    results = _results(function, x, *spans)

    (rows, columns), first = spans, results[0, 0]
    scales = Fraction(first.shape[1], rows[0][1]), Fraction(first.shape[2], columns[0][1])
    extents = tuple(_whole(overlap, scale) for scale in scales)
    steps = tuple(_whole(step, scale) for scale in scales)
    return _blended(results, len(rows), len(columns), extents, steps)


def _whole(size: int, scale: Fraction) -> int:
    scaled = size * scale
    if scaled.denominator != 1:
        raise ValueError(
            f"tile - overlap and overlap must be whole at the scale {scale} of the result; got "
            f"{size}. Use multiples of {scale.denominator}."
        )
    return int(scaled)


def _results(
    function: Callable[[Array], Array],
    x: Array,
    rows: Sequence[tuple[int, int]],
    columns: Sequence[tuple[int, int]],
) -> Tiles:
    """What `function` makes of every tile, by row and column; alike tiles share a program."""
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, j in itertools.product(range(len(rows)), range(len(columns))):
        alike.setdefault((rows[i][1], columns[j][1]), []).append((i, j))

    def at(start: Array, size: tuple[int, int]) -> Array:
        zero = jnp.zeros((), start.dtype)
        corner = (zero, start[0], start[1], zero)
        return jax.lax.dynamic_slice(x, corner, (x.shape[0], *size, x.shape[3]))

    results: Tiles = {}
    for size, places in alike.items():
        starts = jnp.asarray([(rows[i][0], columns[j][0]) for i, j in places], jnp.int32)
        if len(places) == 1:
            results[places[0]] = function(at(starts[0], size))
        else:
            stacked = jax.lax.map(lambda start, size=size: function(at(start, size)), starts)
            results |= {place: stacked[n] for n, place in enumerate(places)}
    return results


def _blended(
    results: Tiles, rows: int, columns: int, extents: Sequence[int], steps: Sequence[int]
) -> Array:
    """One image: each tile blended with the blended ones before it, then cut to `steps`."""
    strips: list[Array] = []
    above: list[Array] = []
    for i in range(rows):
        row: list[Array] = []
        for j in range(columns):
            result = results[i, j]
            if i:
                result = _fade(above[j], result, extents[0], axis=1)
            if j:
                result = _fade(row[-1], result, extents[1], axis=2)
            row.append(result)
        cut = [result[:, : steps[0], : steps[1]] for result in row]
        strips.append(jnp.concatenate(cut, axis=2))
        above = row
    return jnp.concatenate(strips, axis=1)


def _fade(before: Array, after: Array, extent: int, *, axis: int) -> Array:
    """`after`, its first `extent` pixels faded in over the last ones of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    if not extent:
        return after
    shape = [1] * after.ndim
    shape[axis] = extent
    weight = (jnp.arange(extent, dtype=jnp.float32) / extent).astype(after.dtype).reshape(shape)
    end = before.shape[axis]
    old = jax.lax.slice_in_dim(before, end - extent, end, axis=axis)
    new, rest = jnp.split(after, [extent], axis=axis)
    return jnp.concatenate([old * (1 - weight) + new * weight, rest], axis=axis)
