"""A low-rank branch beside every quantized kernel: what few directions hold stays in 16 bits.

A layer's kernel `W` is cut in two,

    W = Q + L + error,      L = down up,      Q = quantize(W - L),

and the layer computes with the integers `Q` and adds `(x down) up`, of rank r, in float
(`qjax.core.layers`). The two are found in turn, `L` as the best approximation of rank r of
`W - Q` and `Q` anew, and the best pair of all rounds is kept. A convolution's kernel is read
as the matrix `[taps * i, o]`: `down` is a convolution to r channels, `up` a matmul.

The branch is rounded to its 16 bits within the search, so that `W - L` makes up for that too,
and it sees the layer's input before that is quantized.

References:
  Li et al., SVDQuant, ICLR 2025, https://arxiv.org/abs/2411.05007 (the branch, rank 32);
  Guo et al., LQ-LoRA, ICLR 2024, https://arxiv.org/abs/2311.12023 (the alternation);
  Halko et al., Finding Structure with Randomness, 2011, https://arxiv.org/abs/0909.4061,
  algorithms 4.4 and 5.1 (the decomposition of large kernels).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.calibrate.blocks import subtree
from qjax.calibrate.fitted import KERNEL, quantized_kernels
from qjax.calibrate.recipe import State
from qjax.calibrate.requantize import fake_quantized, method_of, requantized, with_leaves
from qjax.calibrate.work import Work
from qjax.core.config import QuantConfig
from qjax.core.layers import LOW_RANK
from qjax.core.plan import Plan, name_some
from qjax.core.qtensor import QTensor
from qjax.core.serialize import flatten
from qjax.core.typing import Array, Float, Params, PRNGKeyArray
from qjax.models.pipeline import Pipeline

EXACT_BELOW = 512
"""Kernels whose shorter side is no longer are decomposed exactly."""
OVERSAMPLE = 16
"""Directions of the sketch beyond the rank (Halko et al. advise 5 to 10)."""
POWER_ITERATIONS = 2
"""Of the sketch; a quantization residual's spectrum is flat, which is what they are for."""

_dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Split(NamedTuple):
    """A kernel cut in two.

    Attributes:
      down: `[*taps, i, r]`, in the dtype of the branch.
      up: `[r, o]`.
      error: `|W - L - Q| / |W|`, Frobenius norms.
      plain: The same without a branch.
    """

    down: Float[Array, "*taps i r"]
    up: Float[Array, "r o"]
    error: Float[Array, ""]
    plain: Float[Array, ""]


def truncated_svd(
    w: Float[Array, "m n"], rank: int
) -> tuple[Float[Array, "m r"], Float[Array, "r n"]]:
    """Factors of the best approximation of rank r, the singular values shared by both.

    Matrices with both sides above `EXACT_BELOW` are sketched first; the sketch is the same for
    all, so that equal matrices have equal factors.
    """
    m, n = w.shape
    width = min(rank + OVERSAMPLE, m, n)
    if min(m, n) <= max(EXACT_BELOW, width):
        left, values, right = jnp.linalg.svd(w, full_matrices=False)
    else:
        sketch = jax.random.normal(jax.random.key(0), (n, width), w.dtype)
        basis = jnp.linalg.qr(_dot(w, sketch))[0]
        for _ in range(POWER_ITERATIONS):
            basis = jnp.linalg.qr(_dot(w.T, basis))[0]
            basis = jnp.linalg.qr(_dot(w, basis))[0]
        left, values, right = jnp.linalg.svd(_dot(basis.T, w), full_matrices=False)
        left = _dot(basis, left)
    root = jnp.sqrt(values[:rank])
    return left[:, :rank] * root, root[:, None] * right[:rank]


