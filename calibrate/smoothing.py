"""Smoothing: the outliers of a layer's input are moved into its weights, and nothing is added.

Channels c of an input are divided by `s[c]` and the rows of the kernels that read it multiplied
by it, with

    s[c] = max |x[c]| ** alpha / max |W[c]| ** (1 - alpha),

the larger alpha, the more of the difficulty goes to the weights. The division is folded into the
normalisation, modulation or linear map that makes the input, where that is exact
(`qjax.models.smoothing_pairs` has the list): the float network computes what it did before, and
other integers stand for it. Where an activation is in between nothing is smoothed, and the log
says so.

The largest magnitudes are of a float roll-out on calibration items, over steps and both halves
of guidance; they are updated batch by batch, and no activations are kept. With `alpha=None` every
pair searches its own among `GRID` (and no smoothing), which takes some rows of each input: the
least error of the consumers' output with both sides quantized.

References:
  Xiao et al., SmoothQuant, ICML 2023, https://arxiv.org/abs/2211.10438, section 4;
  Li et al., SVDQuant, ICLR 2025, https://arxiv.org/abs/2411.05007 (the search over alpha).
"""

import dataclasses
import functools
from collections import ChainMap
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from qjax.calibrate.collect import Pairs, Samples, samples_at
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.fitted import KERNEL
from qjax.calibrate.ranges import observe, quantize_with
from qjax.calibrate.recipe import State
from qjax.calibrate.requantize import Method, fake_quantized, method_of, requantized, with_leaves
from qjax.calibrate.rollout import Items, Network, roll_out, shared_steps
from qjax.calibrate.simulate import fake_quantize_dynamic, simulated
from qjax.calibrate.student import stratified_pairs
from qjax.calibrate.work import Work
from qjax.core.config import ActSpec, QuantConfig
from qjax.core.layers import LOW_RANK, Dense
from qjax.core.plan import name_some
from qjax.core.qtensor import QTensor, is_qtensor
from qjax.core.serialize import flatten
from qjax.core.typing import Array, Float, Params, PRNGKeyArray
from qjax.models.pipeline import Pipeline
from qjax.models.smoothing_pairs import Pair, foldable_pairs, folded, multiplied

GRID = tuple((i + 1) / 20 for i in range(20))
"""The alphas that are searched."""

LIMIT = 1e4
"""Most that a channel is scaled by, either way: what 16-bit leaves still hold."""


