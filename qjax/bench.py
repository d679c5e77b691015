"""Where the time goes: every layer of a model and its whole step, in float and at low bits.

The network is traced once to see what shapes its layers are called with; then each different
layer runs alone, float and low-bit in turn. What ran is read off the traced program, so that
the table says what happened and not what was meant to happen.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qjax.core import ops
from qjax.core.layers import Conv, Dense
from qjax.core.qtensor import QTensor, is_qtensor
from qjax.core.serialize import flatten
from qjax.core.typing import Array, Params
from qjax.kernels.problem import Problem
from qjax.models.pipeline import Pipeline
from qjax.roofline import Peak, peak, shares
from qjax.timing import interleaved
from qjax.tune import problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCall:
    """A layer and what it is called with.

    Attributes:
      path: Path of its kernel in the params tree.
      kind: `"dense"` or `"conv"`.
      shape: Of the kernel.
      input_shape: Of what goes in.
      dtype: Of what goes in.
      strides: Of a convolution.
      padding: Of a convolution.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    dtype: Any
    strides: int = 1
    padding: Any = None

    def run(self, x: Array, kernel: Array | QTensor) -> Array:
        """What the layer computes, without its bias."""
        if self.kind == "dense":
            return ops.matmul(x, kernel)
        return ops.conv(x, kernel, strides=self.strides, padding=self.padding)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTime:
    """What one layer costs; layers that do the same are measured once.

    Attributes:
      paths: Kernels of all layers that do this.
      kind: `"dense"` or `"conv"`.
      shape: Of the kernel.
      input_shape: Of what goes in.
      ran: What the low-bit layer computed with, in words; `"float"` where it was left.
      seconds_float: Of the float layer.
      seconds_low_bit: Of the low-bit layer; None where it was left in float.
      operations: Multiplications and additions of a call.
      bytes_float: Of input, output and weights of the float layer.
      bytes_low_bit: The same of the low-bit layer, its weights as they are stored.
    """

    paths: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    ran: str
    seconds_float: float
    seconds_low_bit: float | None
    operations: int
    bytes_float: int
    bytes_low_bit: int

    def shares(self, peak: Peak) -> tuple[float, float]:
        """Of the device's rate and bandwidth, what the layer reached as it is."""
        if self.seconds_low_bit is None:
            moved, seconds = self.bytes_float, self.seconds_float
        else:
            moved, seconds = self.bytes_low_bit, self.seconds_low_bit
        return shares(
            peak,
            operations=self.operations,
            moved=moved,
            seconds=seconds,
            int8="int8" in self.ran,
        )

    @property
    def ratio(self) -> float | None:
        """Low-bit time over float time; above 1 the low-bit layer is slower."""
        return None if self.seconds_low_bit is None else self.seconds_low_bit / self.seconds_float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Times of a model, float and low-bit.

    Attributes:
      layers: Every different layer, in the order in which the network calls them.
      step_float: Seconds of one whole call of the float network.
      step_low_bit: The same of the quantized one.
      batch: Pictures in a call.
      rounds: Samples behind each median.
      peak: What the device can do at most; None for one that is not known.
    """

    layers: tuple[LayerTime, ...]
    step_float: float
    step_low_bit: float
    batch: int
    rounds: int
    peak: Peak | None


def bench(
    pipe: Pipeline,
    quantized: Pipeline,
    *,
    batch: int = 16,
    rounds: int = 7,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Benchmark:
    """Measure a float pipeline and its quantized form, layer by layer and as a whole.

    Args:
      pipe: The float pipeline; of a network built of `qjax.core.layers`.
      quantized: The same with quantized params.
      batch: Pictures in a call of the network.
      rounds: Samples behind each median, all candidates in turn.
      on_progress: Called with work done, all work and what comes next.

    Raises:
      ValueError: If the network has no layer that can be measured alone.
    """
    calls = layer_calls(pipe, batch)
    if not calls:
        raise ValueError(
            "the network calls no Dense or Conv of qjax.core.layers, so there is no layer to "
            "measure. Time the whole pipeline instead."
        )
    kernels, low_bit = dict(flatten(pipe.params)), dict(flatten(quantized.params))
    groups: dict[Any, list[LayerCall]] = {}
    for call in calls:
        groups.setdefault(_signature(call, low_bit[call.path]), []).append(call)
    total = len(groups) + 1
    times = []
    for i, same in enumerate(groups.values()):
        if on_progress is not None:
            on_progress(i, total, same[0].path)
        first = same[0]
        times.append(_time_layer(same, kernels[first.path], low_bit[first.path], rounds))
    if on_progress is not None:
        on_progress(total - 1, total, "whole step")
    step = _time_step(pipe, quantized, batch, rounds)
    if on_progress is not None:
        on_progress(total, total, "done")
    return Benchmark(
        layers=tuple(times),
        step_float=step["float"],
        step_low_bit=step["low-bit"],
        batch=batch,
        rounds=rounds,
        peak=peak(),
    )


def matmuls(quantized: Pipeline, batch: int) -> list[Problem]:
    """The different low-bit matmuls of one call of the network, for `tune.tune`.

    Args:
      quantized: With quantized params.
      batch: Pictures in a call.
    """
    x, t, labels = _inputs(quantized, batch)
    row = {k: v for k, v in (_first_row(quantized) or {}).items() if k != "noise_correction"}
    return problems(lambda v: quantized.apply(v, x, t, labels), {"params": quantized.params, **row})


def layer_calls(pipe: Pipeline, batch: int) -> list[LayerCall]:
    """Every call of a Dense or Conv in one call of the network, in order."""
    found: list[LayerCall] = []

    def watch(next_call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        layer = context.module
        if isinstance(layer, Dense | Conv) and context.method_name == "__call__":
            found.append(_call_of(layer, args[0]))
        return next_call(*args, **kwargs)

    x, t, labels = _inputs(pipe, batch)
    with nn.intercept_methods(watch):
        # A new function each time: what JAX has traced before would not be traced again.
        jax.eval_shape(lambda v: pipe.apply(v, x, t, labels), {"params": pipe.params})
    return found


def _call_of(layer: Dense | Conv, x: Array) -> LayerCall:
    path = "/".join((*layer.path, "kernel"))
    if isinstance(layer, Dense):
        shape: tuple[int, ...] = (x.shape[-1], layer.features)
        return LayerCall(path=path, kind="dense", shape=shape, input_shape=x.shape, dtype=x.dtype)
    padding = layer.padding if isinstance(layer.padding, str) else tuple(map(tuple, layer.padding))
    return LayerCall(
        path=path,
        kind="conv",
        shape=(*layer.kernel_size, x.shape[-1], layer.features),
        input_shape=x.shape,
        dtype=x.dtype,
        strides=layer.strides,
        padding=padding,
    )


def _inputs(pipe: Pipeline, batch: int) -> tuple[Array, Array, Any]:
    x = _normal((batch, *pipe.shape))
    t = jnp.full((batch,), int(pipe.sampler.timesteps(2)[0]), jnp.int32)
    labels = [i % pipe.num_labels for i in range(batch)] if pipe.num_labels else None
    told, _ = pipe.condition(batch, labels=labels, prompts="" if pipe.reads_prompts else None)
    return x, t, told


def _normal(shape: tuple[int, ...]) -> Array:
    # NumPy's, because JAX would compile a program for every shape.
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def _signature(call: LayerCall, kernel: Any) -> Any:
    """Equal for layers that run the same program."""
    anonymous = dataclasses.replace(call, path="")
    return anonymous, kernel.replace(qvalue=None, scale=kernel.scale.shape, zero_point=None) if (
        is_qtensor(kernel)
    ) else None


def _time_layer(same: list[LayerCall], kernel: Any, low_bit: Any, rounds: int) -> LayerTime:
    call = same[0]
    x = _normal(call.input_shape).astype(call.dtype)
    run = jax.jit(call.run)
    calls = {"float": functools.partial(run, x, jnp.asarray(kernel))}
    if is_qtensor(low_bit):
        calls["low-bit"] = functools.partial(run, x, low_bit)
    seconds = interleaved(calls, rounds=rounds)
    y = jax.eval_shape(run, x, kernel)
    *taps, inputs, _ = call.shape
    around = _nbytes(x) + _nbytes(y)
    return LayerTime(
        paths=tuple(one.path for one in same),
        kind=call.kind,
        shape=call.shape,
        input_shape=tuple(call.input_shape),
        ran=what_runs(call, low_bit, x),
        seconds_float=seconds["float"],
        seconds_low_bit=seconds.get("low-bit"),
        operations=2 * y.size * math.prod(taps) * inputs,
        bytes_float=around + _nbytes(kernel),
        bytes_low_bit=around + (low_bit.nbytes_packed if is_qtensor(low_bit) else _nbytes(kernel)),
    )


def _nbytes(array: Any) -> int:
    return array.size * array.dtype.itemsize


def _time_step(pipe: Pipeline, quantized: Pipeline, batch: int, rounds: int) -> dict[str, float]:
    x, t, labels = _inputs(pipe, batch)
    classes = None if labels is None else np.asarray(labels)
    return interleaved(
        {
            "float": lambda: pipe.predict(x, t, classes),
            "low-bit": lambda: quantized.predict(x, t, classes, row=_first_row(quantized)),
        },
        rounds=rounds,
    )


def _first_row(pipe: Pipeline) -> Any:
    table = pipe.step_table
    return table.row(0) if table is not None and table.entries else None


def what_runs(call: LayerCall, kernel: Any, x: Array) -> str:
    """Implementation and arithmetic of a layer in words, from its traced program."""
    if not is_qtensor(kernel):
        return "float"
    found: dict[str, int] = {}
    for equation in _equations(jax.make_jaxpr(call.run)(x, kernel).jaxpr):
        name = equation.primitive.name
        if name in ("pallas_call", "mpmd_map", "core_map"):  # the last two of GPUs
            return f"pallas kernel, {'float' if kernel.act is None else 'int8'}"
        if name in ("dot_general", "conv_general_dilated"):
            whole = all(v.aval.dtype == jnp.int8 for v in equation.invars)
            key = f"{'int8' if whole else 'float'} {'matmul' if name[0] == 'd' else 'convolution'}"
            found[key] = found.get(key, 0) + 1
    taps = math.prod(call.shape[:2]) if call.kind == "conv" else 1
    if "int8 matmul" in found:
        per_tap = taps > 1 and found["int8 matmul"] % taps == 0
        where = " per tap" if per_tap else " of patches" if taps > 1 else ""
        return f"xla, int8 matmul{where}"
    return f"xla, {' and '.join(sorted(found)) or 'no matmul'} on unpacked weights"


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def dequantized(pipe: Pipeline) -> Pipeline:
    """The float pipeline that a quantized one stands for."""
    from qjax.core.quantize import dequantize

    params: Params = dequantize(pipe.params)
    floats = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return pipe.replace(params=floats, step_table=None, method=None, quant=None)