def low_rank_split(
    w: Float[Array, "*taps i o"],
    quantize: Callable[[Array], Array],
    rank: int,
    iterations: int,
    *,
    dtype: Any = jnp.float16,
) -> Split:
    """The kernel cut into a branch of rank r and a rest that quantizes well.

    The error is at most that of no branch, which is one of the candidates (a branch of zeros).

    Args:
      w: Kernel.
      quantize: What the integers make of a float kernel of that shape, in float.
      rank: r; at most the shorter side of the kernel as a matrix.
      iterations: Rounds; the first takes the branch from the kernel itself.
      dtype: Float dtype in which the branch is stored.
    """
    matrix = w.astype(jnp.float32).reshape(-1, w.shape[-1])
    norm = jnp.maximum(jnp.linalg.norm(matrix), jnp.finfo(jnp.float32).tiny)
    rounded = lambda factor: factor.astype(dtype)

    def judged(rest: Array) -> tuple[Array, Array]:
        q = quantize(rest.reshape(w.shape)).astype(jnp.float32).reshape(matrix.shape)
        return q, jnp.linalg.norm(rest - q) / norm

    def turn(_: Any, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        q, *best = carry
        down, up = map(rounded, truncated_svd(matrix - q, rank))
        q, error = judged(matrix - _product(down, up))
        better = error < best[2]
        pick = lambda new, old: jnp.where(better, new, old)
        return q, pick(down, best[0]), pick(up, best[1]), pick(error, best[2])

    plain = judged(matrix)[1]
    nothing = (rounded(jnp.zeros((len(matrix), rank))), rounded(jnp.zeros((rank, w.shape[-1]))))
    begin = (jnp.zeros_like(matrix), *nothing, plain)
    _, down, up, error = lax.fori_loop(0, iterations, turn, begin)
    return Split(down.reshape(*w.shape[:-1], rank), up, error, plain)


def _product(down: Array, up: Array) -> Float[Array, "m n"]:
    return _dot(
        *(factor.astype(jnp.float32).reshape(-1, factor.shape[-1]) for factor in (down, up))
    )


@jax.jit
def _rest(w: Array, down: Array, up: Array) -> Array:
    """`W - L`, in the dtype of `W`."""
    return (w.astype(jnp.float32) - _product(down, up).reshape(w.shape)).astype(w.dtype)


@functools.partial(jax.jit, static_argnames=("method", "rank", "iterations", "dtype"))
def _split(w, like, method, rank, iterations, dtype):
    quantize = lambda kernel: fake_quantized(kernel, like, method)
    return low_rank_split(w, quantize, rank, iterations, dtype=dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank:
    """A branch for every quantized kernel, which is quantized anew without it.

    Branches are stored in the rules' `float_dtype`, or in float16 where that is None. A layer
    whose branch and integers would take no less than its kernel in 16 bits is left as it is,
    and the log names it.

    The new float kernels are made one by one and lie in the host's memory, so that an
    accelerator holds one at a time beside the teacher's.

    Attributes:
      rank: Rank of a branch; at most the shorter side of a kernel.
      iterations: Rounds of `low_rank_split`.
      pattern: Regular expression that must match the whole path of a kernel
        (`".*/ff/net_2/kernel"`); None takes all that are quantized.
    """

    rank: int = 32
    iterations: int = 10
    pattern: str | None = None

    def __post_init__(self):
        if self.rank < 1 or self.iterations < 1:
            raise ValueError(
                f"rank and iterations must be at least 1; got {self.rank} and {self.iterations}. "
                "Leave the stage out for no branch."
            )
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(
                    f"pattern must be a regular expression; got {self.pattern!r}: {error}."
                ) from None

    def run(self, state: State, key: PRNGKeyArray, work: Work) -> State:
        """The state with branches in the student, and floats that lack them; nothing is random.

        Raises:
          ValueError: If no quantized kernel is matched, the network is a stranger's, or there
            are branches already.
        """
        del key
        student = state.student
        floats = state.teacher.params if state.floats is None else state.floats
        chosen = self.chosen(student)
        _check(student, floats, chosen)
        leaves: dict[str, Any] = {}
        kernels: dict[str, np.ndarray] = {}
        for number, (layer, q) in enumerate(chosen.items()):
            path = f"{layer}/{KERNEL}"
            rank = self.rank_of(q.shape)
            if self.is_too_wide(q.shape, q.nbytes_packed):
                work.log("low_rank_skipped", layer=layer, rank=rank, shape=str(q.shape))
                continue
            w = jnp.asarray(subtree(floats, layer)[KERNEL])
            method = method_of(student.quant, path, q.shape)

            def make(w=w, q=q, method=method, rank=rank) -> dict[str, Array]:
                dtype = _dtype(student.quant)
                return _split(w, q, method, rank, self.iterations, dtype)._asdict()

            part = work.part(f"branch-{number}", make)
            rest = _rest(w, part["down"], part["up"])
            leaves[path] = requantized(rest, q, method)
            for name, leaf in zip(LOW_RANK, (part["down"], part["up"]), strict=False):
                leaves[f"{layer}/{name}"] = leaf
            leaves[f"{layer}/{LOW_RANK[2]}"] = jnp.ones((rank,), part["up"].dtype)
            kernels[path] = np.asarray(rest)
            error, plain = float(part["error"]), float(part["plain"])
            work.log("low_rank", layer=layer, rank=rank, error=error, without=plain)
        student = student.replace(params=with_leaves(student.params, leaves))
        return dataclasses.replace(state, student=student, floats=with_leaves(floats, kernels))

    def chosen(self, student: Pipeline) -> dict[str, QTensor]:
        """The quantized kernels that the pattern takes, by layer.

        Raises:
          ValueError: If there are none.
        """
        found = quantized_kernels(student.params)
        chosen = {layer: q for layer, q in found.items() if self.takes(f"{layer}/{KERNEL}")}
        if not chosen:
            raise ValueError(
                f"LowRank needs quantized kernels; got pattern={self.pattern!r}, which takes none "
                f"of {name_some(sorted(found))}. Correct the pattern, or leave it at None."
            )
        return chosen

    def takes(self, path: str) -> bool:
        """Whether the kernel at `path` is one of those."""
        return self.pattern is None or re.fullmatch(self.pattern, path) is not None

    def rank_of(self, shape: tuple[int, ...]) -> int:
        """The rank of the branch of a kernel of that shape."""
        return min(self.rank, shape[-1], math.prod(shape[:-1]))

    def is_too_wide(self, shape: tuple[int, ...], low_bit_bytes: int) -> bool:
        """Whether integers and branch would take no less than the kernel in 16 bits."""
        return low_bit_bytes + branch_bytes(shape, self.rank_of(shape)) >= 2 * math.prod(shape)

    def bytes_of(self, plan: Plan) -> int:
        """Bytes that the branches add to those of a plan, at 16 bits a value."""
        return sum(
            branch_bytes(entry.shape, self.rank_of(entry.shape))
            for entry in plan.entries
            if entry.weight is not None
            and self.takes(entry.path)
            and not self.is_too_wide(entry.shape, entry.bytes_after)
        )


def branch_bytes(shape: tuple[int, ...], rank: int) -> int:
    """Bytes of the branch of a kernel of that shape: both factors and the scale, 16 bits each."""
    return 2 * rank * (math.prod(shape[:-1]) + shape[-1] + 1)


def without_branches(
    student: Params, floats: Params, layers: Mapping[str, Any] | tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Student and floats as if some layers had been left out: `W` whole, nothing beside it.

    Only branches that the floats lack are taken back; others, a LoRA's, are in both.

    Args:
      student: Params with branches.
      floats: The float params that go with them.
      layers: Paths of the layers, or of modules around them.
    """
    kept, whole = dict(student), {}
    inside = lambda path: any(path == name or path.startswith(f"{name}/") for name in layers)
    for path, down in flatten(student):
        layer, _, name = path.rpartition("/")
        if name != LOW_RANK[0] or not inside(layer) or name in subtree(floats, layer):
            continue
        node = dict(subtree(student, layer))
        _, up, scale = (jnp.asarray(node.pop(name)).astype(jnp.float32) for name in LOW_RANK)
        product = _product(jnp.asarray(down).astype(jnp.float32) * scale, up)
        w = jnp.asarray(subtree(floats, layer)[KERNEL])
        sum_ = w.astype(jnp.float32) + product.reshape(w.shape)
        whole[f"{layer}/{KERNEL}"] = sum_.astype(w.dtype)
        kept = with_leaves(kept, {layer: node})
    return kept, with_leaves(floats, whole)


def _dtype(config: QuantConfig | None) -> str:
    """The dtype of a branch: that in which the rules store what stays in float."""
    return "float16" if config is None or config.float_dtype is None else config.float_dtype


def _check(student: Pipeline, floats: Params, chosen: Mapping[str, QTensor]) -> None:
    if student.source is None:
        raise ValueError(
            "LowRank needs a network of this library, whose layers know a low-rank branch; the "
            "pipeline came from from_apply without a source. Leave the stage out of the recipe."
        )
    trees = (dict(flatten(tree)) for tree in (student.params, floats))
    names = {f"{layer}/{LOW_RANK[0]}" for layer in chosen}
    if there := sorted(names & set().union(*trees)):
        raise ValueError(
            f"LowRank needs layers with nothing beside them; got {name_some(there)}. Fuse LoRAs "
            "into the float model (pipe.with_lora(path, fuse=True)), or add them to the result."
        )