def smoothing_scales(
    amax_x: Float[Array, " c"], amax_w: Float[Array, " c"], alpha: float | Array
) -> Float[Array, " c"]:
    """The formula of the module; 1 for channels that are 0 in the input or in all kernels."""
    alpha = jnp.asarray(alpha, jnp.float32)
    log = alpha * jnp.log(amax_x) - (1 - alpha) * jnp.log(amax_w)
    s = jnp.exp(jnp.clip(log, -np.log(LIMIT), np.log(LIMIT)))
    return jnp.where((amax_x > 0) & (amax_w > 0), s, jnp.ones_like(s))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Smoothing:
    """Scales moved from the inputs of quantized layers into their weights.

    It comes before all stages that fit to the weights: `LowRank`, `SerialParallel`,
    `TimePrecalculation`. A LoRA made for the model suits it no more; fuse it before.

    Attributes:
      alpha: How much of the difficulty the weights take, 0 to 1; None searches.
      steps: Steps of the sampler, those of its later use.
      eta: Its share of fresh noise.
      guidance_scale: Weight of the guidance, that of the later use; None for none.
      data: The calibration set.
      pairs: Pairs of an item and a step whose activations are looked at.
      batch: Items that run at once.
      rows: Tokens of each input that a search keeps.
    """

    alpha: float | None = 0.5
    steps: int = 20
    eta: float = 0.0
    guidance_scale: float | None = None
    data: CalibrationSet = dataclasses.field(default_factory=CalibrationSet)
    pairs: int = 256
    batch: int = 64
    rows: int = 256

    def __post_init__(self):
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(
                f"alpha must lie between 0 and 1; got {self.alpha}. None searches one for every "
                "layer."
            )
        if min(self.pairs, self.batch, self.rows) < 1:
            raise ValueError(
                f"pairs, batch and rows must be at least 1; got {self.pairs}, {self.batch} and "
                f"{self.rows}."
            )

    def run(self, state: State, key: PRNGKeyArray, work: Work) -> State:
        """The state with folded floats, and the student quantized from them.

        Raises:
          ValueError: If no quantized layer has an input that can be smoothed, or a stage before
            has fitted something to the weights as they are.
        """
        teacher, student = state.teacher, state.student
        floats = teacher.params if state.floats is None else state.floats
        items = self.data.draw(
            teacher, jax.random.fold_in(key, 0), guidance_scale=self.guidance_scale
        )
        pairs = _chosen(teacher, student, floats, items, work)
        wanted = tuple(sorted({pair.consumers[0] for pair in pairs}))
        make = functools.partial(self._statistics, teacher, floats, items, wanted, work)
        found = work.part("statistics", make)

        leaves, before = dict(flatten(student.params)), dict(flatten(floats))
        changed: dict[str, Any] = {}
        for pair in pairs:
            kernels = [f"{layer}/{KERNEL}" for layer in pair.consumers]
            now = {path: changed.get(path, before[path]) for path in kernels}
            amax_x = jnp.asarray(found[f"amax:{pair.consumers[0]}"])
            amax_w = _largest_rows(tuple(now.values()))
            alpha, fields = self.alpha, {}
            if alpha is None:
                likes = [leaves[path] for path in kernels if is_qtensor(leaves[path])]
                floating = [now[path] for path in kernels if is_qtensor(leaves[path])]
                method = method_of(student.quant, kernels[0], now[kernels[0]].shape)
                x = jnp.asarray(found[f"rows:{pair.consumers[0]}"])
                errors = output_errors(x, amax_x, amax_w, tuple(floating), tuple(likes), method)
                best = int(np.argmin(errors))
                alpha = (None, *GRID)[best]
                fields = {"error": float(errors[best]), "without": float(errors[0])}
            work.log("smoothed", pair=pair.name, alpha=alpha, **fields)
            if alpha is None:
                continue
            s = smoothing_scales(amax_x, amax_w, alpha)
            moved = folded(ChainMap(changed, before), pair, s)
            changed |= {path: np.asarray(leaf) for path, leaf in moved.items()}
        new = {
            path: _in_place_of(leaves[path], jnp.asarray(leaf), path, student.quant)
            for path, leaf in changed.items()
        }
        student = student.replace(params=with_leaves(student.params, new), smoothed=True)
        return dataclasses.replace(state, student=student, floats=with_leaves(floats, changed))

    def _statistics(
        self, teacher: Pipeline, floats: Params, items: Items, wanted: tuple[str, ...], work: Work
    ) -> dict[str, Array]:
        """For every wanted layer the largest magnitudes of its input, and rows for a search."""
        rows = teacher.sampler.rows(self.steps, eta=self.eta)
        calls = len(rows["t"])
        buffer = roll_out(
            Network(teacher.apply, teacher.sampler, teacher.guidance_channels, ()),
            floats,
            items,
            rows,
            group=shared_steps(calls, 1),
            guidance_scale=items.scale(self.guidance_scale),
            batch=self.batch,
            on_step=lambda i: work.log("step", part="statistics", step=i, steps=calls),
        )
        step, item = stratified_pairs(calls, len(items.x_T), self.pairs, seed=0)
        batch = min(self.batch, len(step))
        starts = range(0, len(step) - batch + 1, batch)
        most = 0 if self.alpha is not None else -(-self.rows // len(starts))
        largest: dict[str, Array] = {}
        kept: dict[str, list[np.ndarray]] = {path: [] for path in wanted}
        for a in starts:
            at = Pairs(step[a : a + batch], item[a : a + batch])
            samples = samples_at(
                buffer, items, np.asarray(rows["t"]), np.zeros(calls, np.int32), at
            )
            found = _watch(teacher.apply, wanted, most, floats, samples)
            for path, (amax, some) in found.items():
                largest[path] = jnp.maximum(largest.get(path, amax), amax)
                kept[path].append(np.asarray(some))
        arrays = {f"amax:{path}": amax for path, amax in largest.items()}
        if self.alpha is None:
            arrays |= {
                f"rows:{path}": jnp.asarray(np.concatenate(some)) for path, some in kept.items()
            }
        return arrays


@functools.partial(jax.jit, static_argnames=("apply", "wanted", "most"))
def _watch(apply, wanted, most, params, samples: Samples):
    found: dict[str, tuple[Array, Array]] = {}

    def hook(path: str, module: nn.Module, x: Array) -> Array:
        if path in wanted:
            flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
            stride = max(len(flat) // max(most, 1), 1)
            found[path] = jnp.max(jnp.abs(flat), axis=0), flat[::stride][:most]
        return x

    with simulated(hook):
        apply({"params": params}, samples.x_t, samples.t, samples.told)
    return found


def _chosen(
    teacher: Pipeline, student: Pipeline, floats: Params, items: Items, work: Work
) -> list[Pair]:
    """The pairs that are smoothed: those of which a consumer is quantized."""
    table = student.step_table
    if table is not None and "quant" in table.entries:
        raise ValueError(
            "Smoothing changes the inputs of layers, and their ranges were fitted already. Put it "
            "before the stage that fits them."
        )
    first = jax.tree.map(lambda a: a[:1], (items.x_T, items.told))
    t = jnp.asarray(teacher.sampler.rows(1)["t"])[:1]
    network = lambda: teacher.apply({"params": floats}, first[0], t, first[1])
    every = foldable_pairs(network)
    leaves = dict(flatten(student.params))
    quantized = {path.rpartition("/")[0] for path, leaf in leaves.items() if is_qtensor(leaf)}
    pairs = [pair for pair in every if quantized & set(pair.consumers)]
    if not pairs:
        raise ValueError(
            "Smoothing needs a quantized layer that reads a normalisation, a modulation or a "
            f"linear map of a network of this library; got {name_some(sorted(quantized))}. Leave "
            "the stage out."
        )
    reading = {layer for pair in pairs for layer in pair.consumers}
    making = {fold.leaf.rpartition("/")[0] for pair in pairs for fold in pair.producer}
    trees = {path for tree in (student.params, floats) for path, _ in flatten(tree)}
    if beside := sorted(trees & {f"{layer}/{LOW_RANK[0]}" for layer in reading | making}):
        raise ValueError(
            f"Smoothing needs layers with nothing beside them; got {name_some(beside)}. Put it "
            "before LowRank, and fuse LoRAs into the float model (pipe.with_lora(path, fuse=True))."
        )
    if left := sorted(quantized - reading):
        reason = "an activation, a text or the residual sum is what they read"
        work.log("not_smoothed", layers=", ".join(left), reason=reason)
    return pairs


def _largest_rows(kernels: Sequence[Any]) -> Float[Array, " c"]:
    """The largest magnitude of the kernels in every input channel."""
    rows = [jnp.abs(jnp.asarray(k).astype(jnp.float32)) for k in kernels]
    each = [jnp.max(row, axis=(*range(row.ndim - 2), row.ndim - 1)) for row in rows]
    return functools.reduce(jnp.maximum, each)


@functools.partial(jax.jit, static_argnames=("method",))
def output_errors(
    x: Float[Array, "m c"],
    amax_x: Float[Array, " c"],
    amax_w: Float[Array, " c"],
    kernels: tuple[Array, ...],
    likes: tuple[QTensor, ...],
    method: Method,
) -> Float[Array, " a"]:
    """Squared error of the consumers' output, relative, unsmoothed and for every alpha of `GRID`.

    Args:
      x: Rows of the input.
      amax_x: Largest magnitudes of all rows there are.
      amax_w: Largest magnitudes of the kernels' rows.
      kernels: Of the consumers that are quantized, float.
      likes: How, and how their input is.
      method: How the range of a kernel is found.
    """
    outputs = [_matmul(x, kernel) for kernel in kernels]
    norm = sum(jnp.sum(jnp.square(y)) for y in outputs)

    def error(s: Array) -> Array:
        total = jnp.float32(0)
        for y, kernel, like in zip(outputs, kernels, likes, strict=True):
            q = fake_quantized(multiplied(kernel, s), like, method)
            seen = _quantized_rows(x / s, like.act, dense=kernel.ndim == 2)
            total += jnp.sum(jnp.square(_matmul(seen, q) - y))
        return total / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)

    scales = [smoothing_scales(amax_x, amax_w, alpha) for alpha in GRID]
    return lax.map(error, jnp.stack([jnp.ones_like(amax_x), *scales]))


def _matmul(x: Float[Array, "m c"], kernel: Float[Array, "... c o"]) -> Float[Array, "m o"]:
    matrix = kernel.astype(jnp.float32).reshape(-1, kernel.shape[-1])  # its taps are one
    return jnp.matmul(x, matrix, precision=lax.Precision.HIGHEST)


def _quantized_rows(x: Float[Array, "m c"], act: ActSpec | None, *, dense: bool) -> Array:
    """What a layer makes of rows of its input; ranges of whole images or tensors are theirs."""
    if act is None:
        return x
    if act.mode == "dynamic" and (dense or act.granularity == "per_group"):
        return fake_quantize_dynamic(x, act, Dense(1))
    return quantize_with(x, act, observe(x, act, method="minmax"))


def _in_place_of(old: Any, new: Array, path: str, config: QuantConfig | None) -> Any:
    """A float leaf as the student stores what is there."""
    if isinstance(old, QTensor):
        return requantized(new, old, method_of(config, path, new.shape))
    return new.astype(old.dtype)
